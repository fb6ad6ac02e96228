"""InfluenceIndex: an open index that returns proponents and opponents of queries, and self-influence."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tracin_ann.choices import CURVATURES, DAMPED_SCORES, SIDE_NAMES, ScoreName, SideName
from tracin_ann.device import resolve_device
from tracin_ann.distributed import (
    ServiceLauncher,
    ShardOptions,
    ShardSearch,
    ShardTask,
    describe_bad_launcher,
    open_shard_search,
)
from tracin_ann.errors import UnknownRowError, UsageError, problem
from tracin_ann.features import IndexTask, RunOptions, TaskRunner, check_spec, load_index_task
from tracin_ann.results import Answer, Answers, Id, RankedRows, SelfInfluence
from tracin_ann.scoring import (
    ExactProgress,
    QueryOptions,
    QueryRequest,
    Ranker,
    Score,
    ScoreMaker,
    exact_self_influence,
    open_score_maker,
    require_token_losses,
)
from tracin_ann.search import FlatIndex, GpuScan, SearchIndex, load_index, open_scan
from tracin_ann.store import (
    FEATURES,
    Columns,
    FeatureStore,
    FeatureView,
    Lease,
    Manifest,
    RowFilter,
    RowTable,
    SketchSpec,
    SkippedRows,
    check_generation,
    generation_folder,
    read_columns,
    read_removed_ids,
    read_skipped_rows,
    read_unlisted_ids,
    select_listed_rows,
    take_lease,
)
from tracin_ann.task import Description, Task, absolute_reference, open_examples
from tracin_ann.types import Float32, Float64, Int64, ProgressCallback, ignore_progress

_NUMBERS_AT_ONCE = 1 << 23
"""Numbers of stored rows that are in memory at a time."""
logger = logging.getLogger(__name__)


class InfluenceIndex:
    """A finished index, opened by `InfluenceIndex.open`; it reads one generation until it is closed."""

    def __init__(self, directory: Path, manifest: Manifest, task: IndexTask) -> None:
        self.directory, self.manifest = directory, manifest
        self._folder = generation_folder(directory, manifest.generation)
        self._task, self._options = task, task.options
        self._store = FeatureStore(directory / FEATURES, manifest.build.layout)
        self._lease: Lease | None = None
        self._workers: ShardSearch | None = None

    @classmethod
    def open(  # noqa: PLR0913
        cls,
        directory: str | os.PathLike[str],
        task: Task | str | None = None,
        *,
        arguments: Mapping[str, str] | None = None,
        device: str = "auto",
        batch_size: int = 64,
        memory_bytes: int | None = None,
        launcher: ServiceLauncher | None = None,
        shard_options: ShardOptions | None = None,
    ) -> InfluenceIndex:
        """Open a finished index; `close`, or the end of a `with` block, closes it.

        With a launcher, workers search the index until it is closed: one for each shard of `--index-shards`, or for
        another index as many as the launcher starts. Each searches the lists or codes of its shard, scans a range of
        the stored rows, and computes exact scores. A worker that ends is started again and asked again. Workers import
        the task by its name; if it is given as an object, this process computes exact scores.

        Args:
            directory: the index directory.
            task: the task, or its name if it has moved; None: the name that the build recorded, if that is a file below
                the current directory that defines a task (`load_named_task`).
            arguments: for a task that is a function; None: those that the build recorded.
            device: `auto` or a device's name, see `resolve_device`.
            batch_size: examples per forward pass.
            memory_bytes: the largest number of bytes of weights that remain in memory between queries; None: a quarter
                of the device's free memory.
            launcher: starts workers: a `ProcessLauncher`, whose devices they use in turn, in a script with
                `if __name__ == "__main__":`; or a `RayLauncher`, whose nodes have the index, the task and its data
                under the same paths. None: this process does the work.
            shard_options: deadline and partial results of searches by workers.

        Raises:
            DamagedIndexError: a file is missing or altered, or the directory holds no finished index.
            UsageError: there are options of workers without a launcher, the launcher is none, or there is no place for
                a worker.
            WorkerError: a worker does not start.
        """
        if launcher is None and shard_options is not None:
            expected, remedy = "a launcher", "pass a launcher, such as ProcessLauncher"
            raise UsageError(problem("there are no workers", got="shard_options", expected=expected, remedy=remedy))
        if launcher is not None and (isinstance(launcher, type) or not isinstance(launcher, ServiceLauncher)):
            raise UsageError(describe_bad_launcher(launcher))
        path = Path(directory)
        manifest, lease = take_lease(path)
        check_generation(path, manifest, deep=True)
        options = RunOptions(
            resolve_device(device),
            batch_size,
            manifest.build.random_data,
            precision="bf16" if manifest.build.spec.precision == "bf16" else "fp32",
            channels_last=manifest.build.channels_last,
            preconditioner=manifest.build.spec.preconditioner,  # type: ignore[arg-type]
        )
        find_task = partial(load_index_task, task, arguments, manifest, path)
        index = cls(path, manifest, IndexTask(path, manifest, find_task, options, memory_bytes))
        # Until the index is closed, its lease prevents writers from removing the files of this generation.
        index._lease = lease
        index._store.check(manifest.features)
        if launcher is not None:
            name = None if isinstance(task, Task) else task or manifest.build.task.reference
            shard_task = None
            if name is not None:
                # Workers import it after this process, which rejects names that it must not import.
                name = absolute_reference(name)
                shard_task = ShardTask(path.absolute(), manifest, name, arguments, options, memory_bytes)
            index._workers = open_shard_search(
                index._loaded_index, index._folder, index._store, shard_task, launcher, shard_options or ShardOptions()
            )
        return index

    def __enter__(self) -> InfluenceIndex:
        """Return the index."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the index."""
        self.close()

    def close(self) -> None:
        """End the workers, if there are any, and allow writers to remove the files of this generation."""
        if self._workers is not None:
            self._workers.close()
        if self._lease is not None:
            self._lease.close()

    def __len__(self) -> int:
        """Return N."""
        return self.manifest.build.layout.n_rows

    @property
    def task(self) -> Task:
        """Return the task; a named task is imported at the first access.

        Raises:
            UsageError: it cannot be found.
        """
        return self._task.task

    @property
    def runner(self) -> TaskRunner:
        """Return the task's data and model, after the task is compared with the spec field by field.

        Raises:
            IndexMismatchError: a field differs.
        """
        return self._task.runner

    @contextmanager
    def release_model(self) -> Iterator[None]:
        """Let other threads use the index and its model inside, where a method of the index reports progress.

        To be called by a progress callback, in the thread that it is called in. The method goes on after the block.

        Raises:
            CheckpointError: a checkpoint cannot be loaded again afterwards.
            TaskError: somebody has replaced parts of the model inside.
        """
        with self._task.release_model():
            yield

    def expect(self, sketch: str | None = None, dim: int | None = None, seed: int | None = None) -> None:
        """Check the sketch, dimension and seed that the index was built with.

        Raises:
            IndexMismatchError: one differs.
        """
        built = self.manifest.build.spec
        expected = SketchSpec(
            sketch if sketch is not None else built.sketch.name,
            built.sketch.version,
            dim if dim is not None else built.sketch.dim,
            seed if seed is not None else built.sketch.seed,
        )
        check_spec(built, replace(built, sketch=expected), str(self.directory))

    @property
    def search_index(self) -> SearchIndex:
        """Return the search index over all checkpoints."""
        return self._loaded_index if self._workers is None else self._workers.index

    @cached_property
    def _loaded_index(self) -> SearchIndex:
        rows = select_listed_rows(self._store.view(), read_unlisted_ids(self.directory, self.manifest))
        return load_index(self.manifest.index.kind, self._folder, rows, self._options.device)

    @cached_property
    def _scan(self) -> FlatIndex | GpuScan:
        """Return the exact scan of the stored rows of all checkpoints."""
        rows, device = self._store.view(), self._options.device
        return open_scan(rows, device) if self._workers is None else self._workers.open_scan(rows, device)

    @cached_property
    def rows(self) -> RowTable:
        """Return the columns and ids of the training rows."""
        record = self.manifest.columns
        return RowTable({}) if record is None else read_columns(self._folder / record.name, len(self))

    @property
    def columns(self) -> Columns:
        """Return the columns of the training rows by name; empty if the task defines none."""
        return self.rows.columns

    def id_of(self, side: SideName, row: int) -> Id:
        """Return the task's own id of a row, or the row's position if the task defines no ids."""
        if side == "train":
            return self.rows.id_at(row)
        own = self.runner.id_of(side, row)
        return row if own is None else own

    def ids_of(self, side: SideName, rows: npt.ArrayLike) -> list[Id]:
        """Return the ids of rows, each as from `id_of`."""
        if side == "train":
            return self.rows.ids_at(rows)
        return [self.id_of(side, row) for row in np.asarray(rows).tolist()]

    def positions(self, side: SideName, ids: Sequence[Id]) -> tuple[int, ...]:
        """Return the positions of the rows with these ids of the task; for queries, this reads all of query_data.

        Raises:
            UnknownRowError: there is no such id, or the task defines no ids.
        """
        if side == "train":
            own = [] if self.rows.ids is None else self.rows.ids.tolist()
        else:
            own = self.runner.read_ids(side)
        # Compared as text: on a command line, 7 may be a number or a string.
        places = {str(name): row for row, name in enumerate(own)}
        unknown = [name for name in ids if str(name) not in places]
        if unknown:
            raise UnknownRowError(
                problem(
                    f"no such id in {SIDE_NAMES[side]}",
                    got=repr(unknown[0]),
                    expected=f"one of {len(own):,} ids, such as {own[0]!r}" if own else "a task with ids",
                    remedy="change the ids" if own else "name rows by their positions, or define Task.ids",
                )
            )
        return tuple(places[str(name)] for name in ids)

    @cached_property
    def removed(self) -> Int64:
        """Return the ids of the removed rows, in ascending order; no answer contains them."""
        return read_removed_ids(self.directory, self.manifest)

    @cached_property
    def skipped(self) -> SkippedRows:
        """Return the rows that the build skipped because they are not finite; no answer contains them."""
        return read_skipped_rows(self.directory, self.manifest)

    @property
    def device(self) -> torch.device:
        """Return the device on which the index computes."""
        return self._options.device

    def present(self, rows: RowFilter | None = None) -> Int64:
        """Return the ascending positions of the rows that answers may contain: those that pass the filter.

        Raises:
            UsageError: the filter names an id out of range or an unknown column, or cannot be parsed.
        """
        allowed = (rows or RowFilter()).allowed(len(self), self.columns, self._absent)
        return np.arange(len(self), dtype=np.int64) if allowed is None else allowed

    @cached_property
    def _absent(self) -> Int64:
        return np.union1d(self.removed, self.skipped.row_S)

    def view(self, checkpoints: Sequence[int] | None = None) -> FeatureView:
        """Return the stored feature rows over the chosen checkpoints, for searches and analyses in Python."""
        return self._store.view(self._check_checkpoints(checkpoints))

    def query(
        self,
        ids: Sequence[int] = (),
        train_ids: Sequence[int] = (),
        options: QueryOptions | None = None,
        progress: ProgressCallback | None = None,
        *,
        together: bool = False,
    ) -> Answers:
        """Return the proponents and opponents of rows of `query_data` (`ids`) and of `train_data` (`train_ids`).

        Args:
            ids: positions in query_data.
            train_ids: positions in train_data.
            options: see QueryOptions.
            progress: called with (stage, done, total).
            together: one answer per side, to the mean of the gradients of its rows: a training row's score is the mean
                of its scores for them.

        Raises:
            IndexMismatchError: the task does not fit the index, by a field or by a canary.
            UsageError: an id or an option is out of range, no query is named, or scores cannot be split by token.
            NonFiniteError: a query's loss or gradient is NaN or infinite.
        """
        if not ids and not train_ids:
            expected = "--ids, --train-ids, --input or --text"
            raise UsageError(problem("no query", got="no ids", expected=expected, remedy="name at least one row"))
        sides: list[tuple[SideName, tuple[int, ...]]] = [("query", tuple(ids)), ("train", tuple(train_ids))]
        plain = self._make_request(options)
        requests = [replace(plain, side=side, ids=chosen, together=together) for side, chosen in sides if chosen]
        return self._answer(requests, progress)

    def query_examples(
        self,
        examples: Any,
        options: QueryOptions | None = None,
        progress: ProgressCallback | None = None,
        *,
        ids: Sequence[int] | None = None,
        together: bool = False,
    ) -> Answers:
        """Return the proponents and opponents of examples that are not in the index.

        An example gets the answer that it would get as a row of `query_data`, to the bit. It is named by its id from
        `Task.ids`, or else by its position; its side is `input`. The answers contain the examples, to describe them.

        Args:
            examples: a list or a map-style data set of examples as `query_data` has them, each as before `collate`.
            options: see QueryOptions.
            progress: called with (stage, done, total).
            ids: positions of the examples that are queries; None: all.
            together: one answer, to the mean of the gradients of the examples.

        Raises:
            IndexMismatchError: the task does not fit the index, by a field or by a canary.
            UsageError: there are no examples, or an id or an option is out of range.
            TaskError: the task's collate or loss fails on the examples.
            NonFiniteError: the loss or gradient of an example is NaN or infinite.
        """
        data = open_examples(examples)
        chosen = tuple(range(len(data)) if ids is None else ids)
        if not chosen:
            raise UsageError(problem("no query", got="no ids", expected="at least one", remedy="name an example"))
        request = replace(self._make_request(options), side="input", ids=chosen, together=together)
        with self.lend(data):
            answers = self._answer([request], progress)
        return Answers(answers, partial(self.describe, examples=data), data)

    @contextmanager
    def lend(self, examples: Any) -> Iterator[None]:
        """Let `examples` be the rows of the side `input`, for calls of this thread inside the block.

        For `contrast`, `features`, `describe` and `analysis.explain`, which take a side; `query_examples` does this
        itself.

        Raises:
            UsageError: they are not a list or a map-style data set, or there are none.
        """
        with self.runner.lend(examples):
            yield

    def contrast(
        self,
        ids: Sequence[int],
        against: Sequence[int],
        side: SideName = "query",
        options: QueryOptions | None = None,
        progress: ProgressCallback | None = None,
    ) -> Answers:
        """Return one answer: training rows that are proponents of `ids` rather than of `against`, and the reverse.

        A row's score is its mean score for `ids` minus its mean score for `against`; `Hit.of_means` holds both. A
        proponent of `ids` that is an opponent of `against` has a positive first and a negative second value.

        Raises:
            UsageError: one of the two sets is empty, or an id or an option is out of range.
            IndexMismatchError: the task does not fit the index, by a field or by a canary.
            NonFiniteError: a row's loss or gradient is NaN or infinite.
        """
        for option, rows in (("--ids", ids), ("--against", against)):
            if not rows:
                raise UsageError(
                    problem(
                        "a contrast needs two sets", got=f"no {option}", expected="rows in both", remedy=f"add {option}"
                    )
                )
        request = self._make_request(options)
        both = replace(request, side=side, ids=(*ids, *against), together=True, n_against=len(against))
        return self._answer([both], progress)

    def _make_request(self, options: QueryOptions | None) -> QueryRequest:
        options = options or QueryOptions()
        allowed = options.rows.allowed(len(self), self.columns, self._absent)
        checkpoints = self._check_checkpoints(options.checkpoints)
        return QueryRequest("query", (), checkpoints, options, self.make_score(options), allowed)

    @property
    def default_score(self) -> ScoreName:
        """Return the score of queries that name none."""
        return self.manifest.default_score

    def name_score(self, options: QueryOptions) -> ScoreName:
        """Return the name of the score that the options name, or of the index's default."""
        return options.score or self.default_score

    def make_score(self, options: QueryOptions | None = None) -> Score:
        """Return the score that the options name, or the index's default.

        Raises:
            UsageError: the stored losses do not allow it, or other options do not.
        """
        options = options or QueryOptions()
        name = self.name_score(options)
        unprojected = {
            "--exact": options.exact,
            "--rerank exact": options.rerank == "exact",
            "--tokens": options.tokens,
        }
        for option, is_given in unprojected.items():
            if is_given and name not in ("tracin", *CURVATURES):
                what, expected = f"{option} needs a score over all parameters", " or ".join(("tracin", *CURVATURES))
                remedy = f"remove {option}, or use another --score"
                raise UsageError(problem(what, got=f"the score {name}", expected=expected, remedy=remedy))
        _check_damping(name, options.damping)
        return self.score_maker.make(name, options.damping)

    @cached_property
    def score_maker(self) -> ScoreMaker:
        """Return what makes the scores of this index."""
        return open_score_maker(self.directory, self.manifest, self._store)

    def score_matrix(self, side: SideName, ids: Sequence[int], options: QueryOptions | None = None) -> Float32:
        """Return the scores [Q, N] of all training rows for queries, from the stored features.

        Column i belongs to row i of train_data, also if answers do not contain it. `score`, `damping` and
        `checkpoints` of the options are used.

        Raises:
            UsageError: there are no ids, an id or an option is out of range, or the stored losses do not allow the
                score.
            IndexMismatchError: the task does not fit the index, by a field or by a canary.
            NonFiniteError: a query's loss or gradient is NaN or infinite.
        """
        return next(self.score_matrices(side, ids, [options or QueryOptions()]))

    def score_matrices(self, side: SideName, ids: Sequence[int], options: Sequence[QueryOptions]) -> Iterator[Float32]:
        """Yield the matrix of `score_matrix` for each of several options; features are computed once for all.

        Raises:
            UsageError: as by `score_matrix`.
            IndexMismatchError: the task does not fit the index, by a field or by a canary.
            NonFiniteError: a query's loss or gradient is NaN or infinite.
        """
        if not ids:
            raise UsageError(problem("no query", got="no ids", expected="at least one", remedy="name at least one row"))
        self.runner.check_ids(side, ids)
        requests = [self._make_request(each) for each in options]
        used = sorted({checkpoint for request in requests for checkpoint in request.checkpoints})
        feature_QCD = self.features(side, ids, used).reshape(len(ids), len(used), self.manifest.build.layout.dim)
        for request in requests:
            places = [used.index(checkpoint) for checkpoint in request.checkpoints]
            chosen_QF = feature_QCD[:, places].reshape(len(ids), -1)
            vector_QF = request.score.weigh(chosen_QF, request.checkpoints).vector_QF
            score_QN = np.zeros((len(ids), len(self)), np.float32)
            for ids_B, row_BF in self._read_blocks(request.score, request.checkpoints):
                np.matmul(vector_QF, row_BF.T, out=score_QN[:, ids_B[0] : ids_B[-1] + 1])
            yield score_QN

    def _read_blocks(self, score: Score, checkpoints: Sequence[int]) -> Iterator[tuple[Int64, Float32]]:
        """Return (ids, rows as the score multiplies them) of a bounded number of rows at a time."""
        dim = self.manifest.build.layout.dim * len(checkpoints)
        return score.rows(checkpoints).blocks(max(1, _NUMBERS_AT_ONCE // dim))

    def _answer(self, requests: Sequence[QueryRequest], progress: ProgressCallback | None) -> Answers:
        for request in requests:
            self.runner.check_ids(request.side, request.ids)
            if request.options.tokens:
                require_token_losses(self.task, "train")
        rates = [checkpoint.learning_rate for checkpoint in self.manifest.build.spec.checkpoints]
        answers: list[Answer] = []
        for request in requests:
            ranking = Ranker(
                store=self._store,
                index=self.search_index,
                scan=self._scan,
                record=self.manifest.index,
                fidelity=self.manifest.fidelity,
                score_fidelity=self.manifest.score_fidelity,
                rates=rates,
                runner=self.runner,
                ids_of=self.ids_of,
                progress=ExactProgress(
                    _count_rows(progress, self._count_exact_units(request)), progress or ignore_progress
                ),
                workers=self._workers,
            )
            queries_QF = self.features(request.side, request.ids, request.checkpoints)
            answers += ranking.answers(request, queries_QF)
        if len(self.skipped):
            answers = [replace(answer, how=f"{answer.how}; {self.skipped.summary}") for answer in answers]
        return Answers(answers, self.describe)

    def _count_exact_units(self, request: QueryRequest) -> int:
        """Return the largest number of rows × checkpoints for which exact scores of a request may be computed."""
        options = request.options
        per_query = 2 * max(options.k, options.candidates)
        rows = len(self) if options.exact else min(len(self), len(request.ids) * per_query)
        return rows * len(request.checkpoints)

    def features(self, side: SideName, ids: Sequence[int], checkpoints: Sequence[int] | None = None) -> Float32:
        """Compute the feature rows [Q, F] of examples over the chosen checkpoints.

        Raises:
            IndexMismatchError: a canary shows that the task is not the one that the index was built from.
            NonFiniteError: an example's loss or gradient is NaN or infinite.
        """
        return self._task.features(side, ids, self._check_checkpoints(checkpoints))

    def self_influence(  # noqa: PLR0913
        self,
        k: int | None = None,
        *,
        checkpoints: Sequence[int] | None = None,
        exact: bool = False,
        rows: RowFilter | None = None,
        score: ScoreName = "tracin",
        damping: float | None = None,
        progress: ProgressCallback | None = None,
    ) -> RankedRows:
        """Return training rows by descending self-influence: the first k, or all.

        Self-influence is the score of a row for itself: Σ_c η_c ‖∇ℓ(w_c, z)‖² for `tracin`. It uses the stored squared
        norms (estimates from the sketch unless the index was built with `norms="exact"`), or with `exact` computes them
        for every row, which needs the task. For a score with a curvature matrix, it is Σ_c √(φᵀ(K + λI)⁻¹φ), the sum of
        the roots of the row's leverages, from the stored features; `damping` is its λ, None: by the automatic rule.

        Raises:
            UsageError: k or a checkpoint is out of range, or the score has no self-influence, no exact one, or no
                damping.
            IndexMismatchError: with `exact`, the task does not fit the index.
        """
        if k is not None and k < 1:
            raise UsageError(problem("bad -k", got=k, expected="1 or more", remedy="change -k"))
        _check_damping(score, damping)
        chosen = self._check_checkpoints(checkpoints)
        ids = self.present(rows)
        if score != "tracin":
            options = QueryOptions(score=score, exact=exact, damping=damping)
            scores_N = self._score_rows_themselves(options, chosen, progress or ignore_progress)[ids]
        elif exact:
            self._task.check_canaries(chosen)
            counted = _count_rows(progress, len(ids) * len(chosen))
            scores_N = exact_self_influence(self.runner, ids.tolist(), chosen, counted)
        else:
            rates = np.array([self.manifest.build.spec.checkpoints[c].learning_rate for c in chosen])
            scores_N = (self._store.sqnorms(chosen) @ rates)[ids]
        order = np.lexsort((ids, -scores_N))[:k]
        return RankedRows(
            [
                SelfInfluence(self.rows.id_at(int(ids[i])), int(ids[i]), float(scores_N[i]), rank)
                for rank, i in enumerate(order, start=1)
            ],
            self.describe,
        )

    def _score_rows_themselves(
        self, options: QueryOptions, checkpoints: Sequence[int], progress: ProgressCallback
    ) -> Float64:
        """Return the score of every row for itself, [N]; `progress` is called with ("self-influence", rows done, N).

        Raises:
            UsageError: the score is none with a curvature matrix, or the options request exact scores.
        """
        if options.score not in CURVATURES:
            what, remedy = "the cosine of a row and itself is 1", "change --score"
            expected = f"tracin or {' or '.join(CURVATURES)}"
            raise UsageError(problem(what, got=f"--score {options.score}", expected=expected, remedy=remedy))
        if options.exact:
            what, got = "leverages are computed from the stored features", f"--exact and --score {options.score}"
            raise UsageError(problem(what, got=got, expected="one of the two", remedy="remove one of the two"))
        score, own_N = self.make_score(options), np.zeros(len(self))
        for ids_B, row_BF in self._read_blocks(score, checkpoints):
            vector_BF = score.weigh(row_BF, checkpoints).vector_QF
            own_N[ids_B] = np.einsum("bf,bf->b", vector_BF.astype(np.float64), row_BF)
            progress("self-influence", int(ids_B[-1]) + 1, len(self))
        return own_N

    def describe(self, side: SideName, row: int, examples: Any = None) -> Description | None:
        """Return the task's description of a row, or None if it defines none or cannot be found.

        Args:
            side: the row's data set.
            row: its position.
            examples: the rows of the side `input`; None: those that are lent.
        """
        if not self._has_descriptions:
            return None
        with nullcontext() if examples is None else self.lend(examples):
            return self.runner.describe(side, row)

    def describe_rows(self, side: SideName, rows: Sequence[int]) -> list[Description | None]:
        """Return the descriptions of rows, as `describe` does, in less time than one at a time."""
        return self.runner.describe_rows(side, rows) if self._has_descriptions else [None] * len(rows)

    described = describe
    """The name of `describe` in earlier versions."""

    @cached_property
    def _has_descriptions(self) -> bool:
        try:
            return self.task.describe is not None
        except UsageError as error:
            logger.warning("rows have no descriptions: %s", error)
            return False

    def _check_checkpoints(self, checkpoints: Sequence[int] | None) -> tuple[int, ...]:
        n_checkpoints = len(self.manifest.build.spec.checkpoints)
        chosen = tuple(range(n_checkpoints)) if checkpoints is None else tuple(dict.fromkeys(checkpoints))
        wrong = [c for c in chosen if not 0 <= c < n_checkpoints]
        if wrong or not chosen:
            raise UsageError(
                problem(
                    "bad --checkpoints",
                    got=wrong[0] if wrong else "none",
                    expected=f"0 to {n_checkpoints - 1}",
                    remedy="change --checkpoints",
                )
            )
        if not any(self.manifest.build.spec.checkpoints[c].learning_rate for c in chosen):
            raise UsageError(
                problem(
                    "bad --checkpoints",
                    got="only checkpoints of learning rate 0",
                    expected="one with a positive learning rate",
                    remedy="change --checkpoints",
                )
            )
        return chosen


def _check_damping(score: ScoreName, damping: float | None) -> None:
    """Reject a damping of a score that has none.

    Raises:
        UsageError: the score has no curvature matrix.
    """
    if damping is not None and score not in DAMPED_SCORES:
        what, expected = "--damping has no effect", f"--score {' or '.join(DAMPED_SCORES)}"
        remedy = "remove --damping, or change --score"
        raise UsageError(problem(what, got=f"the score {score}", expected=expected, remedy=remedy))


def _count_rows(progress: ProgressCallback | None, total: int) -> Callable[[int], None] | None:
    """Return a function that adds rows to the number done and reports it."""
    if progress is None:
        return None
    done = 0

    def add(rows: int) -> None:
        nonlocal done
        done += rows
        progress("exact scores", done, total)

    return add
