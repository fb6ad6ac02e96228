"""A build: the checks before its first row, its feature files, and the workers that compute them.

`BuildJob` has the steps of a build, which `build.run` calls in order. `FileWorker` computes some of its feature files,
in this process or, through `WorkerSource`, in another one.
"""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

from tracin_ann.choices import ScoreName
from tracin_ann.config import BuildConfig
from tracin_ann.device import require_native_bf16, resolve_device
from tracin_ann.distributed import Launcher, Shard
from tracin_ann.errors import DamagedIndexError, IndexMismatchError, MisplacedRowsError, UsageError, problem
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
    audit_files,
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
from tracin_ann.files import make_directory
from tracin_ann.scoring import PILOT_DIM, DimChoice, SearchIndexOptions, find_curvature, open_score_maker, run_pilot
from tracin_ann.search import is_flat
from tracin_ann.sketch import make_sketch
from tracin_ann.store import (
    FEATURES,
    BuildRecord,
    BuildStart,
    FeatureSpec,
    FeatureStore,
    Manifest,
    NextGeneration,
    RowTable,
    ScoreRecord,
    SketchSpec,
    StoreLayout,
    agree_on_record,
    check_generation,
    claim_directory,
    collect_columns,
    find_unnamed_files,
    read_current,
    read_last_build,
    read_shard_count,
)
from tracin_ann.task import Task, TaskReference, absolute_reference, load_task
from tracin_ann.types import ProgressCallback, ignore_progress

File = tuple[int, int]
"""Partition and checkpoint of a feature file, the unit of work of shards and launchers."""
_REPORT_S = 1.0
"""Time between two reports of a worker."""
logger = logging.getLogger(__name__)


