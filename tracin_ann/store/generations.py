"""Generations of an index in its directory: which is current, who reads which, how the next one becomes current.

    manifest.json          the current generation's manifest, replaced atomically: this is what makes it current
    build.json             what the last build set out to make; unlike the manifest's, while one is under way
    generation-000001/     what is a generation's own: its manifest, canaries, columns, lists, removed ids
    features/              feature files, shared by all generations that name them
    writer.lock            there while somebody writes

A reader holds a lock on its generation's own manifest; what no reader holds and the current manifest does not name
is swept by the next writer.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tracin_ann.errors import BusyIndexError, DamagedIndexError, UsageError, attach_path, problem
from tracin_ann.files import (
    NotPlainError,
    atomic_path,
    is_temporary,
    make_directory,
    open_directory,
    sweep_temporaries,
    sync_directory,
)
from tracin_ann.store.feature_file import FileRecord
from tracin_ann.store.feature_store import FeatureStore, is_feature_file
from tracin_ann.store.locks import WRITER, Lease, hold_unless_read, hold_writer_lock
from tracin_ann.store.manifest import (
    BUILD_RECORD,
    FEATURES,
    MANIFEST,
    BuildRecord,
    Manifest,
    check_file,
    read_build_record,
    record_file,
)

UNFINISHED_INDEX = ".index-unfinished"
_PREFIX = "generation-"
_NAME = re.compile(rf"{_PREFIX}([0-9]{{6,}})")
logger = logging.getLogger(__name__)


@contextmanager
def claim(directory: Path) -> Iterator[None]:
    """Make a new index's directory and hold the right to write in it.

    Raises:
        BusyIndexError: another build that was started at the same time was faster.
    """
    make_directory(directory)
    with hold_writer_lock(directory):
        if any((directory / name).exists() for name in (BUILD_RECORD, MANIFEST)):
            raise BusyIndexError(
                problem(
                    f"{directory} was begun by another build meanwhile",
                    got="its files",
                    expected="a new directory",
                    remedy="run this command again",
                )
            )
        yield


def refuse_foreign_files(directory: Path) -> None:
    """Refuse a directory that holds files which no build wrote.

    Raises:
        UsageError: it does, or it is a file.
    """
    if any((directory / name).exists() for name in (BUILD_RECORD, MANIFEST)) or not directory.exists():
        return
    # A build that was killed before it wrote its record leaves the lock and temporaries.
    is_directory = directory.is_dir()
    if not is_directory or any(path.name != WRITER and not is_temporary(path) for path in directory.iterdir()):
        raise UsageError(
            problem(
                f"{directory} cannot hold the index",
                got="a directory with other files in it" if is_directory else "a file",
                expected="an empty or new directory, or an index",
                remedy="choose another --out",
            )
        )


def read_begun(directory: Path, manifest: Manifest | None) -> BuildRecord | None:
    """Return what the last build in a directory was to produce, or None where there was none."""
    if (directory / BUILD_RECORD).exists():
        return read_build_record(directory)
    return None if manifest is None else manifest.build


@dataclass(frozen=True)
class Start:
    """From where a build goes on.

    Attributes:
        record: what it sets out to make.
        begun: what the last build in the directory set out to make, or None.
        manifest: of the finished index there, or None.
    """

    record: BuildRecord
    begun: BuildRecord | None
    manifest: Manifest | None

    @property
    def finished(self) -> Manifest | None:
        """Return the manifest if it is of this very index."""
        if self.manifest is None or self.manifest.build.spec.digest() != self.record.spec.digest():
            return None
        return self.manifest

    @property
    def trusted(self) -> tuple[FileRecord, ...]:
        """Return the feature files that are taken as they are: of an index that grows, those that it has."""
        return () if self.manifest is None or self.finished is not None else self.manifest.features


def generation_folder(directory: Path, generation: int) -> Path:
    """Return where a generation's own files are."""
    return directory / f"{_PREFIX}{generation:06d}"


def list_generations(directory: Path) -> list[Path]:
    """Return the directories of generations in a directory, by rising number; what is named otherwise is none."""
    return sorted(filter(_is_generation, directory.glob(f"{_PREFIX}*")), key=generation_number)


def _is_generation(path: Path) -> bool:
    return _NAME.fullmatch(path.name) is not None


def refuse_links(directory: Path) -> None:
    """Refuse an index in which something that is read, written or swept is a link out of it.

    Its directory itself may be one. Single files are looked at when they are opened.

    Raises:
        DamagedIndexError: names the link.
    """
    unfinished = directory / UNFINISHED_INDEX
    inside = [] if unfinished.is_symlink() else unfinished.glob("*")
    for path in (directory / FEATURES, unfinished, *list_generations(directory), *inside):
        if path.is_symlink():
            expected = "a directory or a file of the index itself"
            raise DamagedIndexError(
                problem(f"{path}", got="a symbolic link", expected=expected, remedy="look at it and remove it")
            )


