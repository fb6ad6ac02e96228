"""TracInIdeal: the change of queries' losses at every step of a small run, summed by the training row of the step.

On steps of one row, the influence of z on z' is the sum, over the steps that use z, of the fall of the loss of z'
(Pruthi et al. 2020, "Estimating Training Data Influence by Tracing Gradient Descent", section 3.1). The sum over all
rows is the whole fall of the loss. A step on a batch is the sum of the steps of its rows, with gradients at the same
weights: these are applied one after the other, so the equality holds for batches too. The influence of a row then
depends on its place in the batch by terms of second order in the learning rate.

Shapes: N training rows, Q queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tracin_ann.errors import UsageError, problem
from tracin_ann.evaluation.estimates import Estimate, correlate
from tracin_ann.evaluation.stepping import SteppedModel, open_model
from tracin_ann.features import TaskRunner
from tracin_ann.files import atomic_path, make_directory
from tracin_ann.task import Checkpoint
from tracin_ann.types import Float32, Float64, Int64, ProgressCallback, ignore_progress


@dataclass(frozen=True, eq=False)
class Trace:
    """The influence of training rows on queries in a traced run.

    Attributes:
        fall_QN: the fall of the query's loss by all steps on the row, float64 [Q, N]; 0 for rows that were not visited.
        visit_N: the number of visits of each row, int64 [N].
        first_Q: losses before the first step, float64 [Q].
        last_Q: losses after the last step, float64 [Q].
        checkpoints: weights along the run, for an index of it; each has the learning rate with which TracInCP estimates
            `fall_QN`. Empty without a folder.
    """

    fall_QN: Float64
    visit_N: Int64
    first_Q: Float64
    last_Q: Float64
    checkpoints: tuple[Checkpoint, ...] = ()

    def correlate(self, score_QN: Float32 | Float64) -> Estimate:
        """Return the mean Spearman correlation over the visited rows of scores [Q, N] and these influences.

        Raises:
            UsageError: fewer than 3 rows were visited, or the shapes differ.
            MissingPackageError: SciPy is not installed.
        """
        visited = self.visit_N > 0
        return correlate(score_QN[:, visited].T.astype(np.float64), self.fall_QN[:, visited].T)


@dataclass(frozen=True)
class TracedRun:
    """A run of plain SGD to trace.

    Attributes:
        batches: the training rows of each step, in order.
        learning_rate: η of every step; a step subtracts η times the mean gradient of its rows.
        start: the checkpoint that the run starts from; None: the weights that `Task.model` returns.
        folder: for checkpoints of the run; None: none are written.
        every: steps from one checkpoint to the next; the first is written before the first step.
    """

    batches: Sequence[Sequence[int]]
    learning_rate: float
    start: Checkpoint | None = None
    folder: Path | None = None
    every: int = 1

    def __post_init__(self) -> None:
        """Reject a run without steps, and values out of range.

        Raises:
            UsageError: naming the value.
        """
        for what, got, is_bad in (
            ("batches", "none, or an empty one", not self.batches or not all(map(len, self.batches))),
            ("learning_rate", self.learning_rate, not 0 < self.learning_rate < np.inf),
            ("every", self.every, self.every < 1),
        ):
            if is_bad:
                expected = "rows for each step" if what == "batches" else "a positive number"
                raise UsageError(problem(f"bad {what}", got=got, expected=expected, remedy=f"change {what}"))


def trace(
    runner: TaskRunner, query_ids: Sequence[int], run: TracedRun, progress: ProgressCallback | None = None
) -> Trace:
    """Run SGD and return how much each training row lowered the loss of each query.

    The model is in eval mode: there is no dropout, and batch norm uses its running statistics. Only parameters that the
    task selects are trained. Each visit of a row needs a forward pass of all queries.

    Args:
        runner: the task's data and model, such as `InfluenceIndex.runner`.
        query_ids: positions in query_data.
        run: the steps.
        progress: called with ("steps", done, total).

    Raises:
        UsageError: an id is out of range.
        CheckpointError: the start cannot be loaded.
    """
    report, n_rows = progress or ignore_progress, runner.n_rows("train")
    runner.check_ids("query", query_ids)
    runner.check_ids("train", sorted({row for batch in run.batches for row in batch}))
    fall_NQ, visit_N = np.zeros((n_rows, len(query_ids))), np.zeros(n_rows, np.int64)
    checkpoints: list[Checkpoint] = []
    with open_model(runner, run.start) as model:
        names = list(model.copy_weights())
        first_Q = loss_Q = model.query_losses(query_ids)
        for step, batch in enumerate(run.batches):
            if run.folder is not None and step % run.every == 0:
                n_steps = min(run.every, len(run.batches) - step)
                checkpoints.append(_save(model, run.folder, step, run.learning_rate * n_steps / n_rows))
            rates = dict.fromkeys(names, run.learning_rate / len(batch))
            gradients = [model.gradients(row) for row in batch]
            for row, gradient in zip(batch, gradients, strict=True):
                model.step(gradient, rates)
                before_Q, loss_Q = loss_Q, model.query_losses(query_ids)
                fall_NQ[row] += before_Q - loss_Q
                visit_N[row] += 1
            report("steps", step + 1, len(run.batches))
    return Trace(fall_NQ.T, visit_N, first_Q, loss_Q, tuple(checkpoints))


def _save(model: SteppedModel, folder: Path, step: int, rate: float) -> Checkpoint:
    """Write the weights before a step; `rate` is the sum of η / batch over the visits that a row has on average."""
    make_directory(folder)
    path = folder / f"step{step}.pt"
    with atomic_path(path) as temporary:
        torch.save(model.state(), temporary)
    return Checkpoint(path, rate)
