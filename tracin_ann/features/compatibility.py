"""Whether a task fits an index, by every field of its spec and by its canaries; and its examples' features."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np

from tracin_ann.choices import SideName
from tracin_ann.errors import IndexMismatchError, NonFiniteError, UsageError, problem
from tracin_ann.features.canaries import Canaries, read_generation_canaries
from tracin_ann.features.extractor import FeatureExtractor, FeatureOptions
from tracin_ann.features.fingerprint import checkpoint_specs, model_digest, parameter_specs
from tracin_ann.features.passes import LoadedModel, Passes, PassOptions
from tracin_ann.sketch import make_sketch
from tracin_ann.store import FeatureSpec, Manifest, generation_folder
from tracin_ann.task import Task, load_named_task, load_task
from tracin_ann.types import Float32


class IndexTask:
    """An index's task, found and compared with the manifest when it is first needed."""

    def __init__(
        self, directory: Path, manifest: Manifest, find_task: Callable[[], Task], options: PassOptions
    ) -> None:
        self._directory, self._manifest, self._find_task, self.options = directory, manifest, find_task, options

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
        passes = Passes(self.task, self.options)
        with passes.model() as model:
            self._manifest.build.spec.check_matches(self._asked(passes, model), str(self._directory))
        return passes

    def _asked(self, passes: Passes, model: LoadedModel) -> FeatureSpec:
        built = self._manifest.build
        return replace(
            built.spec,
            model=model_digest(model.module),
            train_rows=passes.n_rows("train"),
            train_data=built.spec.train_data if built.random_data else passes.data_digest(passes.n_rows("train")),
            parameters=parameter_specs(model.parameters, built.spec.rank_one),
            checkpoints=checkpoint_specs(passes.task),
            sketch=replace(built.spec.sketch, version=self._features.sketch.version),
        )

    @cached_property
    def _features(self) -> FeatureOptions:
        spec = self._manifest.build.spec
        return FeatureOptions(make_sketch(spec.sketch.name, spec.sketch.dim), spec.sketch.seed, spec.rank_one)

    @cached_property
    def _canaries(self) -> tuple[Canaries, ...]:
        return read_generation_canaries(generation_folder(self._directory, self._manifest.generation), self._manifest)

    def features(self, side: SideName, ids: Sequence[int], checkpoints: Sequence[int]) -> Float32:
        """Return the feature rows [Q, F] of examples, computed now.

        Raises:
            IndexMismatchError: a canary shows that the task is not the index's.
            NonFiniteError: an example's loss or gradient is NaN or infinite.
        """
        blocks = []
        with self.passes.model() as model:
            for checkpoint in checkpoints:
                model.load(checkpoint)
                extractor = FeatureExtractor(model, self._features)
                self._check_canaries(extractor, checkpoint)
                try:
                    blocks.append(extractor.rows(side, ids).feature_ND)
                except NonFiniteError as error:
                    raise NonFiniteError(f"this row of {side}_data has no features to ask with: {error}") from error
        return np.concatenate(blocks, axis=1)

    def refuse_changed(self, checkpoints: Sequence[int]) -> None:
        """Compute the canaries' features anew.

        Raises:
            IndexMismatchError: one shows that the task is not the index's.
        """
        with self.passes.model() as model:
            for checkpoint in checkpoints:
                model.load(checkpoint)
                self._check_canaries(FeatureExtractor(model, self._features), checkpoint)

    def _check_canaries(self, extractor: FeatureExtractor, checkpoint: int) -> None:
        if self._manifest.build.random_data:
            return
        for canaries in self._canaries:
            if max(canaries.ids_N) >= self.passes.n_rows(canaries.side):
                raise IndexMismatchError(
                    problem(
                        f"{canaries.side}_data is not that of index {self._directory}",
                        got=f"{self.passes.n_rows(canaries.side)} rows",
                        expected=f"at least {max(canaries.ids_N) + 1}",
                        remedy="restore the task's data, or build a new index",
                    )
                )
            canaries.refuse_unlike(extractor, checkpoint, str(self._directory))


def load_index_task(
    task: Task | str | None, arguments: Mapping[str, str] | None, manifest: Manifest, directory: Path
) -> Task:
    """Return the task that was passed, or that the build was told.

    Raises:
        UsageError: the build was told none, it cannot be found, or it is none that may be imported unasked.
    """
    if isinstance(task, Task):
        return task
    built = manifest.build.task
    given = built.arguments if arguments is None else arguments
    if task is not None:
        return load_task(task, given)
    if built.reference is None:
        raise UsageError(
            problem(
                f"index {directory} does not know its task",
                got="an index built from a Task object",
                expected="the task",
                remedy="pass --task path/to/file.py:name, or InfluenceIndex.open(dir, task=...)",
            )
        )
    return load_named_task(built.reference, given, directory)
