"""Is an index what was built? Every byte against the manifest's digests, the lists against the features; and repair."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tracin_ann.build import BuildJob, BuildReport, run
from tracin_ann.config import BuildConfig
from tracin_ann.device import resolve_device
from tracin_ann.errors import DamagedIndexError, TracinAnnError, UsageError, problem
from tracin_ann.features import (
    Auditor,
    AuditResult,
    IndexTask,
    PassOptions,
    draw_places,
    load_index_task,
    read_generation_canaries,
)
from tracin_ann.search import IVFIndex
from tracin_ann.store import (
    BUILD_RECORD,
    FEATURES,
    MANIFEST,
    FeatureFile,
    FeatureStore,
    FileRecord,
    Manifest,
    check_file,
    generation_folder,
    hold_writer_lock,
    list_generations,
    read_build_record,
    read_columns,
    read_removed_ids,
    read_skipped_rows,
    read_unlisted_ids,
    refuse_links,
    refuse_other_copy,
    select_listed_rows,
    tidy,
    write_build_record,
)
from tracin_ann.task import Task, TaskReference, absolute_reference
from tracin_ann.types import ProgressCallback, ignore_progress

_LOOKED_AT = 1000


@dataclass(frozen=True)
class Damage:
    """A file that is not what was written, and in one line what is wrong with it."""

    path: Path
    message: str


@dataclass(frozen=True)
class VerificationResult:
    """What a verification saw: the damage, and how many files of how many bytes it read."""

    damage: tuple[Damage, ...]
    files: int
    size: int


@dataclass(frozen=True)
class Draw:
    """What an audit draws.

    Attributes:
        rows: how many, each at one checkpoint; all if there are fewer.
        seed: which; None: by the index's spec, so that the same index draws the same rows.
    """

    rows: int
    seed: int | None = None


def verify(directory: str | os.PathLike[str], progress: ProgressCallback | None = None) -> VerificationResult:
    """Read every byte of an index's current generation and return all that is damaged.

    Raises:
        DamagedIndexError: no manifest can be read, or there is none.
    """
    out = Path(directory)
    found = list(_manifests(out))
    manifest = _best(out)
    own = generation_folder(out, manifest.generation)
    names = [(own, record) for record in manifest.own_files] + [(out / FEATURES, r) for r in manifest.features]
    whole = set()
    for done, (place, record) in enumerate(names):
        try:
            check_file(place, record, deep=True)
            whole.add(record.name)
        except DamagedIndexError as error:
            found.append(Damage(place / record.name, _where(place / record.name) or str(error)))
        if progress is not None:
            progress("files", done + 1, len(names))
    found += _contents(out, manifest, whole)
    return VerificationResult(tuple(found), len(names) + 2, sum(record.size for _, record in names))


def repair(
    directory: str | os.PathLike[str],
    task: Task | str | None = None,
    *,
    arguments: Mapping[str, str] | None = None,
    device: str = "auto",
    progress: ProgressCallback | None = None,
) -> BuildReport | None:
    """Make anew what `verify` finds damaged, and nothing else; None where nothing had to be computed.

    What killed writers left is swept.

    Args:
        directory: of an index.
        task: the task, or its name where it moved; None: as the build was told.
        arguments: for a task that is a function; None: as the build was told.
        device: `auto` or a device's name.
        progress: called with (stage, done, total).

    Raises:
        DamagedIndexError: what is damaged cannot be made anew: no manifest is left, or which rows were removed is lost.
        BusyIndexError: another process is writing the index.
        IndexMismatchError: the task is not the index's.
    """
    out = Path(directory)
    # Refused here where there is nothing to mend, before a lock is put there.
    _best(out)
    # Held until all is made anew: no other writer finds the directory without what was removed.
    with hold_writer_lock(out):
        seen = verify(out, progress)
        manifest = _best(out)
        rotten = [damage.path for damage in seen.damage if damage.path.name not in (MANIFEST, BUILD_RECORD)]
        work = _work(out, manifest, task, arguments, device) if rotten else None
        _refuse_lost_removals(out, manifest, rotten)
        for path in rotten:
            path.unlink(missing_ok=True)
        if any(damage.path.name == BUILD_RECORD for damage in seen.damage):
            write_build_record(out, manifest.build)
        for place in (generation_folder(out, manifest.generation), out):
            manifest.write(place)
        if work is None:
            tidy(out, manifest)
            return None
        return run(work, progress)


def sweep(directory: str | os.PathLike[str]) -> None:
    """Remove what killed writers left in a whole index: a repair that is run again finds nothing else to do.

    Raises:
        BusyIndexError: another process is writing the index.
    """
    out = Path(directory)
    with hold_writer_lock(out):
        tidy(out, _best(out))


def audit(
    directory: str | os.PathLike[str],
    draw: Draw,
    task: Task | str | None = None,
    *,
    arguments: Mapping[str, str] | None = None,
    device: str = "auto",
    progress: ProgressCallback = ignore_progress,
) -> AuditResult:
    """Compare rows of an index, drawn at random, with the gradients of single examples by plain autograd.

    Args:
        directory: of an index.
        draw: which rows.
        task: the task, or its name where it moved; None: as the build was told.
        arguments: for a task that is a function; None: as the build was told.
        device: `auto` or a device's name.
        progress: called with (stage, done, total).

    Raises:
        UsageError: its rows are random, so that there is nothing to compare with; or the task cannot be found.
        IndexMismatchError: the task is not the index's.
        DamagedIndexError: a file of the index is.
    """
    out = Path(directory)
    refuse_links(out)
    manifest = Manifest.read(out)
    built, config = manifest.build, config_of(manifest, device)
    if built.random_data:
        raise UsageError(
            problem(
                f"{out} cannot be audited",
                got="an index built with --allow-random-data",
                expected="rows that are the same whenever they are read",
                remedy="leave out --audit",
            )
        )
    options = PassOptions(
        resolve_device(device),
        built.batch_size or PassOptions.batch_size,
        precision=config.precision,
        channels_last=built.channels_last,
        on_nonfinite=built.on_nonfinite,
    )
    fitting = IndexTask(out, manifest, lambda: load_index_task(task, arguments, manifest, out), options)
    store = FeatureStore(out / FEATURES, built.layout)
    without = np.union1d(read_skipped_rows(out, manifest).row_S, read_removed_ids(out, manifest))
    seed = int(built.spec.digest(), 16) if draw.seed is None else draw.seed
    drawn = draw_places(draw.rows, store, without, seed)
    fitting.refuse_changed(sorted({checkpoint for _, checkpoint in drawn}))
    with fitting.passes.model() as model:
        return Auditor(model, store, config.features(built.spec.rank_one), progress).audit(drawn)


def _work(
    out: Path, manifest: Manifest, task: Task | str | None, arguments: Mapping[str, str] | None, device: str
) -> BuildJob:
    """Return the build of the manifest's index; refused before anything is removed where its task cannot be found."""
    built = manifest.build.task
    given = built.arguments if arguments is None else arguments
    found = load_index_task(task, given, manifest, out)
    name = task or built.reference
    named = TaskReference(absolute_reference(name), dict(given)) if isinstance(name, str) else TaskReference()
    return BuildJob(found, out, config_of(manifest, device), named)


