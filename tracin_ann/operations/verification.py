"""Verification, audit and repair of an index.

`verify` reads every byte and compares it with the manifest, and the inverted lists with the features. `audit` compares
stored rows with gradients by plain autograd. `repair` rebuilds damaged files from the task.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tracin_ann.build import BuildReport, run
from tracin_ann.build_job import BuildJob
from tracin_ann.config import BuildConfig
from tracin_ann.device import resolve_device
from tracin_ann.errors import DamagedIndexError, TracinAnnError, UsageError, problem
from tracin_ann.features import (
    Auditor,
    AuditResult,
    IndexTask,
    RunOptions,
    draw_places,
    load_index_task,
    read_generation_canaries,
)
from tracin_ann.search import CalibratedIndex, load_index
from tracin_ann.store import (
    BUILD_RECORD,
    FEATURES,
    MANIFEST,
    FeatureFile,
    FeatureStore,
    FileRecord,
    Manifest,
    check_file,
    check_manifest_copy,
    clean_up,
    generation_folder,
    hold_writer_lock,
    list_generations,
    read_build_record,
    read_columns,
    read_removed_ids,
    read_skipped_rows,
    read_unlisted_ids,
    reject_links,
    select_listed_rows,
    write_build_record,
)
from tracin_ann.task import Task, TaskReference, absolute_reference
from tracin_ann.types import ProgressCallback, ignore_progress

# Rows of the inverted lists that are compared with the features.
_CHECKED_VECTORS = 1000


@dataclass(frozen=True)
class Damage:
    """A damaged file, and a line that describes the damage."""

    path: Path
    message: str


@dataclass(frozen=True)
class VerificationResult:
    """The damage that a verification found, and the number of files and bytes that it read."""

    damage: tuple[Damage, ...]
    files: int
    size: int


@dataclass(frozen=True)
class AuditSample:
    """The random sample of rows that an audit compares.

    Attributes:
        rows: the number of rows, each at one checkpoint; all rows if the index has fewer.
        seed: seed of the sample; None: derived from the index's spec, so that each audit compares the same rows.
    """

    rows: int
    seed: int | None = None


def verify(directory: str | os.PathLike[str], progress: ProgressCallback | None = None) -> VerificationResult:
    """Read every byte of an index's current generation and return all damage.

    Raises:
        DamagedIndexError: no manifest can be read, or there is none.
    """
    out = Path(directory)
    damage = list(_check_manifests(out))
    manifest = _read_best_manifest(out)
    own = generation_folder(out, manifest.generation)
    files = [(own, record) for record in manifest.own_files] + [(out / FEATURES, r) for r in manifest.features]
    intact = set()
    for done, (place, record) in enumerate(files):
        try:
            check_file(place, record, deep=True)
            intact.add(record.name)
        except DamagedIndexError as error:
            damage.append(Damage(place / record.name, _describe_altered_rows(place / record.name) or str(error)))
        if progress is not None:
            progress("files", done + 1, len(files))
    damage += _check_contents(out, manifest, intact)
    return VerificationResult(tuple(damage), len(files) + 2, sum(record.size for _, record in files))


def repair(
    directory: str | os.PathLike[str],
    task: Task | str | None = None,
    *,
    arguments: Mapping[str, str] | None = None,
    device: str = "auto",
    progress: ProgressCallback | None = None,
) -> BuildReport | None:
    """Rebuild the files that `verify` finds damaged, and remove leftovers of interrupted writers.

    Returns:
        The report of the build, or None if nothing had to be computed.

    Args:
        directory: the index.
        task: the task, or its name if it has moved; None: the task of the build.
        arguments: arguments of a task that is a function; None: those of the build.
        device: `auto` or the name of a device.
        progress: called with (stage, done, total).

    Raises:
        DamagedIndexError: the damage cannot be repaired: no manifest is left, or the list of removed rows is damaged.
        BusyIndexError: another process is writing the index.
        IndexMismatchError: the task does not match the index.
    """
    out = Path(directory)
    # Raises before a lock file is made if there is nothing to repair.
    _read_best_manifest(out)
    # Hold the lock until the files are rebuilt: no other writer may see the directory without them.
    with hold_writer_lock(out):
        damage = verify(out, progress).damage
        manifest = _read_best_manifest(out)
        damaged = [each.path for each in damage if each.path.name not in (MANIFEST, BUILD_RECORD)]
        job = _open_rebuild(out, manifest, task, arguments, device) if damaged else None
        _check_removed_rows(out, manifest, damaged)
        for path in damaged:
            path.unlink(missing_ok=True)
        if any(each.path.name == BUILD_RECORD for each in damage):
            write_build_record(out, manifest.build)
        for place in (generation_folder(out, manifest.generation), out):
            manifest.write(place)
        if job is None:
            clean_up(out, manifest)
            return None
        return run(job, progress)


def remove_leftovers(directory: str | os.PathLike[str]) -> None:
    """Remove leftover files of interrupted writers from an intact index.

    Raises:
        DamagedIndexError: no manifest can be read.
        BusyIndexError: another process is writing the index.
    """
    out = Path(directory)
    with hold_writer_lock(out):
        clean_up(out, _read_best_manifest(out))


def audit(
    directory: str | os.PathLike[str],
    draw: AuditSample,
    task: Task | str | None = None,
    *,
    arguments: Mapping[str, str] | None = None,
    device: str = "auto",
    progress: ProgressCallback = ignore_progress,
) -> AuditResult:
    """Compare a random sample of stored rows with gradients of single examples by plain autograd.

    Args:
        directory: the index.
        draw: the sample.
        task: the task, or its name if it has moved; None: the task of the build.
        arguments: arguments of a task that is a function; None: those of the build.
        device: `auto` or the name of a device.
        progress: called with (stage, done, total).

    Raises:
        UsageError: the training rows are random, so that they cannot be compared; or the task cannot be found.
        IndexMismatchError: the task does not match the index.
        DamagedIndexError: a file of the index is damaged.
    """
    out = Path(directory)
    reject_links(out)
    manifest = Manifest.read(out)
    built, config = manifest.build, restore_config(manifest, device)
    if built.random_data:
        raise UsageError(
            problem(
                f"{out} cannot be audited",
                got="an index built with --allow-random-data",
                expected="rows that do not change when they are read again",
                remedy="leave out --audit",
            )
        )
    options = RunOptions(
        resolve_device(device),
        built.batch_size or RunOptions.batch_size,
        precision=config.precision,
        channels_last=built.channels_last,
        on_nonfinite=built.on_nonfinite,
        preconditioner=config.preconditioner,
    )
    index_task = IndexTask(out, manifest, lambda: load_index_task(task, arguments, manifest, out), options)
    store = FeatureStore(out / FEATURES, built.layout)
    without = np.union1d(read_skipped_rows(out, manifest).row_S, read_removed_ids(out, manifest))
    seed = int(built.spec.digest(), 16) if draw.seed is None else draw.seed
    places = draw_places(draw.rows, store, without, seed)
    index_task.check_canaries(sorted({checkpoint for _, checkpoint in places}))
    with index_task.runner.model() as model:
        return Auditor(model, store, config.features(built.spec.rank_one), progress).audit(places)


def _open_rebuild(
    out: Path, manifest: Manifest, task: Task | str | None, arguments: Mapping[str, str] | None, device: str
) -> BuildJob:
    """Return the job that rebuilds the manifest's index.

    Raises:
        UsageError: the task cannot be found.
    """
    built = manifest.build.task
    given = built.arguments if arguments is None else arguments
    loaded = load_index_task(task, given, manifest, out)
    name = task or built.reference
    reference = TaskReference(absolute_reference(name), dict(given)) if isinstance(name, str) else TaskReference()
    return BuildJob(loaded, out, restore_config(manifest, device), reference)


def _check_removed_rows(out: Path, manifest: Manifest, damaged: Sequence[Path]) -> None:
    """Check that the list of removed rows is intact: it cannot be computed from the task.

    Raises:
        DamagedIndexError: the list is damaged.
    """
    if manifest.removed is None or all(path.name != manifest.removed.name for path in damaged):
        return
    raise DamagedIndexError(
        problem(
            f"{generation_folder(out, manifest.generation) / manifest.removed.name} cannot be rebuilt",
            got="a damaged file",
            expected="the ids of the removed rows",
            remedy="restore that file, or build a new index and remove the rows again",
        )
    )


def restore_config(manifest: Manifest, device: str = "auto") -> BuildConfig:
    """Return the options with which a build produces the manifest's index."""
    built, index = manifest.build, manifest.index
    spec = built.spec
    defaults = BuildConfig()
    return BuildConfig(
        dim=spec.sketch.dim,
        sketch=spec.sketch.name,
        seed=spec.sketch.seed,
        index=index.kind,
        index_shards=index.shards,
        batch_size=built.batch_size,
        memory_format="channels-last" if built.channels_last else "contiguous",
        precision=spec.precision,  # type: ignore[arg-type]
        preconditioner=spec.preconditioner,  # type: ignore[arg-type]
        target_recall=defaults.target_recall if index.calibration is None else index.calibration.target,
        codes=index.codes or defaults.codes,  # type: ignore[arg-type]
        yardstick=manifest.fidelity is not None,
        device=device,
        dtype=spec.dtype,  # type: ignore[arg-type]
        norms=spec.norms,  # type: ignore[arg-type]
        partition_rows=built.partition_rows,
        allow_random_data=built.random_data,
        on_nonfinite=built.on_nonfinite,
    )