def take_lease(directory: Path) -> tuple[Manifest, Lease]:
    """Return the current manifest and a lease on its generation: until it ends, nobody sweeps the files.

    Raises:
        DamagedIndexError: there is no finished index, its generation is not there, or something in it is a link.
    """
    refuse_links(directory)
    manifest = Manifest.read(directory)
    while True:
        path = generation_folder(directory, manifest.generation) / MANIFEST
        try:
            return manifest, Lease(path)
        except NotPlainError as error:
            remedy = "restore it, or build a new index"
            raise DamagedIndexError(problem(f"{path}", got=error, expected="a manifest", remedy=remedy)) from error
        except FileNotFoundError:
            # Swept in between: then another one is current by now.
            newer = Manifest.read(directory)
            if newer.generation == manifest.generation:
                raise DamagedIndexError(
                    problem(f"{path}", got="no file", expected="a file", remedy="restore it, or build a new index")
                ) from None
            manifest = newer


def read_current(directory: Path) -> Manifest | None:
    """Return the current manifest, or None where no generation was finished.

    Raises:
        DamagedIndexError: there is a manifest that cannot be understood, there was one and it is gone, or something
            in the directory is a link.
    """
    refuse_links(directory)
    if (directory / MANIFEST).exists():
        return Manifest.read(directory)
    # A first build may be killed between its two manifests; later ones leave the one that was current.
    if any(generation_number(path) > 1 and (path / MANIFEST).exists() for path in list_generations(directory)):
        raise DamagedIndexError(
            problem(f"{directory / MANIFEST}", got="no file", expected="a file", remedy="run tracin-verify --repair")
        )
    return None


def make_next_folder(directory: Path, manifest: Manifest | None) -> Path:
    """Sweep what is nobody's and return the next generation's directory, made; for the one writer.

    A directory that a killed writer left is the next one's again.
    """
    _sweep(directory, manifest, under_way=True)
    taken = [generation_number(path) for path in list_generations(directory) if (path / MANIFEST).exists()]
    folder = generation_folder(directory, max([0 if manifest is None else manifest.generation, *taken]) + 1)
    for place in (directory / FEATURES, folder):
        make_directory(place)
    for place in (directory, directory / FEATURES, folder):
        sweep_temporaries(place)
    return folder


def publish(directory: Path, manifest: Manifest) -> None:
    """Make a generation current, durably, and sweep what it left; everything it names has been written."""
    folder = generation_folder(directory, manifest.generation)
    named = {record.name for record in manifest.own_files}
    # Of a killed writer that wanted another generation here.
    _remove_files(folder, lambda name: name not in named)
    _make_names_durable(directory, manifest)
    manifest.write(folder)
    manifest.write(directory)
    logger.info("generation %d of %s is published", manifest.generation, directory)
    _tidied(directory, manifest)


def _make_names_durable(directory: Path, manifest: Manifest) -> None:
    """Fsync the directories and those above the index: a run that was killed before it had may have made them."""
    folder = generation_folder(directory, manifest.generation)
    for place in (directory / FEATURES, folder, directory, *_above(directory)):
        sync_directory(place)


def _above(directory: Path) -> Iterator[Path]:
    """Yield the directories above one, up to that which its file system begins with."""
    place = directory.resolve()
    while not os.path.ismount(place):
        place = place.parent
        yield place


def tidy(directory: Path, manifest: Manifest) -> None:
    """Make sure of an index that is finished already: durable, and nothing left over; for the one writer."""
    _make_names_durable(directory, manifest)
    _tidied(directory, manifest)


def _tidied(directory: Path, manifest: Manifest) -> None:
    """Remove all that the writing of an index left over, for the one writer with nothing under way."""
    _sweep(directory, manifest, under_way=False)
    for place in (directory, directory / FEATURES, generation_folder(directory, manifest.generation)):
        sweep_temporaries(place)


