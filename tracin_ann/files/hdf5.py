"""HDF5 files: writes whose errors are raised at the end, and reads that reject links and external storage."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np
import numpy.typing as npt

_INT64 = np.dtype("<i8")


@contextmanager
def write_hdf5(path: Path) -> Iterator[BinaryIO]:
    """Yield a new file for h5py to write to; errors of the file are raised when the block ends.

    HDF5 itself does not see these errors: after a failed write it may crash the process, even much later.
    """
    with open(path, "x+b") as file:
        deferred = _DeferredErrors(file)
        try:
            yield deferred  # type: ignore[misc]
        except Exception:
            if deferred.error is None:
                raise
        deferred.flush()
        if deferred.error is not None:
            raise deferred.error


class _DeferredErrors:
    """A file that stores its first error in `error` and ignores every later call."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: BaseException | None = None

    def _call(self, function: Callable[..., Any], *arguments: Any, otherwise: Any = 0) -> Any:
        if self.error is None:
            try:
                return function(*arguments)
            except BaseException as error:
                self.error = error
        return otherwise

    def read(self, size: int = -1) -> Any:
        return self._call(self._file.read, size, otherwise=b"")

    def readinto(self, buffer: Any) -> Any:
        size = self._call(self._file.readinto, buffer, otherwise=None)  # type: ignore[attr-defined]
        if size is None:
            memoryview(buffer)[:] = bytes(len(buffer))
        return len(buffer) if size is None else size

    def write(self, data: bytes) -> Any:
        return self._call(self._file.write, data, otherwise=len(data))

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> Any:
        return self._call(self._file.seek, offset, whence)

    def tell(self) -> Any:
        return self._call(self._file.tell)

    def truncate(self, size: int | None = None) -> Any:
        return self._call(self._file.truncate, size)

    def flush(self) -> None:
        self._call(self._file.flush)


def open_own_group(parent: h5py.h5g.GroupID, name: str) -> h5py.h5g.GroupID:
    """Return a group that is stored in the file itself; links are not followed.

    Raises:
        ValueError: there is no such group.
    """
    found = _open_own_object(parent, name)
    if not isinstance(found, h5py.h5g.GroupID):
        raise ValueError(f"{name} is not a group of this file")
    return found


def open_own_dataset(parent: h5py.h5g.GroupID, name: str) -> h5py.h5d.DatasetID:
    """Return a dataset that is stored in the file itself; links are not followed.

    Raises:
        ValueError: there is no such dataset.
    """
    found = _open_own_object(parent, name)
    if not isinstance(found, h5py.h5d.DatasetID):
        raise ValueError(f"{name} is not a dataset of this file")
    return found


def _open_own_object(parent: h5py.h5g.GroupID, name: str) -> Any:
    """Return an object that is stored in the file itself, None if there is none; links are not followed."""
    # h5py's low-level functions: opening a feature file with `h5py.Group` and `h5py.Dataset` takes three times as long.
    key = name.encode()
    try:
        link = parent.links.get_info(key).type
    except KeyError:
        return None
    return h5py.h5o.open(parent, key) if link == h5py.h5l.TYPE_HARD else None


def locate_own_dataset(
    parent: h5py.h5g.GroupID, name: str, shape: tuple[int, ...], dtype: np.dtype[Any], n_bytes: int
) -> int:
    """Return the offset of a dataset of this shape and dtype that is stored contiguously in a file of `n_bytes` bytes.

    Links, external and virtual storage are rejected. So are chunks, because HDF5 would run filters on them.

    Raises:
        ValueError: there is no such dataset.
    """
    dataset = open_own_dataset(parent, name)
    offset: int | None = dataset.get_offset()
    if offset is None:
        # The dataset has chunks, external, virtual or compact storage, or no storage at all.
        raise ValueError(f"{name} is not a dataset of this file with contiguous data")
    if dataset.shape != shape or not dataset.get_type().equal(_stored_type(dtype)):
        raise ValueError(f"dataset {name} is {dataset.dtype} {dataset.shape}, expected {dtype} {shape}")
    # Touching a mapped page past the end of the file would kill the process (SIGBUS).
    if offset + math.prod(shape) * dtype.itemsize > n_bytes:
        raise ValueError(f"dataset {name} reaches past the end of the file")
    return offset


@cache
def _stored_type(dtype: np.dtype[Any]) -> h5py.h5t.TypeID:
    """Return the type with which h5py stores numbers of this dtype."""
    return h5py.h5t.py_create(dtype)


def read_dataset(file: BinaryIO, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Return the content of the dataset that `locate_own_dataset` found at this offset.

    Raises:
        ValueError: the file has become shorter.
    """
    array = np.empty(shape, dtype=dtype)
    file.seek(offset)
    if file.readinto(array.reshape(-1).view(np.uint8).data) != array.nbytes:  # type: ignore[attr-defined]
        raise ValueError("the file became shorter while it was read")
    return array


def read_attribute(parent: h5py.h5g.GroupID, name: str, most_bytes: int) -> bytes | int:
    """Return a text of at most `most_bytes` bytes, or an int64.

    Raises:
        ValueError: the attribute is missing or has another type or shape.
    """
    try:
        attribute = h5py.h5a.open(parent, name.encode())
    except KeyError:
        attribute = None
    if attribute is not None and attribute.get_space().get_simple_extent_type() == h5py.h5s.SCALAR:
        kind = attribute.get_type()
        is_text = isinstance(kind, h5py.h5t.TypeStringID) and not kind.is_variable_str()
        if kind.get_size() <= most_bytes and (is_text or kind.equal(_stored_type(_INT64))):
            value = np.zeros((), dtype=np.dtype((np.bytes_, kind.get_size())) if is_text else _INT64)
            attribute.read(value, mtype=kind)
            return bytes(value.item()) if is_text else int(value)
    raise ValueError(f"attribute {name} is missing or has another type")
