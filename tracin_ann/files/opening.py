"""Opening the files of an index: only regular files, never through a symbolic link; damage versus system errors.

An index may come from an untrusted source. A symbolic link in it could redirect a reader or a writer to any file of
the user, and reading a FIFO could block forever. The directory of the index may be a link, because the user
created it.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from tracin_ann.errors import DamagedIndexError, problem

_OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_SYSTEM_ERRORS = frozenset({*_OUT_OF_RESOURCES, errno.EACCES, errno.EPERM, errno.EIO})
_NOT_REGULAR = frozenset({errno.ELOOP, errno.EMLINK, errno.ENXIO})
_MAX_CHARS = 200


class NotRegularFileError(ValueError):
    """A path of an index is a symbolic link, a directory, a FIFO or a device instead of a regular file."""


def open_descriptor(path: Path, flags: int = os.O_RDONLY) -> int:
    """Open a regular file and return its descriptor; symbolic links are not followed, a FIFO does not block.

    Raises:
        NotRegularFileError: the path is not a regular file.
        OSError: the system cannot open it, or it does not exist.
    """
    try:
        # Opening a FIFO would block without O_NONBLOCK; on a regular file the flag has no effect.
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except IsADirectoryError:
        raise NotRegularFileError("a directory") from None
    except OSError as error:
        if error.errno in _NOT_REGULAR:
            raise NotRegularFileError(_file_type(os.lstat(path).st_mode)) from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise NotRegularFileError(_file_type(os.lstat(path).st_mode))
    return descriptor


def open_regular(path: Path) -> BinaryIO:
    """Return a regular file, open for reading.

    Raises:
        As `open_descriptor`.
    """
    return os.fdopen(open_descriptor(path), "rb")


@contextmanager
def open_directory(path: Path) -> Iterator[int]:
    """Yield the descriptor of a directory; a symbolic link to one is rejected.

    Raises:
        NotRegularFileError: the path is a symbolic link or not a directory.
        OSError: the system cannot open it.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENOTDIR, *_NOT_REGULAR):
            raise NotRegularFileError(f"{path} is a symbolic link or not a directory") from error
        raise
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def require_regular(path: Path) -> None:
    """Check that a path given by the user is a regular file before a library opens it by path; links are followed.

    Raises:
        NotRegularFileError: it is a FIFO, a device or a socket.
        IsADirectoryError: it is a directory.
    """
    with suppress(FileNotFoundError):
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            raise NotRegularFileError(_file_type(mode))


def _file_type(mode: int) -> str:
    kinds = {
        stat.S_IFLNK: "a symbolic link",
        stat.S_IFDIR: "a directory",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFSOCK: "a socket",
    }
    return kinds.get(stat.S_IFMT(mode), "a device")


@contextmanager
def report_damage(path: Path, expected: str, remedy: str) -> Iterator[None]:
    """Turn errors raised while a file is read into `DamagedIndexError`, except for errors of the system.

    A system error, such as a missing permission, does not mean that the file is damaged.

    Raises:
        DamagedIndexError: the file is missing, or reading its content raised an exception.
        OSError: the system has no descriptors or memory left, or denies access to the file; `filename` is set.
    """
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise DamagedIndexError(problem(f"{path}", got="no file", expected=expected, remedy=remedy)) from None
    except NotRegularFileError as error:
        raise DamagedIndexError(problem(f"{path}", got=error, expected=expected, remedy=remedy)) from error
    # The type of exception that a reader raises depends on which byte of the file is damaged.
    except Exception as error:
        system_error = find_system_error(error, path)
        if system_error is not None:
            raise system_error from error
        got = " ".join(str(error).split())[:_MAX_CHARS] or type(error).__name__
        message = problem(f"cannot read {path}", got=got, expected=expected, remedy=remedy)
        raise DamagedIndexError(message) from error


def find_system_error(error: BaseException, path: Path) -> OSError | None:
    """Return the system error behind an exception, with the file's name, or None if the file's content caused it.

    HDF5 and FAISS report system errors only in the text of their exceptions, or in `__cause__` or `__context__`.
    """
    seen: BaseException | None = error
    while seen is not None:
        number = errno.ENOMEM if isinstance(seen, MemoryError) else seen.errno if isinstance(seen, OSError) else None
        if number not in _SYSTEM_ERRORS:
            number = next((lacking for lacking in _OUT_OF_RESOURCES if os.strerror(lacking) in str(seen)), None)
        if number is not None:
            return OSError(number, os.strerror(number), str(path))
        seen = seen.__cause__ or seen.__context__
    return None