def open_build(task: Task | str, out: Path, config: BuildConfig, arguments: Mapping[str, str] | None) -> BuildJob:
    """Return the build of a task, or of a named one.

    Raises:
        TaskError, UsageError: the task cannot be found, or an option cannot be used.
    """
    if isinstance(task, Task):
        return BuildJob(task, out, config, TaskReference())
    reference = TaskReference(absolute_reference(task), dict(arguments or {}))
    return BuildJob(load_task(task, arguments), out, config, reference)


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
        self._chooses_dim = config.dim == "auto"
        self._table: tuple[RowTable | None] | None = None
        self._load_seconds = 0.0

    def choose_dim(self, progress: ProgressCallback, *, compares: bool = False) -> DimChoice | None:
        """Set D if it is to be chosen: that of the existing index, or for a new one by a pilot; return its result.

        With `compares`, the result contains what would be chosen for other dtypes.

        Raises:
            UsageError: no D is within the limits.
            TaskError: the task breaks the contract.
        """
        if self.config.dim != "auto":
            return None
        last_build = read_last_build(self.out, read_current(self.out))
        if last_build is not None:
            self._adopt_dim(last_build)
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
        choice = pilot.compare_dtypes(choice, shape) if compares else choice
        self.config = replace(self.config, dim=choice.chosen.dim)
        log = logger.info if choice.is_reached else logger.warning
        log("sketch dimension: %s", choice.summary)
        return choice

    def _adopt_dim(self, build: BuildRecord) -> None:
        """Use the D of a build, which another process may have recorded during the pilot, if D is to be chosen."""
        if self._chooses_dim:
            self.config = replace(self.config, dim=build.spec.sketch.dim)

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
        self._adopt_dim(last_build)
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
            # A scan has no files. Its rows are divided among workers without shards.
            if index.kind != "flat" and index.shards != self.config.index_shards:
                return False
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

    def agree(self, model: LoadedModel, start: BuildStart) -> tuple[BuildRecord, BatchSettings]:
        """Agree with the other workers of this build on its record: the one that the first of them has written.

        Raises:
            IndexMismatchError: this worker has another task, other options or other versions of libraries.
        """
        record = self.config.agree_on_batches(start.record, 0, str(self.out))
        if start.unfinished_build is not None:
            self._check_same_worker(start.unfinished_build, record)
        settings = self.tune(model, record)
        record = replace(record, batch_size=settings.batch_size, channels_last=settings.channels_last)
        make_directory(self.out)
        agreed = agree_on_record(self.out, start.last_build, record)
        if agreed == record:
            return record, settings
        self._adopt_dim(agreed)
        if self._chooses_dim:
            record = replace(record, spec=replace(record.spec, sketch=agreed.spec.sketch))
        self._check_same_build(agreed, record, None)
        self._check_same_worker(agreed, record)
        agreed = self.config.agree_on_batches(agreed, 0, str(self.out))
        return agreed, self.tune(model, agreed)

    def _check_same_worker(self, first: BuildRecord, own: BuildRecord) -> None:
        """Check what need not be the same when a build is resumed, but has to be for its workers.

        Raises:
            IndexMismatchError: names the first difference.
        """
        versions = {name: (first.spec.versions.get(name), own.spec.versions.get(name)) for name in own.spec.versions}
        pairs = {**versions, "--on-nonfinite": (first.on_nonfinite, own.on_nonfinite)}
        for name, (there, here) in pairs.items():
            if there != here:
                raise IndexMismatchError(
                    f"the features in {self.out} are being computed with {name} {there}, this worker has {here}; use "
                    "the same for all workers, or finish the build by a command without --shard"
                )

    @contextmanager
    def open_worker(self, progress: ProgressCallback = ignore_progress) -> Iterator[FileWorker]:
        """Yield a worker that computes feature files of this build; it takes no lock."""
        self.choose_dim(progress)
        with self.runner.model() as model:
            yield FileWorker(self, model)

    def launch(self, launcher: Launcher, claims: ExitStack | None, progress: ProgressCallback) -> list[File]:
        """Compute the missing feature files on the workers of a launcher, after all checks; return these files.

        Meanwhile the model is not in use by this process: a worker may have the same device, or be in this process.

        Raises:
            UsageError: the workers wrote to another file system.
        """
        with self.runner.model() as model:
            start = self.prepare(model)
            layout = start.record.layout
            missing = FeatureStore(self.out / FEATURES, layout).missing(start.trusted_files)
            if not missing:
                return []
            self.check_canaries(model, start)
            record = self.config.agree_on_batches(start.record, len(missing), str(self.out))
            by_partition = self.reads_by_partition(layout, self.tune(model, record))
            self.collect_columns(progress)
        if claims is not None:
            claims.enter_context(claim_directory(self.out))
        units = sorted(missing, key=lambda file: file if by_partition else file[::-1])
        task = None if self.reference.reference is not None else self.runner.task
        source = WorkerSource(task, self.reference, Path(os.path.abspath(self.out)), self.config)
        done, total = 0, layout.count_rows(missing)
        for n_rows in launcher.run(source, units):
            # The rows of a worker that died are counted again.
            done = min(done + n_rows, total)
            progress("features", done, total)
        absent = [file for file in missing if not (self.out / FEATURES / layout.file_name(*file)).exists()]
        if absent:
            raise UsageError(
                problem(
                    f"the workers have not written all files of {self.out}",
                    got=f"{len(absent)} of {len(missing)} files missing",
                    expected="a directory that all workers share",
                    remedy="use --out on a shared file system",
                )
            )
        return missing

    def describe_missing(self, layout: StoreLayout, missing: Sequence[File]) -> str:
        """Return the message that files are missing, with the shards that compute them."""
        count = read_shard_count(self.out) or 1
        lacking = [shard for i in range(count) if set((shard := Shard(i, count)).take(layout.files)) & set(missing)]
        commands = ", ".join(f"--shard {shard}" for shard in lacking)
        return problem(
            f"the features in {self.out} are not complete",
            got=f"{len(missing)} of {len(layout.files)} files missing",
            expected="all",
            remedy=f"run this command with {commands} instead of --finish, and then again",
        )

    def collect_columns(self, progress: ProgressCallback) -> RowTable | None:
        """Return the columns and ids of the training rows, if the task defines any; the first call reads the rows."""
        task, runner = self.runner.task, self.runner
        id_of = None if task.ids is None else task.id_of
        if self._table is None:
            n_rows = runner.n_rows("train")
            self._table = (collect_columns(runner.data("train"), n_rows, task.columns, id_of, progress),)
        return self._table[0]

    def extract(
        self,
        model: LoadedModel,
        generation: NextGeneration,
        missing: Sequence[File],
        settings: BatchSettings,
        progress: ProgressCallback,
    ) -> ExtractionResult:
        """Write the missing feature files, and the canaries.

        Raises:
            MisplacedRowsError: the examples of some batch cannot be told apart; the new feature files are deleted.
        """
        features = self.features(generation.record)
        extraction = Extraction(model, generation.store, features)
        try:
            by_partition = self.reads_by_partition(extraction.layout, settings)
            extracted = extraction.run(missing, progress, by_partition=by_partition)
        except MisplacedRowsError:
            # A resumed build would reuse intact files, and rows in them may be wrong.
            generation.delete_new_features()
            raise
        write_canaries(generation.folder / CANARY_FILE, extracted.canaries)
        return extracted

    def reads_by_partition(self, layout: StoreLayout, settings: BatchSettings) -> bool:
        """Return whether each partition is read once for all checkpoints."""
        return reading_costs_more(layout, settings, self._load_seconds)

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


