"""Workers of an open index: each has a shard of it, searches and scans this shard, and computes exact scores of rows.

A shard is a range of the stored rows, and if the inverted lists or codes of the index are split, those of a file.

Shapes: N rows, Q queries.
"""

from __future__ import annotations

import itertools
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
from tracin_ann.distributed.service import ServiceLauncher
from tracin_ann.distributed.service_group import Launch, NoReplyError, ServiceGroup
from tracin_ann.errors import UsageError, problem
from tracin_ann.features import IndexTask, RunOptions, load_index_task
from tracin_ann.scoring import Coverage, Queries, RowScorer, make_exact_scorer
from tracin_ann.search import (
    CodedScan,
    CodeFile,
    CodeQuery,
    FlatIndex,
    GpuScan,
    IVFIndex,
    ListQuery,
    RescoredIndex,
    RowQuery,
    SearchIndex,
    ShardFile,
    Subset,
)
from tracin_ann.store import FeatureStore, FeatureView, Manifest, PartitionRows, StoreLayout
from tracin_ann.types import Float32, Float64, Int64, RowSource, TopK

Mask = npt.NDArray[np.bool_]
_EXACT_ROWS = 1024
"""Rows of a worker, at least, whose exact scores are computed between two reports of progress."""
_ROWS_PER_QUERY = 8
"""As many rows for each query, at least: each request computes the gradients of the queries again."""


@dataclass(frozen=True)
class ShardOptions:
    """How workers search the shards of an index.

    Attributes:
        deadline_s: seconds until all shards have to answer a search of lists or codes, which is one direction of up to
            256 queries, or a scan, which is both directions of all queries; None: any.
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
        is_number = isinstance(self.deadline_s, int | float)
        if self.deadline_s is not None and not (is_number and 0 < self.deadline_s <= threading.TIMEOUT_MAX):
            expected = f"more than 0 and at most {threading.TIMEOUT_MAX:.0f} seconds"
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
        memory_bytes: the largest number of bytes of weights that remain in memory; None: a quarter of the free memory.
        n_sharing: number of workers that share this memory.
    """

    directory: Path
    manifest: Manifest
    name: str
    arguments: Mapping[str, str] | None
    options: RunOptions
    memory_bytes: int | None
    n_sharing: int = 1

    def open(self, device: str | None) -> IndexTask:
        """Return the task on a device (None: a GPU if there is one); its first use imports it."""
        find_task = partial(load_index_task, self.name, self.arguments, self.manifest, self.directory)
        options = replace(self.options, device=resolve_device(device or "auto"))
        return IndexTask(self.directory, self.manifest, find_task, options, self.memory_bytes, self.n_sharing)


