"""The steps of a build: task -> feature rows of every checkpoint -> search index -> manifest.

The same command resumes an interrupted build: intact feature files are reused, missing ones are computed. The manifest
is written last; with it, the directory is an index.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

from tracin_ann.choices import ScoreName
from tracin_ann.config import BuildConfig
from tracin_ann.device import require_native_bf16, resolve_device
from tracin_ann.errors import DamagedIndexError, IndexMismatchError, MisplacedRowsError
from tracin_ann.features import (
    CANARY_FILE,
    DEFAULT_BATCH_SIZE,
    Auditor,
    BatchSettings,
    BuildAudits,
    Extraction,
    ExtractionResult,
    FeatureOptions,
    LoadedModel,
    RunOptions,
    TaskRunner,
    TuningOptions,
    UnpublishedRows,
    audit_build,
    check_canaries,
    check_spec,
    checkpoint_specs,
    library_versions,
    model_digest,
    parameter_specs,
    read_intact_canaries,
    reading_costs_more,
    tune,
    warn_of_slower_bf16,
    write_canaries,
)
from tracin_ann.scoring import (
    PILOT_DIM,
    DimChoice,
    QualityMeasurement,
    SearchIndexOptions,
    build_search_index,
    find_curvature,
    open_score_maker,
    run_pilot,
)
from tracin_ann.search import is_flat
from tracin_ann.sketch import make_sketch
from tracin_ann.store import (
    FEATURES,
    AuditRecord,
    BuildRecord,
    BuildStart,
    FeatureSpec,
    FeatureStore,
    IndexRecord,
    Manifest,
    NextGeneration,
    RowTable,
    ScoreRecord,
    SketchSpec,
    SkippedRows,
    StepRecord,
    check_generation,
    claim_directory,
    clean_up,
    collect_columns,
    hold_writer_lock,
    read_current,
    read_last_build,
    read_skipped_rows,
    record_file,
    reject_foreign_files,
)
from tracin_ann.task import Task, TaskReference, absolute_reference, load_task
from tracin_ann.types import ProgressCallback, ignore_progress

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BuildReport:
    """The result of a build.

    Attributes:
        manifest: of the finished index.
        rows_extracted: rows × checkpoints that this run computed; 0 if all feature files existed.
        seconds: wall time.
        skipped: rows that no answer contains because they are not finite.
        notes: one line for each checkpoint file that is not a plain state_dict: how it was read.
        uneven: audit of the batch with the most uneven example sizes that this run computed, if any; the manifest holds
            the audit of other rows.
        dim_choice: the choice of D, if this run made it.
    """

    manifest: Manifest
    rows_extracted: int
    seconds: float
    skipped: SkippedRows
    notes: tuple[str, ...] = ()
    uneven: AuditRecord | None = None
    dim_choice: DimChoice | None = None


def build(
    task: Task | str,
    out: str | os.PathLike[str],
    config: BuildConfig | None = None,
    *,
    arguments: Mapping[str, str] | None = None,
    progress: ProgressCallback | None = None,
) -> BuildReport:
    """Build an index of a task's training rows in the directory `out`, or resume a build there.

    Args:
        task: a Task, or its name (`path/to/file.py:name`, `package.module:name`).
        out: the directory; created if it does not exist.
        config: see BuildConfig.
        arguments: for a named task that is a function.
        progress: called with (stage, done, total).

    Raises:
        TaskError: the task breaks the contract; nothing is written.
        IndexMismatchError: the directory holds the index of another task or other options.
        UsageError: an option or the directory cannot be used.
        NonFiniteError: the loss or gradient of a row is NaN or infinite; complete partitions stay on disk. If such
            rows are skipped: no row is left.
        GradientProofError: no method computes a parameter's gradients as autograd does, or a stored row differs from
            autograd; nothing is published.
    """
    job = open_build(task, Path(out), config or BuildConfig(), arguments)
    with ExitStack() as locks:
        reject_foreign_files(job.out)
        is_new = not job.out.is_dir()
        if not is_new:
            locks.enter_context(hold_writer_lock(job.out))
        return run(job, progress, claims=locks if is_new else None)


def open_build(task: Task | str, out: Path, config: BuildConfig, arguments: Mapping[str, str] | None) -> BuildJob:
    """Return the build of a task, or of a named one.

    Raises:
        TaskError, UsageError: the task cannot be found, or an option cannot be used.
    """
    if isinstance(task, Task):
        return BuildJob(task, out, config, TaskReference())
    reference = TaskReference(absolute_reference(task), dict(arguments or {}))
    return BuildJob(load_task(task, arguments), out, config, reference)


def run(job: BuildJob, progress: ProgressCallback | None = None, *, claims: ExitStack | None = None) -> BuildReport:
    """Build in a directory whose writer's lock the caller holds, or in a new one.

    A new directory is created only after all checks, so that a rejected build leaves nothing behind. `claims` holds
    its lock.

    Raises:
        As `build`.
    """
    began_s = perf_counter()
    progress = progress or ignore_progress
    dim_choice = job.choose_dim(progress)
    with job.runner.model() as model:
        start = job.prepare(model)
        store = FeatureStore(job.out / FEATURES, start.record.layout)
        missing = store.missing(start.trusted_files)
        if start.finished is not None and not missing and job.is_complete(start.finished):
            clean_up(job.out, start.finished)
            return job.report(start.finished, 0, began_s)
        if missing:
            job.check_canaries(model, start)
        record = job.config.agree_on_batches(start.record, len(missing), str(job.out))
        settings = job.tune(model, record)
        record = replace(record, batch_size=settings.batch_size, channels_last=settings.channels_last)
        table = job.collect_columns(progress)
        if claims is not None:
            claims.enter_context(claim_directory(job.out))
        generation = NextGeneration.begin(job.out, start, record, store, missing)
        columns = generation.write_columns(table)
        extracted = job.extract(model, generation, settings, progress)
        audits = job.audit(model, generation, extracted, progress)
    features = generation.list_features()
    quality = QualityMeasurement(job.runner, store, job.features(record), job.config.seed, store.skipped()[0], progress)
    manifest = Manifest(
        generation=generation.number,
        build=record,
        features=features,
        canaries=record_file(generation.folder / CANARY_FILE),
        index=IndexRecord("flat", "", ()),
        steps=tuple(StepRecord(name, step.name, step.reason) for name, step in extracted.plan.steps.items()),
        columns=columns,
        removed=generation.copy_removed(),
        skipped=generation.write_skipped(),
        audit=audits.drawn,
        score=job.score_record,
    )
    job.check_score(manifest, store)
    make_score = open_score_maker(job.out, manifest, store).make
    manifest = replace(
        manifest,
        index=build_search_index(generation, features, quality, make_score, job.search_options),
        fidelity=quality.fidelity() if job.config.yardstick and not record.random_data else None,
    )
    generation.publish(manifest)
    # Not a part of the generation, which is complete without it: an open index computes it at its first use.
    job.keep_curvature(manifest, store)
    return job.report(manifest, extracted.rows, began_s, audits.uneven, dim_choice)


class BuildJob:
    """One build: its task and options, and the directory that it writes to."""

    def __init__(self, task: Task, out: Path, config: BuildConfig, reference: TaskReference) -> None:
        self.out, self.config, self.reference = out, config, reference
        self.device = resolve_device(config.device)
        # Raises an error at once if the sketch or its dimension is not known.
        make_sketch(config.sketch, PILOT_DIM if config.dim == "auto" else config.dim)
        if config.precision == "bf16":
            require_native_bf16(self.device)
        options = RunOptions(
            self.device,
            config.batch_size if config.batch_size is not None else DEFAULT_BATCH_SIZE,
            config.allow_random_data,
            config.workers,
            config.precision,
            preconditioner=config.preconditioner,
        )
        self.runner = TaskRunner(task, options, reference)
        self._load_seconds = 0.0

    def choose_dim(self, progress: ProgressCallback) -> DimChoice | None:
        """Set D if it is to be chosen: that of the existing index, or for a new one by a pilot; return its result.

        Raises:
            UsageError: no D is within the limits.
            TaskError: the task breaks the contract.
        """
        if self.config.dim != "auto":
            return None
        last_build = read_last_build(self.out, read_current(self.out))
        if last_build is not None:
            self.config = replace(self.config, dim=last_build.spec.sketch.dim)
            return None
        runner = self.runner
        runner.data("query")
        runner.options = replace(runner.options, on_nonfinite=self.config.choose_nonfinite_policy(None, str(self.out)))
        with runner.model() as model:
            rank_one = self.examine(model)
        pilot = run_pilot(runner, replace(self.config, dim=PILOT_DIM).features(rank_one), progress)
        n_rows = runner.n_rows("train")
        partition_rows = self.config.agree_on_partitions(None, n_rows)
        shape = self.config.shape(n_rows, len(runner.task.checkpoints), partition_rows)
        choice = pilot.choose(self.config.dim_target, shape)
        self.config = replace(self.config, dim=choice.chosen.dim)
        log = logger.info if choice.is_reached else logger.warning
        log("sketch dimension: %s", choice.summary)
        return choice

    def prepare(self, model: LoadedModel) -> BuildStart:
        """Return the record of this build, and the state of the directory.

        Nothing is written before all checks of a build have passed.

        Raises:
            IndexMismatchError: the directory holds the index of another task or other options.
            TaskError: the task breaks the contract.
        """
        self.runner.data("query")
        manifest = read_current(self.out)
        last_build = read_last_build(self.out, manifest)
        policy = self.config.choose_nonfinite_policy(
            None if last_build is None else last_build.on_nonfinite, str(self.out)
        )
        self.runner.options = replace(self.runner.options, on_nonfinite=policy)
        if last_build is None:
            rank_one = self.examine(model)
            warn_of_slower_bf16(model, self.config.features(rank_one))
            return BuildStart(self._record(model, rank_one, None), None, None)
        record = self._record(model, last_build.spec.rank_one, last_build.partition_rows)
        self._check_same_build(last_build, record, manifest)
        return BuildStart(
            replace(record, batch_size=last_build.batch_size, channels_last=last_build.channels_last),
            last_build,
            manifest,
        )

    def examine(self, model: LoadedModel) -> frozenset[str]:
        """Load every checkpoint once, run the first batch's probes, and return the rank-one parameters."""
        began_s = perf_counter()
        checkpoints = range(len(self.runner.task.checkpoints))
        # In reverse, because the probes need the first checkpoint.
        for checkpoint in reversed(checkpoints):
            model.load(checkpoint)
            if self.runner.options.on_nonfinite == "skip":
                model.require_finite_losses()
        self._load_seconds = (perf_counter() - began_s) / len(checkpoints)
        model.probe("train")
        model.probe("query")
        # The product of a weight and an outer product is not an outer product.
        return model.engine("train").plan.rank_one if self.config.preconditioner == "none" else frozenset()

    def _record(self, model: LoadedModel, rank_one: frozenset[str], partition_rows: int | None) -> BuildRecord:
        """Return what this build produces, given the parameters and the partitions of the existing index, if any."""
        train, sketch = self.runner.data("train"), self.config.make_sketch()
        spec = FeatureSpec(
            model=model_digest(model.module),
            train_rows=len(train),
            train_data="random" if self.config.allow_random_data else self.runner.data_digest(len(train)),
            parameters=parameter_specs(model.parameters, rank_one),
            checkpoints=checkpoint_specs(self.runner.task, model.rates, model.digest_moments),
            sketch=SketchSpec(sketch.name, sketch.version, sketch.dim, self.config.seed),
            dtype=self.config.dtype,
            norms=self.config.norms,
            precision=self.config.precision,
            preconditioner=self.config.preconditioner,
            versions=library_versions(),
        )
        return BuildRecord(
            spec,
            self.reference,
            self.config.agree_on_partitions(partition_rows, len(train)),
            self.config.allow_random_data,
            on_nonfinite=self.runner.options.on_nonfinite,
        )

    def _check_same_build(self, last_build: BuildRecord, record: BuildRecord, manifest: Manifest | None) -> None:
        """Check that this build has the same result as the last one, except for the growth that options allow.

        Raises:
            IndexMismatchError: names the first difference.
        """
        expected = record.spec
        if manifest is not None and manifest.build.spec.digest() == last_build.spec.digest():
            expected = self._ignore_growth(last_build.spec, record.spec)
        check_spec(last_build.spec, expected, str(self.out))
        if last_build.partition_rows != record.partition_rows or last_build.random_data != record.random_data:
            raise IndexMismatchError(
                f"index {self.out} was built with partition_rows {last_build.partition_rows} and allow_random_data "
                f"{last_build.random_data}, this build asks for {record.partition_rows} and {record.random_data}; "
                "use the same values, or another --out"
            )

    def _ignore_growth(self, built: FeatureSpec, requested: FeatureSpec) -> FeatureSpec:
        """Return the requested spec without the rows and checkpoints that may be new."""
        if self.config.append and requested.train_rows > built.train_rows:
            random = self.config.allow_random_data
            digest = "random" if random else self.runner.data_digest(built.train_rows)
            requested = replace(requested, train_rows=built.train_rows, train_data=digest)
        if self.config.add_checkpoint:
            requested = replace(requested, checkpoints=requested.checkpoints[: max(1, len(built.checkpoints))])
        return requested

    def is_complete(self, manifest: Manifest) -> bool:
        """Return whether a finished index of these rows has all its files and the requested kind of search index."""
        if self.config.rebuild_index:
            return False
        if manifest.score is not None and manifest.score != self.score_record:
            return False
        layout = manifest.build.layout
        try:
            check_generation(self.out, manifest, deep=True)
        except DamagedIndexError:
            return False
        index, requested = manifest.index, self.config.index
        if requested == "auto" and index.requested in ("", "auto"):
            return index.requested == "auto" or (index.kind == "flat") == is_flat(requested, layout.n_rows)
        return index.kind == requested and index.shards == self.config.index_shards

    def check_canaries(self, model: LoadedModel, start: BuildStart) -> None:
        """Reject a task whose features differ from those of the finished index: the index would mix rows of two models.

        Raises:
            IndexMismatchError: a canary differs.
        """
        if start.manifest is not None and not start.record.random_data:
            canaries = read_intact_canaries(self.out, start.manifest)
            check_canaries(model, self.features(start.manifest.build), canaries, str(self.out))

    def tune(self, model: LoadedModel, record: BuildRecord) -> BatchSettings:
        """Choose how rows are run, and set the model to it.

        A resumed build keeps the settings of its first run, so that all feature files are computed alike.
        """
        self.runner.check_workers("train")
        if not model.has_checkpoint:
            # A resumed build has not run the probes yet.
            self.examine(model)
        known = None if record.batch_size is None else (record.batch_size, record.channels_last)
        config = self.config
        request = TuningOptions(config.batch_size, config.memory_bytes, config.memory_format, known)
        settings = tune(model, self.features(record), request)
        self.runner.options = replace(self.runner.options, channels_last=settings.channels_last)
        return settings

    def collect_columns(self, progress: ProgressCallback) -> RowTable | None:
        """Return the columns and ids of the training rows, if the task defines any."""
        task, runner = self.runner.task, self.runner
        id_of = None if task.ids is None else task.id_of
        return collect_columns(runner.data("train"), runner.n_rows("train"), task.columns, id_of, progress)

    def extract(
        self, model: LoadedModel, generation: NextGeneration, settings: BatchSettings, progress: ProgressCallback
    ) -> ExtractionResult:
        """Write every missing feature file, and the canaries.

        Raises:
            MisplacedRowsError: the examples of some batch cannot be told apart; the new feature files are deleted.
        """
        features = self.features(generation.record)
        extraction = Extraction(model, generation.store, features, generation.missing, progress)
        try:
            extracted = extraction.run(by_partition=reading_costs_more(extraction.layout, settings, self._load_seconds))
        except MisplacedRowsError:
            # A resumed build would reuse intact files, and rows in them may be wrong.
            generation.delete_new_features()
            raise
        write_canaries(generation.folder / CANARY_FILE, extracted.canaries)
        return extracted

    def audit(
        self, model: LoadedModel, generation: NextGeneration, extracted: ExtractionResult, progress: ProgressCallback
    ) -> BuildAudits:
        """Compare stored rows with plain autograd.

        Raises:
            GradientProofError: a row differs.
        """
        auditor = Auditor(model, generation.store, self.features(generation.record), progress)
        built = UnpublishedRows(extracted, generation.start, generation.missing, generation.removed_R, self.config.seed)
        return audit_build(auditor, built)

    def features(self, record: BuildRecord) -> FeatureOptions:
        """Return how gradients become feature rows."""
        return self.config.features(record.spec.rank_one)

    @property
    def score_record(self) -> ScoreRecord:
        """Return the default score, and what the task says about its runs and its loss."""
        task = self.runner.task
        steps = tuple(checkpoint.steps for checkpoint in task.checkpoints)
        has_steps = all(checkpoint.steps is not None for checkpoint in task.checkpoints if checkpoint.largest_rate)
        usual: ScoreName = "gauss-newton" if task.loss_is_nll else "fisher" if has_steps else "tracin"
        runs = tuple(checkpoint.run for checkpoint in task.checkpoints)
        return ScoreRecord(task.score or usual, steps, runs, task.loss_is_nll)

    def check_score(self, manifest: Manifest, store: FeatureStore) -> None:
        """Check that the losses allow the default score.

        Raises:
            UsageError: it needs probabilities, and the losses are not -log p of one label.
        """
        curvature = find_curvature(self.score_record.default)
        if curvature is not None:
            open_score_maker(self.out, manifest, store).source.check_losses(curvature)

    def keep_curvature(self, manifest: Manifest, store: FeatureStore) -> None:
        """Compute the curvature of the default score, so that the first query does not have to."""
        curvature = find_curvature(self.score_record.default)
        if curvature is not None:
            open_score_maker(self.out, manifest, store).load(curvature)

    @property
    def search_options(self) -> SearchIndexOptions:
        """Return how the rows are indexed."""
        config = self.config
        return SearchIndexOptions(
            kind=config.index,
            seed=config.seed,
            codes=config.codes,
            target_recall=config.target_recall,
            device=self.device,
            score=self.score_record.default,
            shards=config.index_shards,
        )

    def report(
        self,
        manifest: Manifest,
        rows_extracted: int,
        began_s: float,
        uneven: AuditRecord | None = None,
        dim_choice: DimChoice | None = None,
    ) -> BuildReport:
        """Return the result of a build that began at `began_s`."""
        skipped = read_skipped_rows(self.out, manifest)
        return BuildReport(
            manifest, rows_extracted, perf_counter() - began_s, skipped, self.runner.loader.notes, uneven, dim_choice
        )
