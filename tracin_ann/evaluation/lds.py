"""The linear datamodeling score (LDS): the rank correlation of predicted and retrained losses.

A score predicts the loss of a query after training on a subset by the sum of the scores of the rows in it. The LDS of a
query is the Spearman correlation, over the subsets, of this sum and the negative loss of models that were trained on
the subset (Park et al. 2023, "TRAK: Attributing Model Behavior at Scale", definition 2.3).

Shapes: N training rows, Q queries, M subsets, S seeds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tracin_ann.evaluation.estimates import RESAMPLES, Estimate, correlate, correlate_ranks
from tracin_ann.packages import import_scipy_stats
from tracin_ann.types import Float32, Float64, Int64


def compute_lds(
    score_QN: Float32 | Float64, subsets: Sequence[Int64], loss_MSQ: Float64, resamples: int = RESAMPLES
) -> Estimate:
    """Return the linear datamodeling score of attribution scores, with its interval over subsets and queries.

    Args:
        score_QN: scores of all training rows for each query, [Q, N]; a positive score predicts a lower loss.
        subsets: M arrays of training rows.
        loss_MSQ: losses of the queries after training on each subset with each seed, [M, S, Q]; or their means [M, Q].
        resamples: number of bootstrap resamples.

    Raises:
        UsageError: there are fewer than 3 subsets, the shapes do not match, or a value is NaN or infinite.
        MissingPackageError: SciPy is not installed.
    """
    loss_MQ = loss_MSQ.mean(axis=1) if loss_MSQ.ndim == 3 else loss_MSQ  # noqa: PLR2004
    return correlate(sum_scores(score_QN, subsets), -loss_MQ, resamples)


def sum_scores(score_QN: Float32 | Float64, subsets: Sequence[Int64]) -> Float64:
    """Return the sum of the scores of each subset's rows for each query, float64 [M, Q]."""
    return np.stack([score_QN[:, rows].sum(axis=1, dtype=np.float64) for rows in subsets])


def compute_ceiling(loss_MSQ: Float64) -> float | None:
    """Return the LDS that exact predictions of the expected losses would have: √reliability of the mean over the seeds.

    The reliability r of one seed is the Spearman correlation of the losses of two seeds, over subsets, averaged over
    pairs of seeds and queries; that of the mean of S seeds is S·r / (1 + (S-1)·r), the Spearman-Brown formula.

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
    r = max(0.0, np.mean([correlate_ranks(rank_MSQ[:, s], rank_MSQ[:, t]).mean() for s, t in pairs]))
    return float(np.sqrt(n_seeds * r / (1 + (n_seeds - 1) * r)))
