"""The distribution of the calibration queries (norms, cosines with centroids), and tests of new queries against it.

The measured recall of an index may not hold for queries from another distribution.

Shapes: Q queries, F feature dimension.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tracin_ann.search.ivf import IVFIndex
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
        cosine: quantiles of the largest |cosine| with the center of a group of lists.
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

    def find_outliers(self, index: IVFIndex, queries_QF: Float32) -> npt.NDArray[np.bool_]:
        """Return which queries are far outside the range of the calibration queries, bool [Q]."""
        outlier_Q = np.zeros(len(queries_QF), dtype=bool)
        for values_Q, quantiles in zip(_measure(index, queries_QF), (self.log_norm, self.cosine), strict=True):
            low, high = quantiles[0], quantiles[-1]
            margin = _MARGIN * (high - low)
            outlier_Q |= (values_Q < low - margin) | (values_Q > high + margin)
        return outlier_Q

    def is_shifted(self, index: IVFIndex, queries_QF: Float32) -> bool:
        """Return whether the queries have another distribution (Kolmogorov-Smirnov test, level 0.001).

        False for fewer than 20 queries.
        """
        n = len(queries_QF)
        if n < _MIN_QUERIES:
            return False
        limit = _KS_FACTOR * math.sqrt((n + self.samples[0]) / (n * self.samples[0])) + 1 / _QUANTILES
        measures = zip(_measure(index, queries_QF), (self.log_norm, self.cosine), strict=True)
        return any(_ks_distance(values_Q, quantiles) > limit for values_Q, quantiles in measures)


def measure_queries(index: IVFIndex, queries_QF: Float32) -> QueryDistribution:
    """Return the distribution of queries, measured with the centroids of an index."""
    at = np.linspace(0, 1, _QUANTILES)
    log_norm, cosine = (tuple(np.quantile(v, at).tolist()) for v in _measure(index, queries_QF))
    return QueryDistribution(log_norm, cosine, (len(queries_QF),))


def _measure(index: IVFIndex, queries_QF: Float32) -> tuple[Float64, Float64]:
    """Return log10 norms [Q] and largest |cosines| with the center of a group [Q]."""
    norm_Q = np.linalg.norm(queries_QF.astype(np.float64), axis=1)
    smallest = np.finfo(np.float64).tiny
    return np.log10(np.maximum(norm_Q, smallest)), index.nearness(queries_QF)


def _ks_distance(values_Q: Float64, quantiles: tuple[float, ...]) -> float:
    """Return the Kolmogorov-Smirnov distance of the values to the distribution with these quantiles."""
    values = np.sort(values_Q)
    at = np.linspace(0, 1, len(quantiles))
    expected = np.interp(values, quantiles, at, left=0.0, right=1.0)
    steps = np.arange(len(values) + 1) / len(values)
    return float(max(np.abs(expected - steps[1:]).max(), np.abs(expected - steps[:-1]).max()))