def _check_manifests(out: Path) -> Iterator[Damage]:
    """Yield the damage of the manifest, of its copy in the generation's directory, and of the build record."""
    best = _read_best_manifest(out)
    for place in (out, generation_folder(out, best.generation)):
        try:
            check_manifest_copy(place, best)
        except DamagedIndexError as error:
            yield Damage(place / MANIFEST, str(error))
    try:
        read_build_record(out)
    except DamagedIndexError as error:
        yield Damage(out / BUILD_RECORD, str(error))


def _read_best_manifest(out: Path) -> Manifest:
    """Return the manifest; if it is damaged, its copy in the last generation's directory.

    Raises:
        DamagedIndexError: there is no intact manifest, or part of the index is a link.
    """
    reject_links(out)
    try:
        return Manifest.read(out)
    except DamagedIndexError:
        if not (out / MANIFEST).exists() and not (out / BUILD_RECORD).exists():
            raise
        # Only the last generation: an older one, still leased by a reader, lacks the rows removed since.
        folders = list_generations(out)
        if not folders:
            raise
        return Manifest.read(folders[-1])


def _describe_altered_rows(path: Path) -> str:
    """Return a message that names the altered rows of a feature file; "" if none can be determined."""
    if path.suffix != ".h5":
        return ""
    try:
        FeatureFile.open(path).verify()
    except TracinAnnError as error:
        return str(error)
    return ""


