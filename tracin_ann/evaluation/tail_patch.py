"""Tail patch: the fall of a query's loss after one gradient step on one of its proponents.

The score of a good proponent predicts that a step on it, from the last checkpoint, lowers the loss of the query (Chang
et al. 2024, "Scalable Influence and Fact Tracing for Large Language Model Pretraining"). No model is
retrained.

Shapes: Q queries, K proponents of each.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tracin_ann.evaluation.stepping import open_model
from tracin_ann.features import TaskRunner
from tracin_ann.types import Float64, Int64, ProgressCallback, ignore_progress


def measure_tail_patch(
    runner: TaskRunner,
    query_ids: Sequence[int],
    row_QK: Int64,
    checkpoint: int | None = None,
    progress: ProgressCallback | None = None,
) -> Float64:
    """Return how much the loss of each query falls by one step of plain SGD on each of its rows alone.

    The step has the learning rates of the checkpoint, and changes the parameters that the task selects. A positive
    value is a lower loss.

    Args:
        runner: the task's data and model, such as `InfluenceIndex.runner`.
        query_ids: positions in query_data, Q.
        row_QK: training rows of each query, [Q, K].
        checkpoint: position of the checkpoint; None: the last one with a learning rate above 0.
        progress: called with ("steps", done, total).

    Returns:
        the falls, float64 [Q, K].

    Raises:
        UsageError: an id is out of range.
        CheckpointError: the checkpoint is unreadable or does not match the model.
    """
    report, fall_QK = progress or ignore_progress, np.empty(row_QK.shape)
    runner.check_ids("query", query_ids)
    checkpoints = runner.task.checkpoints
    # A schedule that decays to 0 leaves the last checkpoint without a step.
    last = max(place for place, each in enumerate(checkpoints) if each.largest_rate > 0)
    given = checkpoints[last if checkpoint is None else checkpoint]
    with open_model(runner, given) as model:
        before_Q, weights = model.query_losses(query_ids), model.copy_weights()
        rates = given.rates_of(weights)
        rows = np.unique(row_QK)
        for done, row in enumerate(rows.tolist(), start=1):
            model.step(model.gradients(row), rates)
            at_q, at_k = np.nonzero(row_QK == row)
            fall_QK[at_q, at_k] = before_Q[at_q] - model.query_losses([query_ids[q] for q in at_q.tolist()])
            model.set_weights(weights)
            report("steps", done, len(rows))
    return fall_QK
