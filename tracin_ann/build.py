"""The steps of a build: task -> feature rows of every checkpoint -> search index -> manifest.

The same command resumes an interrupted build: intact feature files are reused, missing ones are computed. The manifest
is written last; with it, the directory is an index.

Feature files are independent of each other. With a launcher, workers compute them. `build_shard` computes a share of
them without a lock; `finish_build` does the rest when all shares exist.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

from tracin_ann.build_job import BuildJob, open_build
from tracin_ann.config import BuildConfig
from tracin_ann.distributed import Launcher, Shard, describe_bad_launcher
from tracin_ann.errors import UsageError
from tracin_ann.features import CANARY_FILE
from tracin_ann.scoring import DimChoice, QualityMeasurement, build_search_index, open_score_maker
from tracin_ann.store import (
    FEATURES,
    AuditRecord,
    FeatureStore,
    IndexRecord,
    Manifest,
    NextGeneration,
    SkippedRows,
    StepRecord,
    claim_directory,
    clean_up,
    hold_writer_lock,
    read_skipped_rows,
    record_file,
    reject_foreign_files,
    write_shard_count,
)
from tracin_ann.task import Task
from tracin_ann.types import ProgressCallback, ignore_progress


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
    launcher: Launcher | None = None,
) -> BuildReport:
    """Build an index of a task's training rows in the directory `out`, or resume a build there.

    Args:
        task: a Task, or its name (`path/to/file.py:name`, `package.module:name`).
        out: the directory; created if it does not exist.
        config: see BuildConfig.
        arguments: for a named task that is a function.
        progress: called with (stage, done, total).
        launcher: its workers compute the feature files; None: this process does. The task's file and data, its
            checkpoints and `out` have the same paths for every worker.

    Raises:
        TaskError: the task breaks the contract; nothing is written.
        IndexMismatchError: the directory holds the index of another task or other options.
        UsageError: an option or the directory cannot be used.
        NonFiniteError: the loss or gradient of a row is NaN or infinite; complete partitions stay on disk. If such
            rows are skipped: no row is left.
        GradientProofError: no method computes a parameter's gradients as autograd does, or a stored row differs from
            autograd; nothing is published.
    """
    if launcher is not None and not isinstance(launcher, Launcher):
        raise UsageError(describe_bad_launcher(launcher))
    job = open_build(task, Path(out), config or BuildConfig(), arguments)
    return _run_locked(job, progress, launcher=launcher)


def finish_build(
    task: Task | str,
    out: str | os.PathLike[str],
    config: BuildConfig | None = None,
    *,
    arguments: Mapping[str, str] | None = None,
    progress: ProgressCallback | None = None,
) -> BuildReport:
    """Finish a build whose feature files were computed by `build_shard`: audit, search index, measurements, manifest.

    Args:
        task: as for `build`.
        out: the directory.
        config: as for the shards.
        arguments: as for `build`.
        progress: called with (stage, done, total).

    Raises:
        UsageError: feature files are missing; the message names the shards that compute them.
        TracinAnnError: as `build`.
    """
    job = open_build(task, Path(out), config or BuildConfig(), arguments)
    return _run_locked(job, progress, needs_all_files=True)


def _run_locked(
    job: BuildJob,
    progress: ProgressCallback | None,
    *,
    launcher: Launcher | None = None,
    needs_all_files: bool = False,
) -> BuildReport:
    """Build in a directory, and hold its writer's lock meanwhile."""
    with ExitStack() as locks:
        reject_foreign_files(job.out)
        is_new = not job.out.is_dir()
        if not is_new:
            locks.enter_context(hold_writer_lock(job.out))
        claims = locks if is_new else None
        return run(job, progress, claims=claims, launcher=launcher, needs_all_files=needs_all_files)


@dataclass(frozen=True)
class ShardReport:
    """The result of a shard of a build.

    Attributes:
        shard: its number and the number of shards.
        files: the number of feature files of its share.
        rows_extracted: rows × checkpoints that this run computed; 0 if all these files existed.
        seconds: wall time.
    """

    shard: Shard
    files: int
    rows_extracted: int
    seconds: float


