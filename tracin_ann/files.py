"""Durable small primitives of files (POSIX): whole or not at all, what others write, digests, JSON, sweeping."""

from __future__ import annotations

import errno
import json
import os
import platform
import secrets
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np
import numpy.typing as npt
import xxhash

from tracin_ann.errors import DamagedIndexError, naming, problem

_PREFIX = ".tracin-tmp-"
_CHUNK_BYTES = 1 << 20
# Temporaries that this process is writing: another of its number was written by one that is gone.
_UNDER_WAY: set[str] = set()


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on a clean exit it becomes `path`, durably, else it is removed.

    For libraries that write by path (h5py, faiss): the caller creates the file and closes it before the
    block ends. The temporary name keeps the suffix of `path`.

    Raises:
        OSError: with the name of `path`, whoever wrote.
    """
    name = f"{_PREFIX}{_host()}-{os.getpid()}-{secrets.token_hex(6)}-{_mark(path)}{path.suffix}"
    temporary = path.with_name(name)
    _UNDER_WAY.add(name)
    try:
        with naming(path, temporary):
            yield temporary
            _sync(temporary)
            os.replace(temporary, path)
    except BaseException:
        # What went wrong is told, not that it also kept the temporary from being removed.
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    finally:
        _UNDER_WAY.discard(name)
    sync_directory(path.parent)


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Yield a binary file that becomes `path` on a clean exit and is removed on any other."""
    with atomic_path(path) as temporary, open(temporary, "xb") as file:
        yield file


def write_bytes_atomic(path: Path, data: bytes) -> None:
    """Write `data` as the whole of `path`, or leave what was there."""
    with atomic_write(path) as file:
        file.write(data)


def write_json_atomic(path: Path, value: Mapping[str, object]) -> None:
    """Write a JSON object as the whole of `path`; NaN and inf are refused (ValueError)."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    write_bytes_atomic(path, (text + "\n").encode())


class NotRegularError(ValueError):
    """A FIFO, device or other thing stands where a file should be; the message says what."""


def open_regular(path: Path) -> BinaryIO:
    """Open a file to read; waits for nothing and reads nothing where it is no regular file.

    Raises:
        NotRegularError: it is a FIFO, a device or a socket.
        IsADirectoryError: it is a directory.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        _refuse_irregular(path, os.fstat(descriptor).st_mode)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def require_regular(path: Path) -> None:
    """Refuse what is there and no regular file, for those that open by path.

    Raises:
        NotRegularError: it is a FIFO, a device or a socket.
        IsADirectoryError: it is a directory.
    """
    with suppress(FileNotFoundError):
        _refuse_irregular(path, path.stat().st_mode)


def _refuse_irregular(path: Path, mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFIFO: "a FIFO", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFSOCK: "a socket"}
        raise NotRegularError(kinds.get(stat.S_IFMT(mode), "no regular file"))


def read_json(path: Path) -> dict[str, object]:
    """Return the JSON object in `path`.

    Raises:
        DamagedIndexError: there is no such file, or it holds something else than a JSON object.
    """
    remedy = "name the directory of a finished index, or run the build again"
    try:
        with open_regular(path) as file:
            value = json.loads(file.read())
    except NotRegularError as error:
        raise DamagedIndexError(problem(f"{path}", got=error, expected="a JSON file", remedy=remedy)) from None
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise DamagedIndexError(problem(f"{path}", got="no file", expected="a JSON file", remedy=remedy)) from None
    except (ValueError, RecursionError) as error:
        message = problem(f"{path}", got=f"no JSON ({error})", expected="a JSON object", remedy=remedy)
        raise DamagedIndexError(message) from error
    if not isinstance(value, dict):
        got = f"a JSON {type(value).__name__}"
        raise DamagedIndexError(problem(f"{path}", got=got, expected="a JSON object", remedy=remedy))
    return value


def file_digest(path: Path) -> str:
    """Return the xxh3_128 of the file's bytes, as 32 hexadecimal digits."""
    digest = xxhash.xxh3_128()
    with naming(path), open_regular(path) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def save_array(file: BinaryIO, array: npt.NDArray[Any]) -> None:
    """Write an array in NumPy's format into an open file.

    NumPy itself hands a real file to C, whose last block is written on closing it: where that finds the disk full, the
    array is cut without a word.
    """
    np.save(_Through(file), array, allow_pickle=False)


