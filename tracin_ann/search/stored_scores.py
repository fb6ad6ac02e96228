"""Inner products of queries with rows in their stored format, in float32, without a decoded copy of the rows.

Codes are converted to float32 levels in a buffer, too, and the factors of the rows multiply the inner products.
float16 rows are converted to float32 in registers, for up to eight queries, or else in a buffer that stays in the
cache. Their exponents, or norms, multiply the inner products instead of the rows, so a scan for few queries reads the
stored rows once and writes only scores.

Several threads score blocks of rows at the same time, and each operation runs in the thread that calls it. Threads of
OpenMP wait for each other at the end of each operation, for milliseconds if another process uses one of the cores, and
a scan has several operations per block. PyTorch uses one thread for up to `_SERIAL_NUMBERS` numbers.

Shapes: Q queries, B rows of a block, F feature dimension, D columns of a part.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tracin_ann.device import import_faiss
from tracin_ann.search.half_scanner import HalfScanner, measure_squares, share_memory
from tracin_ann.types import CodedPart, Int64, StoredPart

_BUFFER_NUMBERS = 1 << 18
"""float32 numbers of the buffer of converted rows of a thread: 1 MiB."""
_SERIAL_NUMBERS = 1 << 15
"""PyTorch uses one thread for an elementwise operation of up to this number of elements."""
_QUERIES_AT_ONCE = 64
_SCANNED_QUERIES = 8
"""Up to this number, `HalfScanner` is faster than a conversion and a matrix product."""
_ROWS_AT_ONCE = 2048
"""Rows of a block that a thread multiplies at a time; it scans complete blocks."""
_PENDING = 3
"""Blocks for each thread that are started before one must be finished."""
_SAFE_EXPONENT = 64
_EXPONENT_BIAS, _LARGEST_BIASED, _FRACTION_BITS = 127, 254, 23
_ONE = torch.ones(1, dtype=torch.float32)


class StoredScorer:
    """Inner products of some queries with blocks of stored rows, by several threads.

    A context manager, which ends the threads.
    """

    def __init__(self, queries_QF: Tensor, n_threads: int | None = None) -> None:
        """Store the float32 queries [Q, F], on the CPU; without `n_threads`, there are as many as PyTorch uses."""
        self._queries_QF = queries_QF
        self._scaled: dict[int, _PartQueries] = {}
        self._product = _Product()
        self._is_scan = len(queries_QF) <= _SCANNED_QUERIES
        self._n_threads = n_threads or torch.get_num_threads()
        self._threads = ThreadPoolExecutor(self._n_threads, "tracin-scan", use_one_thread)
        self._pending: deque[Future[None]] = deque()

    def __enter__(self) -> StoredScorer:
        """Return the scorer."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the threads."""
        self._threads.shutdown(cancel_futures=True)

    def start(self, parts: Sequence[StoredPart | CodedPart], where_A: Int64 | None, out_QA: Tensor) -> None:
        """Start to write the inner products of the queries and rows that the parts form together.

        Args:
            parts: the columns of the rows.
            where_A: the positions of some rows, increasing; None: all rows.
            out_QA: the inner products with these rows.
        """
        n_rows = len(parts[0].exponent_B)
        step = n_rows if self._is_scan else _ROWS_AT_ONCE
        for at in range(0, n_rows, step):
            rows = slice(at, at + step)
            if where_A is None:
                self._submit(self._score, parts, rows, out_QA[:, rows])
                continue
            first, last = np.searchsorted(where_A, [at, at + step])
            if first < last:
                self._submit(self._score_some, parts, rows, where_A[first:last] - at, out_QA[:, first:last])

    def _submit(self, function: Callable[..., None], *args: object) -> None:
        # A limit, because parts can be decoded copies of rows.
        if len(self._pending) >= _PENDING * self._n_threads:
            self._pending.popleft().result()
        self._pending.append(self._threads.submit(function, *args))

    def finish(self) -> None:
        """Wait until all inner products are written."""
        while self._pending:
            self._pending.popleft().result()

    def _score(self, parts: Sequence[StoredPart | CodedPart], rows: slice, out_QB: Tensor) -> None:
        """Write the inner products of the queries and some rows of the parts."""
        start = 0
        for whole in parts:
            stop = start + (whole.stored_BD.shape[1] if isinstance(whole, StoredPart) else whole.dim)
            if start not in self._scaled:
                self._scaled[start] = _scale(self._queries_QF[:, start:stop])
            queries, is_first = self._scaled[start], start == 0
            start = stop
            if not isinstance(whole, StoredPart):
                self._multiply_codes(whole, rows, queries, out_QB, is_first=is_first)
                continue
            part = StoredPart(whole.stored_BD[rows], whole.exponent_B[rows], whole.unit)
            if self._is_scan and part.stored_BD.dtype == np.float16:
                _scan_part(part, queries, out_QB, is_first=is_first)
            else:
                self._multiply_part(part, queries, out_QB, is_first=is_first)

    def _score_some(self, parts: Sequence[StoredPart | CodedPart], rows: slice, where_A: Int64, out_QA: Tensor) -> None:
        """Write the inner products of the queries and the rows at these positions of some rows of the parts."""
        scores_QB = torch.empty(len(out_QA), len(parts[0].exponent_B[rows]), dtype=torch.float32)
        self._score(parts, rows, scores_QB)
        np.take(scores_QB.numpy(), where_A, axis=1, out=out_QA.numpy(), mode="clip")

    def _multiply_part(self, part: StoredPart, queries: _PartQueries, out_QB: Tensor, *, is_first: bool) -> None:
        """Add the inner products with one part to `out_QB`, or write them there for the first part."""
        n_rows, dim = part.stored_BD.shape
        stored_BD = torch.from_numpy(share_memory(part.stored_BD))
        powers = [] if part.unit else _compute_powers(part.exponent_B)
        for rows in _split_rows(n_rows, dim, len(out_QB)):
            self._product.convert(stored_BD[rows])
            factors = _invert_norms(self._product.rows_BD) if part.unit else [power_B[rows] for power_B in powers]
            self._multiply_rows(queries, factors, out_QB[:, rows], is_first=is_first)

    def _multiply_codes(
        self, part: CodedPart, rows: slice, queries: _PartQueries, out_QB: Tensor, *, is_first: bool
    ) -> None:
        """Add the inner products with some rows of one part to `out_QB`, or write them there for the first part."""
        exponent_B = part.exponent_B[rows]
        powers, factor_B = _compute_powers(exponent_B), torch.from_numpy(part.read_factors(rows))
        for some in _split_rows(len(exponent_B), part.dim, len(out_QB)):
            self._product.decode(part, slice(rows.start + some.start, rows.start + some.stop))
            factors = [factor_B[some], *(power_B[some] for power_B in powers)]
            self._multiply_rows(queries, factors, out_QB[:, some], is_first=is_first)

    def _multiply_rows(
        self, queries: _PartQueries, factors: Sequence[Tensor], out_QB: Tensor, *, is_first: bool
    ) -> None:
        """Add the inner products with the rows of `_product`, times factors, to `out_QB`, or write them there."""
        for first in range(0, len(out_QB), _QUERIES_AT_ONCE):
            some = slice(first, first + _QUERIES_AT_ONCE)
            power_Q1 = None if queries.power_Q1 is None else queries.power_Q1[some]
            some_QB = self._product.multiply(queries.query_QD[some])
            _accumulate(some_QB, power_Q1, factors, out_QB[some], is_first=is_first)


