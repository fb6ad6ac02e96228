"""The story of a build: task -> features of every row and checkpoint -> search index -> manifest.

A build can be run again at any time: feature files that are whole are kept, the rest is made anew,
and the manifest, written last, is what makes the directory an index.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from tracin_ann.calibration import Yardstick
from tracin_ann.canaries import FILE as CANARIES
from tracin_ann.canaries import write_canaries
from tracin_ann.columns import FILE as COLUMNS
from tracin_ann.columns import gathered, write_columns
from tracin_ann.device import refuse_slow_bf16, resolve_device
from tracin_ann.errors import IndexMismatchError, UsageError, problem
from tracin_ann.extraction import Extraction, data_is_dearer
from tracin_ann.features import FeatureOptions, Norms
from tracin_ann.files import atomic_path, sweep_temporaries
from tracin_ann.gradients import PRECISIONS, Precision
from tracin_ann.manifest import (
    BUILD_RECORD,
    FEATURES,
    MANIFEST,
    BuildRecord,
    IndexRecord,
    Manifest,
    StepRecord,
    read_build_record,
    record_of,
    write_build_record,
)
from tracin_ann.passes import LoadedModel, Passes, PassOptions
from tracin_ann.plan import Plan
from tracin_ann.search import IVFIndex, IVFParams, choose_index
from tracin_ann.search.lists import CODES, Codes
from tracin_ann.sketch import make_sketch
from tracin_ann.spec import (
    FeatureSpec,
    SketchSpec,
    checkpoint_specs,
    data_digest,
    library_versions,
    model_digest,
    parameter_specs,
)
from tracin_ann.store import Dtype, FeatureStore, FileRecord
from tracin_ann.task import Task, TaskReference, absolute_reference, load_task
from tracin_ann.tuning import USUAL_SIZE, Tuned, Wanted, refuse_slower_bf16, tuned
from tracin_ann.types import ProgressCallback

logger = logging.getLogger(__name__)

_UNFINISHED_INDEX = ".index-unfinished"
_DTYPES = ("float16", "float32")
_NORMS = ("sketch", "exact")


@dataclass(frozen=True)
class BuildConfig:
    """What a build may be told.

    Attributes:
        dim: D, sketch dimensions a checkpoint.
        sketch: `factored`, `kronecker`, `dense` or `dense-gaussian`.
        seed: of the sketch's random numbers.
        index: `auto`, `flat` or `ivf`.
        batch_size: examples a forward; None: measured.
        memory_bytes: what batches and rows read ahead may take when the batch size is measured; None: half of
            what is free.
        workers: processes that read and collate ahead.
        precision: of forward and backward, `fp32` or `bf16`; sketches are added up in float32.
        target_recall: recall@10 of the stored rows' own ranking that an index of lists is calibrated to.
        codes: how lists keep their rows: `sq8`, `sq4` (half the memory) or `fp16`.
        yardstick: measure, on a few queries, how well the sketch ranks rows by true scores; some 2,500 rows a
            checkpoint are run once more for that.
        device: `auto` or a device's name, as `resolve_device` takes it.
        dtype: how features are stored: `float16` (with an exponent a row) or `float32`.
        norms: squared gradient norms, estimated from the `sketch` or `exact`.
        partition_rows: rows a feature file; what a killed build repeats at most, for one checkpoint.
        allow_random_data: accept train or query rows that change when read twice.
    """

    dim: int = 1024
    sketch: str = "factored"
    seed: int = 0
    index: str = "auto"
    batch_size: int | None = None
    memory_bytes: int | None = None
    workers: int = 0
    precision: Precision = "fp32"
    target_recall: float = 0.95
    codes: Codes = "sq8"
    yardstick: bool = True
    device: str = "auto"
    dtype: Dtype = "float16"
    norms: Norms = "sketch"
    partition_rows: int = 8192
    allow_random_data: bool = False

    def __post_init__(self) -> None:
        """Refuse values that no build can use.

        Raises:
            UsageError: naming the option.
        """
        choices: tuple[tuple[str, str, Sequence[str]], ...] = (
            ("--dtype", self.dtype, _DTYPES),
            ("--norms", self.norms, _NORMS),
            ("--precision", self.precision, PRECISIONS),
            ("--index", self.index, ("auto", "flat", "ivf")),
            ("--codes", self.codes, CODES),
        )
        for option, value, allowed in choices:
            if value not in allowed:
                raise UsageError(
                    problem(f"bad {option}", got=repr(value), expected=" or ".join(allowed), remedy=f"change {option}")
                )
        if not 0 < self.target_recall < 1:
            expected = "over 0, under 1"
            raise UsageError(
                problem("bad --target-recall", got=self.target_recall, expected=expected, remedy="change it")
            )
        for name, number in (("partition_rows", self.partition_rows), ("--memory", self.memory_bytes)):
            if number is not None and number < 1:
                raise UsageError(problem(f"bad {name}", got=number, expected="1 or more", remedy="change it"))

    def features(self, rank_one: frozenset[str]) -> FeatureOptions:
        """Return what turns gradients into rows, given which parameters' gradients are outer products."""
        return FeatureOptions(make_sketch(self.sketch, self.dim), self.seed, rank_one, self.norms)