def _refuse_lost_removals(out: Path, manifest: Manifest, rotten: Sequence[Path]) -> None:
    if manifest.removed is None or all(path.name != manifest.removed.name for path in rotten):
        return
    raise DamagedIndexError(
        problem(
            f"{generation_folder(out, manifest.generation) / manifest.removed.name} cannot be made anew",
            got="damage",
            expected="the ids of the removed rows",
            remedy="restore that file, or build a new index and remove the rows again",
        )
    )


def config_of(manifest: Manifest, device: str = "auto") -> BuildConfig:
    """Return the options that make the manifest's index."""
    built, index = manifest.build, manifest.index
    spec = built.spec
    plain = BuildConfig()
    return BuildConfig(
        dim=spec.sketch.dim,
        sketch=spec.sketch.name,
        seed=spec.sketch.seed,
        index=index.kind,
        batch_size=built.batch_size,
        memory_format="channels-last" if built.channels_last else "contiguous",
        precision=spec.precision,  # type: ignore[arg-type]
        target_recall=plain.target_recall if index.calibration is None else index.calibration.target,
        codes=index.codes or plain.codes,  # type: ignore[arg-type]
        yardstick=manifest.fidelity is not None,
        device=device,
        dtype=spec.dtype,  # type: ignore[arg-type]
        norms=spec.norms,  # type: ignore[arg-type]
        partition_rows=built.partition_rows,
        allow_random_data=built.random_data,
        on_nonfinite=built.on_nonfinite,
    )


