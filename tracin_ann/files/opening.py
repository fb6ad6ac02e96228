"""Opening the files of an index: plain files only, never by a symbolic link; what the system lacks is no damage.

An index may come from a stranger. A link in it could lead a reader or a writer to any file of the user's, and a FIFO
would never end. The directory of the index itself may be a link: its user made that.
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

_LACKING = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_REFUSING = frozenset({*_LACKING, errno.EACCES, errno.EPERM, errno.EIO})
_NO_PLAIN_FILE = frozenset({errno.ELOOP, errno.EMLINK, errno.ENXIO})
_LONGEST = 200


class NotPlainError(ValueError):
    """What is at a path of an index is a symbolic link, a directory, a FIFO or a device."""


def open_descriptor(path: Path, flags: int = os.O_RDONLY) -> int:
    """Return the descriptor of a plain file; what is at the path is not followed and not waited for.

    Raises:
        NotPlainError: something else is there.
        OSError: the system cannot open it, or there is nothing.
    """
    try:
        # A FIFO would be waited for without O_NONBLOCK; to a plain file that flag means nothing.
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except IsADirectoryError:
        raise NotPlainError("a directory") from None
    except OSError as error:
        if error.errno in _NO_PLAIN_FILE:
            raise NotPlainError(_kind(os.lstat(path).st_mode)) from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise NotPlainError(_kind(os.lstat(path).st_mode))
    return descriptor


def open_plain(path: Path) -> BinaryIO:
    """Return a plain file, open for reading.

    Raises:
        As `open_descriptor`.
    """
    return os.fdopen(open_descriptor(path), "rb")


@contextmanager
def open_directory(path: Path) -> Iterator[int]:
    """Yield the descriptor of a directory that is no symbolic link.

    Raises:
        NotPlainError: it is one, or no directory.
        OSError: the system cannot open it.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENOTDIR, *_NO_PLAIN_FILE):
            raise NotPlainError(f"{path} is no directory of its own") from error
        raise
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def require_regular(path: Path) -> None:
    """Refuse what a user names and is no regular file, for those that open by path; links are followed.

    Raises:
        NotPlainError: it is a FIFO, a device or a socket.
        IsADirectoryError: it is a directory.
    """
    with suppress(FileNotFoundError):
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            raise NotPlainError(_kind(mode))


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFLNK: "a symbolic link",
        stat.S_IFDIR: "a directory",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFSOCK: "a socket",
    }
    return kinds.get(stat.S_IFMT(mode), "a device")


@contextmanager
def report_damage(path: Path, expected: str, remedy: str) -> Iterator[None]:
    """Take for damage what goes wrong while a file is read, unless the system refused: then nothing is known of it.

    Raises:
        DamagedIndexError: the file is missing, or its content raised something.
        OSError: the system has no descriptors or memory left, or no right to the file; names it.
    """
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise DamagedIndexError(problem(f"{path}", got="no file", expected=expected, remedy=remedy)) from None
    except NotPlainError as error:
        raise DamagedIndexError(problem(f"{path}", got=error, expected=expected, remedy=remedy)) from error
    # What readers raise depends on which byte of the file is damaged.
    except Exception as error:
        refused = find_system_error(error, path)
        if refused is not None:
            raise refused from error
        got = " ".join(str(error).split())[:_LONGEST] or type(error).__name__
        message = problem(f"cannot read {path}", got=got, expected=expected, remedy=remedy)
        raise DamagedIndexError(message) from error


def find_system_error(error: BaseException, path: Path) -> OSError | None:
    """Return what the system refused, with the file's name, or None where an error is about the file's content.

    HDF5 and FAISS say it in their text only, or in an error that theirs has taken the place of.
    """
    seen: BaseException | None = error
    while seen is not None:
        number = errno.ENOMEM if isinstance(seen, MemoryError) else seen.errno if isinstance(seen, OSError) else None
        if number not in _REFUSING:
            number = next((lacking for lacking in _LACKING if os.strerror(lacking) in str(seen)), None)
        if number is not None:
            return OSError(number, os.strerror(number), str(path))
        seen = seen.__cause__ or seen.__context__
    return None
