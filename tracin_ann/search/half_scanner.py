"""Inner products of one float32 query with float16 rows, and norms of rows, by FAISS's scanner of half-precision codes.

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
from tracin_ann.search.inverted_lists import Measure, make_empty_index
from tracin_ann.types import Float32


class HalfScanner:
    """A query, whose inner products with blocks of rows are computed."""

    def __init__(self, query_D: Float32) -> None:
        """Store the query."""
        self._query_D = np.ascontiguousarray(query_D)

    def multiply(self, stored_BD: npt.NDArray[Any]) -> Float32:
        """Return the inner products [B] with float16 rows; NaN for a row whose product is NaN or -infinity."""
        return _scan_rows(_make_pool(len(self._query_D), "product"), self._query_D, stored_BD, -math.inf)


def measure_squares(stored_BD: npt.NDArray[Any]) -> Float32:
    """Return the squared norms [B] of float16 rows; NaN for a row whose squared norm is NaN or infinity."""
    origin_D = np.zeros(stored_BD.shape[1], np.float32)
    return _scan_rows(_make_pool(len(origin_D), "distance"), origin_D, stored_BD, math.inf)


def _scan_rows(pool: _Pool, query_D: Float32, stored_BD: npt.NDArray[Any], limit: float) -> Float32:
    """Return the products or squared distances [B] of a query and float16 rows; NaN for those not within the limit."""
    faiss, n_rows = import_faiss(), len(stored_BD)
    position_B, codes_BD = np.arange(n_rows, dtype=np.int64), np.ascontiguousarray(stored_BD)
    result = faiss.RangeSearchResult(1)
    result.buffer_size = max(1, n_rows)
    found = faiss.RangeSearchPartialResult(result)
    row = found.new_result(0)
    scanner = pool.take()
    scanner.set_query(faiss.swig_ptr(query_D))
    # After the query, which a scanner of distances reads here.
    scanner.set_list(0, 0.0)
    # A range search without a limit returns the values of all rows, in order, without those that are not numbers.
    codes = faiss.swig_ptr(codes_BD.view(np.uint8).reshape(-1))
    scanner.scan_codes_range(n_rows, codes, faiss.swig_ptr(position_B), limit, row)
    pool.put(scanner)
    n_found = row.nres
    value_B, found_B = np.empty(n_found, np.float32), np.empty(n_found, np.int64)
    found.copy_range(0, n_found, faiss.swig_ptr(found_B), faiss.swig_ptr(value_B))
    if n_found == n_rows:
        return value_B
    all_B = np.full(n_rows, np.nan, np.float32)
    all_B[found_B] = value_B
    return all_B


class _Pool:
    """FAISS scanners that are not in use. They are reused, because FAISS's Python package cannot delete them."""

    def __init__(self, dim: int, measure: Measure) -> None:
        self._index = make_empty_index(1, dim, "fp16", measure)
        self._unused: list[Any] = []

    def take(self) -> Any:
        """Return a scanner that no other thread uses."""
        try:
            return self._unused.pop()
        except IndexError:
            return self._index.get_InvertedListScanner(False, None, None)

    def put(self, scanner: Any) -> None:
        """Return a scanner to the pool."""
        self._unused.append(scanner)


@cache
def _make_pool(dim: int, measure: Measure) -> _Pool:
    """Return the pool of scanners of rows of D numbers."""
    return _Pool(dim, measure)
