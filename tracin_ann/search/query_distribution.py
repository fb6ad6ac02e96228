"""The distribution of the calibration queries (norms, cosines with centroids), and tests of new queries against it.

The measured recall of an index may not hold for queries from another distribution.

Shapes: Q queries, F feature dimension.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tracin_ann.search.base import CalibratedIndex
from tracin_ann.types import Float32, Float64

_QUANTILES = 101
_MARGIN = 0.25
"""A query is an outlier if it is outside the range of the calibration queries by more than this share of the range."""
_KS_FACTOR = 1.95
"""Factor of the two-sample Kolmogorov-Smirnov test at level 0.001."""
_MIN_QUERIES = 20


@dataclass(frozen=True)
class QueryDistribution:
    """Quantiles of queries, from 0 to 1 in equal steps.

    Attributes:
        log_norm: quantiles of the log10 norms.
        cosine: quantiles of the statistic of directions that `CalibratedIndex.measure` returns: for lists, the largest
            |cosine| with the center of a group.
        samples: number of queries, as a tuple with one element.
    """

    log_norm: tuple[float, ...]
    cosine: tuple[float, ...]
    samples: tuple[int, ...]

    def __post_init__(self) -> None:
        """Check the quantiles.

        Raises:
            ValueError: there are no quantiles or no queries.
        """
        if not self.log_norm or not self.cosine or len(self.samples) != 1 or self.samples[0] < 1:
            raise ValueError("quantiles of no queries")

    def compare(self, index: CalibratedIndex, queries_QF: Float32) -> Comparison:
        """Return which queries are outliers, and whether the queries together have another distribution."""
        measured = list(zip(_measure(index, queries_QF), (self.log_norm, self.cosine), strict=True))
        return Comparison(
            np.logical_or.reduce([_find_outliers(values_Q, quantiles) for values_Q, quantiles in measured]),
            self._is_shifted(measured),
        )

    def _is_shifted(self, measured: Sequence[tuple[Float64, tuple[float, ...]]]) -> bool:
        n = len(measured[0][0])
        if n < _MIN_QUERIES:
            return False
        limit = _KS_FACTOR * math.sqrt((n + self.samples[0]) / (n * self.samples[0])) + 1 / _QUANTILES
        return any(_ks_distance(values_Q, quantiles) > limit for values_Q, quantiles in measured)


@dataclass(frozen=True)
class Comparison:
    """The comparison of queries with calibration queries.

    Attributes:
        outlier_Q: which queries are far outside the range of the calibration queries, bool [Q].
        is_shifted: whether the queries have another distribution (Kolmogorov-Smirnov test, level 0.001); False for
            fewer than 20 queries.
    """

    outlier_Q: npt.NDArray[np.bool_]
    is_shifted: bool


def measure_queries(index: CalibratedIndex, queries_QF: Float32) -> QueryDistribution:
    """Return the distribution of queries, measured with the centroids of an index."""
    at = np.linspace(0, 1, _QUANTILES)
    log_norm, cosine = (tuple(np.quantile(v, at).tolist()) for v in _measure(index, queries_QF))
    return QueryDistribution(log_norm, cosine, (len(queries_QF),))


def _measure(index: CalibratedIndex, queries_QF: Float32) -> tuple[Float64, Float64]:
    """Return log10 norms [Q] and largest |cosines| with the center of a group [Q]."""
    norm_Q, cosine_Q = index.measure(queries_QF)
    return np.log10(np.maximum(norm_Q, np.finfo(np.float64).tiny)), cosine_Q


def _find_outliers(values_Q: Float64, quantiles: tuple[float, ...]) -> npt.NDArray[np.bool_]:
    low, high = quantiles[0], quantiles[-1]
    margin = _MARGIN * (high - low)
    outlier_Q: npt.NDArray[np.bool_] = (values_Q < low - margin) | (values_Q > high + margin)
    return outlier_Q


def _ks_distance(values_Q: Float64, quantiles: tuple[float, ...]) -> float:
    """Return the Kolmogorov-Smirnov distance of the values to the distribution with these quantiles."""
    values = np.sort(values_Q)
    at = np.linspace(0, 1, len(quantiles))
    expected = np.interp(values, quantiles, at, left=0.0, right=1.0)
    steps = np.arange(len(values) + 1) / len(values)
    return float(max(np.abs(expected - steps[1:]).max(), np.abs(expected - steps[:-1]).max()))
