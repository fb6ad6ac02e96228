"""Inner products of queries with rows in their stored format, in float32, without a decoded copy of the rows.

Codes are converted to float32 levels in a buffer, too, and the factors of the rows multiply the inner products.
float16 rows are converted to float32 in registers, for up to eight queries, or else in a buffer that stays in the
cache. Their exponents, or norms, multiply the inner products instead of the rows, so a scan for few queries reads the
stored rows once and writes only scores.

Several threads score blocks of rows at the same time, and each operation runs in the thread that calls it. Threads of
OpenMP wait for each other at the end of each operation, for milliseconds if another process uses one of the cores, and
a scan has several operations per block. See `stored_parts` for the conversion.

Shapes: Q queries, B rows of a block, F feature dimension, D columns of a part.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

import numpy as np
import torch
from torch import Tensor

from tracin_ann.search.stored_parts import (
    QUERIES_AT_ONCE,
    PartBuffer,
    PartQueries,
    SplitQueries,
    is_half,
    measure_factors,
    split_rows,
)
from tracin_ann.search.threads import open_threads, use_one_thread
from tracin_ann.types import CodedPart, Int64, StoredPart

_SCANNED_QUERIES = 8
"""Up to this number, `HalfScanner` is faster than a conversion and a matrix product."""
_ROWS_AT_ONCE = 2048
"""Rows of a block that a thread multiplies at a time; it scans complete blocks."""
_PENDING = 3
"""Blocks for each thread that are started before one must be finished."""
_ONE = torch.ones(1, dtype=torch.float32)


class StoredScorer:
    """Inner products of some queries with blocks of stored rows, by several threads.

    A context manager, which ends what is not finished.
    """

    def __init__(self, queries_QF: Tensor, n_threads: int | None = None) -> None:
        """Store the float32 queries [Q, F], on the CPU, and start threads; without `n_threads`, use the shared ones."""
        self._queries = SplitQueries(queries_QF)
        self._buffer = PartBuffer()
        self._is_scan = len(queries_QF) <= _SCANNED_QUERIES
        self._n_threads = n_threads or torch.get_num_threads()
        self._own = None if n_threads is None else ThreadPoolExecutor(n_threads, "tracin-scan", use_one_thread)
        self._threads = self._own or open_threads()
        self._pending: deque[Future[None]] = deque()

    def __enter__(self) -> StoredScorer:
        """Return the scorer."""
        return self

    def __exit__(self, *_: object) -> None:
        """End what is not finished, and own threads."""
        for started in self._pending:
            started.cancel()
        wait(self._pending)
        if self._own is not None:
            self._own.shutdown()

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
        for number, (part, queries) in enumerate(self._queries.match(parts)):
            is_first = number == 0
            if self._is_scan and is_half(part):
                _scan_part(part, rows, queries, out_QB, is_first=is_first)
            else:
                self._multiply_part(part, rows, queries, out_QB, is_first=is_first)

    def _score_some(self, parts: Sequence[StoredPart | CodedPart], rows: slice, where_A: Int64, out_QA: Tensor) -> None:
        """Write the inner products of the queries and the rows at these positions of some rows of the parts."""
        scores_QB = torch.empty(len(out_QA), len(parts[0].exponent_B[rows]), dtype=torch.float32)
        self._score(parts, rows, scores_QB)
        np.take(scores_QB.numpy(), where_A, axis=1, out=out_QA.numpy(), mode="clip")

    def _multiply_part(
        self, part: StoredPart | CodedPart, rows: slice, queries: PartQueries, out_QB: Tensor, *, is_first: bool
    ) -> None:
        """Add the inner products with some rows of one part to `out_QB`, or write them there for the first part."""
        for some, part_rows in split_rows(part, rows, len(out_QB)):
            factors = self._buffer.load(part, part_rows)
            self._multiply_rows(queries, factors, out_QB[:, some], is_first=is_first)

    def _multiply_rows(
        self, queries: PartQueries, factors: Sequence[Tensor], out_QB: Tensor, *, is_first: bool
    ) -> None:
        """Add the inner products with the rows of `_buffer`, times factors, to `out_QB`, or write them there."""
        for first in range(0, len(out_QB), QUERIES_AT_ONCE):
            some = slice(first, first + QUERIES_AT_ONCE)
            power_Q1 = None if queries.power_Q1 is None else queries.power_Q1[some]
            some_QB = self._buffer.multiply(queries.query_QD[some])
            _accumulate(some_QB, power_Q1, factors, out_QB[some], is_first=is_first)


def _scan_part(part: StoredPart, rows: slice, queries: PartQueries, out_QB: Tensor, *, is_first: bool) -> None:
    """Add the inner products with some rows of one part to `out_QB`, or write them there for the first part."""
    factors = measure_factors(part, rows)
    for q, scanner in enumerate(queries.scanners):
        product_1B = torch.from_numpy(scanner.multiply(part.stored_BD[rows]))[None]
        power_11 = None if queries.power_Q1 is None else queries.power_Q1[q : q + 1]
        _accumulate(product_1B, power_11, factors, out_QB[q : q + 1], is_first=is_first)


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
