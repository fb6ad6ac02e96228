"""Compatibility of a task with an index: a check that the task is the one that the index was built from.

Every field of the recorded FeatureSpec and the canaries are compared; a difference raises the error "index ... was
built with ..." (IndexMismatchError). Features of queries are computed after the check.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from tracin_ann.choices import SIDE_NAMES, SideName
from tracin_ann.device import free_memory_bytes
from tracin_ann.errors import (
    IndexMismatchError,
    NonFiniteError,
    TaskError,
    TracinAnnError,
    UsageError,
    first_line,
    problem,
)
from tracin_ann.features.canaries import Canaries, read_generation_canaries
from tracin_ann.features.extractor import FeatureExtractor, FeatureOptions
from tracin_ann.features.fingerprint import checkpoint_specs, model_digest, parameter_specs
from tracin_ann.features.loaded_model import LoadedModel
from tracin_ann.features.runner import TaskRunner
from tracin_ann.features.task_data import RunOptions
from tracin_ann.sketch import make_sketch
from tracin_ann.store import CheckpointSpec, FeatureSpec, Manifest, generation_folder, is_coded
from tracin_ann.task import FileIdentity, Task, checkpoint_digest, identify_checkpoint, load_named_task, load_task
from tracin_ann.types import Float32

_KEPT_SHARE = 0.25
"""Largest share of the free memory for weights that remain in memory between queries."""
_LOSS_TOLERANCE = 1e-3
"""Relative difference of a canary's loss, above which its gradient is compared again."""
_GRADIENTS_EVERY = 8
"""Of so many comparisons of losses at a checkpoint, one also compares the gradients."""
_LOSS_ROUNDING = 1e-6
"""Difference of losses that rounding explains, relative to the largest loss of a canary."""


