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
_PROT_NONE, _MAP_FIXED = 0, 0x10
_PAGE_BYTES = mmap.ALLOCATIONGRANULARITY


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
    return _map(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, offset)


def _map(address: int | None, size: int, protection: int, flags: int, descriptor: int, offset: int) -> int:
    mapped: int = _load_libc().mmap(address, size, protection, flags, descriptor, offset)
    if mapped == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return mapped


def map_file(file: BinaryIO, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Return the numbers of a file from `offset` on, memory-mapped read-only; the file may be closed afterwards.

    The caller checks that the file is long enough: reading past its end would kill the process (SIGBUS). The map is
    removed when no array uses it.

    Raises:
        OSError: the system cannot map the file.
    """
    count = math.prod(shape)
    before = offset % _PAGE_BYTES
    size = before + count * dtype.itemsize
    content = _view_memory(map_pages(file.fileno(), size, offset - before), size)
    return np.frombuffer(content, dtype, count, before).reshape(shape)


def _view_memory(address: int, size: int) -> memoryview:
    """Return mapped memory, which is unmapped when nothing uses it."""
    content = (ctypes.c_char * size).from_address(address)
    # At exit the system removes the map; another thread may still read it.
    weakref.finalize(content, _load_libc().munmap, address, size).atexit = False
    # Of a writable buffer, NumPy could make a writable array; writing to the map would kill the process.
    return memoryview(content).cast("B").toreadonly()


class AddressRange:
    """Consecutive addresses for the maps of several files, so that one array contains the numbers of all.

    Reading an address to which no file is mapped kills the process. Maps are removed when no array uses one of them.

    Attributes:
        page_bytes: places in the range and offsets in files are multiples of this number.
    """

    page_bytes = _PAGE_BYTES

    def __init__(self, size: int) -> None:
        """Reserve addresses for this many bytes; they take no memory.

        Raises:
            OSError: the system does not have as many.
        """
        self._address = _map(None, size, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        self._content = _view_memory(self._address, size)

    def view(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """Return all addresses as an array, read-only."""
        return np.frombuffer(self._content, dtype, math.prod(shape)).reshape(shape)

    def map_file(self, file: BinaryIO, offset: int, place: int, size: int) -> None:
        """Map bytes of a file from `offset` on to a place in the range; both must be multiples of `page_bytes`.

        As for `map_file`, the caller checks that the file is long enough. A file that was mapped there is replaced.

        Raises:
            OSError: the system cannot map the file.
        """
        if offset % _PAGE_BYTES or place % _PAGE_BYTES or not 0 <= place <= place + size <= len(self._content):
            raise ValueError(f"{size} bytes from {offset} at {place} of {len(self._content)}")
        flags = mmap.MAP_SHARED | _MAP_FIXED
        _map(self._address + place, size, mmap.PROT_READ, flags, file.fileno(), offset)


class _SharedMemory:
    """The memory of an array, for NumPy's array interface without the flag that marks it as read-only."""

    def __init__(self, array: npt.NDArray[Any]) -> None:
        self.array = array
        interface = array.__array_interface__
        self.__array_interface__ = interface | {"data": (interface["data"][0], False)}


def share_memory(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return an array of the same memory for libraries that accept writable arrays only; they must not write to it."""
    return array if array.flags.writeable else np.asarray(_SharedMemory(array))
