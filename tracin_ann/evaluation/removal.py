"""Removal and retraining: the change of a query's loss when its top proponents are left out of training.

Shapes: N training rows, Q queries, K rows removed for each query, S seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tracin_ann.errors import UsageError, problem
from tracin_ann.evaluation.estimates import Estimate, estimate_mean
from tracin_ann.evaluation.retraining import Retraining
from tracin_ann.types import Float32, Float64, Int64, ProgressCallback

_HALF = math.log(2)
"""The loss -log p of a label with probability 1/2."""


@dataclass(frozen=True, eq=False)
class Removal:
    """Losses of queries without and with removal, averaged over the seeds.

    Attributes:
        before_Q: after training on all rows, float64 [Q].
        after_Q: after training without the rows of the query, float64 [Q].
    """

    before_Q: Float64
    after_Q: Float64

    @property
    def rise(self) -> Estimate:
        """Return the mean rise of the loss, with its interval over the queries."""
        return estimate_mean(self.after_Q - self.before_Q)

    @property
    def n_overturned(self) -> int:
        """Return how many queries had a label of probability 1/2 or more before, and have less after the removal.

        It has a meaning only if the loss is -log p of one label.
        """
        return int(((self.before_Q <= _HALF) & (self.after_Q > _HALF)).sum())


def measure_removal(
    retraining: Retraining,
    row_N: Int64,
    row_QK: Int64,
    seeds: Sequence[int],
    progress: ProgressCallback | None = None,
) -> Removal:
    """Retrain without the rows of each query, and return its losses before and after.

    Queries with the same rows share a model.

    Args:
        retraining: an open folder of losses; its queries are those of `row_QK`.
        row_N: all rows that the model is trained on.
        row_QK: the rows to remove for each query, [Q, K].
        seeds: S seeds of `Task.retrain`.
        progress: called with ("retrained models", done, total).

    Raises:
        UsageError: the number of queries differs, or no row is left.
        TaskError: a model is missing and the task has no `retrain`; see `Retraining.measure`.
    """
    remaining = [np.setdiff1d(row_N, rows) for rows in row_QK]
    if len(row_QK) != len(retraining.query_ids) or not all(map(len, remaining)):
        raise UsageError(
            problem(
                "these rows cannot be removed",
                got=f"{row_QK.shape[1]} rows for each of {len(row_QK)} queries",
                expected=f"fewer than {len(row_N)} rows for each of {len(retraining.query_ids)} queries",
                remedy="change the rows",
            )
        )
    loss_MSQ = retraining.measure([row_N, *remaining], seeds, progress)
    places = np.arange(len(row_QK))
    return Removal(loss_MSQ[0].mean(axis=0), loss_MSQ[1 + places, :, places].mean(axis=1))


def find_top_rows(score_QN: Float32 | Float64, row_N: Int64, k: int) -> Int64:
    """Return the k rows among `row_N` with the highest scores for each query, best first, int64 [Q, K]."""
    order_QK = np.argsort(-score_QN[:, row_N], axis=1, kind="stable")[:, :k]
    found_QK: Int64 = row_N[order_QK]
    return found_QK


def draw_random_rows(row_N: Int64, k: int, n_queries: int, seed: int = 0) -> Int64:
    """Return k random rows among `row_N`, the same for each query, int64 [Q, K].

    Queries with the same rows share retrained models.
    """
    chosen_K = np.random.Generator(np.random.Philox(seed)).choice(row_N, k, replace=False)
    return np.tile(chosen_K, (n_queries, 1))
