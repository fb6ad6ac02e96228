"""Means over queries with bootstrap intervals, and the rank correlation of each query.

Shapes: Q queries, M subsets or rows that are ranked, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from tracin_ann.errors import UsageError, problem
from tracin_ann.packages import import_scipy_stats
from tracin_ann.types import Float64, Int64

RESAMPLES = 1000
_LEVEL = 0.95
_LEAST_RANKS = 3


@dataclass(frozen=True, eq=False)
class Estimate:
    """A mean over queries with its bootstrap interval.

    Attributes:
        mean: the mean.
        interval: its 95% interval.
        value_Q: the value of each query, float64 [Q].
        resampled_R: the means of the bootstrap resamples, float64 [R], shifted so that their mean is `mean`: a resample
            has fewer distinct values, which lowers rank correlations. Estimates with as many queries and subsets have
            the same resamples, so the differences of their means are paired.
    """

    mean: float
    interval: tuple[float, float]
    value_Q: Float64
    resampled_R: Float64

    @classmethod
    def make(cls, value_Q: Float64, resampled_R: Float64) -> Estimate:
        """Return the estimate with these means of resamples, which are not shifted yet."""
        mean = float(value_Q.mean())
        shifted_R = resampled_R + (mean - resampled_R.mean())
        return cls(mean, _find_interval(shifted_R), value_Q, shifted_R)

    def compare(self, other: Estimate) -> tuple[float, float]:
        """Return the 95% interval of the difference `self.mean - other.mean` on the same queries and subsets."""
        return _find_interval(self.resampled_R - other.resampled_R)


def estimate_mean(value_Q: Float64, resamples: int = RESAMPLES) -> Estimate:
    """Return the mean of values with its interval over the queries.

    Raises:
        MissingPackageError: SciPy is not installed.
    """
    resampled_R = _resample((len(value_Q),), lambda chosen_Q: float(value_Q[chosen_Q].mean()), resamples)
    return Estimate.make(value_Q, resampled_R)


def correlate(predicted_MQ: Float64, true_MQ: Float64, resamples: int = RESAMPLES) -> Estimate:
    """Return the mean Spearman correlation of predictions and truth, with its interval over M and Q.

    The correlation of a query is 0 if its predictions, or its true values, are all the same.

    Args:
        predicted_MQ: predictions, [M, Q].
        true_MQ: true values, [M, Q].
        resamples: number of bootstrap resamples, R.

    Raises:
        UsageError: there are fewer than 3 values of a query, the shapes differ, or a value is NaN or infinite.
        MissingPackageError: SciPy is not installed.
    """
    if predicted_MQ.shape != true_MQ.shape or len(true_MQ) < _LEAST_RANKS:
        raise UsageError(
            problem(
                "no rank correlation",
                got=f"predictions {list(predicted_MQ.shape)} and true values {list(true_MQ.shape)}",
                expected=f"the same [values, queries], at least {_LEAST_RANKS} values",
                remedy="use more subsets",
            )
        )
    if not np.isfinite(predicted_MQ).all() or not np.isfinite(true_MQ).all():
        what, remedy = "values cannot be ranked", "leave out the query"
        raise UsageError(problem(what, got="NaN or infinity", expected="finite numbers", remedy=remedy))
    rankdata = import_scipy_stats().rankdata

    def mean_correlation(chosen_M: Int64, *chosen_Q: Int64) -> float:
        columns = chosen_Q[0] if chosen_Q else slice(None)
        pair = (values[chosen_M][:, columns] for values in (predicted_MQ, true_MQ))
        return float(correlate_ranks(*(rankdata(values, axis=0) for values in pair)).mean())

    # Values and queries are resampled independently of each other.
    resampled_R = _resample(true_MQ.shape, mean_correlation, resamples)
    value_Q = correlate_ranks(rankdata(predicted_MQ, axis=0), rankdata(true_MQ, axis=0))
    found = Estimate.make(value_Q, resampled_R)
    low, high = found.interval
    # The shift of the resamples may leave the range of a correlation.
    return replace(found, interval=(max(low, -1.0), min(high, 1.0)))


def correlate_ranks(rank_MQ: Float64, other_MQ: Float64) -> Float64:
    """Return the Pearson correlation of each column, float64 [Q]; 0 for a constant one."""
    one_MQ, other_MQ = rank_MQ - rank_MQ.mean(axis=0), other_MQ - other_MQ.mean(axis=0)
    norm_Q = np.linalg.norm(one_MQ, axis=0) * np.linalg.norm(other_MQ, axis=0)
    product_Q = (one_MQ * other_MQ).sum(axis=0)
    found_Q: Float64 = np.divide(product_Q, norm_Q, out=np.zeros_like(product_Q), where=norm_Q > 0)
    return found_Q


def _resample(sizes: tuple[int, ...], statistic: Callable[..., float], resamples: int) -> Float64:
    """Return the statistic of bootstrap resamples of positions below each size; a size of 1 is not resampled."""
    samples = [np.arange(size) for size in sizes if size > 1]
    if not samples:
        return np.full(resamples, statistic(np.zeros(1, np.int64)))
    found = import_scipy_stats().bootstrap(
        samples,
        statistic,
        n_resamples=resamples,
        vectorized=False,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    resampled_R: Float64 = np.asarray(found.bootstrap_distribution)
    return resampled_R


def _find_interval(value_R: Float64) -> tuple[float, float]:
    low, high = np.quantile(value_R, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return float(low), float(high)