@dataclass(frozen=True)
class ShardService:
    """What a worker is sent: its shard, and the task of the index.

    Attributes:
        file: the file of its inverted lists or codes; None: they are not split, or there are none.
        folder: the folder of the feature files.
        layout: of the feature files.
        partitions: those whose rows it scans; if there are more workers than partitions, some have none.
        task: the task, which the first request for exact scores imports; None: there are no such requests.
        threads: CPU threads of the worker; None: as the environment says.
    """

    file: ShardFile | CodeFile | None
    folder: Path
    layout: StoreLayout
    partitions: range
    task: ShardTask | None
    threads: int | None

    @property
    def ids(self) -> range:
        """Return the rows that it scans."""
        return PartitionRows(FeatureStore(self.folder, self.layout).view(), self.partitions).ids

    def open(self, device: str | None) -> OpenShard:
        """Return the open shard, which computes exact scores on a device (None: its own choice)."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)
            import_faiss().omp_set_num_threads(self.threads)
        return OpenShard(self, None if self.file is None else self.file.open(), device)


class OpenShard:
    """What a worker holds: the lists or codes and the memory-mapped feature files of its shard, and the task."""

    def __init__(self, service: ShardService, index: Any, device: str | None) -> None:
        """Store the arguments; feature files are opened, and the task is imported, when they are first used.

        Args:
            service: what the worker was sent.
            index: the lists or codes of its shard; None: it has none.
            device: of exact scores; None: its own choice.
        """
        self._service, self._index, self._device = service, index, device
        self._store = FeatureStore(service.folder, service.layout)

    def run(self, request: ListQuery | CodeQuery | ScanRequest | ExactRequest) -> Any:
        """Return the reply to a request."""
        return request.run(self._index) if isinstance(request, (ListQuery, CodeQuery)) else request.run(self)

    def view_rows(self, checkpoints: tuple[int, ...], *, cosine: bool) -> PartitionRows:
        """Return the stored rows that this worker scans."""
        return PartitionRows(self._store.view(checkpoints, cosine=cosine), self._service.partitions)

    @cached_property
    def task(self) -> IndexTask:
        """Return the task."""
        assert self._service.task is not None
        return self._service.task.open(self._device)


@dataclass(frozen=True, eq=False)
class ScanRequest:
    """A scan of the stored rows of a shard.

    Attributes:
        query: the queries, for all rows.
        mask: one bit for each row of the shard, which says whether it may be a result; None: all may.
        checkpoints: positions of the checkpoints of the rows.
        cosine: whether each checkpoint's part of a row is divided by its norm.
    """

    query: RowQuery
    mask: npt.NDArray[np.uint8] | None
    checkpoints: tuple[int, ...]
    cosine: bool

    def run(self, shard: OpenShard) -> list[TopK]:
        """Return the results for each sign."""
        rows, allowed = shard.view_rows(self.checkpoints, cosine=self.cosine), None
        if self.mask is not None:
            allowed = rows.ids.start + np.flatnonzero(np.unpackbits(self.mask, count=len(rows)))
        return replace(self.query, allowed=allowed).run(rows)


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

    def run(self, shard: OpenShard) -> Float64:
        """Return the scores [Q, N]."""
        runner = shard.task.runner
        with (
            nullcontext() if self.examples is None else runner.lend(self.examples),
            make_exact_scorer(runner, self.queries, self.checkpoints) as scorer,
        ):
            return scorer.scores(self.rows_N.tolist(), self.requested_QN)


class ShardSearch:
    """The workers of an open index; see `open_shard_search`."""

    def __init__(
        self, group: ServiceGroup, index: SearchIndex, services: Sequence[ShardService], options: ShardOptions
    ) -> None:
        """Store the arguments.

        Args:
            group: the workers.
            index: the search index.
            services: what each worker was sent.
            options: see ShardOptions.
        """
        self._group, self._options = group, options
        self._ids = [service.ids for service in services]
        self._has_task = services[0].task is not None
        self._has_files = services[0].file is not None
        self._local = threading.local()
        self._plain_index = index

    @property
    def index(self) -> SearchIndex:
        """Return the index, whose files and exact scans are searched by the workers.

        It is not stored: it refers to this object, and a cycle of references would keep the workers of an index that
        nobody closed until Python's garbage collector runs.
        """
        index = self._plain_index
        if isinstance(index, (FlatIndex, GpuScan)):
            return self.open_scan(index.source, index.device)
        if self._has_files and isinstance(index, (IVFIndex, CodedScan)):
            index = index.with_scanner(self.search_files)
        view = index.source if isinstance(index, RescoredIndex) else None
        view = view.source if isinstance(view, Subset) else view
        if isinstance(index, RescoredIndex) and isinstance(view, FeatureView):
            return index.with_row_scanner(partial(self.scan_rows, view))
        return index

    def open_scan(self, rows: RowSource, device: torch.device) -> FlatIndex:
        """Return the exact scan of rows: by the workers if these are rows of the feature files.

        Args:
            rows: the rows.
            device: of scans that are not by the workers.
        """
        view = rows.source if isinstance(rows, Subset) else rows
        scanner = partial(self.scan_rows, view) if isinstance(view, FeatureView) else None
        return FlatIndex(rows, device, scanner=scanner)

    def search_files(self, queries: Sequence[ListQuery | CodeQuery]) -> list[tuple[Int64, Float32]]:
        """Return the results of the shards that answered; a shard without allowed rows is not asked.

        Raises:
            WorkerError: a shard does not answer, and partial results are not allowed or there are none.
        """
        return self._ask([None if _is_empty(query.allowed) else query for query in queries])

    def scan_rows(self, view: FeatureView, query: RowQuery) -> list[list[TopK]]:
        """Return the results of the shards that answered, for each sign; see `search_files`."""
        request = ScanRequest(replace(query, allowed=None), None, view.checkpoints, view.cosine)
        requests: list[ScanRequest | None] = []
        for ids in self._ids:
            allowed = query.allowed
            if allowed is not None:
                allowed = allowed[slice(*np.searchsorted(allowed, [ids.start, ids.stop]))]
            if not ids or _is_empty(allowed):
                requests.append(None)
            elif allowed is None or len(allowed) == len(ids):
                requests.append(request)
            else:
                # Positions of all rows but a few would be 64 times as large.
                is_allowed = np.zeros(len(ids), bool)
                is_allowed[allowed - ids.start] = True
                requests.append(replace(request, mask=np.packbits(is_allowed)))
        return self._ask(requests)

    def _ask(self, requests: Sequence[Any | None]) -> list[Any]:
        """Return the replies to the requests, one for each shard; None: the shard is not asked.

        Nor is a shard that did not answer before in the block of `watch`.

        Raises:
            WorkerError: a shard does not answer, and partial results are not allowed or there are none.
        """
        coverage: Coverage = getattr(self._local, "coverage", None) or Coverage(len(self._ids))
        asked = [None if shard in coverage.missing else request for shard, request in enumerate(requests)]
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
        self._local.coverage = Coverage(len(self._ids))
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
        parts = np.array_split(np.arange(len(request.rows_N)), len(self._ids))
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
    def n_shards(self) -> int:
        """Return the number of workers."""
        return len(self._ids)

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
        request, rows_N = self.request, np.asarray(rows, dtype=np.int64)
        scores_QN = np.zeros((len(request.queries), len(rows)))
        if requested_QN is None:
            requested_QN = np.ones(scores_QN.shape, dtype=bool)
        step = self.search.n_shards * max(_EXACT_ROWS, _ROWS_PER_QUERY * len(request.queries.ids))
        for start in range(0, len(rows), step):
            block = slice(start, start + step)
            part = replace(request, rows_N=rows_N[block], requested_QN=requested_QN[:, block])
            scores_QN[:, block] = self.search.score_exactly(part)
            if self.progress is not None:
                self.progress(len(part.rows_N) * len(request.checkpoints))
        return scores_QN


def open_shard_search(
    index: SearchIndex,
    folder: Path,
    store: FeatureStore,
    task: ShardTask | None,
    launcher: ServiceLauncher,
    options: ShardOptions,
) -> ShardSearch:
    """Start the workers of an index, and return them: one for each file of a split index, or as many as are launched.

    Args:
        index: the search index.
        folder: the folder with its files.
        store: the stored features.
        task: the task by its name; None: it has none, and workers do not compute exact scores.
        launcher: starts the workers.
        options: see ShardOptions.

    Raises:
        DamagedIndexError: the file of a shard is damaged.
        UsageError: there is no place for a worker.
        WorkerError: a worker ends while it starts.
    """
    files: list[ShardFile | CodeFile | None] = []
    if isinstance(index, (IVFIndex, CodedScan)) and index.params.shards > 1:
        files += index.list_shards(folder.absolute())
    else:
        files += [None] * launcher.count_services()
    threads = None
    if launcher.is_local:
        # Together, workers of this machine use as many threads as this process, and as much memory for weights.
        threads = max(1, torch.get_num_threads() // len(files))
        task = None if task is None else replace(task, n_sharing=len(files))
    edges = [store.layout.n_partitions * number // len(files) for number in range(len(files) + 1)]
    services = [
        ShardService(file, store.directory.absolute(), store.layout, range(first, last), task, threads)
        for file, (first, last) in zip(files, itertools.pairwise(edges), strict=True)
    ]
    launches: list[Launch] = [
        partial(launcher.start_service, service.open, number) for number, service in enumerate(services)
    ]
    group = ServiceGroup(launches, options.restarts)
    group.start()
    return ShardSearch(group, index, services, options)


def _is_empty(allowed: Int64 | None) -> bool:
    return allowed is not None and not len(allowed)
