"""Compatibility of a task with an index: a check that the task is the one that the index was built from.

Every field of the recorded FeatureSpec and the canaries are compared; a difference raises the error "index ... was
built with ..." (IndexMismatchError). Features of queries are computed after the check.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np

from tracin_ann.choices import SideName
from tracin_ann.errors import IndexMismatchError, NonFiniteError, UsageError, problem
from tracin_ann.features.canaries import Canaries, read_generation_canaries
from tracin_ann.features.extractor import FeatureExtractor, FeatureOptions
from tracin_ann.features.fingerprint import checkpoint_specs, model_digest, parameter_specs
from tracin_ann.features.runner import LoadedModel, RunOptions, TaskRunner
from tracin_ann.sketch import make_sketch
from tracin_ann.store import CheckpointSpec, FeatureSpec, Manifest, generation_folder
from tracin_ann.task import Task, load_named_task, load_task
from tracin_ann.types import Float32


class IndexTask:
    """The task of an index. It is loaded when it is first needed, and compared with the manifest.

    Args:
        directory: the directory of the index.
        manifest: the manifest of the index.
        find_task: returns the task, or imports it by name.
        options: how the model runs.
    """

    def __init__(self, directory: Path, manifest: Manifest, find_task: Callable[[], Task], options: RunOptions) -> None:
        self._directory, self._manifest, self._find_task, self.options = directory, manifest, find_task, options

    @cached_property
    def task(self) -> Task:
        """Return the task; the first access may import it by the name that the build recorded.

        Raises:
            UsageError: the task cannot be found.
        """
        return self._find_task()

    @cached_property
    def runner(self) -> TaskRunner:
        """Return the runner of the task, after a comparison of every field of its spec with the index.

        Raises:
            IndexMismatchError: a field differs.
        """
        runner = TaskRunner(self.task, self.options)
        with runner.model() as model:
            check_spec(self._manifest.build.spec, self._task_spec(runner, model), str(self._directory))
        return runner

    def _task_spec(self, runner: TaskRunner, model: LoadedModel) -> FeatureSpec:
        built = self._manifest.build
        return replace(
            built.spec,
            model=model_digest(model.module),
            train_rows=runner.n_rows("train"),
            train_data=built.spec.train_data if built.random_data else runner.data_digest(runner.n_rows("train")),
            parameters=parameter_specs(model.parameters, built.spec.rank_one),
            checkpoints=checkpoint_specs(runner.task),
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
        """Compute and return the features [Q, F] of examples, after a check of the canaries at these checkpoints.

        Raises:
            IndexMismatchError: a canary differs: the task has changed since the build.
            NonFiniteError: an example's loss or gradient is NaN or infinite.
        """
        blocks = []
        with self.runner.model() as model:
            for checkpoint in checkpoints:
                model.load(checkpoint)
                extractor = FeatureExtractor(model, self._features)
                self._check_canaries_at(extractor, checkpoint)
                try:
                    blocks.append(extractor.rows(side, ids).feature_ND)
                except NonFiniteError as error:
                    raise NonFiniteError(f"cannot query with this row of {side}_data: {error}") from error
        return np.concatenate(blocks, axis=1)

    def check_canaries(self, checkpoints: Sequence[int]) -> None:
        """Recompute the canaries at these checkpoints and compare them with the stored ones.

        Raises:
            IndexMismatchError: a canary differs: the task has changed since the build.
        """
        with self.runner.model() as model:
            for checkpoint in checkpoints:
                model.load(checkpoint)
                self._check_canaries_at(FeatureExtractor(model, self._features), checkpoint)

    def _check_canaries_at(self, extractor: FeatureExtractor, checkpoint: int) -> None:
        if self._manifest.build.random_data:
            return
        for canaries in self._canaries:
            if max(canaries.ids_N) >= self.runner.n_rows(canaries.side):
                raise IndexMismatchError(
                    problem(
                        f"{canaries.side}_data is not the data that index {self._directory} was built with",
                        got=f"{self.runner.n_rows(canaries.side)} rows",
                        expected=f"at least {max(canaries.ids_N) + 1}",
                        remedy="restore the task's data, or build a new index",
                    )
                )
            canaries.check(extractor, checkpoint, str(self._directory))


def load_index_task(
    task: Task | str | None, arguments: Mapping[str, str] | None, manifest: Manifest, directory: Path
) -> Task:
    """Return the task of an index: the given one, or else the one that the build recorded by name.

    Args:
        task: a task, its name, or None for the recorded one.
        arguments: arguments for a named task that is a function; None for the recorded ones.
        manifest: the manifest of the index.
        directory: the directory of the index.

    Raises:
        UsageError: the build recorded no name, the task cannot be found, or it may not be imported without `--task`.
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
                f"index {directory} does not record the name of its task",
                got="an index built from a Task object",
                expected="a task",
                remedy="pass --task path/to/file.py:name, or InfluenceIndex.open(dir, task=...)",
            )
        )
    return load_named_task(built.reference, given, directory)