def _manifests(out: Path) -> Iterator[Damage]:
    """Yield what is wrong with the manifest, its generation's copy and the build record."""
    best = _best(out)
    for place in (out, generation_folder(out, best.generation)):
        try:
            refuse_other_copy(place, best)
        except DamagedIndexError as error:
            yield Damage(place / MANIFEST, str(error))
    try:
        read_build_record(out)
    except DamagedIndexError as error:
        yield Damage(out / BUILD_RECORD, str(error))


def _best(out: Path) -> Manifest:
    """Return the manifest, or where it is damaged the copy of the last generation that is whole.

    Raises:
        DamagedIndexError: there is none, or something in the directory is a link.
    """
    refuse_links(out)
    try:
        return Manifest.read(out)
    except DamagedIndexError:
        if not (out / MANIFEST).exists() and not (out / BUILD_RECORD).exists():
            raise
        # Only the last one: an older one, kept by a reader, knows nothing of what was removed since.
        folders = list_generations(out)
        if not folders:
            raise
        return Manifest.read(folders[-1])


def _where(path: Path) -> str:
    """Return which rows of a feature file are altered, where it can still be read, or nothing."""
    if path.suffix != ".h5":
        return ""
    try:
        FeatureFile.open(path).verify()
    except TracinAnnError as error:
        return str(error)
    return ""


def _contents(out: Path, manifest: Manifest, whole: set[str]) -> Iterator[Damage]:
    """Yield which files say what cannot be, though their bytes are those that were written."""
    own = generation_folder(out, manifest.generation)
    layout = manifest.build.layout
    store = FeatureStore(out / FEATURES, layout)
    for partition in range(layout.n_partitions):
        for checkpoint in range(layout.n_checkpoints):
            path = store.path(partition, checkpoint)
            if path.name in whole:
                try:
                    # Opened here and let go of: the store would keep some hundred maps.
                    FeatureFile.open(path, layout.header(partition, checkpoint)).verify()
                except DamagedIndexError as error:
                    whole.discard(path.name)
                    yield Damage(path, str(error))
    readers: list[tuple[FileRecord | None, Callable[[Path], object]]] = [
        (manifest.canaries, lambda path: read_generation_canaries(own, manifest)),
        (manifest.columns, lambda path: read_columns(path, layout.n_rows).refuse_twins()),
        (manifest.removed, lambda path: read_removed_ids(out, manifest)),
        (manifest.skipped, lambda path: read_skipped_rows(out, manifest)),
    ]
    for record, read in readers:
        if record is not None and record.name in whole:
            try:
                read(own / record.name)
            except DamagedIndexError as error:
                yield Damage(own / record.name, str(error))
    listed = {record.name for record in manifest.index.files}
    features = {record.name for record in manifest.features}
    if not listed or (listed | features) - whole:
        return
    path = own / IVFIndex.FILES[0]
    try:
        view = select_listed_rows(store.view(), read_unlisted_ids(out, manifest))
        faults = IVFIndex.load(own, view, torch.device("cpu")).faults(_LOOKED_AT, seed=0)
    except DamagedIndexError as error:
        faults = [str(error)]
    for fault in faults:
        yield Damage(path, f"{path} does not belong to the features: {fault}; run tracin-verify --repair")
