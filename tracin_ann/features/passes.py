"""Passes over a task's examples: one model, each checkpoint in turn, batches with proven gradients."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from tracin_ann.choices import OnNonfinite, Precision, SideName
from tracin_ann.errors import GradientProofError, NonFiniteError, TaskError, UsageError, problem
from tracin_ann.features.fingerprint import data_digest
from tracin_ann.gradients import (
    Batch,
    GradientEngine,
    describe_no_gradient,
    detach_graph,
    probe_description,
    probe_examples,
    probe_gradients,
    probe_losses,
    replace_nonfinite,
)
from tracin_ann.task import (
    BatchOptions,
    CheckpointLoader,
    CollatedBatch,
    Description,
    Reader,
    Reading,
    Task,
    TaskReference,
    borrow_model,
    differ_in_length,
    leaves,
    make_batches,
    map_leaves,
    open_data,
    pickle_reader,
    preserve_globals,
    to_device,
)

logger = logging.getLogger(__name__)
_LOOK_FURTHER = 16
"""Batches of spread rows that are proven before a loss is said to reach no parameter."""


@dataclass(frozen=True)
class PassOptions:
    """How examples are run.

    Attributes:
        device: where the model computes.
        batch_size: B; results do not depend on it but for rounding.
        allow_random_data: accept a data set whose rows change when read twice.
        workers: processes that read and collate ahead where many rows are passed over.
        precision: of forward and backward: `fp32`, or `bf16` by autocast.
        channels_last: the model starts with pictures kept with channels last.
        on_nonfinite: rows whose loss or gradient is NaN or infinite: an `error`, or `skip` them.
    """

    device: torch.device
    batch_size: int = 64
    allow_random_data: bool = False
    workers: int = 0
    precision: Precision = "fp32"
    channels_last: bool = False
    on_nonfinite: OnNonfinite = "error"

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            UsageError: the batch size is below 1, or the workers below 0.
        """
        for option, value, least in (("--batch-size", self.batch_size, 1), ("--workers", self.workers, 0)):
            if value < least:
                raise UsageError(
                    problem(f"bad {option}", got=value, expected=f"{least} or more", remedy=f"change {option}")
                )


class Passes:
    """A task's two data sets, opened, and its model over all checkpoints."""

    def __init__(self, task: Task, options: PassOptions, origin: TaskReference | None = None) -> None:
        self.task, self.options, self._origin = task, options, origin or TaskReference()
        self.loader = CheckpointLoader(task)
        self._data: dict[SideName, Any] = {}
        self._by_length: dict[SideName, bool] = {}
        self._own_ids: dict[SideName, list[int | str]] = {}

    def data(self, side: SideName) -> Any:
        """Return the map-style data set of a side, opened once.

        Raises:
            TaskError: it has no length or no rows, or cannot be indexed.
        """
        if side not in self._data:
            with preserve_globals():
                self._data[side] = open_data(self.task, side)
        return self._data[side]

    def data_digest(self, n_rows: int) -> str:
        """Return the digest of the first n_rows training rows."""
        with preserve_globals():
            return data_digest(self.data("train"), n_rows, self.task.collate_rows)

    def n_rows(self, side: SideName) -> int:
        """Return the number of examples of a side."""
        return len(self.data(side))

    def read(self, side: SideName, ids: Sequence[int]) -> Iterator[CollatedBatch]:
        """Yield the examples with these ids in batches, in order, read in this process."""
        data, options = self.data(side), BatchOptions(self.options.batch_size, keep_examples=True)
        for start in range(0, len(ids), options.size):
            chunk = ids[start : start + options.size]
            yield from make_batches(self.task, chunk, [data[i] for i in chunk], options)

    def reading(self, side: SideName, spans: Sequence[Sequence[int]], *, ahead: bool = True) -> Reading:
        """Return a context that reads spans of rows, alike lengths together; `ahead`: in workers if there are any."""
        options = self._batch_options(side, ahead)
        return Reading(Reader(self.task, side, self.data(side), options, self._origin), spans, options)

    def check_workers(self, side: SideName) -> None:
        """Refuse workers that cannot be sent this side's rows.

        Raises:
            UsageError: there are to be workers, and the task has no name and cannot be pickled.
        """
        if self.options.workers:
            pickle_reader(Reader(self.task, side, self.data(side), self._batch_options(side, ahead=True), self._origin))

    def window(self, side: SideName) -> int:
        """Return the rows of a side that are read together."""
        return self._batch_options(side, ahead=False).window

    def _batch_options(self, side: SideName, ahead: bool) -> BatchOptions:
        if side not in self._by_length:
            self._by_length[side] = differ_in_length(self.data(side))
        return BatchOptions(
            self.options.batch_size,
            by_length=self._by_length[side],
            keep_examples=not ahead or self.options.allow_random_data,
            workers=self.options.workers if ahead else 0,
            pin_memory=self.options.device.type != "cpu",
        )

    def at_precision(self, precision: Precision) -> Passes:
        """Return passes over the same data with another precision."""
        other = copy.copy(self)
        other.options = replace(self.options, precision=precision)
        return other

    def described(self, side: SideName, row: int) -> Description | None:
        """Return what the task shows people of a row, or None."""
        with preserve_globals():
            return self.task.described(self.data(side)[row])

    def id_of(self, side: SideName, row: int) -> int | str | None:
        """Return the task's own id of a row, or None where it gives none."""
        if self.task.ids is None:
            return None
        with preserve_globals():
            return self.task.id_of(self.data(side)[row])

    def own_ids(self, side: SideName) -> list[int | str]:
        """Return the task's own ids of all rows of a side, read through once; none where it gives none."""
        if self.task.ids is None:
            return []
        if side not in self._own_ids:
            with preserve_globals():
                data = self.data(side)
                found = [self.task.id_of(data[i]) for i in range(len(data))]
            self._own_ids[side] = [own for own in found if own is not None]
        return self._own_ids[side]

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
        with borrow_model(self.task, self.options.device) as model:
            yield LoadedModel(self, model)


