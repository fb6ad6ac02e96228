"""Scans of all product codes: the best rows of each list by their codes, and the best of these by codes and factors.

How many rows of a list can be candidates depends on the query. A list is first searched for a few times as many as are
expected; FAISS spends half of a scan's time on keeping and sorting thousands of rows. Where the last of these rows are
candidates, so that others can follow, the query is scanned again for as many rows as a list could have.

Shapes: Q queries, M candidates, R reduced dimension, L lists, K rows of some lists.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from tracin_ann.search.inverted_lists import Selector, make_selector
from tracin_ann.search.product_codes import ProductCodes
from tracin_ann.search.threads import one_openmp_thread, open_threads
from tracin_ann.types import Float32, Float64, Int64

_OVERSAMPLING, _MORE = 1.5, 128
"""A list is searched for at most this many times the wanted candidates, and a few more, because the best rows by their
codes are not the best by codes and factors."""
_SPREAD = 4.0
"""A list is first searched for this many times its expected candidates, and a few more."""
_END = 16
"""Candidates among the last 16th of the rows that a list returned show that others can follow."""
_FEW_QUERIES = 16
"""Each thread searches other lists for up to this many queries, so that it reads their codes once; or other queries."""
_FEW_ROWS = 2**14
"""The calling thread searches the lists of up to this many rows: waking others would take longer."""
_RESULTS_AT_ONCE = 2**20
_LIMITS = 512
"""Values of t that `_expect_candidates` tries."""

_Found = tuple[Int64, Float32]
_Map = Callable[[Callable[["_Part"], _Found], Sequence["_Part"]], Iterable[_Found]]
"""`map`, or that of threads."""


def scan_codes(
    codes: ProductCodes, queries_QR: Float32, n_candidates: int, allowed: Int64 | None = None
) -> tuple[Int64, Float32]:
    """Return (ids int64, estimated scores float32) [Q, M] of the best rows by their codes, unordered.

    The id of padding is −1, and its score −infinity.

    Args:
        codes: the codes of all rows.
        queries_QR: float32.
        n_candidates: M, if there are as many rows.
        allowed: int64 ids, increasing, to which the candidates are restricted; None: all.
    """
    padded, n_candidates = codes.layout.pad(queries_QR), min(n_candidates, len(codes))
    if not n_candidates:
        return np.zeros((len(padded), 0), np.int64), np.zeros((len(padded), 0), np.float32)
    share = 1.0 if allowed is None else len(allowed) / len(codes)
    parts = _plan(codes, share, n_candidates)
    scan = _Scan(codes, parts, n_candidates, make_selector(allowed, len(codes)))
    if len(padded) <= _FEW_QUERIES:
        if len(codes) > _FEW_ROWS:
            return scan.run(padded, open_threads().map)
        with one_openmp_thread():
            return scan.run(padded, map)
    # As many blocks for each thread, which fit into memory.
    n_threads, n_results = torch.get_num_threads(), len(padded) * sum(part.first for part in parts)
    n_blocks = n_threads * math.ceil(n_results / (n_threads * _RESULTS_AT_ONCE))
    blocks = [block for block in np.array_split(padded, n_blocks) if len(block)]
    found = list(open_threads().map(lambda block: scan.run(block, map), blocks))
    return np.concatenate([ids for ids, _ in found]), np.concatenate([scores for _, scores in found])


@dataclass(frozen=True)
class _Part:
    """Lists that are searched together.

    Attributes:
        numbers: of the lists.
        first: rows that they are first searched for.
        most: rows that they are searched for where others can follow.
    """

    numbers: tuple[int, ...]
    first: int
    most: int


@dataclass(frozen=True)
class _Scan:
    """A scan of all lists for a number of candidates."""

    codes: ProductCodes
    parts: Sequence[_Part]
    n_candidates: int
    selector: Selector | None

    def run(self, padded: Float32, map_parts: _Map) -> _Found:
        """Return the ids and scores [Q, M] of the candidates of padded queries; `map_parts` searches all parts."""

        def search(part: _Part) -> _Found:
            return self.codes.search_lists(part.numbers, padded, part.first, self.selector)

        found = list(map_parts(search, self.parts))
        ids_QX, scores_QX = (np.concatenate(arrays, axis=1) for arrays in zip(*found, strict=True))
        ids_QM, scores_QM = select_candidates(ids_QX, scores_QX, self.n_candidates)
        cut = self._find_cut(found, scores_QM.min(axis=1))
        if len(cut):
            # There are M candidates each time: with few allowed rows, all parts are searched for the most at first.
            most = replace(self, parts=[replace(part, first=part.most) for part in self.parts])
            ids_QM[cut], scores_QM[cut] = most.run(padded[cut], map_parts)
        return ids_QM, scores_QM

    def _find_cut(self, found: Sequence[_Found], least_Q: Float32) -> Int64:
        """Return the queries of which some lists can have more candidates than they were searched for."""
        is_cut_Q = np.zeros(len(least_Q), bool)
        for part, (_, scores_QK) in zip(self.parts, found, strict=True):
            if part.first < part.most:
                last_QE = scores_QK[:, -(part.first // _END) :]
                is_cut_Q |= ((last_QE >= least_Q[:, None]) & (last_QE > -np.inf)).any(axis=1)
        return np.flatnonzero(is_cut_Q)


def _plan(codes: ProductCodes, share: float, n_candidates: int) -> list[_Part]:
    """Return all lists that are not empty, the largest first: threads search several at the same time.

    Args:
        codes: the codes of all rows.
        share: share of the rows that are allowed.
        n_candidates: M.
    """
    size_L = codes.list_sizes
    order = np.argsort(-size_L, kind="stable")[: np.count_nonzero(size_L)]
    # All rows of the smallest lists are candidates together: each search computes the tables of a query again.
    n_small = int(np.searchsorted(size_L[order[::-1]].cumsum(), n_candidates, side="right"))
    large, small = order[: len(order) - n_small].tolist(), order[len(order) - n_small :].tolist()
    most_L = np.minimum(size_L, math.ceil(_OVERSAMPLING * n_candidates) + _MORE)
    first_L, allowed_L = most_L, share * size_L.astype(np.float64)
    if allowed_L.sum() > _SPREAD * n_candidates:
        expected_L = _expect_candidates(allowed_L, codes.list_factors, n_candidates)
        first_L = np.minimum(most_L, np.ceil(_SPREAD * expected_L).astype(np.int64) + _MORE)
    parts = [_Part((number,), int(first_L[number]), int(most_L[number])) for number in large]
    if small:
        n_rows = int(size_L[small].sum())
        parts.append(_Part(tuple(small), n_rows, n_rows))
    return parts


def _expect_candidates(size_L: Float64, factor_L: Float64, n_candidates: int) -> Float64:
    """Return the number of candidates that are expected in each list, whose rows are more than the candidates.

    The scores without factors are assumed to have the same exponential tail in all lists: the share of the rows of a
    list is exp(-t / factor), with t such that there are about as many candidates in total, or a few more.
    """
    limit_T = np.linspace(0.0, float(factor_L.max()) * math.log(size_L.sum()), _LIMITS)
    expected_TL = size_L * np.exp(-limit_T[:, None] / factor_L)
    expected_L: Float64 = expected_TL[np.flatnonzero(expected_TL.sum(axis=1) >= n_candidates)[-1]]
    return expected_L


def select_candidates(ids_QX: Int64, scores_QX: Float32, n_candidates: int) -> tuple[Int64, Float32]:
    """Return the ids and scores of the best candidates [Q, M], unordered; all if there are fewer than M."""
    if n_candidates < ids_QX.shape[1]:
        best_QM = np.argpartition(-scores_QX, n_candidates - 1, axis=1)[:, :n_candidates]
        return np.take_along_axis(ids_QX, best_QM, axis=1), np.take_along_axis(scores_QX, best_QM, axis=1)
    return ids_QX, scores_QX
