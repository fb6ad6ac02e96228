"""Search of an index by one worker for each of its shards, which also compute exact scores of rows.

Shapes: N rows, Q queries.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tracin_ann.device import import_faiss, resolve_device
from tracin_ann.distributed.service import ServiceLauncher, ServiceProcess
from tracin_ann.distributed.service_group import Launch, NoReplyError, ServiceGroup
from tracin_ann.errors import UsageError, problem
from tracin_ann.features import IndexTask, RunOptions, load_index_task
from tracin_ann.scoring import Coverage, Queries, RowScorer, make_exact_scorer
from tracin_ann.search import IVFIndex, ListQuery, SearchIndex, ShardFile
from tracin_ann.store import Manifest
from tracin_ann.types import Float32, Float64, Int64

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class ShardOptions:
    """How workers search the shards of an index.

    Attributes:
        deadline_s: seconds until all shards have to answer a search, which is one direction of up to 256 queries; None:
            any.
        allow_partial: return the results of the other shards if some do not answer; at least one has to.
        restarts: how often a worker that ends is started again for one request.
    """

    deadline_s: float | None = None
    allow_partial: bool = False
    restarts: int = 3

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            UsageError: one is out of range.
        """
        if self.deadline_s is not None and not self.deadline_s > 0:
            expected = "more than 0 seconds"
            raise UsageError(
                problem("bad --deadline", got=self.deadline_s, expected=expected, remedy="change --deadline")
            )
        if self.restarts < 0:
            raise UsageError(problem("bad restarts", got=self.restarts, expected="0 or more", remedy="change it"))


@dataclass(frozen=True)
class ShardTask:
    """The task of an index, which workers import by its name.

    Attributes:
        directory: the directory of the index.
        manifest: the manifest of the index.
        name: its name.
        arguments: its arguments; None: those in the manifest.
        options: how the model runs.
        memory_bytes: the largest number of bytes of weights that remain in memory.
        is_remote: the worker is on another machine, which may have other devices: it uses a GPU if it has one.
    """

    directory: Path
    manifest: Manifest
    name: str
    arguments: Mapping[str, str] | None
    options: RunOptions
    memory_bytes: int | None
    is_remote: bool = False

    def open(self) -> IndexTask:
        """Return the task; its first use imports it."""
        find_task = partial(load_index_task, self.name, self.arguments, self.manifest, self.directory)
        options = replace(self.options, device=resolve_device()) if self.is_remote else self.options
        return IndexTask(self.directory, self.manifest, find_task, options, self.memory_bytes)