def _sweep(directory: Path, manifest: Manifest | None, *, under_way: bool) -> None:
    """Remove what neither the current manifest nor a generation that somebody reads names.

    With `under_way`, the directory of the generation that is being made stays, and unfinished lists. Feature files
    and these stay too while build.json speaks of another build than the manifest: they may be that one's.
    """
    named = [] if manifest is None else [manifest]
    for path in list_generations(directory):
        is_current = manifest is not None and path == generation_folder(directory, manifest.generation)
        if is_current or (under_way and not (path / MANIFEST).exists()):
            continue
        with hold_unless_read(path / MANIFEST) as nobody_reads:
            if nobody_reads:
                _remove_files(path, lambda name: True)
                try:
                    path.rmdir()
                except OSError as error:
                    # NFS keeps a file that is still open under another name; the next sweep comes back to it. And a
                    # directory that somebody put there stays.
                    if error.errno != errno.ENOTEMPTY:
                        raise
            else:
                named.append(Manifest.read(path))
    built = None if manifest is None else manifest.build
    begun = read_build_record(directory) if (directory / BUILD_RECORD).exists() else built
    if begun is not None and begun == built:
        kept = {record.name for each in named for record in each.features}
        with suppress(FileNotFoundError):
            _remove_files(directory / FEATURES, lambda name: is_feature_file(name) and name not in kept)
        if not under_way:
            shutil.rmtree(directory / UNFINISHED_INDEX, ignore_errors=True)


def carry_over(directory: Path, manifest: Manifest, folder: Path, records: Iterable[FileRecord]) -> None:
    """Put files of a generation into the next one's directory: linked where the file system can, else copied.

    Raises:
        DamagedIndexError: one is not what was written.
    """
    old = generation_folder(directory, manifest.generation)
    for record in records:
        check_file(old, record, deep=True)
        # A killed writer may have linked this very file: renamed onto itself, the temporary would stay.
        (folder / record.name).unlink(missing_ok=True)
        with atomic_path(folder / record.name) as temporary:
            try:
                os.link(old / record.name, temporary)
            except OSError:
                shutil.copyfile(old / record.name, temporary)


def check_generation(directory: Path, manifest: Manifest, *, deep: bool) -> None:
    """Compare a generation's own files with its manifest, the manifest's copy among them.

    Raises:
        DamagedIndexError: the first that is missing or altered.
    """
    refuse_other_copy(generation_folder(directory, manifest.generation), manifest)
    for record in manifest.own_files:
        check_file(generation_folder(directory, manifest.generation), record, deep=deep)


def refuse_other_copy(place: Path, manifest: Manifest) -> None:
    """Refuse a manifest that is not the one in another place.

    Raises:
        DamagedIndexError: that one cannot be read, or is another.
    """
    if Manifest.read(place) != manifest:
        expected, remedy = f"that of generation {manifest.generation}", "run tracin-verify --repair"
        raise DamagedIndexError(
            problem(f"{place / MANIFEST}", got="another manifest", expected=expected, remedy=remedy)
        )


def list_feature_records(
    store: FeatureStore, manifest: Manifest | None, written: Iterable[tuple[int, int]]
) -> tuple[FileRecord, ...]:
    """Return the records of a store's files; those that the manifest has and that were not written now are not read."""
    known = _named_before(store, manifest, written)
    return tuple(known.get(path.name) or record_file(path) for path in _paths(store))


def find_unnamed_files(
    store: FeatureStore, manifest: Manifest | None, written: Iterable[tuple[int, int]]
) -> list[Path]:
    """Return the paths of a store's files that the manifest does not name, and of those that were written now."""
    known = _named_before(store, manifest, written)
    return [path for path in _paths(store) if path.name not in known]


def _named_before(
    store: FeatureStore, manifest: Manifest | None, written: Iterable[tuple[int, int]]
) -> dict[str, FileRecord]:
    """Return the manifest's records of feature files by name, without those that were written now."""
    known = {} if manifest is None else {record.name: record for record in manifest.features}
    for partition, checkpoint in written:
        known.pop(store.path(partition, checkpoint).name, None)
    return known


def _paths(store: FeatureStore) -> list[Path]:
    layout = store.layout
    return [store.path(p, c) for p in range(layout.n_partitions) for c in range(layout.n_checkpoints)]


def generation_number(path: Path) -> int:
    """Return the number of a generation's directory, 0 of any other."""
    found = _NAME.fullmatch(path.name)
    return int(found[1]) if found else 0


def _remove_files(directory: Path, chosen: Callable[[str], bool]) -> None:
    """Remove the chosen files of a directory; links are not followed, and directories in it are left alone.

    The manifest goes last: while it is there, a reader's lock on it counts.
    """
    with open_directory(directory) as descriptor:
        for name in sorted(filter(chosen, os.listdir(descriptor)), key=lambda name: name == MANIFEST):
            with attach_path(directory / name, Path(name)), suppress(FileNotFoundError):
                if not stat.S_ISDIR(os.stat(name, dir_fd=descriptor, follow_symlinks=False).st_mode):
                    os.unlink(name, dir_fd=descriptor)