@dataclass(frozen=True)
class BuildReport:
    """What a build did.

    Attributes:
        manifest: of the finished index.
        rows_extracted: rows × checkpoints computed by this run; 0 where all files were there already.
        seconds: wall time.
    """

    manifest: Manifest
    rows_extracted: int
    seconds: float


class BuildWork:
    """One build under way: the task opened, and the directory it writes to."""

    def __init__(self, task: Task, out: Path, config: BuildConfig, reference: TaskReference) -> None:
        self.out, self.config, self.reference = out, config, reference
        self.device = resolve_device(config.device)
        self.sketch = make_sketch(config.sketch, config.dim)
        if config.precision == "bf16":
            refuse_slow_bf16(self.device)
        options = PassOptions(
            self.device,
            config.batch_size if config.batch_size is not None else USUAL_SIZE,
            config.allow_random_data,
            config.workers,
            config.precision,
        )
        self.passes = Passes(task, options, reference)
        self.rows_extracted = 0
        self._load_seconds = 0.0

    def prepared(self, model: LoadedModel) -> tuple[BuildRecord, bool]:
        """Return what this build sets out to make, and whether the directory holds its beginning.

        All that can be refused is refused here, before anything is written.

        Raises:
            IndexMismatchError: the directory holds another build.
            UsageError: it is no directory, or holds files that no build wrote.
            TaskError: the task breaks the contract.
        """
        self.passes.data("query")
        found = self._found()
        if found is None:
            rank_one = self.examine(model)
            refuse_slower_bf16(model, self.config.features(rank_one))
            return self._record(model, rank_one), False
        record = self._record(model, found.spec.rank_one)
        found.spec.refuse_unlike(record.spec, str(self.out))
        if found.partition_rows != record.partition_rows or found.random_data != record.random_data:
            raise IndexMismatchError(
                f"index {self.out} was built with partition_rows {found.partition_rows} and allow_random_data "
                f"{found.random_data}, this build asks for {record.partition_rows} and {record.random_data}; "
                "use the same, or another --out"
            )
        return record, True

    def examine(self, model: LoadedModel) -> frozenset[str]:
        """Load every checkpoint once, run the first batch's probes, and return the rank-one parameters."""
        began = perf_counter()
        checkpoints = range(len(self.passes.task.checkpoints))
        for checkpoint in reversed(checkpoints):
            model.load(checkpoint)
        self._load_seconds = (perf_counter() - began) / len(checkpoints)
        model.probe("train")
        model.probe("query")
        return model.engine("train").plan.rank_one

    def _record(self, model: LoadedModel, rank_one: frozenset[str]) -> BuildRecord:
        train = self.passes.data("train")
        spec = FeatureSpec(
            model=model_digest(model.module),
            train_rows=len(train),
            train_data="random" if self.config.allow_random_data else data_digest(train),
            parameters=parameter_specs(model.parameters, rank_one),
            checkpoints=checkpoint_specs(self.passes.task),
            sketch=SketchSpec(self.sketch.name, self.sketch.version, self.sketch.dim, self.config.seed),
            dtype=self.config.dtype,
            norms=self.config.norms,
            precision=self.config.precision,
            versions=library_versions(),
        )
        return BuildRecord(spec, self.reference, self.config.partition_rows, self.config.allow_random_data)

    def _found(self) -> BuildRecord | None:
        """Return the build that the directory holds, or None if it can become this one's."""
        if (self.out / BUILD_RECORD).exists():
            return read_build_record(self.out)
        if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise UsageError(
                problem(
                    f"{self.out} cannot hold the index",
                    got="a file" if not self.out.is_dir() else "a directory with other files in it",
                    expected="an empty or new directory, or an index",
                    remedy="choose another --out",
                )
            )
        return None

    def tuned(self, model: LoadedModel, features: FeatureOptions) -> Tuned:
        """Set the model and its passes to what runs rows fastest here; the last thing that may refuse the build."""
        self.passes.check_workers("train")
        if model.checkpoint < 0:
            self.examine(model)
        passes = self.passes.n_rows("train") * len(self.passes.task.checkpoints)
        return tuned(model, features, Wanted(self.config.batch_size, self.config.memory_bytes, passes))

    def extract(self, extraction: Extraction, chosen: Tuned) -> Plan:
        """Write every feature file that is not there whole, and the canaries; return the plan of gradients."""
        done = extraction.run(held=data_is_dearer(extraction.layout, chosen, self._load_seconds))
        self.rows_extracted += done.rows
        write_canaries(self.out / CANARIES, done.canaries)
        return done.plan

    def columns(self, progress: ProgressCallback) -> FileRecord | None:
        """Write the columns of the training rows, where the task gives any."""
        asked = self.passes.task.columns
        if asked is None:
            return None
        columns = gathered(asked, self.passes.data("train"), self.passes.n_rows("train"), progress)
        write_columns(self.out / COLUMNS, columns)
        return record_of(self.out / COLUMNS)

    def index(self, yardstick: Yardstick) -> IndexRecord:
        """Choose, build, calibrate and save the search index."""
        view, progress = yardstick.store.view(), yardstick.progress
        choice = choose_index(self.config.index, len(view), view.dim)
        logger.info("index %s: %s", choice.kind, choice.reason)
        files: list[FileRecord] = []
        calibration = None
        progress("index", 0, 1)
        if choice.kind == "ivf":
            unfinished = self.out / _UNFINISHED_INDEX
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            try:
                params = IVFParams(seed=self.config.seed, codes=self.config.codes)
                lists = IVFIndex.build(view, params, self.device)
                lists.save(unfinished)
                progress("index", 1, 1)
                calibration = yardstick.recall(lists, self.config.target_recall)
                for name in IVFIndex.FILES:
                    with atomic_path(self.out / name) as temporary:
                        os.replace(unfinished / name, temporary)
                    files.append(record_of(self.out / name))
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
        return IndexRecord(choice.kind, choice.reason, tuple(files), calibration)


