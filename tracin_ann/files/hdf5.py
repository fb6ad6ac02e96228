"""HDF5 files: writes whose errors are raised at the end, and reads that reject links and external storage."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import h5py


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


def require_own_object(group: h5py.Group, name: str, kind: type) -> Any:
    """Return a group or dataset that is stored in the file itself; links are not followed.

    Raises:
        ValueError: there is no such object.
    """
    found = group[name] if isinstance(group.get(name, getlink=True), h5py.HardLink) else None
    if not isinstance(found, kind):
        raise ValueError(f"{name} is not a {kind.__name__.lower()} of this file")
    return found


def require_own_dataset(group: h5py.Group, name: str, shape: tuple[int, ...], dtype: str, n_bytes: int) -> h5py.Dataset:
    """Return a contiguous dataset of this shape and dtype that is stored in the file itself, which has `n_bytes` bytes.

    Links, external and virtual storage are rejected. So are chunks, because HDF5 would run filters on them.

    Raises:
        ValueError: there is no such dataset.
    """
    dataset: h5py.Dataset = require_own_object(group, name, h5py.Dataset)
    if dataset.external is not None or dataset.is_virtual:
        raise ValueError(f"{name} is not a dataset of this file")
    if (dataset.shape, dataset.dtype.str, dataset.chunks) != (shape, dtype, None):
        raise ValueError(f"dataset {name} is {dataset.dtype} {dataset.shape}, expected {dtype} {shape}")
    # Touching a mapped page past the end of the file would kill the process (SIGBUS).
    offset = dataset.id.get_offset()
    if offset is None or offset + math.prod(shape) * dataset.dtype.itemsize > n_bytes:
        raise ValueError(f"dataset {name} reaches past the end of the file")
    return dataset
