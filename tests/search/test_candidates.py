"""Scores of candidates: equal to float64 inner products for every storage format, whether few or many rows are read."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
from test_search_contract import DIM, Rows, heavy_tailed, integers
from test_stored_scan import write_store

from tracin_ann.errors import DamagedIndexError
from tracin_ann.search import candidates as module
from tracin_ann.search.candidates import score_candidates
from tracin_ann.search.reduction import multiply_rows
from tracin_ann.search.threads import open_threads
from tracin_ann.store.feature_store import FeatureStore, FeatureView
from tracin_ann.types import Float64, Int64

N = 300
FORMATS = ["float16", "float32", "int8", "int4", "int2", "int1"]


def draw_ids(n_queries: int, n_candidates: int, seed: int) -> Int64:
    """Return ids that differ within a query, with padding."""
    random = np.random.default_rng(seed)
    ids_QM = np.stack([random.permutation(N)[:n_candidates] for _ in range(n_queries)])
    ids_QM[random.random(ids_QM.shape) < 0.1] = -1
    return ids_QM


def expect(view: FeatureView | Rows, queries: np.ndarray, ids_QM: Int64) -> tuple[Float64, Float64]:
    """Return the inner products [Q, M] of decoded rows in float64, and the products of the norms."""
    row_NF = np.concatenate([rows for _, rows in view.blocks(64)]).astype(np.float64)
    every_QN = queries.astype(np.float64) @ row_NF.T
    reach_QN = np.linalg.norm(queries.astype(np.float64), axis=1)[:, None] * np.linalg.norm(row_NF, axis=1)
    scores, reach = (np.take_along_axis(each, ids_QM.clip(0), axis=1) for each in (every_QN, reach_QN))
    return np.where(ids_QM < 0, 0.0, scores), reach


@pytest.fixture(params=["few", "many"])
def _amount(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read the rows in the calling thread, or 7 at a time in several threads."""
    if request.param == "many":
        monkeypatch.setattr(module, "_NUMBERS_OF_ONE_THREAD", 0)
        monkeypatch.setattr(module, "_ROWS_AT_ONCE", 7)


@pytest.mark.usefixtures("_amount")
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("scale", [2.0**-110, 1.0, 2.0**100])
def test_scores_of_stored_rows(tmp_path: Path, dtype: str, cosine: bool, scale: float) -> None:
    rows = heavy_tailed(N, 6) * np.float32(scale)
    rows[5] = 0
    view = write_store(tmp_path, rows, dtype).view(cosine=cosine)
    for n_queries in (1, 9):
        queries = np.random.default_rng(7).standard_normal((n_queries, DIM)).astype(np.float32)
        ids_QM = draw_ids(n_queries, 40, 8)
        expected, reach = expect(view, queries, ids_QM)
        scores = score_candidates(view, queries, ids_QM)
        assert scores.dtype == np.float32 and scores.shape == ids_QM.shape
        assert (np.abs(scores - expected) <= 2.0**-18 * reach + 2.0**-145).all()


@pytest.mark.usefixtures("_amount")
@pytest.mark.parametrize("scale", [2.0**-120, 2.0**100])
def test_queries_of_extreme_norm_are_scaled(tmp_path: Path, scale: float) -> None:
    view = write_store(tmp_path, heavy_tailed(N, 6) / np.float32(scale), "float16").view()
    queries = integers(3, 9) * np.float32(scale)
    ids_QM = draw_ids(3, 40, 10)
    expected, reach = expect(view, queries, ids_QM)
    assert (np.abs(score_candidates(view, queries, ids_QM) - expected) <= 2.0**-18 * reach).all()


@pytest.mark.usefixtures("_amount")
def test_rows_of_another_source(tmp_path: Path) -> None:
    """A source that cannot give rows in their stored format; integers, whose products are exact."""
    source, queries, ids_QM = Rows(integers(N, 1)), integers(5, 2), draw_ids(5, 60, 3)
    expected, _ = expect(source, queries, ids_QM)
    assert np.array_equal(score_candidates(source, queries, ids_QM), expected)


@pytest.mark.parametrize("first_id", [0, 2**40, 2**62])
@pytest.mark.parametrize("n_queries", [0, 1, 6])
def test_pairs_are_sorted_by_ids_of_any_size(first_id: int, n_queries: int) -> None:
    """Ids and places that fit into one number, or not."""
    drawn = np.random.default_rng(3).integers(-1, 20, (n_queries, 9))
    ids_QM = np.where(drawn < 0, -1, drawn + first_id)
    pairs = module._Pairs.sort(ids_QM)
    known = ids_QM.ravel()[ids_QM.ravel() >= 0]
    assert np.array_equal(pairs.id_U, np.unique(known))
    place_P, row_P = pairs.select(slice(0, len(pairs.id_U)))
    assert len(np.unique(place_P)) == len(known)
    assert np.array_equal(ids_QM.ravel()[place_P], pairs.id_U[row_P])


