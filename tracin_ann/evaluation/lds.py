"""The linear datamodeling score (LDS): the rank correlation of predicted and retrained losses.

A score predicts the loss of a query after training on a subset by the sum of the scores of the rows in it. The LDS of a
query is the Spearman correlation, over the subsets, of this sum and the negative loss of models that were trained on
the subset (Park et al. 2023, "TRAK: Attributing Model Behavior at Scale", definition 2.3).

Shapes: N training rows, Q queries, M subsets, S seeds, R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tracin_ann.errors import UsageError, problem
from tracin_ann.packages import import_scipy_stats
from tracin_ann.types import Float32, Float64, Int64

RESAMPLES = 1000
_LEVEL = 0.95
_LEAST_SUBSETS = 3


@dataclass(frozen=True, eq=False)
class DatamodelingScore:
    """The linear datamodeling score of one attribution score.

    Attributes:
        mean: the mean over the queries.
        interval: its 95% bootstrap interval over subsets and queries.
        lds_Q: the LDS of each query, float64 [Q]; 0 where predictions or losses are the same for all subsets.
        resampled_R: the means of the bootstrap resamples, float64 [R]. Scores that were evaluated on the same losses
            have the same resamples, so the differences of their means are paired.
    """

    mean: float
    interval: tuple[float, float]
    lds_Q: Float64
    resampled_R: Float64

    def compare(self, other: DatamodelingScore) -> tuple[float, float]:
        """Return the 95% interval of the difference `self.mean - other.mean` on the same subsets and queries."""
        return _interval(self.resampled_R - other.resampled_R)


def compute_lds(
    score_QN: Float32 | Float64, subsets: Sequence[Int64], loss_MSQ: Float64, resamples: int = RESAMPLES
) -> DatamodelingScore:
    """Return the linear datamodeling score of attribution scores.

    Args:
        score_QN: scores of all training rows for each query, [Q, N]; a positive score predicts a lower loss.
        subsets: M arrays of training rows.
        loss_MSQ: losses of the queries after training on each subset with each seed, [M, S, Q]; or their means [M, Q].
        resamples: number of bootstrap resamples, R.

    Raises:
        UsageError: there are fewer than 3 subsets, or the shapes do not match.
        NonFiniteError: a score is NaN or infinite.
        MissingPackageError: SciPy is not installed.
    """
    loss_MQ = loss_MSQ.mean(axis=1) if loss_MSQ.ndim == 3 else loss_MSQ  # noqa: PLR2004
    return correlate_predictions(sum_scores(score_QN, subsets), loss_MQ, resamples)


def sum_scores(score_QN: Float32 | Float64, subsets: Sequence[Int64]) -> Float64:
    """Return the sum of the scores of each subset's rows for each query, float64 [M, Q]."""
    return np.stack([score_QN[:, rows].sum(axis=1, dtype=np.float64) for rows in subsets])


def correlate_predictions(predicted_MQ: Float64, loss_MQ: Float64, resamples: int = RESAMPLES) -> DatamodelingScore:
    """Return the linear datamodeling score of predictions [M, Q]; a larger one predicts a lower loss [M, Q].

    Raises:
        UsageError: there are fewer than 3 subsets, the shapes differ, or a value is NaN or infinite.
        MissingPackageError: SciPy is not installed.
    """
    if predicted_MQ.shape != loss_MQ.shape or len(loss_MQ) < _LEAST_SUBSETS:
        raise UsageError(
            problem(
                "no correlation over subsets",
                got=f"predictions {list(predicted_MQ.shape)} and losses {list(loss_MQ.shape)}",
                expected=f"the same [subsets, queries], at least {_LEAST_SUBSETS} subsets",
                remedy="use more subsets",
            )
        )
    for name, values in (("predictions", predicted_MQ), ("losses", loss_MQ)):
        if not np.isfinite(values).all():
            raise UsageError(
                problem(
                    f"{name} cannot be ranked",
                    got="NaN or infinity",
                    expected="finite numbers",
                    remedy="leave out the query",
                )
            )
    stats = import_scipy_stats()

    def mean_lds(chosen_M: Int64, *chosen_Q: Int64) -> float:
        columns = chosen_Q[0] if chosen_Q else slice(None)
        pair = (predicted_MQ[chosen_M][:, columns], -loss_MQ[chosen_M][:, columns])
        return float(_correlate_ranks(*(stats.rankdata(values, axis=0) for values in pair)).mean())

    # Subsets and queries are resampled independently of each other; a single query is not resampled.
    found = stats.bootstrap(
        [np.arange(n) for n in loss_MQ.shape if n > 1],
        mean_lds,
        n_resamples=resamples,
        vectorized=False,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    lds_Q = _correlate_ranks(stats.rankdata(predicted_MQ, axis=0), stats.rankdata(-loss_MQ, axis=0))
    resampled_R = np.asarray(found.bootstrap_distribution)
    return DatamodelingScore(float(lds_Q.mean()), _interval(resampled_R), lds_Q, resampled_R)


def compute_ceiling(loss_MSQ: Float64) -> float | None:
    """Return the LDS that exact predictions of the expected losses would have: √reliability of the mean over the seeds.

    The reliability of one seed is the Spearman correlation of the losses of two seeds, over subsets, averaged over
    pairs of seeds and queries; that of the mean of S seeds follows from the Spearman–Brown formula S·r / (1 + (S-1)·r).

    Args:
        loss_MSQ: losses, [M, S, Q].

    Returns:
        the ceiling, or None if there is one seed only.

    Raises:
        MissingPackageError: SciPy is not installed.
    """
    n_seeds = loss_MSQ.shape[1]
    if n_seeds == 1:
        return None
    rank_MSQ = import_scipy_stats().rankdata(loss_MSQ, axis=0)
    pairs = [(s, t) for s in range(n_seeds) for t in range(s)]
    r = max(0.0, np.mean([_correlate_ranks(rank_MSQ[:, s], rank_MSQ[:, t]).mean() for s, t in pairs]))
    return float(np.sqrt(n_seeds * r / (1 + (n_seeds - 1) * r)))


def _correlate_ranks(rank_MQ: Float64, other_MQ: Float64) -> Float64:
    """Return the Pearson correlation of each column, float64 [Q]; 0 for a constant one."""
    one_MQ, other_MQ = rank_MQ - rank_MQ.mean(axis=0), other_MQ - other_MQ.mean(axis=0)
    norm_Q = np.linalg.norm(one_MQ, axis=0) * np.linalg.norm(other_MQ, axis=0)
    product_Q = (one_MQ * other_MQ).sum(axis=0)
    found_Q: Float64 = np.divide(product_Q, norm_Q, out=np.zeros_like(product_Q), where=norm_Q > 0)
    return found_Q


def _interval(value_R: Float64) -> tuple[float, float]:
    low, high = np.quantile(value_R, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return float(low), float(high)