def _check_contents(out: Path, manifest: Manifest, intact: set[str]) -> Iterator[Damage]:
    """Yield files whose bytes have the recorded digest (`intact`), but whose content is invalid."""
    own = generation_folder(out, manifest.generation)
    layout = manifest.build.layout
    store = FeatureStore(out / FEATURES, layout)
    for partition in range(layout.n_partitions):
        for checkpoint in range(layout.n_checkpoints):
            path = store.path(partition, checkpoint)
            if path.name in intact:
                try:
                    # The file is closed after this check; the store would leave some hundred files open.
                    FeatureFile.open(path, layout.header(partition, checkpoint)).verify()
                except DamagedIndexError as error:
                    intact.discard(path.name)
                    yield Damage(path, str(error))
    readers: list[tuple[FileRecord | None, Callable[[Path], object]]] = [
        (manifest.canaries, lambda path: read_generation_canaries(own, manifest)),
        (manifest.columns, lambda path: read_columns(path, layout.n_rows).check_unique_ids()),
        (manifest.removed, lambda path: read_removed_ids(out, manifest)),
        (manifest.skipped, lambda path: read_skipped_rows(out, manifest)),
    ]
    for record, read in readers:
        if record is not None and record.name in intact:
            try:
                read(own / record.name)
            except DamagedIndexError as error:
                yield Damage(own / record.name, str(error))
    listed = {record.name for record in manifest.index.files}
    features = {record.name for record in manifest.features}
    if not listed or (listed | features) - intact:
        return
    path = own / manifest.index.files[0].name
    try:
        view = select_listed_rows(store.view(), read_unlisted_ids(out, manifest))
        index = load_index(manifest.index.kind, own, view, torch.device("cpu"))
        faults = index.find_faults(_CHECKED_VECTORS, seed=0) if isinstance(index, CalibratedIndex) else []
    except DamagedIndexError as error:
        faults = [str(error)]
    for fault in faults:
        yield Damage(path, f"{path} does not match the features: {fault}; run tracin-verify --repair")
