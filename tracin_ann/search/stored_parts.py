"""The parts of stored rows in float32: rows converted in a buffer of each thread, and what multiplies their products.

float16 rows and codes are converted without their exponents and factors, or norms, which multiply the inner products.

Shapes: Q queries, B rows of a block, D columns of a part.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tracin_ann.device import import_faiss
from tracin_ann.files import share_memory
from tracin_ann.search.half_scanner import HalfScanner, measure_squares
from tracin_ann.types import CodedPart, Float32, Int64, StoredPart

if TYPE_CHECKING:
    from typing import TypeGuard

_BUFFER_NUMBERS = 1 << 18
"""float32 numbers of the buffer of converted rows of a thread: 1 MiB."""
_SERIAL_NUMBERS = 1 << 15
"""PyTorch uses one thread for an elementwise operation of up to this number of elements."""
QUERIES_AT_ONCE = 64
_SAFE_EXPONENT = 64
_EXPONENT_BIAS, _LARGEST_BIASED, _FRACTION_BITS = 127, 254, 23


class PartBuffer(threading.local):
    """Rows converted to float32, and their inner products by FAISS's `LinearTransform`; own memory in each thread.

    Unlike products by PyTorch and NumPy, those by FAISS can be restricted to the calling thread.
    """

    def __init__(self) -> None:
        self._transform = import_faiss().LinearTransform(0, 0, False)
        self._transform.is_trained = True
        self.rows_BD = torch.empty(0, 0, dtype=torch.float32)

    def load(self, part: StoredPart | CodedPart, rows: slice) -> list[Tensor]:
        """Convert some rows of a part, which replace the last ones; return the factors [b] of their inner products."""
        if isinstance(part, StoredPart):
            self._convert(torch.from_numpy(share_memory(part.stored_BD[rows])))
            return _invert_norms(self.rows_BD) if part.unit else _compute_powers(part.exponent_B[rows])
        self._resize(rows.stop - rows.start, part.dim)
        part.decode(rows, self.rows_BD.numpy())
        return [torch.from_numpy(part.read_factors(rows)), *_compute_powers(part.exponent_B[rows])]

    def _convert(self, stored_BD: Tensor) -> None:
        self._resize(*stored_BD.shape)
        own_N, stored_N = self.rows_BD.view(-1), stored_BD.reshape(-1)
        for at in range(0, len(own_N), _SERIAL_NUMBERS):
            own_N[at : at + _SERIAL_NUMBERS].copy_(stored_N[at : at + _SERIAL_NUMBERS])

    def _resize(self, n_rows: int, dim: int) -> None:
        if (n_rows, dim) == self.rows_BD.shape:
            return
        transform = self._transform
        transform.d_out, transform.d_in = n_rows, dim
        transform.A.resize(n_rows * dim)
        matrix = import_faiss().rev_swig_ptr(transform.A.data(), n_rows * dim)
        self.rows_BD = torch.from_numpy(matrix).view(n_rows, dim)

    def multiply(self, query_QD: Tensor) -> Tensor:
        """Return the inner products of queries and the rows, [Q, B]."""
        product_QB = torch.empty(len(query_QD), len(self.rows_BD), dtype=torch.float32)
        pointers = [import_faiss().swig_ptr(tensor.numpy()) for tensor in (query_QD, product_QB)]
        self._transform.apply_noalloc(len(query_QD), *pointers)
        return product_QB

    def multiply_pairs(self, query_QD: Tensor, place_P: Int64, query_P: Int64) -> Float32:
        """Return the inner products [P] of the rows and the queries at these places, C-contiguous."""
        faiss, product_P = import_faiss(), np.empty(len(place_P), np.float32)
        if len(place_P):
            arrays = self.rows_BD.numpy(), place_P, query_QD.numpy(), query_P, product_P
            faiss.pairwise_indexed_inner_product(query_QD.shape[1], len(place_P), *map(faiss.swig_ptr, arrays))
        return product_P


def _count_columns(part: StoredPart | CodedPart) -> int:
    """Return D, the number of columns of a part."""
    return part.stored_BD.shape[1] if isinstance(part, StoredPart) else part.dim


def is_half(part: StoredPart | CodedPart) -> TypeGuard[StoredPart]:
    """Return whether the numbers of a part are float16, which `HalfScanner` accepts."""
    return isinstance(part, StoredPart) and part.stored_BD.dtype == np.float16


def measure_factors(part: StoredPart, rows: slice) -> list[Tensor]:
    """Return the factors [b] of inner products with some rows of float16 numbers."""
    if part.unit:
        return [_invert(torch.from_numpy(measure_squares(part.stored_BD[rows])).sqrt_())]
    return _compute_powers(part.exponent_B[rows])


def split_rows(part: StoredPart | CodedPart, rows: slice, n_queries: int) -> Iterator[tuple[slice, slice]]:
    """Yield the rows that are converted at a time for products with Q queries: places among the rows, and in the part.

    Args:
        part: a part, some of whose rows are converted.
        rows: these; its end can be beyond the part.
        n_queries: Q.
    """
    n_rows, n_queries = len(part.exponent_B[rows]), min(n_queries, QUERIES_AT_ONCE)
    step = max(1, min(_BUFFER_NUMBERS // max(1, _count_columns(part)), _SERIAL_NUMBERS // max(1, n_queries)))
    for at in range(0, n_rows, step):
        stop = min(at + step, n_rows)
        yield slice(at, stop), slice(rows.start + at, rows.start + stop)


@dataclass(frozen=True)
class PartQueries:
    """The queries' columns of a part: `query_QD`, times `power_Q1` (float64) if it is not None."""

    query_QD: Tensor
    power_Q1: Tensor | None

    @cached_property
    def scanners(self) -> list[HalfScanner]:
        """Return a scanner for each query."""
        return [HalfScanner(query_D) for query_D in self.query_QD.numpy()]


