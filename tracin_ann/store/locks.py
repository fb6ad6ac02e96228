"""Who may write an index, and who is reading which of its generations: advisory locks on files (flock).

The system lets go of a lock when its process ends, however it ends: none is ever stale. A file system that cannot
lock is said so in the log, and used without.
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
from tracin_ann.files import NotPlainError, open_descriptor

WRITER = "writer.lock"
_UNSUPPORTED = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL})
_LONGEST_CAPTION = 4096

logger = logging.getLogger(__name__)

# Of writers' locks. A forked child would hold them on after this process was killed.
_WRITER_DESCRIPTORS: set[int] = set()


def _close_inherited_locks() -> None:
    while _WRITER_DESCRIPTORS:
        os.close(_WRITER_DESCRIPTORS.pop())


os.register_at_fork(after_in_child=_close_inherited_locks)


@contextmanager
def hold_writer_lock(directory: Path) -> Iterator[None]:
    """Hold the one right to write in the directory; the lock's file is there only meanwhile.

    Raises:
        BusyIndexError: another process holds it; names the process, its machine and since when.
        DamagedIndexError: the lock's file is a link, or no plain file: to write to it would alter another.
    """
    path = directory / WRITER
    descriptor = _lock_file(path)
    _WRITER_DESCRIPTORS.add(descriptor)
    try:
        caption = {"pid": os.getpid(), "host": platform.node(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        with attach_path(path):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(caption).encode(), 0)
        yield
    finally:
        if descriptor in _WRITER_DESCRIPTORS:
            try:
                # While it is held: whoever opened it before finds that the path is another file, and tries again.
                with suppress(FileNotFoundError):
                    os.unlink(path)
            finally:
                _WRITER_DESCRIPTORS.discard(descriptor)
                os.close(descriptor)


def _lock_file(path: Path) -> int:
    """Return the descriptor of the locked file that is at this path."""
    while True:
        try:
            descriptor = open_descriptor(path, os.O_RDWR | os.O_CREAT)
        except NotPlainError as error:
            raise _bad_lock_file_error(path, str(error)) from error
        try:
            if os.fstat(descriptor).st_nlink > 1:
                raise _bad_lock_file_error(path, "another file's second name")
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
    expected = "a lock that a writer of the index made, or none"
    return DamagedIndexError(problem(f"{path}", got=got, expected=expected, remedy="look at it and remove it"))


def try_lock(descriptor: int, *, exclusive: bool, otherwise: bool = True) -> bool:
    """Lock an open file without waiting, and return whether that was possible; `otherwise` where nothing can be."""
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        logger.warning("this file system cannot lock (%s): be sure that no other process writes here", error.strerror)
        return otherwise
    return True


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def _describe_writer(descriptor: int) -> str:
    try:
        said = json.loads(os.pread(descriptor, _LONGEST_CAPTION, 0))
        return f"process {said['pid']} on {said['host']}, since {said['since']}"
    except (ValueError, TypeError, KeyError):
        return "another process"


class Lease:
    """A reader's shared lock on a file: with any held, `free` says no. Ends with `close` or the process."""

    def __init__(self, path: Path) -> None:
        """Lock the file, waiting for nobody.

        Raises:
            FileNotFoundError: there is no such file (any more), or it is being swept.
            NotPlainError: it is a link, or no plain file.
        """
        self._descriptor = -1
        self._descriptor = open_descriptor(path)
        if not (try_lock(self._descriptor, exclusive=False) and _is_same_file(self._descriptor, path)):
            self.close()
            raise FileNotFoundError(errno.ENOENT, "being removed", str(path))

    def close(self) -> None:
        """Let go; more than once does no harm."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __del__(self) -> None:
        self.close()


@contextmanager
def hold_unless_read(path: Path) -> Iterator[bool]:
    """Yield whether nobody holds a `Lease` on the file; nobody can take one until the block ends.

    No, where that cannot be found out.
    """
    try:
        # For writing, though nothing is written: NFS gives an exclusive lock on no other terms.
        descriptor = open_descriptor(path, os.O_RDWR)
    except (FileNotFoundError, NotPlainError):
        # What is no plain file is nobody's manifest.
        yield True
        return
    except PermissionError:
        yield False
        return
    try:
        yield try_lock(descriptor, exclusive=True, otherwise=False)
    finally:
        os.close(descriptor)