def check_spec(built: FeatureSpec, other: FeatureSpec, where: str) -> None:
    """Compare the spec of the index `where` with the spec of a task or build.

    Raises:
        IndexMismatchError: a field differs; the message names the first difference and the number of others.
    """
    differences = list(_differences(built, other))
    if differences:
        more = f" (and {len(differences) - 1} more differences)" if len(differences) > 1 else ""
        raise IndexMismatchError(f"index {where} was built with {differences[0]}{more}")


def _differences(built: FeatureSpec, other: FeatureSpec) -> Iterator[str]:
    yield from _scalar_differences(built, other)
    old, new = ({p.name: p for p in spec.parameters} for spec in (built, other))
    for name in [*old, *(n for n in new if n not in old)]:
        pair = old.get(name), new.get(name)
        if pair[0] != pair[1]:
            a, b = (f"{list(p.shape)} {p.dtype}" if p else "" for p in pair)
            present = f"the task has {b}" if b else "the task does not have it"
            remedy = "restore Task.parameters and the model"
            yield _describe_difference(f"parameter {name} ({a})" if a else f"no parameter {name}", present, remedy)
    for i, checkpoints in enumerate(itertools.zip_longest(built.checkpoints, other.checkpoints)):
        yield from _checkpoint_differences(i, *checkpoints)


def _scalar_differences(built: FeatureSpec, other: FeatureSpec) -> Iterator[str]:
    sketches = (
        ("sketch", "name", "pass --sketch {}"),
        ("seed", "seed", "pass --seed {}"),
        ("dimension", "dim", "pass --dim {}"),
        ("sketch version", "version", "install the tracin_ann that built it"),
    )
    for word, attribute, remedy in sketches:
        a, b = getattr(built.sketch, attribute), getattr(other.sketch, attribute)
        if a != b:
            yield _describe_difference(f"{word} {a}", f"this command asks for {word} {b}", remedy.format(a))
    rest = (
        ("dtype", "feature type {}", "pass --dtype {}"),
        ("norms", "norms {}", "pass --norms {}"),
        ("precision", "precision {}", "pass --precision {}"),
        ("model", "a model with layers of digest {}", "restore the model's code"),
        ("train_rows", "{} training rows", "restore train_data"),
        ("train_data", "training data of digest {}", "restore train_data"),
    )
    for attribute, what, remedy in rest:
        a, b = getattr(built, attribute), getattr(other, attribute)
        if a != b:
            grown = attribute == "train_rows" and b > a
            yield _describe_difference(
                what.format(a), f"this task has {b}", "build with --append," if grown else remedy.format(a)
            )


def _checkpoint_differences(i: int, built: CheckpointSpec | None, other: CheckpointSpec | None) -> Iterator[str]:
    if built is None or other is None:
        a, b = (c.name if c else "nothing" for c in (built, other))
        remedy = "restore Task.checkpoints" if other is None else "build with --add-checkpoint,"
        yield _describe_difference(f"{a} as checkpoint {i}", f"the task has {b}", remedy)
        return
    if built.digest != other.digest:
        yield _describe_difference(
            f"checkpoint {i} ({built.name}) of digest {built.digest[:12]}",
            f"the task's {other.name} has {other.digest[:12]}",
            "restore that file",
        )
    if built.learning_rate != other.learning_rate:
        yield _describe_difference(
            f"learning rate {built.learning_rate:g} at checkpoint {i}",
            f"the task has {other.learning_rate:g}",
            "restore Task.checkpoints",
        )


def _describe_difference(built: str, other: str, remedy: str) -> str:
    return f"{built}, {other}; {remedy} or build a new index"
