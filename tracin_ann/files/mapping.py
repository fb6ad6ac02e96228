"""Memory maps of files that use no file descriptor.

Python's `mmap` duplicates the descriptor of the file for as long as the map exists. An index can have more files than a
process may have descriptors, of which 1,024 are a common limit.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import weakref
from functools import cache
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

_FAILED = ctypes.c_void_p(-1).value


@cache
def _load_libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [
        *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int),
        *(ctypes.c_int, ctypes.c_int, ctypes.c_int64),
    ]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return libc


def map_pages(descriptor: int, size: int, offset: int) -> int:
    """Map bytes of a file read-only, from the beginning of a page on, and return their address.

    Raises:
        OSError: the system cannot map them.
    """
    address: int = _load_libc().mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, offset)
    if address == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return address


def map_file(file: BinaryIO, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Return the numbers of a file from `offset` on, memory-mapped read-only; the file may be closed afterwards.

    The caller checks that the file is long enough: reading past its end would kill the process (SIGBUS). The map is
    removed when no array uses it.

    Raises:
        OSError: the system cannot map the file.
    """
    count = math.prod(shape)
    before = offset % mmap.ALLOCATIONGRANULARITY
    size = before + count * dtype.itemsize
    address = map_pages(file.fileno(), size, offset - before)
    content = (ctypes.c_char * size).from_address(address)
    # At exit the system removes the map; another thread may still read it.
    weakref.finalize(content, _load_libc().munmap, address, size).atexit = False
    # Of a writable buffer, NumPy could make a writable array; writing to the map would kill the process.
    readonly = memoryview(content).cast("B").toreadonly()
    return np.frombuffer(readonly, dtype, count, before).reshape(shape)


class _SharedMemory:
    """The memory of an array, for NumPy's array interface without the flag that marks it as read-only."""

    def __init__(self, array: npt.NDArray[Any]) -> None:
        self.array = array
        interface = array.__array_interface__
        self.__array_interface__ = interface | {"data": (interface["data"][0], False)}


def share_memory(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return an array of the same memory for libraries that accept writable arrays only; they must not write to it."""
    return array if array.flags.writeable else np.asarray(_SharedMemory(array))