def use_one_thread() -> None:
    """Set the number of OpenMP threads to 1, for parallel regions that the calling thread starts.

    FAISS and PyTorch can share one OpenMP library. PyTorch's first operation in a thread sets the number to that of
    `torch.set_num_threads`, if it was called; so it is made to do this before.
    """
    torch.get_num_threads()
    import_faiss().omp_set_num_threads(1)


class _Product(threading.local):
    """Rows converted to float32, and their inner products by FAISS's `LinearTransform`; own memory in each thread.

    Unlike products by PyTorch and NumPy, those by FAISS can be restricted to the calling thread.
    """

    def __init__(self) -> None:
        self._transform = import_faiss().LinearTransform(0, 0, False)
        self._transform.is_trained = True
        self.rows_BD = torch.empty(0, 0, dtype=torch.float32)

    def convert(self, stored_BD: Tensor) -> None:
        """Convert the rows, which replace the last ones."""
        self._resize(*stored_BD.shape)
        own_N, stored_N = self.rows_BD.view(-1), stored_BD.reshape(-1)
        for at in range(0, len(own_N), _SERIAL_NUMBERS):
            own_N[at : at + _SERIAL_NUMBERS].copy_(stored_N[at : at + _SERIAL_NUMBERS])

    def decode(self, part: CodedPart, rows: slice) -> None:
        """Decode the levels of some rows, which replace the last ones."""
        self._resize(rows.stop - rows.start, part.dim)
        part.decode(rows, self.rows_BD.numpy())

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