class IndexTask:
    """The task of an index. It is loaded when it is first needed, and compared with the manifest.

    Args:
        directory: the directory of the index.
        manifest: the manifest of the index.
        find_task: returns the task, or imports it by name.
        options: how the model runs.
        memory_bytes: the largest number of bytes of weights that remain in memory; None: a quarter of the free memory.
        n_sharing: number of processes that share this memory.
    """

    def __init__(
        self,
        directory: Path,
        manifest: Manifest,
        find_task: Callable[[], Task],
        options: RunOptions,
        memory_bytes: int | None = None,
        n_sharing: int = 1,
    ) -> None:
        self._directory, self._manifest, self._find_task, self.options = directory, manifest, find_task, options
        self._memory_bytes, self._n_sharing = memory_bytes, n_sharing
        self._checked: dict[int, _CheckedCheckpoint] = {}
        self._n_comparisons: Counter[int] = Counter()
        self._shares_engines = True
        self._lock = threading.RLock()

    @property
    def task(self) -> Task:
        """Return the task; the first access may import it by the name that the build recorded.

        Raises:
            UsageError: the task cannot be found.
        """
        # From Python 3.12 on, `cached_property` has no lock: threads would each have a task, and a model.
        with self._lock:
            return self._found_task

    @cached_property
    def _found_task(self) -> Task:
        return self._find_task()

    @property
    def runner(self) -> TaskRunner:
        """Return the runner of the task, after a comparison of every field of its spec with the index.

        Raises:
            IndexMismatchError: a field differs.
        """
        with self._lock:
            return self._checked_runner

    @cached_property
    def _checked_runner(self) -> TaskRunner:
        runner = TaskRunner(self.task, self.options)
        memory_bytes = self._memory_bytes
        if memory_bytes is None:
            memory_bytes = int(free_memory_bytes(self.options.device) * _KEPT_SHARE)
        runner.keep_model(memory_bytes // self._n_sharing)
        with runner.model() as model:
            check_spec(self._manifest.build.spec, self._task_spec(runner, model), str(self._directory))
        return runner

    @contextmanager
    def release_model(self) -> Iterator[None]:
        """Let other threads use the model inside, as `TaskRunner.release_model`, if there is a runner."""
        runner: TaskRunner | None = vars(self).get("_checked_runner")
        with nullcontext() if runner is None else runner.release_model():
            yield

    def _task_spec(self, runner: TaskRunner, model: LoadedModel) -> FeatureSpec:
        built = self._manifest.build
        return replace(
            built.spec,
            model=model_digest(model.module),
            train_rows=runner.n_rows("train"),
            train_data=built.spec.train_data if built.random_data else runner.data_digest(runner.n_rows("train")),
            parameters=parameter_specs(model.parameters, built.spec.rank_one),
            checkpoints=checkpoint_specs(runner.task, model.rates, model.digest_moments),
            sketch=replace(built.spec.sketch, version=self._features.sketch.version),
        )

    @cached_property
    def _features(self) -> FeatureOptions:
        spec = self._manifest.build.spec
        sketch = make_sketch(spec.sketch.name, spec.sketch.dim)
        return FeatureOptions(sketch, spec.sketch.seed, spec.rank_one, rotates=is_coded(spec.dtype))

    @cached_property
    def _canaries(self) -> tuple[Canaries, ...]:
        return read_generation_canaries(generation_folder(self._directory, self._manifest.generation), self._manifest)

    def features(self, side: SideName, ids: Sequence[int], checkpoints: Sequence[int]) -> Float32:
        """Compute and return the features [Q, F] of examples, after a check of the canaries at these checkpoints.

        Each checkpoint is checked once, and again when its file changes. Afterwards every call compares the loss of one
        canary with the loss at the check, at the checkpoint that had the fewest such comparisons. One of eight such
        comparisons also computes the gradient.

        Raises:
            IndexMismatchError: a canary or a checkpoint differs: the task has changed since the build.
            NonFiniteError: an example's loss or gradient is NaN or infinite.
        """
        blocks = []
        with self.runner.model() as model:
            compared = min(checkpoints, key=lambda checkpoint: self._n_comparisons[checkpoint])
            rows = self._choose_canaries(self._n_comparisons[compared])
            self._n_comparisons[compared] += 1
            for checkpoint in checkpoints:
                extractor = self._load_checked(model, checkpoint, rows if checkpoint == compared else ())
                with _report_unusable(side):
                    blocks.append(extractor.rows(side, ids).feature_ND)
        return np.concatenate(blocks, axis=1)

    def check_canaries(self, checkpoints: Sequence[int]) -> None:
        """Recompute the canaries at these checkpoints, or their losses if they have been checked, and compare them.

        Raises:
            IndexMismatchError: a canary or a checkpoint differs: the task has changed since the build.
        """
        with self.runner.model() as model:
            for checkpoint in checkpoints:
                self._load_checked(model, checkpoint, _list_rows(self._canaries))

    def _load_checked(
        self, model: LoadedModel, checkpoint: int, rows: Sequence[tuple[SideName, int]]
    ) -> FeatureExtractor:
        """Load a checkpoint, check it, and return the extractor of its features.

        Args:
            model: the task's model.
            checkpoint: the position of the checkpoint.
            rows: canaries whose losses are compared if the checkpoint was checked before.

        Raises:
            IndexMismatchError: a canary or the checkpoint differs.
        """
        identity = identify_checkpoint(model.runner.task.checkpoints[checkpoint])
        checked = self._checked.get(checkpoint)
        if checked is not None and checked.identity != identity:
            self._check_digest(model, checkpoint)
        model.load(checkpoint)
        is_known = checked is not None and checked.identity == identity and checked.model is model
        if checked is not None and is_known:
            if self._has_same_losses(model, checked, rows):
                if rows and self._n_comparisons[checkpoint] % _GRADIENTS_EVERY == 0:
                    self._compare_canaries(checked.extractor, checkpoint, rows)
                return checked.extractor
            # The file also restores what the user changed in the model and `Task.load` sets.
            model.reload(checkpoint)
        extractor = FeatureExtractor(model, self._features)
        losses = self._check_canaries_at(model, extractor, checkpoint)
        if checked is not None and losses:
            # Losses of a batch in half precision may differ from those of single rows, with which they are compared.
            losses = _compute_losses(model, _list_rows(self._canaries))
        self._checked[checkpoint] = _CheckedCheckpoint(identity, model, extractor, losses)
        return extractor

    def _check_digest(self, model: LoadedModel, checkpoint: int) -> None:
        """Compare a checkpoint whose file changed with the index.

        Raises:
            IndexMismatchError: it differs.
        """
        built = self._manifest.build.spec
        now = list(built.checkpoints)
        now[checkpoint] = replace(
            now[checkpoint],
            digest=checkpoint_digest(model.runner.task.checkpoints[checkpoint]),
            second_moments=model.digest_moments(checkpoint),
        )
        check_spec(built, replace(built, checkpoints=tuple(now)), str(self._directory))

    def _choose_canaries(self, turn: int) -> list[tuple[SideName, int]]:
        """Return the canary whose loss is compared at this turn; one of each side if they have different losses."""
        if self._manifest.build.random_data:
            return []
        rows = _list_rows(self._canaries)
        groups = [rows]
        if self.task.query_loss is not None:
            groups = [[row for row in rows if row[0] == side] for side in ("train", "query")]
        return [group[turn % len(group)] for group in groups]

    def _has_same_losses(
        self, model: LoadedModel, checked: _CheckedCheckpoint, rows: Sequence[tuple[SideName, int]]
    ) -> bool:
        """Return whether canaries have the same losses as when the checkpoint was checked."""
        known = [checked.losses[row] for row in rows if row in checked.losses]
        if self._manifest.build.random_data or not rows:
            return True
        try:
            now = list(_compute_losses(model, rows).values())
        except Exception:  # noqa: BLE001 - the complete check that follows reports the cause
            return False
        rounding = _LOSS_ROUNDING * max(
            (abs(loss) for loss in checked.losses.values() if math.isfinite(loss)), default=0
        )
        return len(known) == len(now) and all(
            math.isclose(loss, before, rel_tol=_LOSS_TOLERANCE, abs_tol=rounding)
            or (math.isnan(loss) and math.isnan(before))
            for loss, before in zip(now, known, strict=True)
        )

    def _check_canaries_at(
        self, model: LoadedModel, extractor: FeatureExtractor, checkpoint: int
    ) -> dict[tuple[SideName, int], float]:
        """Compare the canaries with the stored ones, and return their losses; without canaries an empty mapping.

        The build verified the gradients of each side by themselves. If one engine gives the same canaries of both
        sides, a second verification at every checkpoint is not necessary.
        """
        if self._manifest.build.random_data:
            return {}
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
        model.shares_engines = self._shares_engines and self.task.query_loss is None
        try:
            losses = self._compare_canaries(extractor, checkpoint)
        except TracinAnnError:
            if not model.shares_engines:
                raise
        else:
            # The sides may need different methods: one engine would then verify again and again.
            if not model.shares_engines or model.engine("train").n_verified == 1:
                return losses
        self._shares_engines = model.shares_engines = False
        return self._compare_canaries(extractor, checkpoint)

    def _compare_canaries(
        self, extractor: FeatureExtractor, checkpoint: int, rows: Sequence[tuple[SideName, int]] | None = None
    ) -> dict[tuple[SideName, int], float]:
        losses: dict[tuple[SideName, int], float] = {}
        for canaries in self._canaries:
            losses |= canaries.check(extractor, checkpoint, str(self._directory), rows)
        return losses


@contextmanager
def _report_unusable(side: SideName) -> Iterator[None]:
    """Name the side of queries in errors that their rows cause.

    Errors of a task's own data set are those of its code and keep their type. Examples that a caller gives may be of
    another form than the task's, and any function of the task may fail on them.
    """
    try:
        yield
    except NonFiniteError as error:
        raise NonFiniteError(f"cannot query with this row of {SIDE_NAMES[side]}: {error}") from error
    except (TracinAnnError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if side != "input":
            raise
        raise TaskError(
            problem(
                "the given examples cannot be used",
                got=first_line(error),
                expected="examples of the form of query_data's",
                remedy="pass what query_data[i] would return for them",
            )
        ) from error


@dataclass(frozen=True)
class _CheckedCheckpoint:
    """A checkpoint whose canaries agreed with the stored ones.

    Attributes:
        identity: of its file at the check.
        model: the model that the check used.
        extractor: its feature extractor, with the sketches of all parameters.
        losses: the loss of each canary, by side and row.
    """

    identity: FileIdentity
    model: LoadedModel
    extractor: FeatureExtractor
    losses: Mapping[tuple[SideName, int], float]


def _list_rows(canaries: Sequence[Canaries]) -> list[tuple[SideName, int]]:
    """Return side and row of every canary."""
    return [(each.side, int(row)) for each in canaries for row in each.ids_N]


def _compute_losses(model: LoadedModel, rows: Sequence[tuple[SideName, int]]) -> dict[tuple[SideName, int], float]:
    """Return the losses of rows, by side and row, at the loaded checkpoint."""
    losses: dict[tuple[SideName, int], float] = {}
    for side, row in rows:
        (batch,) = model.batches(side, [row])
        losses[side, row] = float(model.engine(side).loss_values(batch)[0])
    return losses


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
        ("preconditioner", "preconditioner {}", "pass --preconditioner {}"),
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
    yield from _describe_rate_differences(i, built, other)
    if built.second_moments != other.second_moments:
        was, now = (f"{(spec.second_moments or 'none')[:12]}" for spec in (built, other))
        yield _describe_difference(
            f"second moments of digest {was} at checkpoint {i}", f"the task has {now}", "restore their file"
        )


def _describe_rate_differences(i: int, built: CheckpointSpec, other: CheckpointSpec) -> Iterator[str]:
    remedy = "restore Task.checkpoints"
    if built.rates is None and other.rates is None:
        if built.learning_rate != other.learning_rate:
            was, now = f"{built.learning_rate:g}", f"{other.learning_rate:g}"
            yield _describe_difference(f"learning rate {was} at checkpoint {i}", f"the task has {now}", remedy)
        return
    names = dict.fromkeys([*(built.rates or ()), *(other.rates or ())])
    changed = [name for name in names if built.rate_of(name) != other.rate_of(name)]
    if changed:
        was, now = (f"{spec.rate_of(changed[0]):g}" for spec in (built, other))
        more = f", and other rates of {len(changed) - 1} more parameters" if len(changed) > 1 else ""
        where = f"of parameter {changed[0]} at checkpoint {i}"
        yield _describe_difference(f"learning rate {was} {where}", f"the task has {now}{more}", remedy)


def _describe_difference(built: str, other: str, remedy: str) -> str:
    return f"{built}, {other}; {remedy} or build a new index"
