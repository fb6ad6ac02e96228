"""The first batch's probes: rows that change, losses that are reduced, random, NaN, or mix examples."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from tracin_ann.errors import TaskError, first_line, problem
from tracin_ann.gradients.engine import Batch, GradientEngine
from tracin_ann.gradients.proof import check_finite
from tracin_ann.task import EXAMPLES, Task, encode_content

_READ_TWICE = 16
_ALONE = 3
_SAME_LOSS = 1e-5
_MIXED_LOSS = 1e-3
_MIXED_GRADIENT = 2e-2
_HALF_PRECISION = 50.0
logger = logging.getLogger(__name__)


def probe_examples(data: Any, side: str, ids: Sequence[int], collate: Callable[[list[Any]], Any]) -> None:
    """Refuse a data set whose rows change when they are read twice; log what cannot be compared.

    Args:
        data: of the side.
        side: `train` or `query`.
        ids: the first batch's.
        collate: what is compared of rows whose objects cannot be.

    Raises:
        TaskError: a row came back different.
    """
    unknown: set[str] = set()
    for i in ids[:_READ_TWICE]:
        # One after the other: a data set may fill one object again and again.
        first = encode_content(data[i], collate)
        second = encode_content(data[i], collate)
        unknown.update(first.unknown)
        if first != second:
            raise TaskError(
                problem(
                    f"rows of {side}_data change when they are read twice",
                    got=f"two different readings of row {i}",
                    expected="the same example each time",
                    remedy="leave random augmentation out of the task's data, or pass --allow-random-data",
                )
            )
    if unknown:
        logger.warning(
            "rows of %s_data hold %s, whose content cannot be known: whether it changes when read twice is not checked",
            side,
            ", ".join(sorted(unknown)),
        )


def probe_description(task: Task, example: Any, side: str) -> None:
    """Ask the task's `ids`, `describe` and, of a training row, `columns` of a side's first row, as a build will.

    Args:
        task: the task.
        example: the row.
        side: `train` or `query`.

    Raises:
        TaskError: one of them cannot be asked.
    """
    asked = {"ids": task.id_of, "describe": task.described, "columns": task.columns if side == "train" else None}
    for name, ask in asked.items():
        try:
            if ask is not None:
                ask(example)
        except TaskError:
            raise
        except Exception as error:
            raise TaskError(
                problem(
                    f"Task.{name} fails on row 0 of {side}_data",
                    got=f"{type(error).__name__}: {error}",
                    expected="a function of one example",
                    remedy=f"mend it, for example {EXAMPLES[name]}",
                )
            ) from error


def probe_losses(engine: GradientEngine, batch: Batch, checkpoint: int) -> None:
    """Refuse a loss that is reduced, NaN, random, or not a function of the example alone.

    Raises:
        TaskError: the loss breaks the contract.
        NonFiniteError: a loss is NaN or infinite.
    """
    first, second = engine.loss_values(batch), engine.loss_values(batch)
    check_finite(first, batch.ids, checkpoint)
    scale = float(first.abs().mean()) + float(first.abs().max()) * 1e-3
    slack = _slack(engine, batch)
    if float((first - second).abs().max()) > _SAME_LOSS * slack * max(scale, 1e-6):
        raise TaskError(
            problem(
                "the loss is random",
                got="two different losses of one batch",
                expected="the same loss each time",
                remedy="drop what draws random numbers in eval mode (functional dropout, sampled noise)",
            )
        )
    if len(batch) > 1:
        for i in range(min(_ALONE, len(batch))):
            _compare_alone(engine, batch, i, float(first[i]), _MIXED_LOSS * slack * max(scale, 1e-6))


def probe_gradients(engine: GradientEngine, batch: Batch) -> None:
    """Refuse a loss whose gradient for an example depends on the other examples of its batch.

    Raises:
        TaskError: the gradients of an example alone and among its batch differ.
    """
    if len(batch) < 2:  # noqa: PLR2004
        return
    tolerance = _MIXED_GRADIENT * max(_slack(engine, batch) / 5, 1.0)
    for i in range(min(_ALONE, len(batch))):
        _, alone = engine.alone(batch, i)
        _, together = engine.together(batch, i)
        off, norm = float((alone - together).norm()), float(together.norm())
        if off > tolerance * norm + 1e-6:
            raise TaskError(_mixed(batch, i, f"a gradient {off / max(norm, 1e-300):.2g} of its norm away from its own"))


def _compare_alone(engine: GradientEngine, batch: Batch, i: int, among: float, tolerance: float) -> None:
    single = engine.batch(batch.ids[i : i + 1], batch.examples[i : i + 1])
    try:
        alone = float(engine.loss_values(single)[0])
    except (RuntimeError, ValueError, IndexError) as error:
        raise TaskError(_mixed(batch, i, f"an error for the example alone ({first_line(error)})")) from error
    if not abs(alone - among) <= tolerance:
        raise TaskError(_mixed(batch, i, f"a loss of {among:.6g} among {len(batch)} examples but {alone:.6g} alone"))


def _mixed(batch: Batch, i: int, got: str) -> str:
    return problem(
        "examples of a batch mix in the loss",
        got=f"for row {batch.ids[i]} {got}",
        expected="a loss that is a function of its own example alone",
        remedy="use no batch statistics (batch norm outside eval mode) and no in-batch negatives in Task.loss",
    )


def _slack(engine: GradientEngine, batch: Batch) -> float:
    return _HALF_PRECISION if engine.is_half_precision(batch) else 1.0


def replace_nonfinite(engine: GradientEngine, batch: Batch) -> tuple[Batch, tuple[int, ...]] | None:
    """Return a batch whose every row has a finite loss and gradient, and the places that other rows took.

    Each row stays in its place or is replaced by one of the others: whatever runs a batch of this size and layout runs
    the batch returned, and with the same rounding. None where no row is finite. A backward a row.
    """
    finite = torch.isfinite(engine.loss_values(batch)).tolist()
    kept = [i for i, fine in enumerate(finite) if fine and bool(torch.isfinite(engine.alone(batch, i)[1]).all())]
    if not kept:
        return None
    if len(kept) == len(batch):
        return batch, ()
    replaced = sorted(set(range(len(batch))) - set(kept))
    places = list(range(len(batch)))
    for j, i in enumerate(replaced):
        places[i] = kept[j % len(kept)]
    return engine.batch([batch.ids[i] for i in places], [batch.examples[i] for i in places]), tuple(replaced)
