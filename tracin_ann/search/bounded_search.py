"""The search of a batch of queries by bounds: which rows are scored, and the best of them.

A score goes through three steps: an upper bound from the reduced row; the float32 inner product with the row, if the
bound reaches the k-th best score; the float64 inner product, if the float32 one reaches it with its largest error.

Queries are scaled to norms below 1. The *floor* of a signed query is a number below its k-th best score: rows with
smaller scores are not among the results, also after rounding to float32.

Shapes: N rows, M rows of a search, B rows of a block, U rows that are read together, Q queries, O queries that are not
finished, A signed queries (all queries for the first sign, then all for the second one), P pairs of a signed query and
a row, K results, F feature dimension, R reduced dimension.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tracin_ann.device import import_faiss
from tracin_ann.errors import DamagedIndexError, problem
from tracin_ann.files import share_memory
from tracin_ann.search.bounds import ReducedQueries, ReducedRows, bound_product_error, round_down, round_up
from tracin_ann.search.flat import FlatIndex, Sign, check_finite
from tracin_ann.search.stored_scores import StoredScorer
from tracin_ann.types import Float32, Float64, Int64, TopK

Bool = npt.NDArray[np.bool_]
Int32 = npt.NDArray[np.int32]

_FIRST_ROWS = 4096
_SCORES_AT_ONCE = 2**22
"""Entries of the Q × B reduced scores of a block."""
_MOST_PAIRS = 2**22
"""Pairs that may wait to be scored. All rows are scanned for the queries with most of the others."""
_SCANNED_SCORES_AT_ONCE = 2**24
_ROWS_READ_AT_ONCE = 8192
_WIDE_PAIRS_AT_ONCE = 128
_MORE_FIRST = 22
"""The rows of the best reduced scores of a block are scored first: k, and this number more."""
_FEW_SHARE = 1 / 32


@dataclass(frozen=True)
class SearchedRows:
    """The rows of a search: all rows, or those that a filter allows.

    Attributes:
        scan: the scan of these rows.
        rows: all reduced rows, by decreasing norm.
        place_M: the positions of these rows among the reduced rows, by increasing id.
        sorted_M: the same positions in increasing order; None: all positions.
    """

    scan: FlatIndex
    rows: ReducedRows
    place_M: Int64
    sorted_M: Int64 | None

    def __len__(self) -> int:
        """Return M."""
        return len(self.place_M)

    def locate(self, part: slice) -> Int64:
        """Return the positions of these rows by decreasing norm."""
        return np.arange(part.start, part.stop) if self.sorted_M is None else self.sorted_M[part]

    def select(self, part: slice) -> ReducedRows:
        """Return these reduced rows by decreasing norm."""
        return self.rows.select(part if self.sorted_M is None else self.sorted_M[part])

    def sort_norms(self) -> Float32:
        """Return the norms in increasing order."""
        norm_M = self.rows.norm_N if self.sorted_M is None else self.rows.norm_N[self.sorted_M]
        return np.ascontiguousarray(norm_M[::-1])


@dataclass(frozen=True)
class _Pairs:
    """Pairs of a signed query and a row.

    Attributes:
        signed_P: int32 number of the signed query.
        place_P: int32 position of the row among the reduced rows.
        bound_P: float32 upper bound of the sign times the score.
    """

    signed_P: Int32
    place_P: Int32
    bound_P: Float32

    @classmethod
    def join(cls, parts: Sequence[_Pairs]) -> _Pairs:
        """Return all pairs."""
        none = cls(np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.float32))
        columns = ([getattr(part, name) for part in [none, *parts]] for name in cls.__dataclass_fields__)
        return cls(*map(np.concatenate, columns))

    def select(self, which: Bool | Int64) -> _Pairs:
        """Return some of the pairs."""
        return _Pairs(*(getattr(self, name)[which] for name in self.__dataclass_fields__))

    def drop(self, which_P: Int64) -> _Pairs:
        """Return the pairs without those at some positions."""
        kept_P = np.ones(len(self.signed_P), bool)
        kept_P[which_P] = False
        return self.select(kept_P)


class BatchSearch:
    """The rows of largest sign × inner product with some queries, for each sign."""

    def __init__(
        self,
        searched: SearchedRows,
        queries: ReducedQueries,
        exponent_Q: Int64,
        k: int,
        signs: Sequence[Sign],
    ) -> None:
        """Store the arguments. The queries are scaled by 2^−`exponent_Q`."""
        self._searched, self._queries, self._k, self._signs = searched, queries, k, signs
        self._n_queries = len(exponent_Q)
        n_signed = len(signs) * self._n_queries
        self._sign_A = np.repeat(np.array(signs, np.float64), self._n_queries)
        self._exponent_A, self._norm_A = np.tile(exponent_Q, len(signs)), np.tile(queries.norm_Q, len(signs))
        self._floor_A = np.full(n_signed, -np.inf)
        self._lower_AK = np.full((n_signed, k), -np.inf)
        """Lower bounds of the best scores so far."""
        self._candidates: list[_Pairs] = []
        self._is_scanned_A = np.zeros(n_signed, bool)
        self._count_A = np.zeros(n_signed, np.int64)
        self._ids, self._scores = [np.zeros(0, np.int64)] * n_signed, [np.zeros(0, np.float32)] * n_signed

    def score_bounded(self, most: int, n_threads: int) -> None:
        """Find the results of signed queries for which at most `most` rows are left.

        Other operations than the products with reduced rows use one thread, if `use_one_thread` was called.
        """
        left = self._scan_reduced(most, n_threads)
        self._score(left.signed_P, left.place_P)
        # A scan adds the rows that were scored before once more.
        self._candidates = [pairs.select(~self._is_scanned_A[pairs.signed_P]) for pairs in self._candidates]
        self._lower_AK[self._is_scanned_A] = -np.inf
        self._rank()

    def finish(self) -> list[TopK]:
        """Return the results for each sign, after a scan of all rows for the other signed queries."""
        scanned_Q = np.flatnonzero(self._is_scanned_A.reshape(len(self._signs), -1).any(axis=0))
        at_once = max(1, _SCANNED_SCORES_AT_ONCE // max(1, len(self._searched)))
        for at in range(0, len(scanned_Q), at_once):
            self._scan(scanned_Q[at : at + at_once])
            self._rank()
        sides = (slice(at, at + self._n_queries) for at in range(0, len(self._ids), self._n_queries))
        return [TopK(tuple(self._ids[side]), tuple(self._scores[side]), self._count_A[side]) for side in sides]

    def _scan_reduced(self, most: int, n_threads: int) -> _Pairs:
        """Return the pairs whose bounds reach the floors and that are not scored; find the queries with too many."""
        left, is_scanned_A = _Pairs.join([]), self._is_scanned_A
        norm_M = self._searched.sort_norms()
        start, stop = 0, max(_FIRST_ROWS, self._k)
        while True:
            reach_A = len(norm_M) - np.searchsorted(norm_M, self._find_least_norms())
            is_open_A = ~is_scanned_A & (reach_A > start)
            if not is_open_A.any():
                return left
            stop = min(stop, int(reach_A[is_open_A].max()))
            found, value_P = self._bound(is_open_A, slice(start, stop), n_threads)
            first_P = np.flatnonzero(value_P >= self._floor_A[found.signed_P])
            rank_P = _rank_in_groups(found.signed_P[first_P], value_P[first_P])
            first_P = first_P[rank_P < self._n_first]
            self._score(found.signed_P[first_P], found.place_P[first_P])
            left = _Pairs.join([left, found.drop(first_P)])
            left = left.select(~(left.bound_P < self._floor_A[left.signed_P]))
            is_scanned_A |= _find_largest(np.bincount(left.signed_P, minlength=len(is_scanned_A)), most)
            left = left.select(~is_scanned_A[left.signed_P])
            start, stop = stop, stop + max(1, _SCORES_AT_ONCE // self._n_queries)

    def _find_least_norms(self) -> Float32:
        """Return the norms [A] below which rows cannot reach the floors."""
        least_A = np.zeros(len(self._floor_A))
        np.divide(self._floor_A, self._norm_A, out=least_A, where=self._floor_A > 0)
        return round_down(least_A)

    def _bound(self, is_open_A: Bool, part: slice, n_threads: int) -> tuple[_Pairs, Float32]:
        """Return the pairs of open queries and a block of rows whose bounds reach the floors, and sign × p̂·x̂.

        The floors are unknown at the first block: the rows of its best reduced scores are scored before.
        """
        open_O = np.flatnonzero(is_open_A.reshape(len(self._signs), -1).any(axis=0))
        block, place_B = self._searched.select(part), self._searched.locate(part)
        queries = self._queries.select(open_O)
        score_OB = torch.empty(len(open_O), len(block))
        with StoredScorer(torch.from_numpy(queries.reduced_QR), n_threads) as scorer:
            scorer.start([block.part], None, score_OB)
            scorer.finish()
        first: list[Tensor] = []
        if part.start == 0:
            n_first = min(self._n_first, len(block))
            first = [torch.topk(sign * score_OB, n_first).indices for sign in self._signs]
            signed_OF = np.arange(len(self._norm_A)).repeat(n_first)
            self._score(signed_OF, place_B[torch.cat(first).numpy().reshape(-1)])
        margin_OB = torch.from_numpy(queries.whole_Q)[:, None] * torch.from_numpy(block.rounding_N)
        margin_OB.addcmul_(torch.from_numpy(queries.missing_Q)[:, None], torch.from_numpy(block.missing_N))
        found, values = [], [np.zeros(0, np.float32)]
        for side, sign in enumerate(self._signs):
            signed_O = side * self._n_queries + open_O
            bound_OB = torch.add(margin_OB, score_OB, alpha=sign)
            floor_O = torch.from_numpy(round_down(np.where(is_open_A[signed_O], self._floor_A[signed_O], np.inf)))
            # Not `ge`: a bound that is NaN excludes no row.
            reaches_OB = bound_OB.lt(floor_O[:, None]).logical_not_()
            if first:
                reaches_OB.scatter_(1, first[side], False)
            flat_P = np.flatnonzero(reaches_OB.numpy())
            query_P, row_P = np.divmod(flat_P, len(block))
            signed_P: Int32 = signed_O[query_P].astype(np.int32)
            place_P: Int32 = place_B[row_P].astype(np.int32)
            found.append(_Pairs(signed_P, place_P, bound_OB.numpy().reshape(-1)[flat_P]))
            values.append(np.float32(sign) * score_OB.numpy().reshape(-1)[flat_P])
        return _Pairs.join(found), np.concatenate(values)

    def _score(self, signed_P: Int64 | Int32, place_P: Int64 | Int32) -> None:
        """Compute the inner products of pairs in float32, and add them to the candidates."""
        query_P = (signed_P % self._n_queries).astype(np.int64)
        for part_P, row_P, rows_UF in self._read_rows(place_P):
            product_P = np.empty(len(part_P), np.float32)
            # All arrays must exist until the function returns.
            arrays = self._queries.query_QF, query_P[part_P], share_memory(rows_UF), row_P, product_P
            faiss, n_pairs = import_faiss(), len(part_P)
            faiss.pairwise_indexed_inner_product(rows_UF.shape[1], n_pairs, *map(faiss.swig_ptr, arrays))
            self._add(signed_P[part_P], place_P[part_P], product_P)
        self._count_A += np.bincount(signed_P, minlength=len(self._count_A))

    def _scan(self, asked_Q: Int64) -> None:
        """Add the inner products of these queries and all rows to the candidates, for the signs to be scanned."""
        done = 0
        for ids_B, score_QB in self._searched.scan.iter_scores(torch.from_numpy(self._queries.query_QF[asked_Q])):
            place_B = self._searched.place_M[done : done + len(ids_B)]
            done += len(ids_B)
            for query, score_B in zip(asked_Q, score_QB.cpu().numpy(), strict=True):
                for signed in range(query, len(self._norm_A), self._n_queries):
                    if self._is_scanned_A[signed]:
                        self._add(np.full(len(ids_B), signed), place_B, score_B)
        is_asked_A = np.isin(np.arange(len(self._norm_A)) % self._n_queries, asked_Q)
        self._count_A[is_asked_A & self._is_scanned_A] += len(self._searched)

    def _add(self, signed_P: Int64 | Int32, place_P: Int64 | Int32, product_P: Float32) -> None:
        """Add the pairs whose float32 inner products reach the floors to the candidates, and raise the floors."""
        value_P = self._sign_A[signed_P] * product_P
        error_P = bound_product_error(
            self._queries.query_QF.shape[1], self._norm_A[signed_P], self._searched.rows.norm_N[place_P]
        )
        # Not `>=`: a score that is not a number remains a candidate, and is reported.
        reaches_P = ~(value_P + error_P < self._floor_A[signed_P])
        signed_P, place_P = signed_P[reaches_P], place_P[reaches_P]
        bound_P, lower_P = round_up(value_P + error_P)[reaches_P], (value_P - error_P)[reaches_P]
        lower_P[np.isnan(lower_P)] = -np.inf
        self._candidates.append(_Pairs(signed_P.astype(np.int32), place_P.astype(np.int32), bound_P))
        best_A, at_P = np.unique(signed_P, return_inverse=True)
        rank_P = _rank_in_groups(at_P, lower_P)
        lower_AK = np.full((len(best_A), self._k), -np.inf)
        is_best_P = rank_P < self._k
        lower_AK[at_P[is_best_P], rank_P[is_best_P]] = lower_P[is_best_P]
        lower_AK = np.concatenate([self._lower_AK[best_A], lower_AK], axis=1)
        lower_AK = np.partition(lower_AK, self._k, axis=1)[:, self._k :]
        self._lower_AK[best_A] = lower_AK
        # The largest float32 score below that of the lower bound: equal scores after rounding are not below the floor.
        exponent_A = self._exponent_A[best_A]
        below_A = np.nextafter(round_down(np.ldexp(lower_AK.min(axis=1), exponent_A)), np.float32(-np.inf))
        floor_A = np.ldexp(below_A.astype(np.float64), -exponent_A)
        self._floor_A[best_A] = np.maximum(self._floor_A[best_A], floor_A)

    def _rank(self) -> None:
        """Replace the candidates by results: the best by float64 scores, rounded to float32."""
        pairs, self._candidates = _Pairs.join(self._candidates), []
        pairs = pairs.select(~(pairs.bound_P < self._floor_A[pairs.signed_P]))
        query_QF, query_P = self._queries.query_QF.astype(np.float64), pairs.signed_P % self._n_queries
        score_P = np.empty(len(query_P))
        for part_P, row_P, rows_UF in self._read_rows(pairs.place_P):
            for at in range(0, len(part_P), _WIDE_PAIRS_AT_ONCE):
                some_P = part_P[at : at + _WIDE_PAIRS_AT_ONCE]
                row_PF = rows_UF[row_P[at : at + _WIDE_PAIRS_AT_ONCE]].astype(np.float64)
                score_P[some_P] = np.einsum("pf,pf->p", row_PF, query_QF[query_P[some_P]])
        with np.errstate(over="ignore"):
            # The sum with 0 replaces −0.0.
            score_P = np.ldexp(self._sign_A[pairs.signed_P] * score_P, self._exponent_A[pairs.signed_P])
            rounded_P = score_P.astype(np.float32) + np.float32(0)
        ids_P = self._searched.rows.ids_N[pairs.place_P]
        check_finite(ids_P, rounded_P)
        order_P = np.lexsort((ids_P, -rounded_P, pairs.signed_P))
        found_A, start_A = np.unique(pairs.signed_P[order_P], return_index=True)
        for signed, best_P in zip(found_A, np.split(order_P, start_A[1:]), strict=False):
            self._ids[signed], self._scores[signed] = ids_P[best_P[: self._k]], rounded_P[best_P[: self._k]]

    def _read_rows(self, place_P: Int64 | Int32) -> Iterator[tuple[Int64, Int64, Float32]]:
        """Read the rows of pairs, each row once; yield (positions of pairs, the row of each pair, rows [U, F])."""
        place_V, at_P = _find_unique(place_P)
        # A stable sort of small numbers takes linear time.
        order_P = np.argsort((at_P // _ROWS_READ_AT_ONCE).astype(np.uint16), kind="stable")
        edges = np.searchsorted(
            at_P, np.arange(0, len(place_V) + _ROWS_READ_AT_ONCE, _ROWS_READ_AT_ONCE), sorter=order_P
        )
        for number, (first, last) in enumerate(zip(edges, edges[1:], strict=False)):
            start, part_P = number * _ROWS_READ_AT_ONCE, order_P[first:last]
            ids_U = self._searched.rows.ids_N[place_V[start : start + _ROWS_READ_AT_ONCE]]
            # By increasing id, rows are read from one file after the other.
            order_U = np.argsort(ids_U)
            row_U = np.empty(len(ids_U), np.int64)
            row_U[order_U] = np.arange(len(ids_U))
            try:
                rows_UF = self._searched.scan.source.take(ids_U[order_U])
            except KeyError as error:
                raise DamagedIndexError(
                    problem(
                        "the reduced rows contain an unknown row",
                        got=f"id {error}",
                        expected="ids of the stored features",
                        remedy="rebuild the index",
                    )
                ) from error
            yield part_P, row_U[at_P[part_P] - start], np.ascontiguousarray(rows_UF)

    @property
    def _n_first(self) -> int:
        return self._k + _MORE_FIRST


def _rank_in_groups(group_P: Int64 | Int32, value_P: Float64 | Float32) -> Int64:
    """Return the number of larger values in the group of each value; equal values are counted in their order."""
    order_P = np.lexsort((-value_P, group_P))
    sorted_P = group_P[order_P]
    rank_P = np.empty(len(group_P), np.int64)
    rank_P[order_P] = np.arange(len(group_P)) - np.searchsorted(sorted_P, sorted_P)
    return rank_P


def _find_largest(count_A: Int64, most: int) -> Bool:
    """Return which numbers exceed `most`, and the largest of the others if the sum of these exceeds `_MOST_PAIRS`."""
    is_large_A: Bool = count_A > most
    others_A = np.where(is_large_A, 0, count_A)
    excess = int(others_A.sum()) - _MOST_PAIRS
    if excess > 0:
        order_A = np.argsort(-others_A, kind="stable")
        is_large_A[order_A[: np.searchsorted(others_A[order_A].cumsum(), excess) + 1]] = True
    return is_large_A


def _find_unique(place_P: Int64 | Int32) -> tuple[Int64, Int64]:
    """Return the different numbers in increasing order, and the position of each of P numbers among them."""
    if len(place_P) < _FEW_SHARE * place_P.max(initial=0):
        place_V, at_P = np.unique(place_P.astype(np.int64), return_inverse=True)
        return place_V, at_P
    is_used_N = np.bincount(place_P) > 0
    return np.flatnonzero(is_used_N), (np.cumsum(is_used_N) - 1)[place_P]
