"""Generations of an index: its directory layout, how a new generation is published, and how old files are removed.

    manifest.json          the current generation's manifest; replacing it atomically publishes a generation
    build.json             the options of the last build; during a build they may differ from the manifest's
    generation-000001/     the generation's own files: manifest, canaries, columns, inverted lists, removed rows
    features/              feature files, shared by all generations whose manifests name them
    writer.lock            exists while a process writes to the index

A reader holds a lease (a lock on the manifest in its generation's directory). The next writer removes files that
neither the current manifest nor the manifest of a leased generation names.
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
    NotRegularFileError,
    atomic_path,
    is_temporary,
    make_directory,
    open_directory,
    read_json,
    remove_temporaries,
    sync_directory,
    write_json_atomic,
)
from tracin_ann.store.feature_file import FileRecord
from tracin_ann.store.feature_store import FeatureStore
from tracin_ann.store.layout import is_feature_file
from tracin_ann.store.locks import WRITER, Lease, hold_writer_lock, lock_unless_read
from tracin_ann.store.manifest import (
    BUILD_RECORD,
    FEATURES,
    MANIFEST,
    BuildRecord,
    Manifest,
    check_file,
    read_build_record,
    record_file,
    write_build_record,
)

UNFINISHED_INDEX = ".index-unfinished"
_SHARDS = "shards.json"
_PREFIX = "generation-"
_NAME = re.compile(rf"{_PREFIX}([0-9]{{6,}})")
logger = logging.getLogger(__name__)


@contextmanager
def claim_directory(directory: Path) -> Iterator[None]:
    """Make the directory of a new index and hold its writer's lock; after an error, an empty directory is removed.

    Raises:
        BusyIndexError: another build has started to write in the directory in the meantime.
    """
    make_directory(directory)
    try:
        with hold_writer_lock(directory):
            if any((directory / name).exists() for name in (BUILD_RECORD, MANIFEST)):
                raise BusyIndexError(
                    problem(
                        f"another build has started in {directory}",
                        got="its files",
                        expected="a new directory",
                        remedy="run this command again",
                    )
                )
            yield
    except BaseException:
        with suppress(OSError):
            directory.rmdir()
        raise


def reject_foreign_files(directory: Path) -> None:
    """Reject a build directory that contains files which no build wrote.

    Raises:
        UsageError: the directory contains such files, or the path is a file.
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


def read_last_build(directory: Path, manifest: Manifest | None) -> BuildRecord | None:
    """Return the record of the last build in a directory, or None if there was none."""
    if (directory / BUILD_RECORD).exists():
        return read_build_record(directory)
    return None if manifest is None else manifest.build


def agree_on_record(directory: Path, last_build: BuildRecord | None, record: BuildRecord) -> BuildRecord:
    """Write the record of a build unless another process has written one, and return the record on disk.

    Processes that compute the feature files of one build together call this before their first row. They take no lock:
    the first record becomes the name of a complete file, which only one of them can create.

    Args:
        directory: of the index; exists.
        last_build: the record that was in the directory when this process began, or None.
        record: what this process would produce.
    """
    if last_build is None:
        with suppress(FileExistsError):
            write_build_record(directory, record, exclusive=True)
    elif last_build != record and read_build_record(directory) == last_build:
        # The index grows: every process derives the same record from the finished index.
        write_build_record(directory, record)
    return read_build_record(directory)


@dataclass(frozen=True)
class BuildStart:
    """The state from which a build starts or resumes.

    Attributes:
        record: the options of this build.
        last_build: the options of the last build in the directory, or None.
        manifest: the manifest of the finished index in the directory, or None.
    """

    record: BuildRecord
    last_build: BuildRecord | None
    manifest: Manifest | None

    @property
    def finished(self) -> Manifest | None:
        """Return the manifest if the finished index has the same spec as this build, else None."""
        if self.manifest is None or self.manifest.build.spec.digest() != self.record.spec.digest():
            return None
        return self.manifest

    @property
    def trusted_files(self) -> tuple[FileRecord, ...]:
        """Return the feature files that are not read again: if the index grows, those of the finished index."""
        return () if self.manifest is None or self.finished is not None else self.manifest.features

    @property
    def unfinished_build(self) -> BuildRecord | None:
        """Return the options of the last build if it has not been finished, else None."""
        is_finished = self.manifest is not None and self.manifest.build == self.last_build
        return None if is_finished else self.last_build