class FileWorker:
    """Computes feature files of a build, in a directory to which other workers write other files at the same time.

    Args:
        job: the build.
        model: the model of its task.

    Attributes:
        store: the feature files.

    Raises:
        IndexMismatchError: another worker has another task, other options or other versions of libraries.
        TaskError: the task breaks the contract.
    """

    def __init__(self, job: BuildJob, model: LoadedModel) -> None:
        self._job, self._start = job, job.prepare(model)
        job.check_canaries(model, self._start)
        finished = self._start.finished
        if finished is not None:
            # Damaged files are computed again as they were.
            record, self._settings = finished.build, job.tune(model, finished.build)
        else:
            record, self._settings = job.agree(model, self._start)
        self.store = FeatureStore(job.out / FEATURES, record.layout)
        features = job.features(record)
        self._extraction = Extraction(model, self.store, features)
        self._auditor = Auditor(model, self.store, features, ignore_progress)

    def __call__(self, files: Sequence[File]) -> Iterator[int]:
        """Compute those of the files that are missing, and yield the number of new rows about once a second."""
        n_rows, last_s = 0, perf_counter()
        for n_new in self.write(self.find_missing(files)):
            n_rows += n_new
            if perf_counter() - last_s >= _REPORT_S:
                yield n_rows
                n_rows, last_s = 0, perf_counter()
        yield n_rows

    def find_missing(self, files: Sequence[File]) -> list[File]:
        """Return the files that do not exist or are damaged."""
        return self.store.missing(self._start.trusted_files, files)

    def write(self, files: Sequence[File]) -> Iterator[int]:
        """Compute and write files, and yield the number of rows of each batch.

        If a batch is more uneven than those of earlier calls, rows of it are compared with autograd.

        Raises:
            NonFiniteError: a row is not finite and such rows are not skipped.
            GradientProofError: a row differs from autograd; all files that no manifest lists are deleted.
        """
        uneven = self._extraction.uneven
        before = uneven.measure
        try:
            by_partition = self._job.reads_by_partition(self.store.layout, self._settings)
            yield from self._extraction.write(files, by_partition=by_partition)
        except MisplacedRowsError:
            # Rows of earlier batches may be wrong, too.
            for path in find_unnamed_files(self.store, self._start.manifest, files):
                path.unlink(missing_ok=True)
            raise
        if uneven.measure > before:
            audit_files(self._auditor, uneven.places, self._start, files)


@dataclass(frozen=True)
class WorkerSource:
    """What another process needs to open a worker of a build; picklable if the task has a name or is picklable itself.

    Attributes:
        task: None for a named task.
        reference: its name, if any.
        out: the directory of the index, which exists.
        config: the options.
    """

    task: Task | None
    reference: TaskReference
    out: Path
    config: BuildConfig

    @contextmanager
    def __call__(self, device: str | None) -> Iterator[FileWorker]:
        """Yield a worker on a device; None: that of the options.

        Raises:
            UsageError: this machine does not have the directory.
        """
        if not self.out.is_dir():
            raise UsageError(
                problem(
                    f"{self.out} does not exist on {platform.node()}",
                    got="no directory",
                    expected="a directory that all workers share",
                    remedy="use --out on a shared file system",
                )
            )
        task, config = self.task, self.config
        if self.reference.reference is not None:
            task = load_task(self.reference.reference, self.reference.arguments)
        assert task is not None
        if device is not None:
            config = replace(config, device=device)
        with BuildJob(task, self.out, config, self.reference).open_worker() as worker:
            yield worker