@dataclass(frozen=True)
class ShardService:
    """What a worker holds: the lists of a shard, memory-mapped, and the task of the index.

    Attributes:
        file: the file of the shard.
        task: the task, which the first request for exact scores imports; None: there are no such requests.
        threads: CPU threads of the worker; None: as the environment says.
    """

    file: ShardFile
    task: ShardTask | None
    threads: int | None

    def open(self) -> ShardService:
        """Return this service after opening the file; called in the worker."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)
            import_faiss().omp_set_num_threads(self.threads)
        _ = self._lists
        return self

    def run(self, request: ListQuery | ExactRequest) -> tuple[Int64, Float32] | Float64:
        """Return the reply to a request."""
        return request.run(self._lists) if isinstance(request, ListQuery) else request.run(self._index_task)

    @cached_property
    def _lists(self) -> Any:
        return self.file.open()

    @cached_property
    def _index_task(self) -> IndexTask:
        assert self.task is not None
        return self.task.open()


@dataclass(frozen=True, eq=False)
class ExactRequest:
    """Exact scores of some rows.

    Attributes:
        queries: the queries; for the side `input`, their ids are positions in `examples`.
        checkpoints: positions of the checkpoints to sum over.
        rows_N: positions of the rows.
        requested_QN: which scores are computed.
        examples: the examples of the side `input`; None for other sides.
    """

    queries: Queries
    checkpoints: tuple[int, ...]
    rows_N: Int64
    requested_QN: Mask
    examples: Sequence[Any] | None

    def run(self, task: IndexTask) -> Float64:
        """Return the scores [Q, N]."""
        runner = task.runner
        with (
            nullcontext() if self.examples is None else runner.lend(self.examples),
            make_exact_scorer(runner, self.queries, self.checkpoints) as scorer,
        ):
            return scorer.scores(self.rows_N.tolist(), self.requested_QN)


class ShardSearch:
    """The workers of an open index, one for each shard; see `open_shard_search`."""

    def __init__(self, group: ServiceGroup, index: IVFIndex, options: ShardOptions, *, has_task: bool) -> None:
        self._group, self._options, self._has_task = group, options, has_task
        self._n_shards, self._index = index.params.shards, index.with_scanner(self.scan)
        self._local = threading.local()

    @property
    def index(self) -> IVFIndex:
        """Return the index, whose shards the workers search."""
        return self._index

    def scan(self, queries: Sequence[ListQuery]) -> list[tuple[Int64, Float32]]:
        """Return the results of the shards that answered.

        A shard without allowed rows is not asked, nor one that did not answer before in the block of `watch`.

        Raises:
            WorkerError: a shard does not answer, and partial results are not allowed or there are none.
        """
        coverage: Coverage = getattr(self._local, "coverage", None) or Coverage(self._n_shards)
        asked = [
            None if shard in coverage.missing or (query.allowed is not None and not len(query.allowed)) else query
            for shard, query in enumerate(queries)
        ]
        replies = self._group.ask(asked, self._options.deadline_s)
        errors = {shard: reply for shard, reply in enumerate(replies) if isinstance(reply, NoReplyError)}
        found = [reply for reply in replies if reply is not None and not isinstance(reply, NoReplyError)]
        if errors and not (self._options.allow_partial and found):
            raise next(iter(errors.values()))
        coverage.is_asked = True
        coverage.missing.update(errors)
        return found

    @contextmanager
    def watch(self) -> Iterator[Coverage]:
        """Record which shards answer the searches of this thread in the block."""
        self._local.coverage = Coverage(self._n_shards)
        try:
            yield self._local.coverage
        finally:
            self._local.coverage = None

    def open_scorer(
        self,
        queries: Queries,
        checkpoints: Sequence[int],
        examples: Sequence[Any] | None,
        progress: Callable[[int], None] | None,
    ) -> RowScorer | None:
        """Return exact scores by the workers; None if the task has no name by which they could import it.

        Scores differ from those of one process by rounding, because rows are in other batches.
        """
        if not self._has_task:
            return None
        if examples is not None:
            examples = [examples[i] for i in queries.ids]
            queries = replace(queries, ids=range(len(examples)))
        empty = np.zeros(0, np.int64), np.zeros((len(queries), 0), dtype=bool)
        return _WorkerScorer(self, ExactRequest(queries, tuple(checkpoints), *empty, examples), progress)

    def score_exactly(self, request: ExactRequest) -> Float64:
        """Return the scores [Q, N] of a request, whose rows are divided among the workers.

        Raises:
            WorkerError: a worker does not answer.
        """
        parts = np.array_split(np.arange(len(request.rows_N)), self._n_shards)
        requests = [
            replace(request, rows_N=request.rows_N[part], requested_QN=request.requested_QN[:, part])
            if len(part)
            else None
            for part in parts
        ]
        scores = []
        for reply in self._group.ask(requests):
            if isinstance(reply, NoReplyError):
                raise reply
            if reply is not None:
                scores.append(reply)
        return np.concatenate([np.zeros((len(request.queries), 0)), *scores], axis=1)

    @property
    def pids(self) -> list[int | None]:
        """Return the process of each worker on this machine; None: it has not been started yet."""
        return self._group.pids

    def close(self) -> None:
        """End the workers."""
        self._group.close()


@dataclass(frozen=True)
class _WorkerScorer:
    """Exact scores by workers; `progress` is called with the number of finished rows."""

    search: ShardSearch
    request: ExactRequest
    progress: Callable[[int], None] | None

    def scores(self, rows: Sequence[int], requested_QN: Mask | None = None) -> Float64:
        """Return scores [Q, N] of these training rows; scores that are not requested are 0."""
        request = self.request
        if requested_QN is None:
            requested_QN = np.ones((len(request.queries), len(rows)), dtype=bool)
        scores_QN = self.search.score_exactly(
            replace(request, rows_N=np.asarray(rows, dtype=np.int64), requested_QN=requested_QN)
        )
        if self.progress is not None:
            self.progress(len(rows) * len(request.checkpoints))
        return scores_QN


def open_shard_search(
    index: SearchIndex,
    folder: Path,
    task: ShardTask | None,
    options: ShardOptions,
    launcher: ServiceLauncher | None = None,
) -> ShardSearch:
    """Start a worker for each shard of an index, and return them.

    Args:
        index: the search index.
        folder: the folder with its files.
        task: the task by its name; None: it has none, and workers do not compute exact scores.
        options: see ShardOptions.
        launcher: starts the workers; None: as processes of this machine.

    Raises:
        UsageError: the index is not one of inverted lists.
        DamagedIndexError: the file of a shard is damaged.
        WorkerError: a worker ends while it starts.
    """
    if not isinstance(index, IVFIndex):
        what, remedy = (
            "the index has no shards",
            "build it with --index ivf --index-shards N, or search without workers",
        )
        raise UsageError(problem(what, got=f"the kind {index.kind}", expected="ivf", remedy=remedy))
    files = index.list_shards(folder.absolute())
    start = ServiceProcess.start if launcher is None else launcher.start_service
    # Together, processes of this machine use as many threads as this one, and as much memory for weights.
    threads = max(1, torch.get_num_threads() // len(files)) if launcher is None else None
    if task is not None and launcher is not None:
        task = replace(task, is_remote=True)
    elif task is not None and task.memory_bytes is not None:
        task = replace(task, memory_bytes=task.memory_bytes // len(files))
    services = [ShardService(file, task, threads) for file in files]
    launches: list[Launch] = [partial(start, service.open) for service in services]
    group = ServiceGroup(launches, options.restarts)
    group.start()
    return ShardSearch(group, index, options, has_task=task is not None)