def generation_folder(directory: Path, generation: int) -> Path:
    """Return the directory of a generation's own files."""
    return directory / f"{_PREFIX}{generation:06d}"


def list_generations(directory: Path) -> list[Path]:
    """Return the generation directories of an index, in ascending order of their numbers."""
    return sorted(filter(_is_generation, directory.glob(f"{_PREFIX}*")), key=generation_number)


def _is_generation(path: Path) -> bool:
    return _NAME.fullmatch(path.name) is not None


def reject_links(directory: Path) -> None:
    """Reject an index in which a directory, or a file that a writer removes, is a symbolic link.

    The index directory itself may be a link. Other files are checked when they are opened.

    Raises:
        DamagedIndexError: there is a link; the message names it.
    """
    unfinished = directory / UNFINISHED_INDEX
    inside = [] if unfinished.is_symlink() else unfinished.glob("*")
    for path in (directory / FEATURES, unfinished, *list_generations(directory), *inside):
        if path.is_symlink():
            expected = "a directory or a file of the index itself"
            raise DamagedIndexError(
                problem(f"{path}", got="a symbolic link", expected=expected, remedy="inspect it and remove it")
            )


def take_lease(directory: Path) -> tuple[Manifest, Lease]:
    """Return the current manifest and a lease on its generation: until it ends, no writer removes its files.

    Raises:
        DamagedIndexError: there is no finished index, its generation is missing, or part of the index is a link.
    """
    reject_links(directory)
    manifest = Manifest.read(directory)
    while True:
        path = generation_folder(directory, manifest.generation) / MANIFEST
        try:
            return manifest, Lease(path)
        except NotRegularFileError as error:
            remedy = "restore it, or build a new index"
            raise DamagedIndexError(problem(f"{path}", got=error, expected="a manifest", remedy=remedy)) from error
        except FileNotFoundError:
            # A writer has removed the generation in the meantime, after it has published another one.
            newer = Manifest.read(directory)
            if newer.generation == manifest.generation:
                raise DamagedIndexError(
                    problem(f"{path}", got="no file", expected="a file", remedy="restore it, or build a new index")
                ) from None
            manifest = newer


def read_current(directory: Path) -> Manifest | None:
    """Return the current manifest, or None if no generation was published.

    Raises:
        DamagedIndexError: the manifest cannot be understood, it is lost, or part of the index is a link.
    """
    reject_links(directory)
    if (directory / MANIFEST).exists():
        return Manifest.read(directory)
    # A first build that was interrupted between its two manifests leaves no manifest here; later builds replace one.
    if any(generation_number(path) > 1 and (path / MANIFEST).exists() for path in list_generations(directory)):
        raise DamagedIndexError(
            problem(f"{directory / MANIFEST}", got="no file", expected="a file", remedy="run tracin-verify --repair")
        )
    return None


def make_next_folder(directory: Path, manifest: Manifest | None) -> Path:
    """Remove unused files, make the next generation's directory, and return it; the caller holds the writer's lock.

    If an interrupted writer has left the directory, it is used again.
    """
    _remove_unused_files(directory, manifest, is_building=True)
    folder = find_next_folder(directory, manifest)
    for place in (directory / FEATURES, folder):
        make_directory(place)
    for place in (directory, directory / FEATURES, folder):
        remove_temporaries(place)
    return folder


