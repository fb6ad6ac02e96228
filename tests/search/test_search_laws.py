"""Laws of search: merged shards equal a complete search, opponents are proponents of -q, filters, no padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from test_search_contract import DIM, Rows, heavy_tailed, oracle

from tracin_ann.search import FlatIndex, IVFIndex, IVFParams, scale_to_unit, search_both
from tracin_ann.search.settings import Setting
from tracin_ann.search.topk import best_positions, from_padded, merge, negate
from tracin_ann.types import Float32, TopK

CPU = torch.device("cpu")
small = st.integers(-3, 3).map(float)


def rectangles(max_columns: int = 25) -> st.SearchStrategy[Float32]:
    """Return a strategy for scores [Q, M] with many ties."""
    shapes = st.tuples(st.integers(0, 4), st.integers(1, max_columns))
    return shapes.flatmap(lambda shape: hnp.arrays(np.float32, shape, elements=small))


def rank(ids: np.ndarray, scores: np.ndarray, k: int) -> list[list[tuple[int, float]]]:
    """Return the results of a Python sort of (id, score) pairs."""
    rows = [sorted(zip(ids.tolist(), row, strict=True), key=lambda hit: (-hit[1], hit[0])) for row in scores.tolist()]
    return [row[:k] for row in rows]


def make_hits(top: TopK) -> list[list[tuple[int, float]]]:
    return [
        list(zip(ids.tolist(), scores.tolist(), strict=True)) for ids, scores in zip(top.ids, top.scores, strict=True)
    ]


@given(rectangles(), st.integers(1, 30))
def test_best_is_a_stable_sort(scores: Float32, k: int) -> None:
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    assert best_positions(torch.from_numpy(scores), k).tolist() == expected.tolist()


@given(rectangles(), st.integers(1, 30), st.data())
def test_merged_shards_equal_the_complete_search(scores: Float32, k: int, data: st.DataObject) -> None:
    n_queries, n_rows = scores.shape
    ids = np.array(data.draw(st.permutations(range(n_rows))), dtype=np.int64) * 3
    shard = np.array(data.draw(st.lists(st.integers(0, 3), min_size=n_rows, max_size=n_rows)))
    parts = []
    for number in range(4):
        columns = shard == number
        shard_ids = np.tile(ids[columns], (n_queries, 1))
        counts = np.full(n_queries, columns.sum())
        parts.append(from_padded(shard_ids, scores[:, columns], k, counts))
    merged = merge(parts, k)
    assert make_hits(merged) == rank(ids, scores, k)
    assert merged.rows_scored.tolist() == [n_rows] * n_queries


@given(rectangles(), st.integers(1, 30), st.data())
def test_results_contain_no_padding(scores: Float32, k: int, data: st.DataObject) -> None:
    n_rows = scores.shape[1]
    padding = np.array(data.draw(st.lists(st.booleans(), min_size=n_rows, max_size=n_rows)))
    ids = np.where(padding, -1, np.arange(n_rows))
    padded = np.where(padding, np.finfo(np.float32).min, scores).astype(np.float32)
    top = from_padded(np.tile(ids, (len(scores), 1)), padded, k, np.zeros(len(scores), np.int64))
    assert make_hits(top) == rank(ids[~padding], scores[:, ~padding], k)


@given(st.data(), st.integers(0, 40), st.booleans())
def test_padded_candidates_are_sorted_by_score_then_id(data: st.DataObject, k: int, large: bool) -> None:
    """Also numbers whose bits do not increase with them, and ids of more than 32 bits."""
    special = st.sampled_from([0.0, -0.0, 1e-45, -1e-45, 1.5, -1.5, 3e38, -3e38, np.inf, -np.inf])
    scores = data.draw(hnp.arrays(np.float32, st.tuples(st.integers(0, 3), st.integers(0, 20)), elements=special))
    ids = np.stack([np.random.default_rng(row).permutation(scores.shape[1]) for row in range(len(scores))] or [[]])
    ids = (ids[: len(scores)].astype(np.int64) + (2**32 - 7 if large else 2**31 - 7)).reshape(scores.shape)
    ids[data.draw(hnp.arrays(bool, scores.shape))] = -1
    top = from_padded(ids, scores, k, np.zeros(len(scores), np.int64))
    for found, own_ids, own_scores in zip(make_hits(top), ids, scores, strict=True):
        assert found == rank(own_ids[own_ids >= 0], own_scores[None, own_ids >= 0], k)[0]


@settings(max_examples=25)
@given(
    hnp.arrays(np.float32, st.tuples(st.integers(1, 60), st.just(5)), elements=small),
    hnp.arrays(np.float32, st.tuples(st.integers(0, 3), st.just(5)), elements=small),
    st.integers(1, 70),
    st.sampled_from([1, 20, 1000]),
)
def test_opponents_are_proponents_of_the_negated_query(rows: Float32, queries: Float32, k: int, codes: int) -> None:
    source = Rows(rows)
    for index in (
        FlatIndex(source, CPU, block_rows=16),
        IVFIndex.build(source, IVFParams(), CPU).with_settings(Setting(codes, codes, 0.1)),
    ):
        proponents, opponents = search_both(index, queries, k)
        assert make_hits(proponents) == make_hits(index.search(queries, k))
        mirrored = index.search(-queries, k)
        assert make_hits(opponents) == [[(number, -score) for number, score in row] for row in make_hits(mirrored)]
        assert opponents.rows_scored.tolist() == mirrored.rows_scored.tolist()
        assert [len(row) for row in make_hits(opponents)] == [min(k, len(rows))] * len(queries)
        assert not any(np.signbit(scores[scores == 0]).any() for scores in opponents.scores)


@settings(max_examples=25)
@given(
    hnp.arrays(np.float32, st.tuples(st.integers(1, 60), st.just(5)), elements=small),
    st.integers(1, 20),
    st.integers(1, 70),
)
def test_results_do_not_depend_on_the_block_size(rows: Float32, k: int, block_rows: int) -> None:
    queries = np.array([[1, 0, 0, 0, 0], [1, 2, -1, 0, 1]], np.float32)
    expected = FlatIndex(Rows(rows), CPU).search(queries, k)
    assert make_hits(FlatIndex(Rows(rows), CPU, block_rows=block_rows).search(queries, k)) == make_hits(expected)


MANY = Rows(heavy_tailed(400, 50), ids=5_000_000_000 + 7 * np.arange(400))
PROBED = IVFIndex.build(MANY, IVFParams(codes="fp16"), CPU)
budgets = st.builds(Setting, st.integers(1, 399), st.integers(1, 200), st.sampled_from([0.0, 0.1, 1.0]))


@settings(max_examples=60)
@given(budgets, budgets, st.integers(1, 60), st.one_of(st.none(), st.integers(0, 400)), st.integers(0, 2**32 - 1))
def test_hits_are_allowed_and_exact_for_any_settings_and_filter(
    up: Setting, down: Setting, k: int, passing: int | None, seed: int
) -> None:
    """Each direction uses its own setting; results are k distinct allowed rows, if there are k, with exact scores."""
    random = np.random.default_rng(seed)
    queries = random.integers(-3, 4, (3, DIM)).astype(np.float32)
    allowed = None if passing is None else np.sort(random.choice(MANY.ids, passing, replace=False))
    may = MANY.ids if allowed is None else allowed
    chosen = Rows(MANY.take(may), may)
    proponents, opponents = search_both(PROBED.with_settings(up, down), queries, k, allowed)
    assert make_hits(proponents) == make_hits(PROBED.with_settings(up).search(queries, k, allowed))
    assert make_hits(negate(opponents)) == make_hits(PROBED.with_settings(down).search(-queries, k, allowed))
    for found, signed in ((proponents, queries), (negate(opponents), -queries)):
        _, best_scores = oracle(chosen, signed, k)
        for query, ids, scores, best_K in zip(signed, found.ids, found.scores, best_scores, strict=True):
            assert len(set(ids.tolist())) == len(ids) == min(k, len(may))
            assert np.isin(ids, may).all()
            assert scores.tolist() == (MANY.take(ids) @ query).tolist()
            assert (np.diff(scores) <= 0).all() and (scores <= best_K).all()


def test_merge_requires_the_same_queries() -> None:
    one, none = from_padded(np.zeros((1, 0), np.int64), np.zeros((1, 0), np.float32), 3, np.zeros(1)), []
    two = from_padded(np.zeros((2, 0), np.int64), np.zeros((2, 0), np.float32), 3, np.zeros(2))
    with pytest.raises(ValueError, match="1, 2"):
        merge([one, two], 3)
    with pytest.raises(ValueError, match="merge of parts"):
        merge(none, 3)


@given(
    rows=hnp.arrays(np.float32, (4, DIM), elements=st.floats(-1, 1, width=32)),
    powers=st.lists(st.integers(-148, 126), min_size=4, max_size=4),
)
def test_queries_are_scaled_to_norms_from_a_half_to_1_by_powers_of_two(rows: Float32, powers: list[int]) -> None:
    with np.errstate(under="ignore"):
        queries = np.ldexp(rows, np.array(powers)[:, None])
    # Together, queries of extreme norms are scaled in another way than those of usual norms alone.
    for some in (queries, queries[np.abs(powers) < 100]):
        scaled, exponents = scale_to_unit(some)
        assert scaled.dtype == np.float32
        # Equal, except that a subnormal number beside large ones may lose its last bit.
        error = np.abs(np.ldexp(scaled.astype(np.float64), exponents[:, None]) - some)
        assert (error <= np.ldexp(float(np.finfo(np.float32).smallest_subnormal), exponents)[:, None]).all()
        norms = np.linalg.norm(scaled.astype(np.float64), axis=1)
        assert (((norms >= 0.5) & (norms < 1)) | (norms == 0)).all()
