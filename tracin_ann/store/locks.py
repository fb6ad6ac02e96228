"""The writer's lock of an index and the leases of its readers: advisory file locks (flock).

The writer's lock (`hold_writer_lock`) admits one writer to an index directory. A lease (`Lease`) tells writers that a
generation is being read, so that they do not remove its files.

The system releases a lock when its process ends, so no lock is ever stale. On a file system that does not support
locks, a warning is logged and the index is used without them.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tracin_ann.errors import BusyIndexError, DamagedIndexError, attach_path, problem
from tracin_ann.files import NotRegularFileError, open_descriptor

WRITER = "writer.lock"
_UNSUPPORTED = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL})
_LONGEST_RECORD = 4096

logger = logging.getLogger(__name__)

# A forked child closes these descriptors: otherwise it would hold the locks after this process is killed.
_WRITER_DESCRIPTORS: set[int] = set()


def _close_inherited_locks() -> None:
    while _WRITER_DESCRIPTORS:
        os.close(_WRITER_DESCRIPTORS.pop())


os.register_at_fork(after_in_child=_close_inherited_locks)


@contextmanager
def hold_writer_lock(directory: Path) -> Iterator[None]:
    """Hold the writer's lock of an index directory; its file exists only while the lock is held.

    Raises:
        BusyIndexError: another process holds the lock; the message names the process, its machine and the time.
        DamagedIndexError: the lock file is a link or not a regular file: writing to it could alter another file.
    """
    path = directory / WRITER
    descriptor = _lock_file(path)
    _WRITER_DESCRIPTORS.add(descriptor)
    try:
        record = {"pid": os.getpid(), "host": platform.node(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        with attach_path(path):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(record).encode(), 0)
        yield
    finally:
        if descriptor in _WRITER_DESCRIPTORS:
            try:
                # Unlink before releasing the lock: a process that has opened this file then sees that it is no longer
                # at the path, and tries again.
                with suppress(FileNotFoundError):
                    os.unlink(path)
            finally:
                _WRITER_DESCRIPTORS.discard(descriptor)
                os.close(descriptor)


def _lock_file(path: Path) -> int:
    """Create the file if needed, lock it, and return its descriptor."""
    while True:
        try:
            descriptor = open_descriptor(path, os.O_RDWR | os.O_CREAT)
        except NotRegularFileError as error:
            raise _bad_lock_file_error(path, str(error)) from error
        try:
            if os.fstat(descriptor).st_nlink > 1:
                raise _bad_lock_file_error(path, "a hard link to another file")
            if not try_lock(descriptor, exclusive=True):
                raise BusyIndexError(
                    problem(
                        f"{path.parent} is being written",
                        got=_describe_writer(descriptor),
                        expected="one writer at a time",
                        remedy="wait for it, or stop it and run this command again",
                    )
                )
            if _is_same_file(descriptor, path):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _bad_lock_file_error(path: Path, got: str) -> DamagedIndexError:
    expected = "a lock file that a writer of the index made, or none"
    return DamagedIndexError(problem(f"{path}", got=got, expected=expected, remedy="inspect it and remove it"))


def try_lock(descriptor: int, *, exclusive: bool, otherwise: bool = True) -> bool:
    """Lock an open file without waiting and return whether it is locked; `otherwise` if locks are not supported."""
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        logger.warning(
            "this file system does not support locks (%s): make sure that no other process writes here", error.strerror
        )
        return otherwise
    return True


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def _describe_writer(descriptor: int) -> str:
    try:
        record = json.loads(os.pread(descriptor, _LONGEST_RECORD, 0))
        return f"process {record['pid']} on {record['host']}, since {record['since']}"
    except (ValueError, TypeError, KeyError):
        return "another process"


class Lease:
    """A reader's shared lock on the manifest of a generation.

    While a lease exists, `lock_unless_read` yields False for the file. It ends with `close` or with the process.
    """

    def __init__(self, path: Path) -> None:
        """Lock the file without waiting.

        Raises:
            FileNotFoundError: there is no such file, or a writer is removing it.
            NotRegularFileError: it is a link or not a regular file.
        """
        self._descriptor = -1
        self._descriptor = open_descriptor(path)
        if not (try_lock(self._descriptor, exclusive=False) and _is_same_file(self._descriptor, path)):
            self.close()
            raise FileNotFoundError(errno.ENOENT, "being removed", str(path))

    def close(self) -> None:
        """Release the lock; a second call does nothing."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __del__(self) -> None:
        self.close()


@contextmanager
def lock_unless_read(path: Path) -> Iterator[bool]:
    """Yield True if no process has a `Lease` on the file; none can take one until the block ends.

    Yields False if this cannot be determined.
    """
    try:
        # NFS grants an exclusive lock only for a file that is open for writing.
        descriptor = open_descriptor(path, os.O_RDWR)
    except (FileNotFoundError, NotRegularFileError):
        # Anything but a regular file is not a manifest, so nobody has a lease on it.
        yield True
        return
    except PermissionError:
        yield False
        return
    try:
        yield try_lock(descriptor, exclusive=True, otherwise=False)
    finally:
        os.close(descriptor)
