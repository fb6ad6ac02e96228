"""Inner products of one float32 query with float16 rows, by FAISS's scanner of half-precision codes.

The scanner converts and multiplies in registers and uses one thread. A conversion to float32 and a matrix product
take twice as long on one thread; on several threads, they wait for each other twice for each block of rows.

Shapes: B rows of a block, D columns.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from tracin_ann.device import import_faiss
from tracin_ann.search.inverted_lists import make_empty_index
from tracin_ann.types import Float32


class HalfScanner:
    """A query, whose inner products with blocks of rows are computed."""

    def __init__(self, query_D: Float32) -> None:
        """Store the query."""
        self._query_D = np.ascontiguousarray(query_D)

    def multiply(self, stored_BD: npt.NDArray[Any]) -> Float32:
        """Return the inner products [B] with float16 rows; NaN for a row whose product is NaN or -infinity."""
        faiss = import_faiss()
        n_rows, dim = stored_BD.shape
        position_B, codes_BD = np.arange(n_rows, dtype=np.int64), np.ascontiguousarray(stored_BD)
        result = faiss.RangeSearchResult(1)
        result.buffer_size = max(1, n_rows)
        found = faiss.RangeSearchPartialResult(result)
        row = found.new_result(0)
        pool = _make_pool(dim)
        scanner = pool.take()
        scanner.set_query(faiss.swig_ptr(self._query_D))
        # A range search without a limit returns the products of all rows, in order, without those that are not numbers.
        codes = faiss.swig_ptr(codes_BD.view(np.uint8).reshape(-1))
        scanner.scan_codes_range(n_rows, codes, faiss.swig_ptr(position_B), -math.inf, row)
        pool.put(scanner)
        n_found = row.nres
        product_B, found_B = np.empty(n_found, np.float32), np.empty(n_found, np.int64)
        found.copy_range(0, n_found, faiss.swig_ptr(found_B), faiss.swig_ptr(product_B))
        if n_found == n_rows:
            return product_B
        all_B = np.full(n_rows, np.nan, np.float32)
        all_B[found_B] = product_B
        return all_B


class _Pool:
    """FAISS scanners that are not in use. They are reused, because FAISS's Python package cannot delete them."""

    def __init__(self, dim: int) -> None:
        self._index = make_empty_index(1, dim, "fp16")
        self._unused: list[Any] = []

    def take(self) -> Any:
        """Return a scanner that no other thread uses."""
        try:
            return self._unused.pop()
        except IndexError:
            scanner = self._index.get_InvertedListScanner(False, None, None)
            scanner.set_list(0, 0.0)
            return scanner

    def put(self, scanner: Any) -> None:
        """Return a scanner to the pool."""
        self._unused.append(scanner)


@cache
def _make_pool(dim: int) -> _Pool:
    """Return the pool of scanners of rows of D numbers."""
    return _Pool(dim)


class _SharedMemory:
    """The memory of an array, for NumPy's array interface without the flag that marks it as read-only."""

    def __init__(self, array: npt.NDArray[Any]) -> None:
        self.array = array
        interface = array.__array_interface__
        self.__array_interface__ = interface | {"data": (interface["data"][0], False)}


def share_memory(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return an array of the same memory for libraries that accept writable arrays only; they must not write to it."""
    return array if array.flags.writeable else np.asarray(_SharedMemory(array))
