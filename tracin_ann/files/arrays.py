"""Files in NumPy's formats (npy, npz): bounded reading, memory mapping, and writes that report every error."""

from __future__ import annotations

import math
import os
import zipfile
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from tracin_ann.files.opening import open_regular


def read_array(file: IO[bytes], n_bytes: int) -> npt.NDArray[Any]:
    """Return the npy array in the next `n_bytes` bytes of a file.

    NumPy's own reader allocates the memory that the header states, even if the file is shorter.

    Raises:
        ValueError: the bytes are not an array, or its size is not `n_bytes` minus the header.
    """
    begin = file.tell()
    shape, is_fortran, dtype = _read_header(file)
    size = math.prod(shape) * dtype.itemsize
    if size != n_bytes - (file.tell() - begin):
        raise ValueError(f"{dtype} of shape {shape} in {n_bytes} bytes")
    data = bytearray(file.read(size))
    return np.ndarray(shape, dtype, data, order="F" if is_fortran else "C")


def map_array(path: Path) -> npt.NDArray[Any]:
    """Return the array of an npy file, memory-mapped read-only.

    Raises:
        ValueError: the file is not an array, or is shorter than its header states.
        OSError: the system cannot open or map it.
    """
    with open_regular(path) as file:
        shape, is_fortran, dtype = _read_header(file)
        return np.memmap(file, dtype, "r", file.tell(), shape, "F" if is_fortran else "C")


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, is_fortran, dtype = readers[np.lib.format.read_magic(file)](file)
    if dtype.hasobject or not dtype.itemsize or min(shape, default=0) < 0:
        raise ValueError(f"an array of {dtype} and shape {shape}")
    return shape, is_fortran, dtype


def read_npz(file: BinaryIO) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays by name that `numpy.savez` wrote; they take no more memory than the file has bytes.

    Raises:
        ValueError, zipfile.BadZipFile: the file is not such an archive.
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
    """Write an array in npy format into an open file.

    For a real file, NumPy writes through C's buffered stdio, which flushes the last block on close: if the disk is
    full at that moment, the array is truncated and no error is raised. This function writes through Python instead.
    """
    np.save(_WriteOnly(file), array, allow_pickle=False)


class _WriteOnly:
    """An object with only `write`, which NumPy does not recognise as a real file."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def write(self, data: bytes) -> int:
        return self._file.write(data)
