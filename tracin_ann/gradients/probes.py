"""Checks of the first batch: its rows, the task's descriptions, and its losses and gradients."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from tracin_ann.errors import TaskError, first_line, problem
from tracin_ann.gradients.engine import Batch, GradientEngine
from tracin_ann.gradients.proof import check_finite
from tracin_ann.task import EXAMPLES, Task, encode_content

_ROWS_READ_TWICE = 16
# Rows whose losses and gradients are compared with those of each row alone.
_ROWS_ALONE = 3
# Relative tolerances of one loss computed twice, and of a loss and a gradient alone and in the batch.
_SAME_LOSS = 1e-5
_MIXED_LOSS = 1e-3
_MIXED_GRADIENT = 2e-2
# In half precision, tolerances are multiplied by these factors.
_HALF_LOSS = 50.0
_HALF_GRADIENT = 10.0
logger = logging.getLogger(__name__)


def probe_examples(data: Any, side: str, ids: Sequence[int], collate: Callable[[list[Any]], Any]) -> None:
    """Check that rows do not change when they are read twice; log the types that cannot be compared.

    Args:
        data: the data set of the side.
        side: `train` or `query`.
        ids: the rows of the first batch.
        collate: converts rows whose objects cannot be compared.

    Raises:
        TaskError: two readings of a row differ.
    """
    unknown: set[str] = set()
    for i in ids[:_ROWS_READ_TWICE]:
        # One after the other: a data set may reuse one object for all rows.
        first = encode_content(data[i], collate)
        second = encode_content(data[i], collate)
        unknown.update(first.unknown)
        if first != second:
            raise TaskError(
                problem(
                    f"rows of {side}_data change when they are read twice",
                    got=f"two different readings of row {i}",
                    expected="the same example each time",
                    remedy="remove random augmentation from the task's data, or pass --allow-random-data",
                )
            )
    if unknown:
        logger.warning(
            "rows of %s_data hold %s, whose content cannot be read: changes between two reads are not detected",
            side,
            ", ".join(sorted(unknown)),
        )


def probe_description(task: Task, example: Any, side: str) -> None:
    """Call the task's `ids` and `describe`, and for training rows `columns`, on the first row of a side.

    Args:
        task: the task.
        example: the first row.
        side: `train` or `query`.

    Raises:
        TaskError: one of them fails.
    """
    functions = {
        "ids": task.id_of,
        "describe": task.describe_example,
        "columns": task.columns if side == "train" else None,
    }
    for name, function in functions.items():
        try:
            if function is not None:
                function(example)
        except TaskError:
            raise
        except Exception as error:
            raise TaskError(
                problem(
                    f"Task.{name} fails on row 0 of {side}_data",
                    got=f"{type(error).__name__}: {error}",
                    expected="a function of one example",
                    remedy=f"correct it, for example {EXAMPLES[name]}",
                )
            ) from error


def probe_losses(engine: GradientEngine, batch: Batch, checkpoint: int) -> Batch:
    """Check the losses: one per example, finite, deterministic, and a function of the example alone.

    Returns:
        The rows of the batch with the largest losses, to verify the gradients.

    Raises:
        TaskError: the loss breaks this contract.
        NonFiniteError: a loss is NaN or infinite.
    """
    loss_B = engine.loss_values(batch)
    check_finite(loss_B, batch.ids, checkpoint)
    chosen = engine.select_rows(batch, loss_B)
    first = loss_B if chosen is batch else engine.loss_values(chosen)
    second = engine.loss_values(chosen)
    scale = max(float(loss_B.abs().mean()) + float(loss_B.abs().max()) * 1e-3, 1e-6)
    if not _is_within(float((first - second).abs().max()), _SAME_LOSS * scale, _HALF_LOSS, engine, chosen):
        raise TaskError(
            problem(
                "the loss is random",
                got="two different losses of one batch",
                expected="the same loss each time",
                remedy="remove operations that draw random numbers in eval mode (functional dropout, sampled noise)",
            )
        )
    if len(batch) > 1:
        for i in range(min(_ROWS_ALONE, len(batch))):
            _compare_alone(engine, batch, i, float(loss_B[i]), _MIXED_LOSS * scale)
    return chosen


def probe_gradients(engine: GradientEngine, batch: Batch) -> None:
    """Check that the gradient of an example does not depend on the other examples of its batch.

    Raises:
        TaskError: the gradients of an example alone and in its batch differ.
    """
    if len(batch) < 2:  # noqa: PLR2004
        return
    few = engine.batch(batch.ids[:_ROWS_ALONE], batch.examples[:_ROWS_ALONE])
    for i in range(len(few)):
        _, alone = engine.compute_alone(few, i)
        _, together = engine.compute_in_batch(few, i)
        error, norm = float((alone - together).norm()), float(together.norm())
        if not _is_within(error - 1e-6, _MIXED_GRADIENT * norm, _HALF_GRADIENT, engine, few):
            got = (
                f"a gradient that differs by {error / max(norm, 1e-300):.2g} of its norm from that of the example alone"
            )
            raise TaskError(_describe_mixed(batch, i, got))


def _compare_alone(engine: GradientEngine, batch: Batch, i: int, together: float, tolerance: float) -> None:
    single = engine.batch(batch.ids[i : i + 1], batch.examples[i : i + 1])
    try:
        alone = float(engine.loss_values(single)[0])
    except (RuntimeError, ValueError, IndexError) as error:
        got = f"an error for the example alone ({first_line(error)})"
        raise TaskError(_describe_mixed(batch, i, got)) from error
    if not _is_within(abs(alone - together), tolerance, _HALF_LOSS, engine, batch):
        got = f"a loss of {together:.6g} in a batch of {len(batch)} examples but {alone:.6g} alone"
        raise TaskError(_describe_mixed(batch, i, got))


def _describe_mixed(batch: Batch, i: int, got: str) -> str:
    return problem(
        "examples of a batch mix in the loss",
        got=f"for row {batch.ids[i]} {got}",
        expected="a loss that is a function of its own example alone",
        remedy="use no batch statistics (batch norm outside eval mode) and no in-batch negatives in Task.loss",
    )


def _is_within(error: float, tolerance: float, half_factor: float, engine: GradientEngine, batch: Batch) -> bool:
    """Return whether an error is at most a tolerance, which is multiplied by a factor in half precision."""
    return error <= tolerance or (error <= half_factor * tolerance and engine.is_half_precision(batch))


def replace_nonfinite(engine: GradientEngine, batch: Batch) -> tuple[Batch, tuple[int, ...]] | None:
    """Return a batch whose rows all have finite losses and gradients, and the positions that were replaced.

    Each row that is not finite is replaced by another row of the batch, so the size and layout of the batch, and with
    them the rounding, stay the same. Return None if no row is finite. This runs one backward per row.
    """
    finite = torch.isfinite(engine.loss_values(batch)).tolist()
    valid = [
        i
        for i, is_finite in enumerate(finite)
        if is_finite and bool(torch.isfinite(engine.compute_alone(batch, i)[1]).all())
    ]
    if not valid:
        return None
    if len(valid) == len(batch):
        return batch, ()
    replaced = sorted(set(range(len(batch))) - set(valid))
    rows = list(range(len(batch)))
    for j, i in enumerate(replaced):
        rows[i] = valid[j % len(valid)]
    return engine.batch([batch.ids[i] for i in rows], [batch.examples[i] for i in rows]), tuple(replaced)