def build(
    task: Task | str,
    out: str | os.PathLike[str],
    config: BuildConfig | None = None,
    *,
    arguments: Mapping[str, str] | None = None,
    progress: ProgressCallback | None = None,
) -> BuildReport:
    """Build an index of a task's training rows in the directory `out`, or go on with one begun there.

    Args:
        task: a Task, or its name (`path/to/file.py:name`, `package.module:name`).
        out: the directory; made if need be.
        config: see BuildConfig.
        arguments: for a task that is named and is a function.
        progress: called with (stage, done, total).

    Raises:
        TaskError: the task breaks the contract; nothing is left behind.
        IndexMismatchError: the directory holds another build.
        UsageError: an option or the directory cannot be used.
        NonFiniteError: a row's loss or gradient is NaN or infinite; whole partitions are kept.
    """
    began = perf_counter()
    report = progress or _silent
    work = opened(task, Path(out), config or BuildConfig(), arguments)
    with work.passes.model() as model:
        record, begun = work.prepared(model)
        store = FeatureStore(work.out / FEATURES, record.layout)
        if begun and (finished := _finished(work, store)) is not None:
            return BuildReport(finished, 0, perf_counter() - began)
        features = work.config.features(record.spec.rank_one)
        chosen = work.tuned(model, features)
        (work.out / FEATURES).mkdir(parents=True, exist_ok=True)
        if not begun:
            write_build_record(work.out, record)
        for directory in (work.out, work.out / FEATURES):
            sweep_temporaries(directory)
        (work.out / MANIFEST).unlink(missing_ok=True)
        columns = work.columns(report)
        plan = work.extract(Extraction(model, store, features, report), chosen)
    yardstick = Yardstick(work.passes, store, features, work.config.seed, report)
    index = work.index(yardstick)
    manifest = Manifest(
        build=record,
        features=_feature_records(store),
        canaries=record_of(work.out / CANARIES),
        index=index,
        steps=tuple(StepRecord(name, step.name, step.reason) for name, step in plan.steps.items()),
        fidelity=yardstick.fidelity() if work.config.yardstick and not work.config.allow_random_data else None,
        columns=columns,
    )
    manifest.write(work.out)
    return BuildReport(manifest, work.rows_extracted, perf_counter() - began)


def opened(task: Task | str, out: Path, config: BuildConfig, arguments: Mapping[str, str] | None) -> BuildWork:
    """Return the work of a build: the task found, nothing read or written yet."""
    if isinstance(task, Task):
        return BuildWork(task, out, config, TaskReference(None, {}))
    reference = TaskReference(absolute_reference(task), dict(arguments or {}))
    return BuildWork(load_task(task, arguments), out, config, reference)


def _finished(work: BuildWork, store: FeatureStore) -> Manifest | None:
    """Return the manifest if the directory already holds the whole index that is asked for."""
    if not (work.out / MANIFEST).exists():
        return None
    manifest = Manifest.read(work.out)
    wanted = choose_index(work.config.index, store.layout.n_rows, store.view().dim).kind
    whole = not store.missing() and all((work.out / record.name).is_file() for record in manifest.besides)
    return manifest if whole and manifest.index.kind == wanted else None


def _feature_records(store: FeatureStore) -> tuple[FileRecord, ...]:
    layout = store.layout
    return tuple(record_of(store.path(p, c)) for p in range(layout.n_partitions) for c in range(layout.n_checkpoints))


def _silent(stage: str, done: int, total: int) -> None:
    """Report nothing."""