def find_next_folder(directory: Path, manifest: Manifest | None) -> Path:
    """Return the path of the next generation's directory, which need not exist."""
    taken = [generation_number(path) for path in list_generations(directory) if (path / MANIFEST).exists()]
    return generation_folder(directory, max([0 if manifest is None else manifest.generation, *taken]) + 1)


def write_shard_count(directory: Path, count: int) -> None:
    """Write the number of shards of an unfinished build, for messages; `publish` removes the file."""
    folder = find_next_folder(directory, read_current(directory))
    make_directory(folder)
    write_json_atomic(folder / _SHARDS, {"count": count})


def read_shard_count(directory: Path) -> int | None:
    """Return the number of shards of an unfinished build, or None if it is not known."""
    try:
        count = read_json(find_next_folder(directory, read_current(directory)) / _SHARDS).get("count")
    except (DamagedIndexError, FileNotFoundError):
        return None
    return count if isinstance(count, int) and count > 0 else None


def publish(directory: Path, manifest: Manifest) -> None:
    """Make a generation current, durably, and remove unused files; all files that it names have been written."""
    folder = generation_folder(directory, manifest.generation)
    named = {record.name for record in manifest.own_files}
    # Other files here are leftovers of an interrupted writer.
    _remove_files(folder, lambda name: name not in named)
    _make_names_durable(directory, manifest)
    manifest.write(folder)
    manifest.write(directory)
    logger.info("generation %d of %s is published", manifest.generation, directory)
    _remove_leftovers(directory, manifest)


def _make_names_durable(directory: Path, manifest: Manifest) -> None:
    """Fsync the directories of the index and all above: an interrupted run may have made them without fsync."""
    folder = generation_folder(directory, manifest.generation)
    for place in (directory / FEATURES, folder, directory, *_list_ancestors(directory)):
        sync_directory(place)


def _list_ancestors(directory: Path) -> Iterator[Path]:
    """Yield the directories above a directory, up to the mount point of its file system."""
    place = directory.resolve()
    while not os.path.ismount(place):
        place = place.parent
        yield place


def clean_up(directory: Path, manifest: Manifest) -> None:
    """Make a finished index durable and remove leftovers; the caller holds the writer's lock."""
    _make_names_durable(directory, manifest)
    _remove_leftovers(directory, manifest)


def _remove_leftovers(directory: Path, manifest: Manifest) -> None:
    """Remove the leftovers of finished and interrupted writers; no build is in progress."""
    _remove_unused_files(directory, manifest, is_building=False)
    for place in (directory, directory / FEATURES, generation_folder(directory, manifest.generation)):
        remove_temporaries(place)


def _remove_unused_files(directory: Path, manifest: Manifest | None, *, is_building: bool) -> None:
    """Remove the files that neither the current manifest nor the manifest of a leased generation names.

    With `is_building` (a build is in progress), the directory of the next generation and unfinished inverted lists are
    not removed. If build.json and the manifest describe different builds, a build was interrupted: then its feature
    files and unfinished lists are not removed either.
    """
    named = [] if manifest is None else [manifest]
    for path in list_generations(directory):
        is_current = manifest is not None and path == generation_folder(directory, manifest.generation)
        if is_current or (is_building and not (path / MANIFEST).exists()):
            continue
        with lock_unless_read(path / MANIFEST) as nobody_reads:
            if nobody_reads:
                _remove_files(path, lambda name: True)
                try:
                    path.rmdir()
                except OSError as error:
                    # NFS renames a removed file that is still open; the next writer removes the directory. It also
                    # remains if somebody has put a directory into it.
                    if error.errno != errno.ENOTEMPTY:
                        raise
            else:
                named.append(Manifest.read(path))
    built = None if manifest is None else manifest.build
    last_build = read_build_record(directory) if (directory / BUILD_RECORD).exists() else built
    if last_build is not None and last_build == built:
        used = {record.name for each in named for record in each.features}
        with suppress(FileNotFoundError):
            _remove_files(directory / FEATURES, lambda name: is_feature_file(name) and name not in used)
        if not is_building:
            shutil.rmtree(directory / UNFINISHED_INDEX, ignore_errors=True)