class SplitQueries:
    """Queries [Q, F], whose columns are those of parts, one after the other; several threads can use it."""

    def __init__(self, queries_QF: Tensor) -> None:
        """Store the float32 queries."""
        self._queries_QF = queries_QF
        self._scaled: dict[int, PartQueries] = {}

    def match(self, parts: Iterable[StoredPart | CodedPart]) -> Iterator[tuple[StoredPart | CodedPart, PartQueries]]:
        """Yield each part with the queries' columns of it."""
        start = 0
        for part in parts:
            stop = start + _count_columns(part)
            if start not in self._scaled:
                self._scaled[start] = _scale_queries(self._queries_QF[:, start:stop])
            yield part, self._scaled[start]
            start = stop


def _scale_queries(query_QD: Tensor) -> PartQueries:
    """Return the columns, scaled by powers of two to norms below 1 if the norm of one is extreme.

    The inner product of such a query and a stored row, which has numbers up to 2^15, can leave the range of float32
    although their score is in it.
    """
    norm_Q1 = np.linalg.norm(query_QD.numpy().astype(np.float64), axis=1, keepdims=True)
    exponent_Q1 = np.frexp(norm_Q1)[1]
    exponent_Q1[np.abs(exponent_Q1) <= _SAFE_EXPONENT] = 0
    if not exponent_Q1.any():
        return PartQueries(torch.from_numpy(np.ascontiguousarray(query_QD.numpy())), None)
    scaled_QD = np.ldexp(query_QD.numpy(), -exponent_Q1)
    return PartQueries(torch.from_numpy(scaled_QD), torch.from_numpy(np.ldexp(1.0, exponent_Q1)))


def _invert_norms(rows_BD: Tensor) -> list[Tensor]:
    """Return the factor that divides an inner product by the norm of its row; 0 for a zero row."""
    # Less than the limit, at which PyTorch uses several threads for a reduction.
    few = max(1, (_SERIAL_NUMBERS - 1) // rows_BD.shape[1])
    return [_invert(torch.cat([torch.linalg.vector_norm(some_BD, dim=1) for some_BD in torch.split(rows_BD, few)]))]


def _invert(norm_B: Tensor) -> Tensor:
    """Return the reciprocals; 0 for 0."""
    return norm_B.reciprocal().masked_fill_(norm_B == 0, 0.0)


def _compute_powers(exponent_B: npt.NDArray[np.int16]) -> list[Tensor]:
    """Return the powers of two of these exponents: two factors if a power is not a normal float32."""
    biased_B = exponent_B.astype(np.int32)
    biased_B += _EXPONENT_BIAS
    # As unsigned numbers, negative ones are large: one pass checks both limits.
    if not len(biased_B) or (biased_B - 1).view(np.uint32).max() < _LARGEST_BIASED:
        return [_as_powers(biased_B)]
    first_B = biased_B.clip(1, _LARGEST_BIASED)
    return [_as_powers(first_B), _as_powers((biased_B - first_B + _EXPONENT_BIAS).clip(1, _LARGEST_BIASED))]


def _as_powers(biased_B: npt.NDArray[np.int32]) -> Tensor:
    """Return float32 numbers with these biased exponents, which must be those of normal numbers."""
    return torch.from_numpy((biased_B << _FRACTION_BITS).view(np.float32))
