"""The story of a build: task -> features of every row and checkpoint -> search index -> manifest.

A build can be run again at any time: feature files that are whole are kept, the rest is made anew,
and the manifest, written last, is what makes the directory an index.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter

from tracin_ann.config import BuildConfig
from tracin_ann.device import refuse_slow_bf16, resolve_device
from tracin_ann.errors import DamagedIndexError, IndexMismatchError, MisplacedRowsError, UsageError, problem
from tracin_ann.features import (
    CANARY_FILE,
    USUAL_SIZE,
    Auditor,
    BuiltRows,
    Extraction,
    ExtractionResult,
    LoadedModel,
    Passes,
    PassOptions,
    RunSettings,
    TuningRequest,
    audit_build,
    checkpoint_specs,
    library_versions,
    model_digest,
    parameter_specs,
    read_kept_canaries,
    reading_costs_more,
    refuse_changed,
    tune,
    warn_of_slower_bf16,
    write_canaries,
)
from tracin_ann.files import atomic_path, is_temporary
from tracin_ann.scoring import QualityMeasurement
from tracin_ann.search import IVFIndex, IVFParams, UnfinishedLists, choose_index, digest_inputs
from tracin_ann.sketch import make_sketch
from tracin_ann.store import (
    BUILD_RECORD,
    COLUMN_FILE,
    FEATURES,
    MANIFEST,
    UNFINISHED_INDEX,
    WRITER,
    AuditRecord,
    BuildRecord,
    FeatureSpec,
    FeatureStore,
    FileRecord,
    IndexRecord,
    Manifest,
    SketchSpec,
    Skipped,
    Start,
    StepRecord,
    carry_removed,
    check_generation,
    claim,
    collect_columns,
    find_unnamed_files,
    generation_number,
    hold_writer_lock,
    list_feature_records,
    make_next_folder,
    publish,
    read_build_record,
    read_current,
    read_removed_ids,
    read_skipped_rows,
    record_file,
    select_listed_rows,
    tidy,
    write_build_record,
    write_columns,
    write_skipped,
    write_unlisted,
)
from tracin_ann.task import Task, TaskReference, absolute_reference, load_task
from tracin_ann.types import Int64, ProgressCallback, ignore_progress

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BuildReport:
    """What a build did.

    Attributes:
        manifest: of the finished index.
        rows_extracted: rows × checkpoints computed by this run; 0 where all files were there already.
        seconds: wall time.
        skipped: the rows that are in no answer because they are not finite.
        notes: in a line each, how checkpoints were read whose files are no plain state_dict.
        uneven: the audit of the most uneven batch that this run computed, if any; the manifest's is of other rows.
    """

    manifest: Manifest
    rows_extracted: int
    seconds: float
    skipped: Skipped
    notes: tuple[str, ...] = ()
    uneven: AuditRecord | None = None


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

    def prepare(self, model: LoadedModel) -> Start:
        """Return what this build sets out to make, and from where it starts.

        All that can be refused is refused here, before anything is written.

        Raises:
            IndexMismatchError: the directory holds another build.
            UsageError: it is no directory, or holds files that no build wrote.
            TaskError: the task breaks the contract.
        """
        self.passes.data("query")
        manifest = read_current(self.out)
        begun = self._begun(manifest)
        policy = self.config.policy(None if begun is None else begun.on_nonfinite, str(self.out))
        self.passes.options = replace(self.passes.options, on_nonfinite=policy)
        if begun is None:
            rank_one = self.examine(model)
            warn_of_slower_bf16(model, self.config.features(rank_one))
            return Start(self._record(model, rank_one), None, None)
        record = self._record(model, begun.spec.rank_one)
        self._refuse_unlike(begun, record, manifest)
        return Start(replace(record, batch_size=begun.batch_size, channels_last=begun.channels_last), begun, manifest)

    def _begun(self, manifest: Manifest | None) -> BuildRecord | None:
        if (self.out / BUILD_RECORD).exists():
            return read_build_record(self.out)
        return None if manifest is None else manifest.build

    def _refuse_unlike(self, begun: BuildRecord, record: BuildRecord, manifest: Manifest | None) -> None:
        """Refuse to make something else than was begun, but for growth of a finished index where that is asked for.

        Raises:
            IndexMismatchError: names the first difference.
        """
        expected = record.spec
        if manifest is not None and manifest.build.spec.digest() == begun.spec.digest():
            expected = self._without_growth(begun.spec, record.spec)
        begun.spec.check_matches(expected, str(self.out))
        if begun.partition_rows != record.partition_rows or begun.random_data != record.random_data:
            raise IndexMismatchError(
                f"index {self.out} was built with partition_rows {begun.partition_rows} and allow_random_data "
                f"{begun.random_data}, this build asks for {record.partition_rows} and {record.random_data}; "
                "use the same, or another --out"
            )

    def _without_growth(self, built: FeatureSpec, asked: FeatureSpec) -> FeatureSpec:
        """Return what is asked for less the rows and checkpoints that may be new."""
        if self.config.append and asked.train_rows > built.train_rows:
            random = self.config.allow_random_data
            digest = "random" if random else self.passes.data_digest(built.train_rows)
            asked = replace(asked, train_rows=built.train_rows, train_data=digest)
        if self.config.add_checkpoint:
            asked = replace(asked, checkpoints=asked.checkpoints[: max(1, len(built.checkpoints))])
        return asked

    def examine(self, model: LoadedModel) -> frozenset[str]:
        """Load every checkpoint once, run the first batch's probes, and return the rank-one parameters."""
        began = perf_counter()
        checkpoints = range(len(self.passes.task.checkpoints))
        for checkpoint in reversed(checkpoints):
            model.load(checkpoint)
            if self.passes.options.on_nonfinite == "skip":
                model.refuse_diverged()
        self._load_seconds = (perf_counter() - began) / len(checkpoints)
        model.probe("train")
        model.probe("query")
        return model.engine("train").plan.rank_one

    def _record(self, model: LoadedModel, rank_one: frozenset[str]) -> BuildRecord:
        train = self.passes.data("train")
        spec = FeatureSpec(
            model=model_digest(model.module),
            train_rows=len(train),
            train_data="random" if self.config.allow_random_data else self.passes.data_digest(len(train)),
            parameters=parameter_specs(model.parameters, rank_one),
            checkpoints=checkpoint_specs(self.passes.task),
            sketch=SketchSpec(self.sketch.name, self.sketch.version, self.sketch.dim, self.config.seed),
            dtype=self.config.dtype,
            norms=self.config.norms,
            precision=self.config.precision,
            versions=library_versions(),
        )
        return BuildRecord(
            spec,
            self.reference,
            self.config.partition_rows,
            self.config.allow_random_data,
            on_nonfinite=self.passes.options.on_nonfinite,
        )

    def refuse_foreign(self) -> None:
        """Refuse a directory that holds what no build wrote.

        Raises:
            UsageError: it does, or is a file.
        """
        if any((self.out / name).exists() for name in (BUILD_RECORD, MANIFEST)) or not self.out.exists():
            return
        # What a build leaves that was killed before it had said what it makes.
        if not self.out.is_dir() or any(path.name != WRITER and not is_temporary(path) for path in self.out.iterdir()):
            raise UsageError(
                problem(
                    f"{self.out} cannot hold the index",
                    got="a file" if not self.out.is_dir() else "a directory with other files in it",
                    expected="an empty or new directory, or an index",
                    remedy="choose another --out",
                )
            )

    def suits(self, manifest: Manifest) -> bool:
        """Return whether a finished index of these rows has all its files and the kind of search asked for."""
        layout = manifest.build.layout
        wanted = choose_index(self.config.index, layout.n_rows, layout.dim * layout.n_checkpoints).kind
        if self.config.rebuild_index:
            return False
        try:
            check_generation(self.out, manifest, deep=True)
        except DamagedIndexError:
            return False
        return manifest.index.kind == wanted

    def tune(self, model: LoadedModel, record: BuildRecord) -> RunSettings:
        """Set the model and its passes to how rows are run; the last thing that may refuse the build.

        What was chosen when the build was begun is kept: all files are made alike.
        """
        self.passes.check_workers("train")
        if model.checkpoint < 0:
            self.examine(model)
        wanted = TuningRequest(
            self.config.batch_size,
            self.config.memory_bytes,
            self.config.memory_format,
            None if record.batch_size is None else (record.batch_size, record.channels_last),
        )
        chosen = tune(model, self.config.features(record.spec.rank_one), wanted)
        self.passes.options = replace(self.passes.options, channels_last=chosen.channels_last)
        return chosen

    def extract(self, extraction: Extraction, chosen: RunSettings, folder: Path) -> ExtractionResult:
        """Write every feature file that is not there whole, and the canaries."""
        done = extraction.run(held=reading_costs_more(extraction.layout, chosen, self._load_seconds))
        self.rows_extracted += done.rows
        write_canaries(folder / CANARY_FILE, done.canaries)
        return done

    def index(
        self, yardstick: QualityMeasurement, folder: Path, features: Sequence[FileRecord], removed_R: Int64
    ) -> IndexRecord:
        """Choose, build, calibrate and save the search index; unfinished lists are kept for the next time."""
        view, progress = select_listed_rows(yardstick.store.view(), removed_R), yardstick.progress
        choice = choose_index(self.config.index, len(view), view.dim)
        logger.info("index %s: %s", choice.kind, choice.reason)
        unfinished = self.out / UNFINISHED_INDEX
        files: list[FileRecord] = []
        calibration = None
        progress("index", 0, len(view))
        if choice.kind == "ivf":
            params = IVFParams(seed=self.config.seed, codes=self.config.codes)
            scratch = UnfinishedLists(
                unfinished, digest_inputs(params, [asdict(r) for r in features], removed_R.tolist())
            )
            lists = IVFIndex.build(
                view, params, self.device, scratch, lambda done, total: progress("index", done, total)
            )
            calibration = yardstick.recall(lists, self.config.target_recall)
            lists.save(unfinished)
            for name in IVFIndex.FILES:
                with atomic_path(folder / name) as temporary:
                    os.replace(unfinished / name, temporary)
                files.append(record_file(folder / name))
            files += write_unlisted(folder, removed_R)
        return IndexRecord(choice.kind, choice.reason, tuple(files), calibration, self.config.codes if files else "")

    def report(self, manifest: Manifest, began: float, uneven: AuditRecord | None = None) -> BuildReport:
        """Return what was done since `began`."""
        return BuildReport(
            manifest,
            self.rows_extracted,
            perf_counter() - began,
            read_skipped_rows(self.out, manifest),
            self.passes.loader.notes,
            uneven,
        )


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
        NonFiniteError: a row's loss or gradient is NaN or infinite; whole partitions are kept. Where such rows are
            skipped: none is left.
        GradientProofError: no way to compute a parameter's gradients agrees with autograd, or a stored row does not;
            nothing is published.
    """
    work = open_build(task, Path(out), config or BuildConfig(), arguments)
    with ExitStack() as held:
        work.refuse_foreign()
        is_new = not work.out.is_dir()
        if not is_new:
            held.enter_context(hold_writer_lock(work.out))
        return run(work, progress, claims=held if is_new else None)


def run(work: BuildWork, progress: ProgressCallback | None = None, *, claims: ExitStack | None = None) -> BuildReport:
    """Build in a directory in which the caller holds the right to write, or in a new one, claimed within `claims`.

    Raises:
        As `build`.
    """
    began = perf_counter()
    report = progress or ignore_progress
    with work.passes.model() as model:
        start = work.prepare(model)
        store = FeatureStore(work.out / FEATURES, start.record.layout)
        missing = store.missing(start.trusted)
        if start.finished is not None and not missing and work.suits(start.finished):
            tidy(work.out, start.finished)
            return work.report(start.finished, began)
        if start.manifest is not None and missing and not start.record.random_data:
            features = work.config.features(start.manifest.build.spec.rank_one)
            refuse_changed(model, features, read_kept_canaries(work.out, start.manifest), str(work.out))
        record = work.config.agree_on_batches(start.record, len(missing), str(work.out))
        chosen = work.tune(model, record)
        record = replace(record, batch_size=chosen.batch_size, channels_last=chosen.channels_last)
        table = collect_columns(
            work.passes.data("train"),
            work.passes.n_rows("train"),
            work.passes.task.columns,
            None if work.passes.task.ids is None else work.passes.task.id_of,
            report,
        )
        if claims is not None:
            claims.enter_context(claim(work.out))
        if start.begun != record:
            write_build_record(work.out, record)
        folder = make_next_folder(work.out, start.manifest)
        if table is not None:
            write_columns(folder / COLUMN_FILE, table)
        features = work.config.features(record.spec.rank_one)
        try:
            done = work.extract(Extraction(model, store, features, missing, report), chosen, folder)
        except MisplacedRowsError:
            # Files that are whole would be gone on with, and rows in them may be wrong.
            for path in find_unnamed_files(store, start.manifest, missing):
                path.unlink(missing_ok=True)
            raise
        removed = read_removed_ids(work.out, start.manifest)
        auditor = Auditor(model, store, features, report)
        audits = audit_build(auditor, BuiltRows(done, start, missing, removed, work.config.seed))
    yardstick = QualityMeasurement(work.passes, store, features, work.config.seed, store.skipped()[0], report)
    measured = work.config.yardstick and not work.config.allow_random_data
    files = list_feature_records(store, start.manifest, missing)
    manifest = Manifest(
        generation=generation_number(folder),
        build=record,
        features=files,
        canaries=record_file(folder / CANARY_FILE),
        index=work.index(yardstick, folder, files, removed),
        steps=tuple(StepRecord(name, step.name, step.reason) for name, step in done.plan.steps.items()),
        fidelity=yardstick.fidelity() if measured else None,
        columns=None if table is None else record_file(folder / COLUMN_FILE),
        removed=carry_removed(work.out, start.manifest, folder),
        skipped=write_skipped(folder, store),
        audit=audits.drawn,
    )
    publish(work.out, manifest)
    return work.report(manifest, began, audits.uneven)


def open_build(task: Task | str, out: Path, config: BuildConfig, arguments: Mapping[str, str] | None) -> BuildWork:
    """Return the work of a build: the task found, nothing read or written yet."""
    if isinstance(task, Task):
        return BuildWork(task, out, config, TaskReference(None, {}))
    reference = TaskReference(absolute_reference(task), dict(arguments or {}))
    return BuildWork(load_task(task, arguments), out, config, reference)