class LoadedModel:
    """The model with one checkpoint in it; makes batches and gradient engines."""

    def __init__(self, passes: Passes, model: nn.Module) -> None:
        self.passes, self.module = passes, model
        self.parameters = passes.task.select_parameters(model)
        self._trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        self._engines: dict[tuple[int, SideName, bool, Precision], GradientEngine] = {}
        self.checkpoint = -1
        self.lay_out(channels_last=passes.options.channels_last)

    def load(self, checkpoint: int) -> None:
        """Read a checkpoint into the model; what was proven at a checkpoint holds when it is loaded again.

        Raises:
            CheckpointError: it is missing, unreadable or does not match the model.
            TaskError: loading changed which parameters there are.
        """
        for name, parameter in self.module.named_parameters():
            parameter.requires_grad_(name in self._trainable)
        task = self.passes.task
        logger.debug("loading checkpoint %d, %s", checkpoint, task.checkpoints[checkpoint].path)
        # Until it is whole: a load that fails leaves a part of it.
        self.checkpoint = -1
        self.passes.loader.load(self.module, checkpoint, self.passes.options.device)
        before = self.parameters
        self.parameters = task.select_parameters(self.module)
        was, now = ({name: (list(p.shape), p.dtype) for name, p in each.items()} for each in (before, self.parameters))
        if was != now:
            name = next(name for name in {**was, **now} if was.get(name) != now.get(name))
            there, here = ("nothing" if got is None else f"{got[0]} {got[1]}" for got in (was.get(name), now.get(name)))
            raise TaskError(
                problem(
                    f"loading checkpoint {checkpoint} changed the model's parameters",
                    got=f"{len(now)} chosen parameters, {name} {here}",
                    expected=f"the same {len(was)} names, shapes and types as before, {name} {there}",
                    remedy="let Task.model build the model whole and in its type, and Task.load only fill it",
                )
            )
        for parameter in self.module.parameters():
            parameter.requires_grad_(False)
        if any(after is not before[name] for name, after in self.parameters.items()):
            self._engines.clear()
            # What was put in place of a parameter has a layout of its own.
            self.lay_out(channels_last=self.channels_last)
        self.checkpoint = checkpoint

    def lay_out(self, *, channels_last: bool) -> None:
        """Keep pictures and the weights over them with channels last, or as usual; each is proven by itself."""
        self.channels_last = channels_last
        form = torch.channels_last if channels_last else torch.contiguous_format
        for parameter in self.module.parameters():
            if parameter.dim() == 4 and not parameter.is_contiguous(memory_format=form):  # noqa: PLR2004
                parameter.data = parameter.data.contiguous(memory_format=form)

    def engine(self, side: SideName) -> GradientEngine:
        """Return the gradients of a side's loss at this checkpoint."""
        task, options = self.passes.task, self.passes.options
        key = self.checkpoint, side, self.channels_last, options.precision
        if key not in self._engines:
            loss = task.query_loss if side == "query" and task.query_loss is not None else task.loss
            self._engines[key] = GradientEngine(
                self.module, self.parameters, loss, self._inputs, self.checkpoint, options.precision
            )
        return self._engines[key]

    def _inputs(self, examples: list[Any]) -> Any:
        return self._moved(self.passes.task.collate_rows(examples))

    def _moved(self, inputs: Any) -> Any:
        moved = to_device(inputs, self.passes.options.device, channels_last=self.channels_last)
        # A graph that rows bring along is not the loss's: a backward through it would use it up.
        grown = any(isinstance(leaf, torch.Tensor) and leaf.grad_fn is not None for leaf in leaves(moved))
        return map_leaves(detach_graph, moved) if grown else moved

    def batch(self, side: SideName, read: CollatedBatch) -> Batch:
        """Return a batch that was read, on the device."""
        examples = _Examples(self.passes.data(side), read.ids) if read.examples is None else read.examples
        return Batch(read.ids, examples, self._moved(read.inputs))

    def batches(self, side: SideName, ids: Sequence[int]) -> Iterator[Batch]:
        """Yield the examples with these ids, in order, in batches on the device."""
        for read in self.passes.read(side, ids):
            yield self.batch(side, read)

    def probe(self, side: SideName) -> None:
        """Run the checks of the first batch of a side.

        Raises:
            TaskError: the data or the loss break the contract; the message says which and how to mend it.
        """
        data, engine = self.passes.data(side), self.engine(side)
        ids = range(min(self.passes.options.batch_size, len(data)))
        if not self.passes.options.allow_random_data:
            with preserve_globals():
                probe_examples(data, side, ids, self.passes.task.collate_rows)
        with preserve_globals():
            probe_description(self.passes.task, data[0], side)
        batch = engine.batch(ids, [data[i] for i in ids])
        if self.passes.options.on_nonfinite == "skip":
            batch = self._mended(side, batch)
        probe_losses(engine, batch, self.checkpoint)
        try:
            engine.prove(batch)
            self._look_further(side)
        except GradientProofError:
            # No step can serve examples that mix; the probe says that more plainly.
            probe_gradients(engine, batch)
            raise
        probe_gradients(engine, batch)

    def _look_further(self, side: SideName) -> None:
        """Prove rows spread over a side where no loss of the first batch reaches a parameter.

        Raises:
            TaskError: none of those does either.
        """
        engine, n_rows = self.engine(side), self.passes.n_rows(side)
        parts = min(_LOOK_FURTHER, math.ceil(n_rows / self.passes.options.batch_size))
        for part in range(parts):
            if engine.reached:
                return
            batch = self._spread(side, part, parts)
            if self.passes.options.on_nonfinite == "skip":
                batch = self._mended(side, batch)
            engine.prove(batch)
        if not engine.reached:
            raise TaskError(describe_no_gradient(looked=min(n_rows, parts * self.passes.options.batch_size)))

    def _mended(self, side: SideName, batch: Batch) -> Batch:
        """Return a batch of finite rows: of this one, or where it has none, of rows spread over the side.

        Raises:
            NonFiniteError: none of those is finite either.
        """
        engine = self.engine(side)
        found = replace_nonfinite(engine, batch) or replace_nonfinite(engine, self._spread(side))
        if found is None:
            raise NonFiniteError(self._no_row_is_finite(side, len(batch)))
        return found[0]

    def refuse_diverged(self) -> None:
        """Refuse a checkpoint at which no loss is finite.

        Raises:
            NonFiniteError: none of a batch of rows spread over the training rows is.
        """
        batch = self._spread("train")
        if not bool(torch.isfinite(self.engine("train").loss_values(batch)).any()):
            raise NonFiniteError(self._no_row_is_finite("train", len(batch)))

    def _spread(self, side: SideName, part: int = 0, parts: int = 1) -> Batch:
        """Return a batch of rows spread over a side, or one of several with other rows in each."""
        data = self.passes.data(side)
        size = min(parts * self.passes.options.batch_size, len(data))
        ids = [round(j * (len(data) - 1) / max(1, size - 1)) for j in range(part, size, parts)]
        return self.engine(side).batch(ids, [data[i] for i in ids])

    def _no_row_is_finite(self, side: SideName, n_rows: int) -> str:
        return problem(
            f"no row of {side}_data is finite at checkpoint {self.checkpoint}",
            got=f"NaN or infinity for each of {n_rows} rows spread over it",
            expected="rows to keep when others are skipped",
            remedy="leave out this checkpoint, or mend the loss or the data",
        )


class _Examples(Sequence[Any]):
    """The examples of a batch that a worker collated, read again where one is needed by itself."""

    def __init__(self, data: Any, ids: tuple[int, ...]) -> None:
        self._data, self._ids = data, ids

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, place: Any) -> Any:
        chosen = self._ids[place]
        return [self._data[i] for i in chosen] if isinstance(chosen, tuple) else self._data[chosen]
