"""Rows read and collated: in this process, or ahead of it in workers; rows of like length together.

Workers are spawned, never forked (a fork after threads have started may hang in them), and open a task
that has a name by that name, so that nothing but row ids is sent to them.
"""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import get_context
from types import TracebackType
from typing import Any

import torch

from tracin_ann.choices import SideName
from tracin_ann.errors import TaskError, UsageError, problem
from tracin_ann.task.data import open_data
from tracin_ann.task.nested import length, pin_memory
from tracin_ann.task.references import TaskReference, load_task
from tracin_ann.task.task import Task

SORTED_BATCHES = 16
_SAMPLED = 32
_AHEAD = 2


@dataclass(frozen=True)
class CollatedBatch:
    """A batch as collate made it.

    Attributes:
        ids: of the rows, in its order.
        inputs: what the loss takes.
        examples: where they cannot be read again.
        sizes: of the rows, by `length`; empty where PyTorch's own collate has stacked them, which takes equal ones.
    """

    ids: tuple[int, ...]
    inputs: Any
    examples: list[Any] | None = None
    sizes: tuple[int, ...] = ()


@dataclass(frozen=True)
class BatchOptions:
    """How rows become batches.

    Attributes:
        size: B.
        by_length: rows of a window of 16 batches are sorted by length first.
        keep_examples: examples come with their batch.
        workers: processes that read ahead; 0: this one reads.
        pinned: batches are put into page-locked memory, from where they go to a GPU unwaited for.
    """

    size: int
    by_length: bool = False
    keep_examples: bool = False
    workers: int = 0
    pin_memory: bool = False

    @property
    def window(self) -> int:
        """Return the rows that are read together."""
        return self.size * (SORTED_BATCHES if self.by_length else 1)


class Reader:
    """One side's rows: `reader[ids]` reads a window of rows and returns its batches; can be sent to a worker."""

    def __init__(self, task: Task, side: SideName, data: Any, options: BatchOptions, origin: TaskReference) -> None:
        self._task, self._side, self._data, self._options, self._origin = task, side, data, options, origin

    def __getstate__(self) -> dict[str, Any]:
        """Return the state that is sent: without the data where a worker can open the task by its name."""
        state = dict(vars(self))
        if self._origin.reference is not None:
            del state["_task"], state["_data"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the state, and open the task in this process if it was not sent."""
        vars(self).update(state)
        if self._origin.reference is not None:
            self._task = load_task(self._origin.reference, self._origin.arguments)
            self._data = open_data(self._task, self._side)

    def __getitem__(self, ids: Sequence[int]) -> list[CollatedBatch]:
        """Return the batches of these rows."""
        return make_batches(self._task, ids, [self._data[i] for i in ids], self._options)


def make_batches(task: Task, ids: Sequence[int], examples: list[Any], options: BatchOptions) -> list[CollatedBatch]:
    """Return these examples in batches: in order, or by falling length."""
    order = list(range(len(ids)))
    sizes = [length(example) for example in examples] if options.by_length or task.collate is not None else []
    if options.by_length:
        order.sort(key=lambda j: -sizes[j])
    batches = []
    for start in range(0, len(order), options.size):
        chosen = order[start : start + options.size]
        given = [examples[j] for j in chosen]
        kept = given if options.keep_examples else None
        own = tuple(sizes[j] for j in chosen) if sizes else ()
        batches.append(CollatedBatch(tuple(ids[j] for j in chosen), task.collate_rows(given), kept, own))
    return batches


def differ_in_length(data: Any) -> bool:
    """Return whether some rows spread over a data set are of unlike length."""
    n_rows = len(data)
    few = {round(j * (n_rows - 1) / (_SAMPLED - 1)) for j in range(_SAMPLED)}
    return len({length(data[i]) for i in few}) > 1


class Reading:
    """Spans of rows, read one after another; a context, so that workers end with it.

    Args:
        reader: of the side.
        spans: ids of the rows of each span, in the order in which they will be asked for.
        options: as the reader's.
    """

    def __init__(self, reader: Reader, spans: Sequence[Sequence[int]], options: BatchOptions) -> None:
        self._reader, self._options = reader, options
        self._windows = [
            [span[start : start + options.window] for start in range(0, len(span), options.window)] for span in spans
        ]
        self._counts = iter([len(windows) for windows in self._windows])
        self._workers: ProcessPoolExecutor | None = None
        self._batches: Iterator[list[CollatedBatch]] = iter(())

    def __enter__(self) -> Reading:
        """Start the workers, if there are to be any.

        Raises:
            UsageError: they cannot be sent the data.
        """
        windows = [window for span in self._windows for window in span]
        n_workers = min(self._options.workers, len(windows))
        if n_workers:
            self._workers = ProcessPoolExecutor(
                n_workers, get_context("spawn"), initializer=_start_worker, initargs=(pickle_reader(self._reader),)
            )
            self._batches = _ahead(self._workers, windows, _AHEAD * n_workers)
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
                raise TaskError(_dead_worker(str(error))) from error
            for batch in batches:
                yield replace(batch, inputs=pin_memory(batch.inputs)) if self._options.pin_memory else batch


def _ahead(
    workers: ProcessPoolExecutor, windows: Sequence[Sequence[int]], n_ahead: int
) -> Iterator[list[CollatedBatch]]:
    """Yield the windows' batches in order, so many of them being read at a time."""
    waiting: deque[Future[bytes]] = deque()
    for window in windows:
        waiting.append(workers.submit(_read_window, window))
        if len(waiting) > n_ahead:
            yield _received(waiting.popleft().result())
    while waiting:
        yield _received(waiting.popleft().result())


def _received(sent: bytes) -> list[CollatedBatch]:
    batches: list[CollatedBatch] = pickle.loads(sent)
    # Unpickling notes every sparse tensor for torch.load to check, and so keeps it for good; this checks and forgets.
    torch._utils._validate_loaded_sparse_tensors()  # type: ignore[no-untyped-call]
    return batches


# In a worker process: the one reader it serves.
_served: list[Reader] = []


def _start_worker(sent: bytes) -> None:
    torch.set_num_threads(1)
    _served.append(pickle.loads(sent))


def _read_window(ids: Sequence[int]) -> bytes:
    # By value: shared memory is small in many containers, and breaks with the process that made it.
    return pickle.dumps(_served[0][ids], protocol=5)


def pickle_reader(reader: Reader) -> bytes:
    """Return a reader as it is sent to workers.

    Raises:
        UsageError: it cannot be.
    """
    try:
        return pickle.dumps(reader)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise UsageError(
            problem(
                "the task cannot be sent to worker processes",
                got=str(error).splitlines()[0],
                expected="a task that is named (file.py:name), or one that can be pickled",
                remedy="use 0 workers, or name the task",
            )
        ) from error


def _dead_worker(got: str) -> str:
    return problem(
        "a worker process that reads the data died",
        got=got.splitlines()[0],
        expected="workers that live to the end",
        remedy="use fewer --workers or a smaller --batch-size if memory ran out; --workers 0 shows the task's error",
    )