def _split_rows(n_rows: int, dim: int, n_queries: int) -> Iterator[slice]:
    """Yield the rows that are converted and multiplied at a time."""
    n_queries = min(n_queries, _QUERIES_AT_ONCE)
    step = max(1, min(_BUFFER_NUMBERS // dim, _SERIAL_NUMBERS // n_queries))
    for start in range(0, n_rows, step):
        yield slice(start, min(start + step, n_rows))


def _scan_part(part: StoredPart, queries: _PartQueries, out_QB: Tensor, *, is_first: bool) -> None:
    """Add the inner products with one part to `out_QB`, or write them there for the first part."""
    if part.unit:
        factors = [_invert(torch.from_numpy(measure_squares(part.stored_BD)).sqrt_())]
    else:
        factors = _compute_powers(part.exponent_B)
    for q, scanner in enumerate(queries.scanners):
        product_1B = torch.from_numpy(scanner.multiply(part.stored_BD))[None]
        power_11 = None if queries.power_Q1 is None else queries.power_Q1[q : q + 1]
        _accumulate(product_1B, power_11, factors, out_QB[q : q + 1], is_first=is_first)


@dataclass(frozen=True)
class _PartQueries:
    """The queries' columns of a part: `query_QD`, times `power_Q1` (float64) if it is not None."""

    query_QD: Tensor
    power_Q1: Tensor | None

    @cached_property
    def scanners(self) -> list[HalfScanner]:
        """Return a scanner for each query."""
        return [HalfScanner(query_D) for query_D in self.query_QD.numpy()]


def _accumulate(
    product_QB: Tensor, power_Q1: Tensor | None, factors: Sequence[Tensor], out_QB: Tensor, *, is_first: bool
) -> None:
    """Multiply the products by all factors, and add them to `out_QB`, or write them there if they are the first."""
    *others, factor_B = factors
    if power_Q1 is not None:
        product_QB = product_QB.double().mul_(power_Q1)
        others, factor_B = list(factors), _ONE
    for other_B in others:
        product_QB *= other_B
    if is_first:
        torch.mul(product_QB.float(), factor_B, out=out_QB)
    else:
        out_QB.addcmul_(product_QB.float(), factor_B)


def _scale(query_QD: Tensor) -> _PartQueries:
    """Return the columns, scaled by powers of two to norms below 1 if the norm of one is extreme.

    The inner product of such a query and a stored row, which has numbers up to 2^15, can leave the range of float32
    although their score is in it.
    """
    norm_Q1 = np.linalg.norm(query_QD.numpy().astype(np.float64), axis=1, keepdims=True)
    exponent_Q1 = np.frexp(norm_Q1)[1]
    exponent_Q1[np.abs(exponent_Q1) <= _SAFE_EXPONENT] = 0
    if not exponent_Q1.any():
        return _PartQueries(torch.from_numpy(np.ascontiguousarray(query_QD.numpy())), None)
    scaled_QD = np.ldexp(query_QD.numpy(), -exponent_Q1)
    return _PartQueries(torch.from_numpy(scaled_QD), torch.from_numpy(np.ldexp(1.0, exponent_Q1)))


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
