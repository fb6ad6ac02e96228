"""The data sets of a task: examples in batches, their ids and descriptions; the options for running a model on them."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from tracin_ann.choices import SIDE_NAMES, OnNonfinite, Precision, Preconditioner, SideName
from tracin_ann.errors import UnknownRowError, UsageError, problem
from tracin_ann.features.fingerprint import data_digest
from tracin_ann.task import (
    BatchOptions,
    BatchStream,
    CollatedBatch,
    Description,
    Task,
    TaskReference,
    WindowReader,
    differ_in_length,
    make_batches,
    open_data,
    open_examples,
    pickle_reader,
    preserve_globals,
)


@dataclass(frozen=True)
class RunOptions:
    """Options for running a model on examples.

    Attributes:
        device: the device of the model.
        batch_size: B; it affects results by rounding only.
        allow_random_data: accept a data set whose rows change when they are read twice.
        workers: number of processes that read and collate ahead of long passes; 0 reads in this process.
        precision: precision of forward and backward: `fp32`, or `bf16` by autocast.
        channels_last: the initial memory format of images and convolution weights.
        on_nonfinite: what to do with rows whose loss or gradient is NaN or infinite: raise an `error`, or `skip` them.
        preconditioner: the weights of the entries of gradients, from Adam's second moments; see preconditioner.py.
    """

    device: torch.device
    batch_size: int = 64
    allow_random_data: bool = False
    workers: int = 0
    precision: Precision = "fp32"
    channels_last: bool = False
    on_nonfinite: OnNonfinite = "error"
    preconditioner: Preconditioner = "none"

    def __post_init__(self) -> None:
        """Check the batch size and the number of workers.

        Raises:
            UsageError: the batch size is below 1, or the number of workers is below 0.
        """
        for option, value, least in (("--batch-size", self.batch_size, 1), ("--workers", self.workers, 0)):
            if value < least:
                raise UsageError(
                    problem(f"bad {option}", got=value, expected=f"{least} or more", remedy=f"change {option}")
                )


class TaskData:
    """The examples of a task, in batches, with their ids and descriptions; each data set is opened once.

    Args:
        task: the task.
        options: how the model runs; may be replaced later, as tuning does.
        origin: the name of the task, by which worker processes open it.
    """

    def __init__(self, task: Task, options: RunOptions, origin: TaskReference | None = None) -> None:
        self.task, self.options, self._origin = task, options, origin or TaskReference()
        self._data: dict[SideName, Any] = {}
        self._by_length: dict[SideName, bool] = {}
        self._own_ids: dict[SideName, list[int | str]] = {}
        self._lent = threading.local()

    def data(self, side: SideName) -> Any:
        """Return the map-style data set of a side; it is opened by the first call.

        Raises:
            TaskError: it has no length, has no rows, or cannot be indexed.
        """
        if side == "input":
            return self._find_lent()
        if side not in self._data:
            with preserve_globals():
                self._data[side] = open_data(self.task, side)
        return self._data[side]

    @contextmanager
    def lend(self, examples: Any) -> Iterator[None]:
        """Let `examples` be the data set of the side `input` in this thread, until the block ends.

        Raises:
            UsageError: they are not a list or a map-style data set, or there are none.
        """
        opened, before = open_examples(examples), getattr(self._lent, "data", None)
        self._lent.data = opened
        try:
            yield
        finally:
            self._lent.data = before

    def _find_lent(self) -> Any:
        data = getattr(self._lent, "data", None)
        if data is None:
            raise UsageError(
                problem(
                    "no examples are given in this thread",
                    got='side "input"',
                    expected="a call inside `with index.lend(examples)`",
                    remedy="use query_examples, or lend the examples",
                )
            )
        return data

    def data_digest(self, n_rows: int) -> str:
        """Return a digest of the first n_rows training examples."""
        with preserve_globals():
            return data_digest(self.data("train"), n_rows, self.task.collate_rows)

    def n_rows(self, side: SideName) -> int:
        """Return the number of examples of a side."""
        return len(self.data(side))

    def read(self, side: SideName, ids: Sequence[int]) -> Iterator[CollatedBatch]:
        """Yield batches of the examples with these ids, in this order; they are read in this process."""
        data, options = self.data(side), BatchOptions(self.options.batch_size, keep_examples=True)
        for start in range(0, len(ids), options.size):
            chunk = ids[start : start + options.size]
            yield from make_batches(self.task, chunk, [data[i] for i in chunk], options)

    def open_batches(self, side: SideName, spans: Sequence[Sequence[int]], *, ahead: bool = True) -> BatchStream:
        """Return a context that reads spans of rows in batches of similar lengths.

        Args:
            side: the data set.
            spans: ids of the rows of each span.
            ahead: read ahead in worker processes if the options ask for workers.
        """
        options = self._batch_options(side, ahead)
        return BatchStream(WindowReader(self.task, side, self.data(side), options, self._origin), spans, options)

    def check_workers(self, side: SideName) -> None:
        """Check that worker processes can read the data set of a side.

        Raises:
            UsageError: the options ask for workers, but the task has no name and cannot be pickled.
        """
        if self.options.workers:
            pickle_reader(
                WindowReader(self.task, side, self.data(side), self._batch_options(side, ahead=True), self._origin)
            )

    def window(self, side: SideName) -> int:
        """Return the number of rows of a side that are read together and sorted by length."""
        return self._batch_options(side, ahead=False).window

    def _batch_options(self, side: SideName, ahead: bool) -> BatchOptions:
        if side not in self._by_length:
            self._by_length[side] = differ_in_length(self.data(side))
        return BatchOptions(
            self.options.batch_size,
            by_length=self._by_length[side],
            keep_examples=not ahead or self.options.allow_random_data,
            workers=self.options.workers if ahead else 0,
        )

    def describe(self, side: SideName, row: int) -> Description | None:
        """Return the task's description of a row, for display; None if the task has none."""
        return self.describe_rows(side, [row])[0]

    def describe_rows(self, side: SideName, rows: Sequence[int]) -> list[Description | None]:
        """Return the task's descriptions of rows; for many rows, this takes much less time than one at a time."""
        with preserve_globals():
            data = self.data(side)
            return [self.task.describe_example(data[row]) for row in rows]

    def id_of(self, side: SideName, row: int) -> int | str | None:
        """Return the id that the task assigns to a row; None if it assigns none.

        For the side `input`, an error of `Task.ids` counts as none.
        """
        if self.task.ids is None:
            return None
        with preserve_globals():
            example = self.data(side)[row]
            try:
                return self.task.id_of(example)
            except Exception:
                # An example that is not in the task's data, such as a typed text, may have no id.
                if side == "input":
                    return None
                raise

    def read_ids(self, side: SideName) -> list[int | str]:
        """Return the ids that the task assigns to the rows of a side; the first call reads all rows."""
        if self.task.ids is None:
            return []
        if side in self._own_ids:
            return self._own_ids[side]
        with preserve_globals():
            data = self.data(side)
            found = [self.task.id_of(data[i]) for i in range(len(data))]
        ids = [own for own in found if own is not None]
        if side != "input":
            self._own_ids[side] = ids
        return ids

    def check_ids(self, side: SideName, ids: Sequence[int]) -> None:
        """Check that the data set of a side has rows with these ids.

        Raises:
            UsageError: an id is out of range.
        """
        wrong = [i for i in ids if not 0 <= i < self.n_rows(side)]
        if wrong:
            raise UnknownRowError(
                problem(
                    f"no such row in {SIDE_NAMES[side]}",
                    got=wrong[0],
                    expected=f"0 to {self.n_rows(side) - 1}",
                    remedy="change the ids",
                )
            )
