"""Passes over a task's examples: one model, each checkpoint in turn, batches with proven gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from tracin_ann.checkpoints import load_checkpoint
from tracin_ann.errors import GradientProofError, TaskError, UsageError, problem
from tracin_ann.gradients import Batch, GradientEngine
from tracin_ann.probe import probe_examples, probe_gradients, probe_losses
from tracin_ann.session import borrowed_model, preserved_globals
from tracin_ann.task import Description, Task

SideName = Literal["train", "query"]


@dataclass(frozen=True)
class PassOptions:
    """How examples are run.

    Attributes:
        device: where the model computes.
        batch_size: B; results do not depend on it but for rounding.
        allow_random_data: accept a data set whose rows change when read twice.
    """

    device: torch.device
    batch_size: int = 64
    allow_random_data: bool = False

    def __post_init__(self) -> None:
        """Check the batch size.

        Raises:
            UsageError: it is below 1.
        """
        if self.batch_size < 1:
            raise UsageError(
                problem("bad batch size", got=self.batch_size, expected="1 or more", remedy="change --batch-size")
            )


class Passes:
    """A task's two data sets, opened, and its model over all checkpoints."""

    def __init__(self, task: Task, options: PassOptions) -> None:
        self.task, self.options = task, options
        self._data: dict[SideName, Any] = {}

    def data(self, side: SideName) -> Any:
        """Return the map-style data set of a side, opened once.

        Raises:
            TaskError: it has no length or no rows, or cannot be indexed.
        """
        if side not in self._data:
            with preserved_globals():
                self._data[side] = open_data(self.task.train_data if side == "train" else self.task.query_data, side)
        return self._data[side]

    def n_rows(self, side: SideName) -> int:
        """Return the number of examples of a side."""
        return len(self.data(side))

    def described(self, side: SideName, row: int) -> Description | None:
        """Return what the task shows people of a row, or None."""
        with preserved_globals():
            return self.task.described(self.data(side)[row])

    def check_ids(self, side: SideName, ids: Sequence[int]) -> None:
        """Refuse ids that the side does not hold.

        Raises:
            UsageError: an id is out of range.
        """
        wrong = [i for i in ids if not 0 <= i < self.n_rows(side)]
        if wrong:
            raise UsageError(
                problem(
                    f"no such row in {side}_data",
                    got=wrong[0],
                    expected=f"0 to {self.n_rows(side) - 1}",
                    remedy="change the ids",
                )
            )

    @contextlib.contextmanager
    def model(self) -> Iterator[LoadedModel]:
        """Yield the model, to be loaded with one checkpoint after another; all is put back on leaving."""
        with borrowed_model(self.task, self.options.device) as model:
            yield LoadedModel(self, model)


class LoadedModel:
    """The model with one checkpoint in it; makes batches and gradient engines."""

    def __init__(self, passes: Passes, model: nn.Module) -> None:
        self.passes, self.module = passes, model
        self.parameters = passes.task.selected(model)
        self._trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        self._engines: dict[SideName, GradientEngine] = {}
        self.checkpoint = -1

    def load(self, checkpoint: int) -> None:
        """Read a checkpoint into the model and forget what was proven on the last one.

        Raises:
            CheckpointError: it is missing, unreadable or does not match the model.
            TaskError: loading changed which parameters there are.
        """
        for name, parameter in self.module.named_parameters():
            parameter.requires_grad_(name in self._trainable)
        task = self.passes.task
        load_checkpoint(task, self.module, task.checkpoints[checkpoint], self.passes.options.device)
        before = {name: p.shape for name, p in self.parameters.items()}
        self.parameters = task.selected(self.module)
        if before != {name: p.shape for name, p in self.parameters.items()}:
            raise TaskError(
                problem(
                    f"loading checkpoint {checkpoint} changed the model's parameters",
                    got=f"{len(self.parameters)} chosen parameters",
                    expected=f"the same {len(before)} names and shapes as before",
                    remedy="let Task.model build the model whole, and Task.load only fill it",
                )
            )
        for parameter in self.module.parameters():
            parameter.requires_grad_(False)
        self._engines.clear()
        self.checkpoint = checkpoint

    def engine(self, side: SideName) -> GradientEngine:
        """Return the gradients of a side's loss at this checkpoint."""
        if side not in self._engines:
            task = self.passes.task
            loss = task.query_loss if side == "query" and task.query_loss is not None else task.loss
            self._engines[side] = GradientEngine(
                self.module, self.parameters, loss, task.collated, self.passes.options.device, self.checkpoint
            )
        return self._engines[side]

    def batches(self, side: SideName, ids: Sequence[int]) -> Iterator[Batch]:
        """Yield the examples with these ids, in order, in batches on the device."""
        data, engine = self.passes.data(side), self.engine(side)
        size = self.passes.options.batch_size
        for start in range(0, len(ids), size):
            chunk = ids[start : start + size]
            yield engine.batch(chunk, [data[i] for i in chunk])

    def probe(self, side: SideName) -> None:
        """Run the checks of the first batch of a side.

        Raises:
            TaskError: the data or the loss break the contract; the message says which and how to mend it.
        """
        data, engine = self.passes.data(side), self.engine(side)
        ids = range(min(self.passes.options.batch_size, len(data)))
        if not self.passes.options.allow_random_data:
            probe_examples(data, side, ids)
        batch = engine.batch(ids, [data[i] for i in ids])
        probe_losses(engine, batch, self.checkpoint)
        try:
            engine.prove(batch)
        except GradientProofError:
            # No step can serve examples that mix; the probe says that more plainly.
            probe_gradients(engine, batch)
            raise
        probe_gradients(engine, batch)


def open_data(make: Any, side: SideName) -> Any:
    """Return the data set that a task's function makes, checked to be map-style and not empty.

    Raises:
        TaskError: it has no length or no rows, or cannot be indexed.
    """
    data = make()
    try:
        n_rows = len(data)
    except TypeError as error:
        raise TaskError(_no_rows(side, f"a {type(data).__name__} without a length")) from error
    if not hasattr(data, "__getitem__"):
        raise TaskError(_no_rows(side, f"a {type(data).__name__} that cannot be indexed"))
    if n_rows == 0:
        raise TaskError(_no_rows(side, "no rows"))
    return data


def _no_rows(side: SideName, got: str) -> str:
    return problem(
        f"Task.{side}_data cannot be used",
        got=got,
        expected="a map-style data set (len(data), data[i]) with at least one row",
        remedy="return a list or a torch.utils.data.Dataset that is not empty",
    )