class _Through:
    """Something that NumPy can write to and does not take for a real file."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def write(self, data: bytes) -> int:
        return self._file.write(data)


@contextmanager
def hdf5_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a new file for h5py to write to, whose errors are raised when the block ends.

    HDF5 itself is told of none: after a failed write it may bring the process down, files or hours later.
    """
    with open(path, "x+b") as file:
        deferred = _Deferred(file)
        try:
            yield deferred  # type: ignore[misc]
        except Exception:
            if deferred.error is None:
                raise
        deferred.flush()
        if deferred.error is not None:
            raise deferred.error


class _Deferred:
    """A file that does nothing more once something failed, and keeps that."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: BaseException | None = None

    def _done(self, function: Callable[..., Any], *given: Any, otherwise: Any = 0) -> Any:
        if self.error is None:
            try:
                return function(*given)
            except BaseException as error:
                self.error = error
        return otherwise

    def read(self, size: int = -1) -> Any:
        return self._done(self._file.read, size, otherwise=b"")

    def readinto(self, buffer: Any) -> Any:
        size = self._done(self._file.readinto, buffer, otherwise=None)  # type: ignore[attr-defined]
        if size is None:
            memoryview(buffer)[:] = bytes(len(buffer))
        return len(buffer) if size is None else size

    def write(self, data: bytes) -> Any:
        return self._done(self._file.write, data, otherwise=len(data))

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> Any:
        return self._done(self._file.seek, offset, whence)

    def tell(self) -> Any:
        return self._done(self._file.tell)

    def truncate(self, size: int | None = None) -> Any:
        return self._done(self._file.truncate, size)

    def flush(self) -> None:
        self._done(self._file.flush)


def own_dataset(group: h5py.Group, name: str) -> h5py.Dataset:
    """Return a data set whose numbers lie in its own file: links and storage that lead out of it are refused.

    Raises:
        ValueError: there is none.
    """
    dataset = group[name] if isinstance(group.get(name, getlink=True), h5py.HardLink) else None
    if not isinstance(dataset, h5py.Dataset) or dataset.external is not None or dataset.is_virtual:
        raise ValueError(f"{name} is no data set of this file")
    return dataset


def make_directory(directory: Path) -> None:
    """Make a directory, and those above it that are missing, durably; one that is there is left as it is."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    for path in reversed(missing):
        # Another process may make it at this moment.
        with suppress(FileExistsError):
            os.mkdir(path)
        sync_directory(path.parent)


def is_temporary(path: Path) -> bool:
    """Return whether a path is the temporary of an atomic write."""
    return path.name.startswith(_PREFIX)


def sweep_temporaries(directory: Path, *, idle_s: float = 3600.0) -> list[Path]:
    """Remove the temporaries that killed runs left in `directory`, and return their paths.

    A temporary is left over when its process, on this machine, is gone, or when nothing has been written to
    it for `idle_s` seconds (another machine's process can't be seen, and process ids are used again).
    """
    swept = []
    for path in sorted(directory.glob(f"{_PREFIX}*")):
        # A writer may finish, or another sweep may win, between the listing and here.
        with suppress(FileNotFoundError):
            if _writer_is_gone(path.name) or time.time() - path.stat().st_mtime >= idle_s:
                path.unlink()
                swept.append(path)
    return swept


def sweep_temporaries_of(target: Path) -> None:
    """Remove the temporaries of killed runs that were to become `target`, and no others."""
    with suppress(OSError):
        for path in target.parent.glob(f"{_PREFIX}*-{_mark(target)}*"):
            if _writer_is_gone(path.name):
                path.unlink()


def _writer_is_gone(name: str) -> bool:
    host, _, rest = name.removeprefix(_PREFIX).partition("-")
    pid = rest.partition("-")[0]
    if host != _host() or not pid.isdecimal():
        return False
    if int(pid) == os.getpid():
        return name not in _UNDER_WAY
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    return False


def _mark(path: Path) -> str:
    """Return what a temporary's name says of the name that it is to have."""
    return xxhash.xxh3_64_hexdigest(os.fsencode(path.name))[:8]


def _host() -> str:
    return xxhash.xxh3_64_hexdigest(platform.node().encode())[:8]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(directory: Path) -> None:
    """Make the names in a directory durable."""
    try:
        _sync(directory)
    except OSError as error:
        # Some network file systems can't sync a directory at all and say EINVAL, and one above the index may not be
        # ours to read; there is nothing more to do.
        if error.errno not in (errno.EINVAL, errno.EACCES):
            raise
