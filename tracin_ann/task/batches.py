"""Batches: rows read and collated in this process or ahead of it in worker processes, optionally sorted by length.

Workers are spawned, not forked: a fork after threads have started may hang. If a task has a reference, a worker
loads it by that reference, and only row ids are sent to the worker.
"""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from types import TracebackType
from typing import Any

import torch

from tracin_ann.choices import SideName
from tracin_ann.errors import TaskError, UsageError, problem
from tracin_ann.task.data import open_data
from tracin_ann.task.nested import length
from tracin_ann.task.references import TaskReference, load_task
from tracin_ann.task.task import Task

_BATCHES_PER_SORT = 16
_SAMPLED_ROWS = 32
_WINDOWS_PER_WORKER = 2


@dataclass(frozen=True)
class CollatedBatch:
    """A batch returned by collate.

    Attributes:
        ids: positions of its rows in the data set, in the order of the batch.
        inputs: the argument `batch` of the loss.
        examples: the examples before collate, if `BatchOptions.keep_examples`.
        sizes: the rows' sizes by `length`; empty if PyTorch's default collate stacked rows in the data set's order,
            which requires equal sizes.
    """

    ids: tuple[int, ...]
    inputs: Any
    examples: list[Any] | None = None
    sizes: tuple[int, ...] = ()


@dataclass(frozen=True)
class BatchOptions:
    """Options for making batches of rows.

    Attributes:
        size: B.
        by_length: sort the rows of each window of 16 batches by length.
        keep_examples: store the examples in their batch.
        workers: number of processes that read ahead; 0: read in this process.
    """

    size: int
    by_length: bool = False
    keep_examples: bool = False
    workers: int = 0

    @property
    def window(self) -> int:
        """Return the number of rows that are read together."""
        return self.size * (_BATCHES_PER_SORT if self.by_length else 1)