def build_shard(
    task: Task | str,
    out: str | os.PathLike[str],
    shard: Shard,
    config: BuildConfig | None = None,
    *,
    arguments: Mapping[str, str] | None = None,
    progress: ProgressCallback | None = None,
) -> ShardReport:
    """Compute a share of the feature files of a build; other shards may run at the same time, on any machine.

    Shards take no lock, and any of them can run again. The first one records the batch size, the memory format and,
    with `dim="auto"`, D before its first row; the others use them.

    Args:
        task: as for `build`.
        out: the directory, on a file system that all shards share.
        shard: which share: consecutive files, ordered by partition.
        config: as for `build`; the same for all shards.
        arguments: as for `build`.
        progress: called with (stage, done, total).

    Raises:
        IndexMismatchError: another shard has another task, other options or other versions of libraries.
        TracinAnnError: as `build`.
    """
    began_s, rows = perf_counter(), 0
    progress = progress or ignore_progress
    job = open_build(task, Path(out), config or BuildConfig(), arguments)
    reject_foreign_files(job.out)
    with job.open_worker(progress) as worker:
        share = shard.take(worker.store.layout.files)
        missing = worker.find_missing(share)
        if missing:
            write_shard_count(job.out, shard.count)
        total = worker.store.layout.count_rows(missing)
        for n_rows in worker.write(missing):
            rows += n_rows
            progress("features", rows, total)
    return ShardReport(shard, len(share), rows, perf_counter() - began_s)


def run(
    job: BuildJob,
    progress: ProgressCallback | None = None,
    *,
    claims: ExitStack | None = None,
    launcher: Launcher | None = None,
    needs_all_files: bool = False,
) -> BuildReport:
    """Build in a directory whose writer's lock the caller holds, or in a new one.

    A new directory is created only after all checks, so that a rejected build leaves nothing behind.

    Args:
        job: the build.
        progress: called with (stage, done, total).
        claims: holds the lock of a new directory.
        launcher: its workers compute the feature files.
        needs_all_files: feature files that are missing are an error.

    Raises:
        As `build` and `finish_build`.
    """
    began_s = perf_counter()
    progress = progress or ignore_progress
    dim_choice = job.choose_dim(progress)
    launched = [] if launcher is None else job.launch(launcher, claims, progress)
    with job.runner.model() as model:
        start = job.prepare(model)
        store = FeatureStore(job.out / FEATURES, start.record.layout)
        missing = store.missing(start.trusted_files)
        new = [*launched, *missing]
        if start.finished is not None and not new and job.is_complete(start.finished):
            clean_up(job.out, start.finished)
            return _report(job, start.finished, 0, began_s)
        if missing and needs_all_files:
            raise UsageError(job.describe_missing(store.layout, missing))
        if missing:
            job.check_canaries(model, start)
        record = job.config.agree_on_batches(start.record, len(missing), str(job.out))
        if not missing and start.unfinished_build is not None:
            # The versions that computed the rows, which may be those of other machines.
            record = replace(record, spec=replace(record.spec, versions=start.unfinished_build.spec.versions))
        settings = job.tune(model, record)
        record = replace(record, batch_size=settings.batch_size, channels_last=settings.channels_last)
        table = job.collect_columns(progress)
        if claims is not None and not launched:
            claims.enter_context(claim_directory(job.out))
        generation = NextGeneration.begin(job.out, start, record, store, new)
        columns = generation.write_columns(table)
        extracted = job.extract(model, generation, missing, settings, progress)
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
        manifest, index=build_search_index(generation, features, quality, make_score, job.search_options)
    )
    if job.config.yardstick and not record.random_data:
        manifest = replace(manifest, fidelity=quality.fidelity(make_score("tracin")))
        measured = quality.score_fidelity(make_score(manifest.default_score), record.spec.parameters)
        manifest = replace(manifest, score_fidelity=measured)
    generation.publish(manifest)
    # Not a part of the generation, which is complete without it: an open index computes it at its first use.
    job.keep_curvature(manifest, store)
    return _report(job, manifest, store.layout.count_rows(new), began_s, audits.uneven, dim_choice)


def _report(
    job: BuildJob,
    manifest: Manifest,
    rows_extracted: int,
    began_s: float,
    uneven: AuditRecord | None = None,
    dim_choice: DimChoice | None = None,
) -> BuildReport:
    """Return the result of a build that began at `began_s`."""
    skipped = read_skipped_rows(job.out, manifest)
    return BuildReport(
        manifest, rows_extracted, perf_counter() - began_s, skipped, job.runner.loader.notes, uneven, dim_choice
    )
