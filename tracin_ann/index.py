"""Open an index and ask it: proponents and opponents of queries, and self-influence."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tracin_ann.absent import Skipped, listed_rows, removed_ids, skipped_rows, unlisted_ids
from tracin_ann.answers import Answer, QueryOptions, SelfInfluence
from tracin_ann.canaries import Canaries, read_canaries
from tracin_ann.columns import RowFilter, read_columns
from tracin_ann.device import resolve_device
from tracin_ann.errors import IndexMismatchError, NonFiniteError, UsageError, problem
from tracin_ann.exact import exact_self_influence
from tracin_ann.features import FeatureExtractor, FeatureOptions
from tracin_ann.generations import check, folder_of, leased
from tracin_ann.loading import SideName
from tracin_ann.locks import Lease
from tracin_ann.manifest import FEATURES, Manifest
from tracin_ann.passes import LoadedModel, Passes, PassOptions
from tracin_ann.ranking import Question, Ranking
from tracin_ann.search import FlatIndex, IVFIndex, SearchIndex
from tracin_ann.sketch import make_sketch
from tracin_ann.spec import FeatureSpec, SketchSpec, checkpoint_specs, data_digest, model_digest, parameter_specs
from tracin_ann.store import FeatureStore, FeatureView
from tracin_ann.task import Description, Task, load_task
from tracin_ann.types import Float32, Int64, ProgressCallback


class InfluenceIndex:
    """A finished index, opened by `InfluenceIndex.open`; answers from one manifest."""

    def __init__(
        self, directory: Path, manifest: Manifest, find_task: Callable[[], Task], options: PassOptions
    ) -> None:
        self.directory, self.manifest = directory, manifest
        self._folder = folder_of(directory, manifest.generation)
        self._find_task, self._options = find_task, options
        self._store = FeatureStore(directory / FEATURES, manifest.build.layout)
        self._lease: Lease | None = None

    @classmethod
    def open(
        cls,
        directory: str | os.PathLike[str],
        task: Task | str | None = None,
        *,
        arguments: Mapping[str, str] | None = None,
        device: str = "auto",
        batch_size: int = 64,
    ) -> InfluenceIndex:
        """Open a finished index.

        Args:
            directory: where `build` made it.
            task: the task, or its name where it moved; None: as the build was told.
            arguments: for a task that is a function; None: as the build was told.
            device: `auto` or a device's name, as `resolve_device` takes it.
            batch_size: examples a forward.

        Raises:
            DamagedIndexError: a file is missing or altered, or there is no finished index.
        """
        path = Path(directory)
        manifest, lease = leased(path)
        check(path, manifest, deep=True)
        options = PassOptions(
            resolve_device(device),
            batch_size,
            manifest.build.random_data,
            precision="bf16" if manifest.build.spec.precision == "bf16" else "fp32",
            channels_last=manifest.build.channels_last,
        )
        index = cls(path, manifest, lambda: _found(task, arguments, manifest, path), options)
        # Held as long as the index: until then, nobody sweeps its generation's files.
        index._lease = lease
        index._store.check(manifest.features)
        return index

    def __len__(self) -> int:
        """Return N."""
        return self.manifest.build.layout.n_rows

    @cached_property
    def task(self) -> Task:
        """Return the task, imported now if the build was told its name.

        Raises:
            UsageError: it cannot be found.
        """
        return self._find_task()

    @cached_property
    def passes(self) -> Passes:
        """Return the task's data and model, after every field of the spec was found to fit.

        Raises:
            IndexMismatchError: a field differs.
        """
        passes = Passes(self.task, self._options)
        with passes.model() as model:
            self.manifest.build.spec.refuse_unlike(self._asked(passes, model), str(self.directory))
        return passes

    def _asked(self, passes: Passes, model: LoadedModel) -> FeatureSpec:
        built = self.manifest.build
        sketch = self._features.sketch
        train = passes.data("train")
        return replace(
            built.spec,
            model=model_digest(model.module),
            train_rows=passes.n_rows("train"),
            train_data=built.spec.train_data if built.random_data else data_digest(train, len(train)),
            parameters=parameter_specs(model.parameters, built.spec.rank_one),
            checkpoints=checkpoint_specs(passes.task),
            sketch=replace(built.spec.sketch, version=sketch.version),
        )

    def expect(self, sketch: str | None = None, dim: int | None = None, seed: int | None = None) -> None:
        """Refuse the index unless it was built with these.

        Raises:
            IndexMismatchError: one differs.
        """
        built = self.manifest.build.spec
        asked = SketchSpec(
            sketch if sketch is not None else built.sketch.name,
            built.sketch.version,
            dim if dim is not None else built.sketch.dim,
            seed if seed is not None else built.sketch.seed,
        )
        built.refuse_unlike(replace(built, sketch=asked), str(self.directory))

    @cached_property
    def _features(self) -> FeatureOptions:
        spec = self.manifest.build.spec
        return FeatureOptions(make_sketch(spec.sketch.name, spec.sketch.dim), spec.sketch.seed, spec.rank_one)

    @cached_property
    def _canaries(self) -> tuple[Canaries, ...]:
        return read_canaries(self._folder / self.manifest.canaries.name)

    @cached_property
    def search_index(self) -> SearchIndex:
        """Return the search index over all checkpoints."""
        if self.manifest.index.kind == "ivf":
            rows = listed_rows(self._store.view(), unlisted_ids(self.directory, self.manifest))
            return IVFIndex.load(self._folder, rows, self._options.device)
        return FlatIndex(self._store.view(), self._options.device)

    @cached_property
    def columns(self) -> dict[str, npt.NDArray[Any]]:
        """Return the columns of the training rows by name; none where the task gave none."""
        record = self.manifest.columns
        return {} if record is None else read_columns(self._folder / record.name)

    @cached_property
    def removed(self) -> Int64:
        """Return the ids of the rows that were removed, rising: no answer holds them."""
        return removed_ids(self.directory, self.manifest)

    @cached_property
    def skipped(self) -> Skipped:
        """Return the rows that the build skipped because they are not finite: no answer holds them."""
        return skipped_rows(self.directory, self.manifest)

    @cached_property
    def _absent(self) -> Int64:
        return np.union1d(self.removed, self.skipped.row_S)

    def view(self, checkpoints: Sequence[int] | None = None) -> FeatureView:
        """Return the stored feature rows over the chosen checkpoints, to read or to search in one's own way."""
        return self._store.view(self._chosen(checkpoints))

    def query(
        self,
        ids: Sequence[int] = (),
        train_ids: Sequence[int] = (),
        options: QueryOptions | None = None,
        progress: ProgressCallback | None = None,
    ) -> list[Answer]:
        """Return the proponents and opponents of rows of `query_data` (`ids`) and of `train_data` (`train_ids`).

        Raises:
            IndexMismatchError: the task does not fit the index, by a field or by a canary.
            UsageError: an id or an option is out of range, or there is no query.
            NonFiniteError: a query's loss or gradient is NaN or infinite.
        """
        options = options or QueryOptions()
        if not ids and not train_ids:
            raise UsageError(
                problem("no query", got="no ids", expected="--ids or --train-ids", remedy="name at least one row")
            )
        sides: list[tuple[SideName, tuple[int, ...]]] = [("query", tuple(ids)), ("train", tuple(train_ids))]
        allowed = options.rows.allowed(len(self), self.columns, self._absent)
        checkpoints = self._chosen(options.checkpoints)
        asked = [Question(side, chosen, checkpoints, options, allowed) for side, chosen in sides if chosen]
        for question in asked:
            self.passes.check_ids(question.side, question.ids)
        rates = [checkpoint.learning_rate for checkpoint in self.manifest.build.spec.checkpoints]
        answers: list[Answer] = []
        for question in asked:
            queries_QF = self.features(question.side, question.ids, question.checkpoints)
            counted = _counted(progress, self._exact_units(question))
            fidelity = self.manifest.fidelity
            scale = None if fidelity is None else fidelity.error_scale
            ranking = Ranking(self._store, self.search_index, self.manifest.index, scale, rates, self.passes, counted)
            answers += ranking.answers(question, queries_QF)
        if len(self.skipped):
            answers = [replace(answer, how=f"{answer.how}; {self.skipped.counted}") for answer in answers]
        return answers

    def _exact_units(self, question: Question) -> int:
        """Return the most rows that exact scores of a question may run."""
        options = question.options
        a_query = 2 * max(options.k, options.candidates)
        rows = len(self) if options.exact else min(len(self), len(question.ids) * a_query)
        return rows * len(question.checkpoints)

    def features(self, side: SideName, ids: Sequence[int], checkpoints: Sequence[int] | None = None) -> Float32:
        """Return the feature rows [Q, F] of examples, computed now, over the chosen checkpoints.

        Raises:
            IndexMismatchError: a canary shows that the task is not the index's.
            NonFiniteError: an example's loss or gradient is NaN or infinite.
        """
        blocks = []
        with self.passes.model() as model:
            for checkpoint in self._chosen(checkpoints):
                model.load(checkpoint)
                extractor = FeatureExtractor(model, self._features)
                self._check_canaries(extractor, checkpoint)
                try:
                    blocks.append(extractor.rows(side, ids).feature_ND)
                except NonFiniteError as error:
                    raise NonFiniteError(f"this row of {side}_data has no features to ask with: {error}") from error
        return np.concatenate(blocks, axis=1)

    def _refuse_changed(self, checkpoints: Sequence[int]) -> None:
        with self.passes.model() as model:
            for checkpoint in checkpoints:
                model.load(checkpoint)
                self._check_canaries(FeatureExtractor(model, self._features), checkpoint)

    def _check_canaries(self, extractor: FeatureExtractor, checkpoint: int) -> None:
        if self.manifest.build.random_data:
            return
        for canaries in self._canaries:
            if max(canaries.ids_N) >= self.passes.n_rows(canaries.side):
                raise IndexMismatchError(
                    problem(
                        f"{canaries.side}_data is not that of index {self.directory}",
                        got=f"{self.passes.n_rows(canaries.side)} rows",
                        expected=f"at least {max(canaries.ids_N) + 1}",
                        remedy="restore the task's data, or build a new index",
                    )
                )
            canaries.refuse_unlike(extractor, checkpoint, str(self.directory))

    def self_influence(
        self,
        k: int | None = None,
        *,
        checkpoints: Sequence[int] | None = None,
        exact: bool = False,
        rows: RowFilter | None = None,
        progress: ProgressCallback | None = None,
    ) -> list[SelfInfluence]:
        """Return training rows by falling self-influence Σ_c η_c ‖∇ℓ(w_c, z)‖², the k first or all.

        From the stored squared norms (estimates from the sketch, unless built with `norms="exact"`),
        or with `exact` computed now over every row; only then is the task needed.

        Raises:
            UsageError: k or a checkpoint is out of range.
            IndexMismatchError: with `exact`, the task does not fit the index.
        """
        if k is not None and k < 1:
            raise UsageError(problem("bad -k", got=k, expected="1 or more", remedy="change -k"))
        chosen = self._chosen(checkpoints)
        allowed = (rows or RowFilter()).allowed(len(self), self.columns, self._absent)
        ids = np.arange(len(self)) if allowed is None else allowed
        if exact:
            self._refuse_changed(chosen)
            counted = _counted(progress, len(ids) * len(chosen))
            scores_N = exact_self_influence(self.passes, ids.tolist(), chosen, counted)
        else:
            rates = np.array([self.manifest.build.spec.checkpoints[c].learning_rate for c in chosen])
            scores_N = (self._store.sqnorms(chosen) @ rates)[ids]
        order = np.lexsort((ids, -scores_N))[:k]
        return [SelfInfluence(str(ids[i]), float(scores_N[i]), rank) for rank, i in enumerate(order, start=1)]

    def described(self, side: SideName, row: int) -> Description | None:
        """Return what the task shows people of a row, or None."""
        return self.passes.described(side, row)

    def _chosen(self, checkpoints: Sequence[int] | None) -> tuple[int, ...]:
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
        return chosen


def _found(task: Task | str | None, arguments: Mapping[str, str] | None, manifest: Manifest, directory: Path) -> Task:
    """Return the task that was passed, or that the build was told."""
    if isinstance(task, Task):
        return task
    built = manifest.build.task
    name = task or built.reference
    if name is None:
        raise UsageError(
            problem(
                f"index {directory} does not know its task",
                got="an index built from a Task object",
                expected="the task",
                remedy="pass --task path/to/file.py:name, or InfluenceIndex.open(dir, task=...)",
            )
        )
    return load_task(name, built.arguments if arguments is None else arguments)


def _counted(progress: ProgressCallback | None, total: int) -> Callable[[int], None] | None:
    """Return a function that is told how many rows more are done."""
    if progress is None:
        return None
    done = 0

    def more(rows: int) -> None:
        nonlocal done
        done += rows
        progress("exact scores", done, total)

    return more