def copy_files(directory: Path, manifest: Manifest, folder: Path, records: Iterable[FileRecord]) -> None:
    """Put files of a generation into the next one's directory, as hard links if possible, else as copies.

    Raises:
        DamagedIndexError: a file is damaged.
    """
    old = generation_folder(directory, manifest.generation)
    for record in records:
        check_file(old, record, deep=True)
        # An interrupted writer may have linked this file already: a rename onto itself would leave the temporary.
        (folder / record.name).unlink(missing_ok=True)
        with atomic_path(folder / record.name) as temporary:
            try:
                os.link(old / record.name, temporary)
            except OSError:
                shutil.copyfile(old / record.name, temporary)


def check_generation(directory: Path, manifest: Manifest, *, deep: bool) -> None:
    """Compare a generation's own files and its copy of the manifest with the manifest.

    Raises:
        DamagedIndexError: a file is missing or altered; the message names the first.
    """
    check_manifest_copy(generation_folder(directory, manifest.generation), manifest)
    for record in manifest.own_files:
        check_file(generation_folder(directory, manifest.generation), record, deep=deep)


def check_manifest_copy(place: Path, manifest: Manifest) -> None:
    """Compare the manifest in the directory `place` with a manifest.

    Raises:
        DamagedIndexError: the manifest in `place` cannot be read or differs.
    """
    if Manifest.read(place) != manifest:
        expected, remedy = f"the manifest of generation {manifest.generation}", "run tracin-verify --repair"
        raise DamagedIndexError(
            problem(f"{place / MANIFEST}", got="another manifest", expected=expected, remedy=remedy)
        )


def list_feature_records(
    store: FeatureStore, manifest: Manifest | None, written: Iterable[tuple[int, int]]
) -> tuple[FileRecord, ...]:
    """Return the records of a store's files.

    Files that this run has `written` as (partition, checkpoint), or that the manifest does not name, are read; the
    records of others are copied from the manifest.
    """
    known = _map_known_records(store, manifest, written)
    return tuple(known.get(path.name) or record_file(path) for path in _list_feature_paths(store))


def find_unnamed_files(
    store: FeatureStore, manifest: Manifest | None, written: Iterable[tuple[int, int]]
) -> list[Path]:
    """Return the paths of a store's files that the manifest does not name or that this run has `written`."""
    known = _map_known_records(store, manifest, written)
    return [path for path in _list_feature_paths(store) if path.name not in known]


def _map_known_records(
    store: FeatureStore, manifest: Manifest | None, written: Iterable[tuple[int, int]]
) -> dict[str, FileRecord]:
    """Return the manifest's records of feature files by name, without those that this run has written."""
    known = {} if manifest is None else {record.name: record for record in manifest.features}
    for partition, checkpoint in written:
        known.pop(store.path(partition, checkpoint).name, None)
    return known


def _list_feature_paths(store: FeatureStore) -> list[Path]:
    return [store.path(*file) for file in store.layout.files]


def generation_number(path: Path) -> int:
    """Return the number of a generation's directory; 0 for any other path."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else 0


def _remove_files(directory: Path, chosen: Callable[[str], bool]) -> None:
    """Remove the chosen files of a directory; links are not followed, and subdirectories are not removed.

    The manifest is removed last: readers hold their leases on it.
    """
    with open_directory(directory) as descriptor:
        for name in sorted(filter(chosen, os.listdir(descriptor)), key=lambda name: name == MANIFEST):
            with attach_path(directory / name, Path(name)), suppress(FileNotFoundError):
                if not stat.S_ISDIR(os.stat(name, dir_fd=descriptor, follow_symlinks=False).st_mode):
                    os.unlink(name, dir_fd=descriptor)