@pytest.mark.usefixtures("_amount")
def test_padding_and_unknown_rows(tmp_path: Path) -> None:
    view, queries = write_store(tmp_path, integers(N, 1), "float16").view(), integers(2, 2)
    assert score_candidates(view, queries, np.full((2, 3), -1)).tolist() == [[0.0] * 3] * 2
    assert score_candidates(view, queries, np.zeros((2, 0), np.int64)).shape == (2, 0)
    with pytest.raises(KeyError, match="300"):
        score_candidates(view, queries, np.array([[1, -1], [2, N]]))


@pytest.mark.usefixtures("_amount")
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("n_queries", [1, 4])
def test_a_single_row(tmp_path: Path, dtype: str, n_queries: int) -> None:
    view = write_store(tmp_path, heavy_tailed(N, 3), dtype).view()
    ids_Q1, queries = np.full((n_queries, 1), 17), integers(n_queries, 4)
    expected, reach = expect(view, queries, ids_Q1)
    assert (np.abs(score_candidates(view, queries, ids_Q1) - expected) <= 2e-6 * reach).all()


@pytest.mark.usefixtures("_amount")
@pytest.mark.parametrize("n_queries", [1, 4])
def test_an_overflow_is_infinite(tmp_path: Path, n_queries: int) -> None:
    view = write_store(tmp_path, np.full((N, DIM), 2.0**110, np.float32), "float16").view()
    scores = score_candidates(view, np.full((n_queries, DIM), 2.0**60, np.float32), draw_ids(n_queries, 5, 1))
    assert set(scores.ravel().tolist()) <= {0.0, float("inf")} and scores.max() > 0


@pytest.mark.usefixtures("_amount")
@pytest.mark.parametrize("dtype", FORMATS)
def test_an_altered_row_is_named_and_others_are_read(tmp_path: Path, dtype: str) -> None:
    store = write_store(tmp_path, heavy_tailed(N, 15), dtype)
    content, stored = bytearray(store.path(1, 1).read_bytes()), store.file(1, 1).stored_ND
    content[content.find(stored.tobytes()) + 3 * stored[0].nbytes + 1] ^= 1
    store.path(1, 1).write_bytes(bytes(content))
    view, queries = FeatureStore(tmp_path, store.layout).view(), integers(1, 16)
    with pytest.raises(DamagedIndexError, match="row 40 is altered"):
        score_candidates(view, queries, np.arange(30, 80)[None])
    with pytest.raises(DamagedIndexError, match="row 40 is altered"):
        score_candidates(view, queries, np.array([[40]]))
    others = np.setdiff1d(np.arange(30, 80), [40])[None]
    sound = write_store(tmp_path / "sound", heavy_tailed(N, 15), dtype).view()
    assert np.array_equal(score_candidates(view, queries, others), score_candidates(sound, queries, others))


def test_a_block_with_many_rows_is_verified_at_once(tmp_path: Path) -> None:
    store = write_store(tmp_path, heavy_tailed(N, 4), "float16", partition_rows=N)
    file = FeatureStore(tmp_path, store.layout).file(0, 0)
    assert file.find_unverified(np.array([1, 299])).tolist() == [True, True]
    assert not file.find_unverified(np.arange(0, 256, 8)).any()
    assert file.find_unverified(np.array([255, 256])).tolist() == [False, True]
    assert file.verified_blocks.tolist() == [True, False]


@pytest.mark.parametrize("shape", [(6, 5), (1500, 900)])
@pytest.mark.parametrize("n_rows", [0, 1, 2, 40])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rows_times_a_matrix(shape: tuple[int, int], n_rows: int, dtype: type[np.floating]) -> None:
    random = np.random.default_rng(2)
    rows, matrix = random.standard_normal((n_rows, shape[0])).astype(dtype), random.standard_normal(shape).astype(dtype)
    for each in (matrix, np.asfortranarray(matrix)):
        product = multiply_rows(rows, each)
        assert product.dtype == dtype
        np.testing.assert_allclose(product, rows.astype(np.float64) @ matrix, atol=2e-4)


def scan_in_child(queue: multiprocessing.Queue[list[int]]) -> None:
    queue.put(list(open_threads().map(abs, [-1, 2])))


def test_a_forked_process_starts_its_own_threads() -> None:
    assert list(open_threads().map(abs, [-3])) == [3]
    context = multiprocessing.get_context("fork")
    queue: multiprocessing.Queue[list[int]] = context.Queue()
    child = context.Process(target=scan_in_child, args=(queue,))
    child.start()
    assert queue.get(timeout=60) == [1, 2]
    child.join()


def test_there_are_as_many_threads_as_pytorch_uses() -> None:
    before = torch.get_num_threads()
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            assert open_threads()._max_workers == number
    finally:
        torch.set_num_threads(before)
