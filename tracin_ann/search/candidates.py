"""Inner products of queries and their candidates: rows that are read by their ids, each once for all queries.

Many rows are read in their stored format, few at a time, and converted in a buffer of each thread: the system takes
longer to provide new memory than to read the rows. Few rows are decoded completely, because a store can keep them for
the scores of the results (`FeatureStore.remember_taken`).

Shapes: Q queries, M candidates of each, P pairs of a query and a row, U different rows, F feature dimension.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tracin_ann.search.stored_parts import (
    PartBuffer,
    PartQueries,
    SplitQueries,
    is_half,
    measure_factors,
    split_rows,
)
from tracin_ann.search.threads import one_openmp_thread, open_threads
from tracin_ann.types import CodedPart, Float32, Float64, Int64, RowSource, StoredCandidates, StoredPart

_ROWS_AT_ONCE, _NUMBERS_AT_ONCE = 2048, 2**23
"""The most rows, and numbers, that a thread reads at a time."""
_LARGEST_BITS = 63
_NUMBERS_OF_ONE_THREAD = 2**20
"""Up to this many numbers are read by the calling thread: waking others would take longer."""


def score_candidates(source: RowSource, queries_QF: Float32, ids_QM: Int64) -> Float32:
    """Return the inner products [Q, M] of queries and the rows with these ids; 0 for negative ids, which are padding.

    Raises:
        KeyError: the source has no row with one of the ids.
    """
    pairs, multiply = _Pairs.sort(ids_QM), _Multiplier(queries_QF)
    score_P = np.zeros(ids_QM.size, np.float32)

    def write(rows: slice, parts: Iterable[StoredPart | CodedPart]) -> None:
        pair_P, place_P = pairs.select(rows)
        with np.errstate(over="ignore", invalid="ignore"):
            score_P[pair_P] = multiply(parts, place_P, pair_P // ids_QM.shape[1])

    def read(rows: slice) -> None:
        id_B = pairs.id_U[rows]
        write(rows, source.take_stored(id_B) if isinstance(source, StoredCandidates) else _wrap(source.take(id_B)))

    n_rows = len(pairs.id_U)
    if n_rows * source.dim <= _NUMBERS_OF_ONE_THREAD:
        with one_openmp_thread():
            write(slice(0, n_rows), _wrap(source.take(pairs.id_U)))
    else:
        step = max(1, min(_ROWS_AT_ONCE, _NUMBERS_AT_ONCE // source.dim))
        for _ in open_threads().map(read, [slice(at, at + step) for at in range(0, n_rows, step)]):
            pass
    return score_P.reshape(ids_QM.shape)


@dataclass(frozen=True)
class _Pairs:
    """The pairs of a query and a row in the order of the rows.

    Attributes:
        id_U: int64 ids of the rows, increasing, without those of padding.
        start_U1: int64 place of the first pair of each row in `pair_P`, and the number of pairs.
        pair_P: int64 place of each pair among the flattened ids.
    """

    id_U: Int64
    start_U1: Int64
    pair_P: Int64

    @classmethod
    def sort(cls, ids_QM: Int64) -> _Pairs:
        """Return the pairs of padded ids."""
        id_P, order_P = _sort_ids(ids_QM.ravel())
        n_padding = int(np.searchsorted(id_P, 0))
        id_P, order_P = id_P[n_padding:], order_P[n_padding:]
        start_U = np.concatenate([np.zeros(min(len(id_P), 1), np.int64), np.flatnonzero(id_P[1:] != id_P[:-1]) + 1])
        return cls(id_P[start_U], np.append(start_U, len(id_P)), order_P)

    def select(self, rows: slice) -> tuple[Int64, Int64]:
        """Return the pairs of some rows: their places among the flattened ids, and those of their rows among these."""
        start_U1 = self.start_U1[rows.start : rows.stop + 1]
        place_P = np.repeat(np.arange(len(start_U1) - 1), np.diff(start_U1))
        return self.pair_P[start_U1[0] : start_U1[-1]], place_P


def _sort_ids(id_P: Int64) -> tuple[Int64, Int64]:
    """Return ids in increasing order, and their places.

    NumPy sorts numbers in a third of the time that it takes to sort their places. If ids and places have at most 63
    bits together, they are sorted as one number.
    """
    n_bits = max(1, len(id_P) - 1).bit_length()
    if int(id_P.max(initial=0)).bit_length() + n_bits > _LARGEST_BITS:
        order_P = np.argsort(id_P)
        return id_P[order_P], order_P
    key_P = id_P << n_bits
    key_P |= np.arange(len(id_P))
    key_P.sort()
    return key_P >> n_bits, key_P & ((1 << n_bits) - 1)


class _Multiplier:
    """Inner products of pairs of rows and queries; several threads can use it."""

    def __init__(self, queries_QF: Float32) -> None:
        """Store the queries."""
        self._queries, self._buffer = SplitQueries(torch.from_numpy(np.ascontiguousarray(queries_QF))), PartBuffer()

    def __call__(self, parts: Iterable[StoredPart | CodedPart], place_P: Int64, query_P: Int64) -> Float64:
        """Return the inner products [P] of rows, whose columns are in the parts, and queries at these places."""
        score_P = np.zeros(len(place_P))
        for part, queries in self._queries.match(parts):
            product_P = self._multiply_part(part, queries, place_P, query_P)
            score_P += product_P if queries.power_Q1 is None else product_P * queries.power_Q1[:, 0].numpy()[query_P]
        return score_P

    def _multiply_part(
        self, part: StoredPart | CodedPart, queries: PartQueries, place_P: Int64, query_P: Int64
    ) -> Float64:
        """Return the inner products [P] of the columns in one part."""
        n_rows = len(part.exponent_B)
        if len(queries.query_QD) == 1 and is_half(part):
            product_B = queries.scanners[0].multiply(part.stored_BD).astype(np.float64)
            return _multiply(product_B, measure_factors(part, slice(0, n_rows)))[place_P]
        product_P = np.empty(len(place_P))
        for rows, _ in split_rows(part, slice(0, n_rows), 1):
            factors = self._buffer.load(part, rows)
            own = slice(*np.searchsorted(place_P, [rows.start, rows.stop]))
            own_P = place_P[own] - rows.start
            products = self._buffer.multiply_pairs(queries.query_QD, own_P, query_P[own]).astype(np.float64)
            product_P[own] = _multiply(products, [factor_B[torch.from_numpy(own_P)] for factor_B in factors])
        return product_P


def _multiply(product_X: Float64, factors: Sequence[torch.Tensor]) -> Float64:
    """Multiply products by factors, in place, and return them."""
    for factor_X in factors:
        product_X *= factor_X.numpy()
    return product_X


def _wrap(row_BF: Float32) -> list[StoredPart]:
    """Return decoded rows as a single part."""
    return [StoredPart(row_BF, np.zeros(len(row_BF), np.int16))]