class WindowReader:
    """A picklable reader of one side's rows: `reader[ids]` reads a window of rows and returns its batches."""

    def __init__(self, task: Task, side: SideName, data: Any, options: BatchOptions, origin: TaskReference) -> None:
        self._task, self._side, self._data, self._options, self._origin = task, side, data, options, origin

    def __getstate__(self) -> dict[str, Any]:
        """Return the state to pickle, without task and data if a worker can load the task by its reference."""
        state = dict(vars(self))
        if self._origin.reference is not None:
            del state["_task"], state["_data"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Set the state, and load the task in this process if it was not pickled."""
        vars(self).update(state)
        if self._origin.reference is not None:
            self._task = load_task(self._origin.reference, self._origin.arguments)
            self._data = open_data(self._task, self._side)

    def __getitem__(self, ids: Sequence[int]) -> list[CollatedBatch]:
        """Return the batches of these rows."""
        return make_batches(self._task, ids, [self._data[i] for i in ids], self._options)


def make_batches(task: Task, ids: Sequence[int], examples: list[Any], options: BatchOptions) -> list[CollatedBatch]:
    """Return these examples in batches: in order, or by descending length."""
    order = list(range(len(ids)))
    sizes = [length(example) for example in examples] if options.by_length or task.collate is not None else []
    if options.by_length:
        order.sort(key=lambda j: -sizes[j])
    batches = []
    for start in range(0, len(order), options.size):
        chosen = order[start : start + options.size]
        batch = [examples[j] for j in chosen]
        stored = batch if options.keep_examples else None
        batch_sizes = tuple(sizes[j] for j in chosen) if sizes else ()
        batches.append(CollatedBatch(tuple(ids[j] for j in chosen), task.collate_rows(batch), stored, batch_sizes))
    return batches


def differ_in_length(data: Any) -> bool:
    """Return whether the lengths of 32 rows, spread evenly over a data set, differ."""
    n_rows = len(data)
    sample = {round(j * (n_rows - 1) / (_SAMPLED_ROWS - 1)) for j in range(_SAMPLED_ROWS)}
    return len({length(data[i]) for i in sample}) > 1


class BatchStream:
    """A sequential read of spans of rows, possibly by workers; a context manager that ends its workers.

    Args:
        reader: reads the rows of one side.
        spans: ids of the rows of each span, in reading order.
        options: the options of the reader.
    """

    def __init__(self, reader: WindowReader, spans: Sequence[Sequence[int]], options: BatchOptions) -> None:
        self._reader, self._options = reader, options
        self._windows = [
            [span[start : start + options.window] for start in range(0, len(span), options.window)] for span in spans
        ]
        self._counts = iter([len(windows) for windows in self._windows])
        self._workers: ProcessPoolExecutor | None = None
        self._batches: Iterator[list[CollatedBatch]] = iter(())

    def __enter__(self) -> BatchStream:
        """Start the workers, if `options.workers` is not 0.

        Raises:
            UsageError: the reader cannot be pickled.
        """
        windows = [window for span in self._windows for window in span]
        n_workers = min(self._options.workers, len(windows))
        if n_workers:
            self._workers = ProcessPoolExecutor(
                n_workers, get_context("spawn"), initializer=_start_worker, initargs=(pickle_reader(self._reader),)
            )
            self._batches = _read_ahead(self._workers, windows, _WINDOWS_PER_WORKER * n_workers)
        else:
            self._batches = (self._reader[window] for window in windows)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the workers."""
        if self._workers is not None:
            self._workers.shutdown(cancel_futures=True)

    def span(self) -> Iterator[CollatedBatch]:
        """Yield the batches of the next span.

        Raises:
            TaskError: a worker process died.
        """
        for _ in range(next(self._counts)):
            try:
                batches = next(self._batches)
            except BrokenProcessPool as error:
                raise TaskError(_dead_worker_message(str(error))) from error
            yield from batches


def _read_ahead(
    workers: ProcessPoolExecutor, windows: Sequence[Sequence[int]], n_ahead: int
) -> Iterator[list[CollatedBatch]]:
    """Yield the batches of the windows in order, while `n_ahead` windows after them are read."""
    waiting: deque[Future[bytes]] = deque()
    for window in windows:
        waiting.append(workers.submit(_read_window, window))
        if len(waiting) > n_ahead:
            yield _unpickle_batches(waiting.popleft().result())
    while waiting:
        yield _unpickle_batches(waiting.popleft().result())


def _unpickle_batches(pickled: bytes) -> list[CollatedBatch]:
    batches: list[CollatedBatch] = pickle.loads(pickled)
    # Unpickling adds every sparse tensor to a list that torch.load validates later, and which would keep them all in
    # memory; this call validates and clears the list.
    torch._utils._validate_loaded_sparse_tensors()  # type: ignore[no-untyped-call]
    return batches


# The reader of this process, if it is a worker.
_worker_readers: list[WindowReader] = []


def _start_worker(pickled: bytes) -> None:
    torch.set_num_threads(1)
    _worker_readers.append(pickle.loads(pickled))


def _read_window(ids: Sequence[int]) -> bytes:
    # Pickled by value: shared memory is small in many containers, and is lost if the process that created it dies.
    return pickle.dumps(_worker_readers[0][ids], protocol=5)


def pickle_reader(reader: WindowReader) -> bytes:
    """Return a reader, pickled for workers.

    Raises:
        UsageError: it cannot be pickled.
    """
    try:
        return pickle.dumps(reader)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise UsageError(
            problem(
                "the task cannot be sent to worker processes",
                got=str(error).splitlines()[0],
                expected="a task named as file.py:name, or a task that can be pickled",
                remedy="use 0 workers, or pass the task as file.py:name",
            )
        ) from error


def _dead_worker_message(got: str) -> str:
    return problem(
        "a worker process that reads data died",
        got=got.splitlines()[0],
        expected="workers that run until all rows are read",
        remedy="use fewer --workers or a smaller --batch-size if memory ran out; --workers 0 shows the task's error",
    )
