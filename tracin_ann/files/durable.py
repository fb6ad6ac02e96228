"""Atomic, durable writes: temporary files that replace their target, directories, leftovers of interrupted writers.

POSIX only.
"""

from __future__ import annotations

import errno
import os
import platform
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import xxhash

from tracin_ann.errors import attach_path

_PREFIX = ".tracin-tmp-"
_NO_HARD_LINKS = frozenset({errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP})
# Names of the temporary files that this process is writing. Another file with the same process id in its name was
# left by an earlier process that had this id.
_ACTIVE: set[str] = set()


@contextmanager
def atomic_path(path: Path, *, exclusive: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on a clean exit it durably replaces `path`, otherwise it is removed.

    For libraries that write by path (h5py, faiss): the caller creates the file and closes it before the
    block ends. The temporary name has the suffix of `path`.

    Args:
        path: the path of the file.
        exclusive: create `path` and do not replace it: of several processes, on any machine, one succeeds, if the file
            system has hard links.

    Raises:
        FileExistsError: `path` exists, and the write is exclusive.
        OSError: writing, syncing or renaming failed; `filename` is `path`.
    """
    name = f"{_PREFIX}{_host_digest()}-{os.getpid()}-{secrets.token_hex(6)}-{_target_digest(path)}{path.suffix}"
    temporary = path.with_name(name)
    _ACTIVE.add(name)
    try:
        with attach_path(path, temporary):
            yield temporary
            _sync(temporary)
            if exclusive:
                _create(temporary, path)
            else:
                os.replace(temporary, path)
    except BaseException:
        # The first error is reported, not a second one from removing the temporary file.
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    finally:
        _ACTIVE.discard(name)
    sync_directory(path.parent)


def _create(temporary: Path, path: Path) -> None:
    """Rename a file to a path that does not exist.

    Raises:
        FileExistsError: it exists.
    """
    try:
        # Unlike a rename, this fails if the path exists.
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        # Of processes that get here at the same moment, several succeed.
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from error
        os.replace(temporary, path)
    else:
        os.unlink(temporary)


@contextmanager
def atomic_write(path: Path, *, exclusive: bool = False) -> Iterator[BinaryIO]:
    """Yield a binary file that replaces `path` on a clean exit and is removed on any other; see `atomic_path`."""
    with atomic_path(path, exclusive=exclusive) as temporary, open(temporary, "xb") as file:
        yield file


def make_directory(directory: Path) -> None:
    """Create a directory and its missing parents durably; an existing directory is left unchanged."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    for path in reversed(missing):
        # Another process may create it at the same time.
        with suppress(FileExistsError):
            os.mkdir(path)
        sync_directory(path.parent)


def is_temporary(path: Path) -> bool:
    """Return whether a path has the name of a temporary file of an atomic write."""
    return path.name.startswith(_PREFIX)


def remove_temporaries(directory: Path, *, idle_s: float = 3600.0) -> list[Path]:
    """Remove the temporary files that interrupted writers left in `directory`, and return their paths.

    A file is a leftover if its writer was a process of this machine that has ended, or if nothing has been written to
    it for `idle_s` seconds: processes of other machines cannot be seen, and process ids are reused.
    """
    removed = []
    for path in sorted(directory.glob(f"{_PREFIX}*")):
        # A writer may finish, or another process may remove the file, between the listing and here.
        with suppress(FileNotFoundError):
            status = path.lstat()
            if stat.S_ISDIR(status.st_mode):
                continue
            if _has_writer_ended(path.name) or time.time() - status.st_mtime >= idle_s:
                path.unlink()
                removed.append(path)
    return removed


def remove_leftovers_of(target: Path) -> None:
    """Remove the temporary files that interrupted writers of `target` left, and no others."""
    with suppress(OSError):
        for path in target.parent.glob(f"{_PREFIX}*-{_target_digest(target)}*"):
            if _has_writer_ended(path.name):
                path.unlink()


def _has_writer_ended(name: str) -> bool:
    host, _, rest = name.removeprefix(_PREFIX).partition("-")
    pid = rest.partition("-")[0]
    if host != _host_digest() or not pid.isdecimal():
        return False
    if int(pid) == os.getpid():
        return name not in _ACTIVE
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    return False


def _target_digest(path: Path) -> str:
    """Return the digest of the target's name that is part of the name of a temporary file."""
    return xxhash.xxh3_64_hexdigest(os.fsencode(path.name))[:8]


def _host_digest() -> str:
    """Return the digest of this machine's name."""
    return xxhash.xxh3_64_hexdigest(platform.node().encode())[:8]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with attach_path(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(directory: Path) -> None:
    """Make the creation, renaming and removal of files in a directory durable."""
    try:
        _sync(directory)
    except OSError as error:
        # Some network file systems cannot sync a directory and fail with EINVAL, and the user may lack the right to
        # read a directory above the index; nothing more can be done.
        if error.errno not in (errno.EINVAL, errno.EACCES):
            raise
