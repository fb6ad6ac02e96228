"""The scan of rows in their stored format: scores equal to a float64 oracle at all magnitudes, filters, damage."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from test_search_contract import DIM, Rows, assert_exact, heavy_tailed, integers, oracle

from tracin_ann.device import import_faiss
from tracin_ann.errors import DamagedIndexError, NonFiniteError
from tracin_ann.search import FlatIndex, Subset, search_both, stored_parts
from tracin_ann.search import stored_scores as module
from tracin_ann.search.threads import use_one_thread
from tracin_ann.store.feature_file import FeatureBlock
from tracin_ann.store.feature_store import FeatureStore, FeatureView
from tracin_ann.store.layout import StoreLayout
from tracin_ann.types import Float32, Float64, Int64, StoredPart

CPU = torch.device("cpu")
LOWEST, HIGHEST = -163, 113
"""The exponents of rows of the smallest and of the largest float32."""


class StoredSource(Rows):
    """A source that gives its rows in parts of 5 and 7 columns, and cannot be read in another way."""

    def __init__(self, parts: Sequence[StoredPart], ids: np.ndarray | None = None) -> None:
        self.parts = parts
        with np.errstate(invalid="ignore"):
            self.exact_NF: Float64 = np.concatenate([decode(part) for part in parts], axis=1)
        super().__init__(np.zeros(self.exact_NF.shape), ids)

    def blocks(self, block_rows: int, start: int = 0) -> Iterator[tuple[Int64, Float32]]:
        raise AssertionError("the rows were decoded")

    def stored_blocks(self, block_rows: int) -> Iterator[tuple[Int64, list[StoredPart]]]:
        for at in range(0, len(self), block_rows):
            rows = slice(at, at + block_rows)
            yield (
                self.ids[rows],
                [StoredPart(part.stored_BD[rows], part.exponent_B[rows], part.unit) for part in self.parts],
            )


def decode(part: StoredPart) -> Float64:
    row_BD: Float64 = np.ldexp(part.stored_BD.astype(np.float64), part.exponent_B[:, None].astype(np.int64))
    if part.unit:
        norm_B1 = np.linalg.norm(row_BD, axis=1, keepdims=True)
        row_BD = np.divide(row_BD, norm_B1, out=np.zeros_like(row_BD), where=norm_B1 > 0)
    return row_BD


def error_bounds(parts: Sequence[StoredPart], queries_QF: np.ndarray) -> Float64:
    """Return the largest errors of scores [Q, N]: float32 rounding relative to the norms, and the denormal step."""
    bound_QN, start = np.full((len(queries_QF), len(parts[0].stored_BD)), 2.0**-148), 0
    for part in parts:
        row_BD = decode(part)
        query_QD = queries_QF[:, start : (start := start + row_BD.shape[1])].astype(np.float64)
        bound_QN += 2.0**-20 * np.linalg.norm(query_QD, axis=1)[:, None] * np.linalg.norm(row_BD, axis=1)
    return bound_QN


def all_scores(source: StoredSource, queries_QF: np.ndarray) -> Float32:
    """Return the scores [Q, N] of the scan, in the order of the rows."""
    top = FlatIndex(source, CPU, block_rows=7).search(queries_QF, len(source))
    place = {number: at for at, number in enumerate(source.ids.tolist())}
    scores_QN = np.full((len(queries_QF), len(source)), np.nan, np.float32)
    for q, (ids, scores) in enumerate(zip(top.ids, top.scores, strict=True)):
        scores_QN[q, [place[number] for number in ids.tolist()]] = scores
    return scores_QN


def random_parts(n: int, seed: int, *, unit: bool = False, low: int = -20, high: int = 20) -> list[StoredPart]:
    random = np.random.default_rng(seed)
    parts = []
    for dim in (5, DIM - 5):
        stored = random.uniform(-(2.0**15) + 16, 2.0**15 - 16, (n, dim)).astype(np.float16)
        stored[::7] = 0
        parts.append(StoredPart(stored, random.integers(low, high + 1, n).astype(np.int16), unit))
    return parts


@pytest.mark.parametrize("n_queries", [1, 2, 3, 8, 9, 150])
@pytest.mark.parametrize("unit", [False, True])
def test_scores_equal_the_float64_oracle(n_queries: int, unit: bool) -> None:
    source = StoredSource(random_parts(100, 1, unit=unit), ids=5_000_000_000 + 7 * np.arange(100))
    queries = np.random.default_rng(2).standard_normal((n_queries, DIM)).astype(np.float32)
    off_QN = np.abs(all_scores(source, queries) - queries.astype(np.float64) @ source.exact_NF.T)
    assert (off_QN <= error_bounds(source.parts, queries)).all()


def test_rows_of_a_part_are_converted_in_groups_that_fit_the_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    source = StoredSource(random_parts(100, 3))
    queries = np.random.default_rng(4).standard_normal((20, DIM)).astype(np.float32)
    expected = all_scores(source, queries)
    monkeypatch.setattr(stored_parts, "_BUFFER_NUMBERS", 11)
    monkeypatch.setattr(stored_parts, "_SERIAL_NUMBERS", 4)
    for each in (stored_parts, module):
        monkeypatch.setattr(each, "QUERIES_AT_ONCE", 13)
    monkeypatch.setattr(module, "_ROWS_AT_ONCE", 3)
    assert (np.abs(all_scores(source, queries) - expected) <= error_bounds(source.parts, queries)).all()


stored_numbers = st.floats(-(2.0**15) + 16, 2.0**15 - 16, width=16)
query_numbers = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=200)
@given(
    hnp.arrays(np.float16, (9, DIM), elements=stored_numbers),
    hnp.arrays(np.int16, (9, 2), elements=st.integers(LOWEST, HIGHEST)),
    hnp.arrays(np.float32, st.tuples(st.integers(1, 10), st.just(DIM)), elements=query_numbers),
)
def test_scores_of_any_magnitude_equal_the_oracle_or_are_rejected(
    stored: np.ndarray, exponents: np.ndarray, queries: Float32
) -> None:
    parts = [StoredPart(stored[:, :5], exponents[:, 0]), StoredPart(stored[:, 5:], exponents[:, 1])]
    source = StoredSource(parts)
    exact_QN, bound_QN = queries.astype(np.float64) @ source.exact_NF.T, error_bounds(parts, queries)
    largest = float(np.finfo(np.float32).max)
    # A sum can overflow if the sum of its terms' magnitudes does.
    reach_QN = np.abs(queries.astype(np.float64)) @ np.abs(source.exact_NF.T)
    try:
        scores_QN = all_scores(source, queries)
    except NonFiniteError:
        assert reach_QN.max() >= 0.99 * largest
        return
    assert np.abs(exact_QN).max() <= 1.01 * largest
    assert (np.abs(scores_QN - exact_QN) <= bound_QN).all()


@pytest.mark.parametrize("exponent", [LOWEST, -127, -126, 0, HIGHEST])
def test_exponents_at_their_limits_are_exact(exponent: int) -> None:
    stored = np.zeros((3, DIM), np.float16)
    stored[0, 0], stored[1, 0] = 2.0**14, -(2.0**14)
    source = StoredSource([StoredPart(stored, np.full(3, exponent, np.int16))])
    query = np.eye(1, DIM, dtype=np.float32)
    assert all_scores(source, query)[0].tolist() == [2.0 ** (exponent + 14), -(2.0 ** (exponent + 14)), 0.0]


@pytest.mark.parametrize("scale", [2.0**-149, 2.0**-100, 2.0**100, 2.0**127])
def test_queries_of_extreme_norm_are_scaled(scale: float) -> None:
    """The scores are in the range of float32; the products with the stored numbers alone are not."""
    exponent = np.array([-20 - int(np.log2(scale))] * 2, np.int16)
    stored = np.array([[2.0**14, -(2.0**14)], [3 * 2.0**12, 2.0**13]], np.float16)
    source = StoredSource([StoredPart(stored, exponent.clip(LOWEST, HIGHEST))])
    query = np.array([[scale, 0]], np.float32)
    assert all_scores(source, query)[0].tolist() == (source.exact_NF @ query[0].astype(np.float64)).tolist()


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("n_queries", [1, 20])
def test_a_nonfinite_row_is_named(poison: float, unit: bool, n_queries: int) -> None:
    parts = random_parts(60, 5, unit=unit)
    parts[1].stored_BD[41, 3] = poison
    source = StoredSource(parts, ids=100 + np.arange(60))
    with pytest.raises(NonFiniteError, match="row 141 "):
        search_both(FlatIndex(source, CPU, block_rows=16), np.abs(integers(n_queries, 24)) + 1, 5)


def write_store(folder: Path, rows: np.ndarray, dtype: str, partition_rows: int = 37) -> FeatureStore:
    """Return a store of these rows with 2 checkpoints of 6 columns."""
    store = FeatureStore(folder, StoreLayout(len(rows), partition_rows, DIM // 2, dtype, ("a", "b")))
    for partition, (start, stop) in enumerate(store.partitions()):
        for checkpoint in range(2):
            columns = slice(checkpoint * DIM // 2, (checkpoint + 1) * DIM // 2)
            feature = np.ascontiguousarray(rows[start:stop, columns], np.float32)
            ones = np.ones(stop - start)
            block = FeatureBlock(np.arange(start, stop, dtype=np.int64), feature, ones, ones.astype(np.float32))
            store.write(partition, checkpoint, block)
    return store


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("scale", [2.0**-100, 1.0, 2.0**100])
def test_a_store_gives_the_results_of_the_oracle(tmp_path: Path, dtype: str, scale: float) -> None:
    rows = heavy_tailed(300, 6) * np.float32(scale)
    view = write_store(tmp_path, rows, dtype).view()
    for block_rows in (16, 37, 8192):
        for n_queries in (1, 12):
            assert_exact(FlatIndex(view, CPU, block_rows), Rows(rows), integers(n_queries, 7), 10)
    assert_exact(FlatIndex(view, CPU), Rows(rows), integers(1, 7), 1000)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("scale", [2.0**-120, 1.0, 2.0**110])
def test_a_cosine_view_gives_the_scores_of_its_decoded_rows(tmp_path: Path, dtype: str, scale: float) -> None:
    rows = heavy_tailed(200, 8) * np.float32(scale)
    rows[5] = 0
    view = write_store(tmp_path, rows, dtype).view(cosine=True)
    decoded = Rows(np.concatenate([block for _, block in view.blocks(64)]))
    queries = np.random.default_rng(9).standard_normal((4, DIM)).astype(np.float32)
    found = FlatIndex(view, CPU).search(queries, 200)
    expected = FlatIndex(decoded, CPU).search(queries, 200)
    for scores, others in zip(found.scores, expected.scores, strict=True):
        np.testing.assert_allclose(scores, others, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["int8", "int4", "int2", "int1"])
@pytest.mark.parametrize("scale", [2.0**-120, 1.0, 2.0**110])
@pytest.mark.parametrize("cosine", [False, True])
def test_codes_give_the_scores_of_decoded_rows(tmp_path: Path, dtype: str, scale: float, cosine: bool) -> None:
    rows = heavy_tailed(300, 8) * np.float32(scale)
    rows[5] = 0
    view = write_store(tmp_path, rows, dtype).view(cosine=cosine)
    decoded = Rows(np.concatenate([block for _, block in view.blocks(64)]))
    for block_rows, n_queries in ((16, 1), (37, 12), (8192, 70)):
        queries = np.random.default_rng(9).standard_normal((n_queries, DIM)).astype(np.float32)
        found = FlatIndex(view, CPU, block_rows).search(queries, 300)
        allowed = FlatIndex(Subset(view, np.arange(0, 300, 2)), CPU, block_rows, takes_few=False).search(queries, 300)
        for q, expected in enumerate(oracle_scores(decoded, queries)):
            tolerance = 1e-5 * np.abs(expected).max()
            np.testing.assert_allclose(found.scores[q], expected[found.ids[q]], atol=tolerance)
            np.testing.assert_allclose(allowed.scores[q], expected[allowed.ids[q]], atol=tolerance)
            assert sorted(found.ids[q]) == list(range(300)) and sorted(allowed.ids[q]) == list(range(0, 300, 2))


def oracle_scores(rows: Rows, queries_QF: np.ndarray) -> Float64:
    stored_NF = np.concatenate([block for _, block in rows.blocks(64)])
    scores_QN: Float64 = queries_QF.astype(np.float64) @ stored_NF.T.astype(np.float64)
    return scores_QN


@pytest.mark.parametrize("share", [0.0, 0.01, 0.2, 0.7, 1.0])
@pytest.mark.parametrize("n_queries", [1, 3, 70])
def test_only_allowed_rows_are_found(
    tmp_path: Path, share: float, n_queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_ROWS_AT_ONCE", 16)
    rows, queries = heavy_tailed(300, 10), integers(n_queries, 11)
    view = write_store(tmp_path, rows, "float16").view()
    allowed = np.flatnonzero(np.random.default_rng(12).random(300) < share)
    chosen = Rows(rows[allowed], allowed)
    nested = Subset(Subset(view, np.union1d(allowed, np.arange(0, 300, 2))), allowed)
    for proponents, opponents in (
        FlatIndex(view, CPU).search_both(queries, 10, allowed),
        FlatIndex(nested, CPU).search_both(queries, 10),
    ):
        for found, signed, sign in ((proponents, queries, 1), (opponents, -queries, -1)):
            ids, scores = oracle(chosen, signed, 10)
            assert [row.tolist() for row in found.ids] == ids.tolist()
            assert [(sign * row).tolist() for row in found.scores] == scores.tolist()
            assert found.rows_scored.tolist() == [len(allowed)] * n_queries


def test_an_altered_row_is_rejected(tmp_path: Path) -> None:
    store = write_store(tmp_path, heavy_tailed(100, 15), "float16")
    path = store.path(1, 1)
    content = bytearray(path.read_bytes())
    stored = store.file(1, 1).stored_ND.tobytes()
    content[content.find(stored) + 3] ^= 1
    path.write_bytes(bytes(content))
    view: FeatureView = FeatureStore(tmp_path, store.layout).view()
    with pytest.raises(DamagedIndexError, match="row 37 is altered"):
        FlatIndex(view, CPU).search(integers(1, 16), 5)


def test_threads_share_an_index(tmp_path: Path) -> None:
    rows = heavy_tailed(300, 17)
    index, source = FlatIndex(write_store(tmp_path, rows, "float16").view(), CPU, 16), Rows(rows)
    done: list[int] = []

    def search(seed: int) -> None:
        for _ in range(5):
            assert_exact(index, source, integers(1 + seed, 18 + seed), 10)
        done.append(seed)

    threads = [threading.Thread(target=search, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == [0, 1, 2, 3]


def test_scores_of_many_queries_are_computed_in_groups(tmp_path: Path) -> None:
    rows = heavy_tailed(80, 19)
    view = write_store(tmp_path, rows, "float16").view()
    assert_exact(FlatIndex(view, CPU, block_rows=2**14), Rows(rows), integers(2100, 20), 3)


def test_openmp_threads_of_a_scan_do_not_start_threads() -> None:
    # FAISS's and PyTorch's OpenMP can be one library, and PyTorch's first operation in a thread sets its number.
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with ThreadPoolExecutor(1, initializer=use_one_thread) as threads:
            threads.submit(torch.get_num_threads).result()
            assert threads.submit(import_faiss().omp_get_max_threads).result() == 1
    finally:
        torch.set_num_threads(before)
