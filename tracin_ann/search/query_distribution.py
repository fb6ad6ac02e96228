"""Whether queries look like those that an index's recall was measured on: their norms, and how near centroids they lie.

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
"""How far outside the range of all queries measured, in shares of that range, a query may still lie."""
_KS_FACTOR = 1.95
"""Kolmogorov-Smirnov's factor at a level of 0.001 (two samples)."""
_MIN_QUERIES = 20


@dataclass(frozen=True)
class QueryDistribution:
    """Quantiles, 0 to 1 in even steps, of the queries' log10 norms and of their largest |cosine| with a centroid.

    `samples` is how many queries there were, as a tuple of one.
    """

    log_norm: tuple[float, ...]
    cosine: tuple[float, ...]
    samples: tuple[int, ...]

    def __post_init__(self) -> None:
        """Refuse what no queries look like.

        Raises:
            ValueError: there are no quantiles, or there was no query.
        """
        if not self.log_norm or not self.cosine or len(self.samples) != 1 or self.samples[0] < 1:
            raise ValueError("quantiles of no queries")

    def strange(self, index: IVFIndex, queries_QF: Float32) -> npt.NDArray[np.bool_]:
        """Return which queries [Q] lie well outside what was measured."""
        strange_Q = np.zeros(len(queries_QF), dtype=bool)
        for values_Q, quantiles in zip(_measure(index, queries_QF), (self.log_norm, self.cosine), strict=True):
            low, high = quantiles[0], quantiles[-1]
            aside = _MARGIN * (high - low)
            strange_Q |= (values_Q < low - aside) | (values_Q > high + aside)
        return strange_Q

    def is_shifted(self, index: IVFIndex, queries_QF: Float32) -> bool:
        """Return whether a set of queries, 20 or more, is drawn from elsewhere (Kolmogorov-Smirnov, level 0.001)."""
        n = len(queries_QF)
        if n < _MIN_QUERIES:
            return False
        limit = _KS_FACTOR * math.sqrt((n + self.samples[0]) / (n * self.samples[0])) + 1 / _QUANTILES
        measures = zip(_measure(index, queries_QF), (self.log_norm, self.cosine), strict=True)
        return any(_ks_distance(values_Q, quantiles) > limit for values_Q, quantiles in measures)


def measure_queries(index: IVFIndex, queries_QF: Float32) -> QueryDistribution:
    """Return what queries look like to an index."""
    at = np.linspace(0, 1, _QUANTILES)
    log_norm, cosine = (tuple(np.quantile(v, at).tolist()) for v in _measure(index, queries_QF))
    return QueryDistribution(log_norm, cosine, (len(queries_QF),))


def _measure(index: IVFIndex, queries_QF: Float32) -> tuple[Float64, Float64]:
    norm_Q = np.linalg.norm(queries_QF.astype(np.float64), axis=1)
    smallest = np.finfo(np.float64).tiny
    return np.log10(np.maximum(norm_Q, smallest)), index.nearness(queries_QF)


def _ks_distance(values_Q: Float64, quantiles: tuple[float, ...]) -> float:
    """Return the largest difference between the distribution of values and the one of these quantiles."""
    values = np.sort(values_Q)
    at = np.linspace(0, 1, len(quantiles))
    expected = np.interp(values, quantiles, at, left=0.0, right=1.0)
    steps = np.arange(len(values) + 1) / len(values)
    return float(max(np.abs(expected - steps[1:]).max(), np.abs(expected - steps[:-1]).max()))
