"""Scans of product codes: the rows that each list is searched for, and candidates that a first search missed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tracin_ann.search import product_scan
from tracin_ann.search.product_codes import Layout, ProductCoder, ProductCodes
from tracin_ann.search.product_scan import scan_codes
from tracin_ann.types import Float32, Int64

DIM = 48
MANY, FEW = 4000, 2000
LARGE, SMALL = 5000.0, 1000.0
"""Norms; rows are scaled to norms below 2^13 before they are coded."""


def encode(rows: Float32) -> ProductCodes:
    layout = Layout.allocate(np.ones(DIM), 24)
    coder = ProductCoder.train(rows[:, : layout.width], layout, seed=0)
    coder.add(rows[:, : layout.width], np.arange(len(rows)))
    return coder.finish()


def draw_rows(seed: int) -> Float32:
    """Return MANY large rows in all directions and FEW small ones, which are near the first axis."""
    random = np.random.default_rng(seed)
    large, small = random.standard_normal((MANY, DIM)), random.standard_normal((FEW, DIM))
    large[:, 0] *= 0.01
    small[:, 0] += 12
    parts = [
        size * part / np.linalg.norm(part, axis=1, keepdims=True) for size, part in ((LARGE, large), (SMALL, small))
    ]
    return np.concatenate(parts).astype(np.float32)


@pytest.fixture(scope="module")
def codes() -> ProductCodes:
    return encode(draw_rows(0))


def draw_queries(n_queries: int, seed: int) -> Float32:
    """Return queries near the first axis and, every third, in any direction."""
    queries = np.random.default_rng(seed).standard_normal((n_queries, DIM)).astype(np.float32)
    queries[:, 0] += np.where(np.arange(n_queries) % 3, 100, 0)
    return queries


def scan_everything(
    codes: ProductCodes, queries: Float32, n_candidates: int, allowed: Int64 | None, monkeypatch: pytest.MonkeyPatch
) -> Float32:
    """Return the scores [Q, M] of a scan that searches every list for as many rows as it can have candidates."""
    with monkeypatch.context() as patched:
        patched.setattr(product_scan, "_SPREAD", 1e9)
        return scan_codes(codes, queries, n_candidates, allowed)[1]


@pytest.mark.parametrize("n_queries", [1, 40])
@pytest.mark.parametrize("n_candidates", [20, 300, 1500])
@pytest.mark.parametrize("share", [None, 0.5, 0.1])
def test_candidates_in_unexpected_lists_are_found(
    codes: ProductCodes, n_queries: int, n_candidates: int, share: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries = draw_queries(n_queries, 1)
    allowed = None if share is None else np.flatnonzero(np.random.default_rng(2).random(MANY + FEW) < share)
    found, scores = scan_codes(codes, queries, n_candidates, allowed)
    expected = scan_everything(codes, queries, n_candidates, allowed, monkeypatch)
    for own, score, other in zip(found, scores, expected, strict=True):
        assert len(np.unique(own[own >= 0])) == (score > -np.inf).sum() == (other > -np.inf).sum()
        assert allowed is None or np.isin(own[own >= 0], allowed).all()
        # FAISS rounds the sums before the factors, and keeps any of the equal ones.
        one, two = (np.sort(each[each > -np.inf]).astype(np.float64) for each in (score, other))
        assert np.abs(one - two).max(initial=0) <= 0.02 * np.abs(two).max(initial=0)
    near = found[1::3]
    if n_candidates == 300 and share is None and len(near):
        # The case: almost all candidates are small rows, of which few are expected.
        assert np.mean(near >= MANY) > 0.95


def test_few_queries_are_scanned_again_if_all_lists_are_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(5)
    rows = random.standard_normal((6000, DIM)) * random.lognormal(5, 0.5, (6000, 1))
    codes, again = encode(rows.astype(np.float32)), []
    find_cut = product_scan._Scan._find_cut
    monkeypatch.setattr(product_scan._Scan, "_find_cut", lambda *given: again.append(find_cut(*given)) or again[-1])
    queries = random.standard_normal((200, DIM)).astype(np.float32)
    for n_candidates in (30, 100, 400):
        again.clear()
        scan_codes(codes, queries, n_candidates)
        assert sum(map(len, again)) <= 0.05 * len(queries)


@pytest.mark.parametrize("n_candidates", [1, 30, 300, 3000, MANY + FEW])
@pytest.mark.parametrize("share", [1.0, 0.3, 0.001, 0.0])
def test_every_row_is_in_one_part_of_a_plan(codes: ProductCodes, n_candidates: int, share: float) -> None:
    parts = product_scan._plan(codes, share, n_candidates)
    numbers = [number for part in parts for number in part.numbers]
    assert sorted(numbers) == np.flatnonzero(codes.list_sizes).tolist()
    assert all(1 <= part.first <= part.most <= codes.list_sizes[list(part.numbers)].sum() for part in parts)
    if share == 1:
        assert sum(part.first for part in parts) >= n_candidates


@pytest.mark.parametrize("n_candidates", [50, 2000])
def test_candidates_are_expected_in_total(codes: ProductCodes, n_candidates: int) -> None:
    sizes = codes.list_sizes.astype(np.float64)
    expected = product_scan._expect_candidates(sizes, codes.list_factors, n_candidates)
    assert n_candidates <= expected.sum() <= 1.05 * n_candidates
    assert (expected <= sizes).all()


@pytest.mark.parametrize("n_candidates", [20, 100, 300, 900, 3000])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_allowed_rows_of_one_list_are_found(codes: ProductCodes, n_candidates: int, rank: int) -> None:
    number = int(np.argsort(-codes.list_sizes)[rank])
    allowed = np.sort(codes._list_ids(number))[:1000]
    for n_queries in (1, 30):
        found, _ = scan_codes(codes, draw_queries(n_queries, 3), n_candidates, allowed)
        for ids in found:
            own = ids[ids >= 0]
            assert len(own) == len(np.unique(own)) == min(n_candidates, len(allowed))
            assert np.isin(own, allowed).all()


def test_a_part_without_rows_is_not_searched_twice(codes: ProductCodes) -> None:
    """No row is allowed: there is only padding, and nothing can follow."""
    scan = product_scan._Scan(codes, product_scan._plan(codes, 1.0, 30), 30, None)
    found = [(np.full((2, part.first), -1), np.full((2, part.first), -np.inf, np.float32)) for part in scan.parts]
    assert not len(scan._find_cut(found, np.full(2, -np.inf, np.float32)))
    deeper = replace(scan, parts=[replace(part, first=part.most) for part in scan.parts])
    found = [(np.zeros((2, part.first), int), np.ones((2, part.first), np.float32)) for part in deeper.parts]
    assert not len(deeper._find_cut(found, np.zeros(2, np.float32)))
