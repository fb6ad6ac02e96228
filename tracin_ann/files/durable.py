"""Durable small primitives of files (POSIX): whole or not at all, what others write, digests, JSON, sweeping."""

from __future__ import annotations

import errno
import json
import math
import os
import platform
import secrets
import stat
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

import h5py
import numpy as np
import numpy.typing as npt
import xxhash

from tracin_ann.errors import DamagedIndexError, attach_path, problem
from tracin_ann.files.opening import NotPlainError, open_plain, report_damage

_PREFIX = ".tracin-tmp-"
_CHUNK_BYTES = 1 << 20
_LARGEST_JSON = 64 << 20
_JSON_REMEDY = "name the directory of a finished index, or run the build again"
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
        with attach_path(path, temporary):
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


def read_json(path: Path, remedy: str = _JSON_REMEDY) -> dict[str, object]:
    """Return the JSON object in `path`.

    Raises:
        DamagedIndexError: there is no such plain file, it is larger than any that is written, or it holds something
            else than a JSON object.
        OSError: the system cannot read it.
    """
    with report_damage(path, "a JSON file", remedy), open_plain(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > _LARGEST_JSON:
            raise ValueError(f"more than {_LARGEST_JSON:,} bytes")
        # A read takes memory for all that it asks for.
        data = file.read(size)
    try:
        value = json.loads(data)
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
    with attach_path(path), open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def describe_difference(path: Path, size: int, digest: str | None) -> str:
    """Return how a file of an index differs from what was written, "" if it does not; None: its digest is not read.

    Raises:
        OSError: the system cannot read it.
    """
    try:
        with open_plain(path) as file:
            found = os.fstat(file.fileno()).st_size
    except (FileNotFoundError, NotADirectoryError):
        return "no file"
    except NotPlainError as error:
        return str(error)
    if found != size:
        return f"{found} bytes"
    return "other content" if digest is not None and file_digest(path) != digest else ""


def read_array(file: IO[bytes], n_bytes: int) -> npt.NDArray[Any]:
    """Return the array in NumPy's format that the next so many bytes of a file hold.

    NumPy itself sets aside as much memory as the array's header asks for, whatever there is to read.

    Raises:
        ValueError: they hold none, or one of another size.
    """
    begin = file.tell()
    shape, is_fortran, dtype = _array_header(file)
    size = math.prod(shape) * dtype.itemsize
    if size != n_bytes - (file.tell() - begin):
        raise ValueError(f"{dtype} of shape {shape} in {n_bytes} bytes")
    data = bytearray(file.read(size))
    return np.ndarray(shape, dtype, data, order="F" if is_fortran else "C")


def map_array(path: Path) -> npt.NDArray[Any]:
    """Return the array in a file in NumPy's format, mapped.

    Raises:
        ValueError: it holds none, or less than the whole.
        OSError: the system cannot open or map it.
    """
    with open_plain(path) as file:
        shape, is_fortran, dtype = _array_header(file)
        return np.memmap(file, dtype, "r", file.tell(), shape, "F" if is_fortran else "C")


def _array_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, is_fortran, dtype = readers[np.lib.format.read_magic(file)](file)
    if dtype.hasobject or not dtype.itemsize or min(shape, default=0) < 0:
        raise ValueError(f"an array of {dtype} and shape {shape}")
    return shape, is_fortran, dtype


def read_npz(file: BinaryIO) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays by name that `numpy.savez` wrote into an open file; they take no more memory than it has bytes.

    Raises:
        ValueError, zipfile.BadZipFile: there are none.
    """
    found = {}
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if sum(entry.file_size for entry in entries) > os.fstat(file.fileno()).st_size:
            raise ValueError("more bytes than the file has")
        for entry in entries:
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{entry.filename} is compressed")
            with archive.open(entry) as part:
                found[entry.filename.removesuffix(".npy")] = read_array(part, entry.file_size)
    return found


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
def write_hdf5(path: Path) -> Iterator[BinaryIO]:
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


def require_own_object(group: h5py.Group, name: str, kind: type) -> Any:
    """Return a group or data set that lies in the file itself: no link is followed.

    Raises:
        ValueError: there is none.
    """
    found = group[name] if isinstance(group.get(name, getlink=True), h5py.HardLink) else None
    if not isinstance(found, kind):
        raise ValueError(f"{name} is no {kind.__name__.lower()} of this file")
    return found


def require_own_dataset(group: h5py.Group, name: str, shape: tuple[int, ...], dtype: str, n_bytes: int) -> h5py.Dataset:
    """Return a data set of this shape and type whose numbers lie in its own file of so many bytes, as they are.

    Links and storage that lead out of the file are refused, and chunks: filters would run on them.

    Raises:
        ValueError: there is none.
    """
    dataset: h5py.Dataset = require_own_object(group, name, h5py.Dataset)
    if dataset.external is not None or dataset.is_virtual:
        raise ValueError(f"{name} is no dataset of this file")
    if (dataset.shape, dataset.dtype.str, dataset.chunks) != (shape, dtype, None):
        raise ValueError(f"dataset {name} is {dataset.dtype} {dataset.shape}, expected {dtype} {shape}")
    # A page past the end of the file would kill the process when it is touched (SIGBUS).
    offset = dataset.id.get_offset()
    if offset is None or offset + math.prod(shape) * dataset.dtype.itemsize > n_bytes:
        raise ValueError(f"dataset {name} reaches past the end of the file")
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
            found = path.lstat()
            if stat.S_ISDIR(found.st_mode):
                continue
            if _writer_is_gone(path.name) or time.time() - found.st_mtime >= idle_s:
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
        with attach_path(path):
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
