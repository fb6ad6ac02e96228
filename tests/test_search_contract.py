"""The contract of every search backend on every device: the ids of an argsort in float64, ties included.

Rows are small integers times powers of two, so that products are exact in half precision and ties are real.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from tracin_ann.errors import DamagedIndexError, NonFiniteError, UsageError
from tracin_ann.search import (
    FlatIndex,
    IVFIndex,
    IVFParams,
    SearchIndex,
    TwoSidedIndex,
    choose_index,
    search_both,
)
from tracin_ann.search.cluster import stratified_ids, survey
from tracin_ann.types import Float32, Int64, RowSource

DIM = 12


class Rows:
    """A `RowSource` over arrays; blocks come read-only, as from a mapped file."""

    def __init__(self, rows: np.ndarray, ids: np.ndarray | None = None) -> None:
        self.rows = np.asarray(rows, dtype=np.float32)
        self.ids = np.arange(len(rows), dtype=np.int64) if ids is None else np.asarray(ids, dtype=np.int64)
        self.rows.setflags(write=False)

    @property
    def dim(self) -> int:
        return self.rows.shape[1]

    def __len__(self) -> int:
        return len(self.rows)

    def blocks(self, block_rows: int) -> Iterator[tuple[Int64, Float32]]:
        for at in range(0, len(self.rows), block_rows):
            yield self.ids[at : at + block_rows], self.rows[at : at + block_rows]

    def take(self, ids: Sequence[int] | Int64) -> Float32:
        where = {number: row for row, number in enumerate(self.ids.tolist())}
        return self.rows[[where[number] for number in np.asarray(ids).tolist()]]


def flat(source: RowSource, device: torch.device) -> SearchIndex:
    return FlatIndex(source, device, block_rows=37)


def ivf(source: RowSource, device: torch.device) -> SearchIndex:
    return IVFIndex.build(source, IVFParams(scan_fraction=1.0), device)


def reloaded_ivf(source: RowSource, device: torch.device) -> SearchIndex:
    with tempfile.TemporaryDirectory() as directory:
        IVFIndex.build(source, IVFParams(scan_fraction=1.0), device).save(Path(directory))
        return IVFIndex.load(Path(directory), device)


Backend = Callable[[RowSource, torch.device], SearchIndex]


@pytest.fixture(params=[flat, ivf, reloaded_ivf], ids=lambda backend: backend.__name__)
def backend(request: pytest.FixtureRequest) -> Backend:
    return request.param


def integers(n: int, seed: int, span: int = 4) -> Float32:
    return np.random.default_rng(seed).integers(-span, span + 1, (n, DIM)).astype(np.float32)


def heavy_tailed(n: int, seed: int) -> Float32:
    powers = np.random.default_rng(seed + 1).choice([1, 2, 4, 16], size=(n, 1), p=[0.6, 0.25, 0.1, 0.05])
    return integers(n, seed) * powers.astype(np.float32)


def oracle(source: Rows, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return ids and scores [Q, min(k, N)] by argsort in float64; ties by rising id."""
    scores = queries.astype(np.float64) @ source.rows.astype(np.float64).T
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return source.ids[order], np.take_along_axis(scores, order, axis=1)


def assert_exact(index: SearchIndex, source: Rows, queries: np.ndarray, k: int) -> None:
    ids, scores = oracle(source, queries, k)
    top = index.search(queries, k)
    assert [found.tolist() for found in top.ids] == ids.tolist()
    assert [found.tolist() for found in top.scores] == scores.tolist()
    assert all(found.dtype == np.int64 for found in top.ids)
    assert all(found.dtype == np.float32 for found in top.scores)
    low_ids, low_scores = oracle(source, -queries, k)
    proponents, opponents = search_both(index, queries, k)
    assert [found.tolist() for found in proponents.ids] == ids.tolist()
    assert [found.tolist() for found in proponents.scores] == scores.tolist()
    assert [found.tolist() for found in opponents.ids] == low_ids.tolist()
    assert [found.tolist() for found in opponents.scores] == (-low_scores).tolist()


CASES = {
    "heavy tail": heavy_tailed(700, 0),
    "one row": integers(1, 1),
    "few rows": integers(9, 2),
    "duplicates": np.repeat(heavy_tailed(40, 3), 8, axis=0),
    "duplicates far apart": np.tile(heavy_tailed(40, 4), (8, 1)),
    "all rows equal": np.tile(integers(1, 5), (120, 1)),
    "all rows zero": np.zeros((90, DIM), np.float32),
    "some rows zero": heavy_tailed(200, 6) * (np.arange(200) % 3 > 0)[:, None],
    "an outlier": np.concatenate([integers(150, 7), integers(1, 8) * 2.0**13, integers(150, 9)]),
    "tiny": heavy_tailed(300, 10) * 2.0**-60,
    "huge": heavy_tailed(300, 11) * 2.0**60,
}


@pytest.mark.parametrize("k", [1, 10, 1000])
@pytest.mark.parametrize("case", CASES)
def test_answers_are_the_oracles(backend: Backend, device: torch.device, case: str, k: int) -> None:
    source = Rows(CASES[case])
    queries = np.concatenate([integers(6, 20), np.zeros((1, DIM), np.float32)])
    assert_exact(backend(source, device), source, queries, k)


def test_ids_are_the_sources(backend: Backend, device: torch.device) -> None:
    source = Rows(heavy_tailed(300, 12), ids=5_000_000_000 + 7 * np.arange(300))
    assert_exact(backend(source, device), source, integers(5, 21), 10)


def test_no_queries(backend: Backend, device: torch.device) -> None:
    index = backend(Rows(integers(50, 13)), device)
    for top in (
        index.search(np.zeros((0, DIM), np.float32), 5),
        *search_both(index, np.zeros((0, DIM), np.float32), 5),
    ):
        assert (top.ids, top.scores, top.rows_scored.tolist()) == ((), (), [])


def test_no_rows() -> None:
    source = Rows(np.zeros((0, DIM)))
    assert_exact(FlatIndex(source, torch.device("cpu")), source, integers(2, 36), 5)


def test_says_what_it_is(backend: Backend, device: torch.device) -> None:
    index = backend(Rows(integers(50, 13)), device)
    assert (index.kind, index.dim, len(index)) == ("flat" if backend is flat else "ivf", DIM, 50)
    assert isinstance(index, TwoSidedIndex) == (backend is flat)


def test_a_second_search_answers_alike(backend: Backend, device: torch.device) -> None:
    source = Rows(heavy_tailed(300, 14))
    index = backend(source, device)
    for seed in (22, 23):
        assert_exact(index, source, integers(4, seed), 7)


@pytest.mark.parametrize(
    ("queries", "k", "error"),
    [
        (np.zeros((2, DIM), np.float32), 0, UsageError),
        (np.zeros((2, DIM + 1), np.float32), 5, UsageError),
        (np.zeros(DIM, np.float32), 5, UsageError),
        (np.full((2, DIM), np.nan, np.float32), 5, NonFiniteError),
    ],
)
def test_bad_queries_are_refused(backend: Backend, queries: Float32, k: int, error: type[Exception]) -> None:
    index = backend(Rows(integers(50, 15)), torch.device("cpu"))
    with pytest.raises(error):
        index.search(queries, k)
    with pytest.raises(error):
        search_both(index, queries, k)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_is_named(backend: Backend, poison: float) -> None:
    rows = integers(60, 16)
    rows[41, 3] = poison
    source = Rows(rows, ids=100 + np.arange(60))
    with pytest.raises(NonFiniteError, match="row 141 "):
        search_both(backend(source, torch.device("cpu")), np.abs(integers(1, 24)) + 1, 5)


def test_many_queries_are_answered_in_chunks(device: torch.device) -> None:
    source = Rows(heavy_tailed(80, 17))
    queries = integers(2100, 25)
    assert_exact(FlatIndex(source, device, block_rows=2**14), source, queries, 3)
    assert_exact(ivf(source, device), source, queries, 3)


def test_the_budget_bounds_what_is_scored(device: torch.device) -> None:
    source = Rows(heavy_tailed(2000, 18))
    whole = IVFIndex.build(source, IVFParams(nlist=40), device)
    queries = integers(30, 26)
    sizes = whole.search(queries[:1], 2000).rows_scored[0]
    assert sizes == 2000 + 40
    for fraction in (0.1, 0.3):
        top = whole.probing(scan_fraction=fraction).search(queries, 5)
        assert (top.rows_scored <= 2000 * fraction + 40).all()
        assert [len(ids) for ids in top.ids] == [5] * 30
        exact = source.rows.astype(np.float64) @ queries.T.astype(np.float64)
        assert [s.tolist() for s in top.scores] == [exact[i, q].tolist() for q, i in enumerate(top.ids)]


def test_k_is_reached_past_the_budget(device: torch.device) -> None:
    source = Rows(heavy_tailed(500, 19))
    index = IVFIndex.build(source, IVFParams(nlist=50, scan_fraction=0.002), device)
    top = index.search(integers(20, 27), 100)
    assert [len(set(ids.tolist())) for ids in top.ids] == [100] * 20
    assert (top.rows_scored < 500 + 50).all()


def test_lists_find_the_tail(device: torch.device) -> None:
    source = Rows(
        np.random.default_rng(28).standard_normal((4000, DIM)) * 2.0 ** np.repeat([0, 2, 4], [3000, 800, 200])[:, None]
    )
    queries = np.random.default_rng(29).standard_normal((50, DIM)).astype(np.float32)
    top = IVFIndex.build(source, IVFParams(scan_fraction=0.2), device).search(queries, 10)
    ids, _ = oracle(source, queries, 10)
    found = [len(np.intersect1d(a, b)) for a, b in zip(top.ids, ids, strict=True)]
    assert np.mean(found) / 10 >= 0.95


def test_the_sample_spans_the_norms() -> None:
    source = Rows(2.0 ** np.linspace(-10, 10, 1000)[:, None] * np.ones((1000, DIM)), ids=50 + np.arange(1000))
    measured = survey(source, 300)
    sample = stratified_ids(measured, 100, seed=3)
    assert ((sample - 50) // 10).tolist() == list(range(100))
    assert sample.tolist() == stratified_ids(measured, 100, seed=3).tolist()
    assert sample.tolist() != stratified_ids(measured, 100, seed=4).tolist()
    assert stratified_ids(measured, 5000, seed=3).tolist() == source.ids.tolist()


def test_built_twice_answers_alike(device: torch.device) -> None:
    source, queries = Rows(heavy_tailed(600, 30)), integers(10, 31)
    params = IVFParams(scan_fraction=0.1, seed=5)
    first, second = (IVFIndex.build(source, params, device).search(queries, 10) for _ in range(2))
    assert [ids.tolist() for ids in first.ids] == [ids.tolist() for ids in second.ids]
    assert first.rows_scored.tolist() == second.rows_scored.tolist()


def test_a_saved_index_answers_alike(device: torch.device, tmp_path: Path) -> None:
    index = IVFIndex.build(Rows(heavy_tailed(600, 32)), IVFParams(scan_fraction=0.1, alpha=0.3), device)
    index.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(IVFIndex.FILES)
    loaded, queries = IVFIndex.load(tmp_path, device), integers(10, 33)
    assert loaded.params == index.params
    for before, after in zip(search_both(index, queries, 10), search_both(loaded, queries, 10), strict=True):
        assert [ids.tolist() for ids in before.ids] == [ids.tolist() for ids in after.ids]
        assert [scores.tolist() for scores in before.scores] == [scores.tolist() for scores in after.scores]
        assert before.rows_scored.tolist() == after.rows_scored.tolist()


@pytest.mark.parametrize("harm", ["no lists", "no caption", "short lists", "short caption", "other version", "mixed"])
def test_a_damaged_file_is_refused(tmp_path: Path, harm: str) -> None:
    cpu = torch.device("cpu")
    IVFIndex.build(Rows(integers(200, 34)), IVFParams(), cpu).save(tmp_path)
    lists, caption = (tmp_path / name for name in IVFIndex.FILES)
    if harm == "no lists":
        lists.unlink()
    elif harm == "no caption":
        caption.unlink()
    elif harm == "short lists":
        lists.write_bytes(lists.read_bytes()[:-300])
    elif harm == "short caption":
        caption.write_text(caption.read_text()[:-9])
    elif harm == "other version":
        caption.write_text(caption.read_text().replace('"version": 1', '"version": 2'))
    else:
        kept = caption.read_text()
        IVFIndex.build(Rows(integers(201, 35)), IVFParams(), cpu).save(tmp_path)
        caption.write_text(kept)
    with pytest.raises(DamagedIndexError, match="rebuild the index"):
        IVFIndex.load(tmp_path, cpu)


@pytest.mark.parametrize(
    "bad",
    [
        {"nlist": 0},
        {"alpha": -0.1},
        {"alpha": np.inf},
        {"scan_fraction": 0.0},
        {"scan_fraction": 1.1},
        {"seed": -1},
        {"train_rows": 0},
    ],
)
def test_bad_params_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(bad))):
        IVFParams(**bad)


@pytest.mark.parametrize(
    ("n_rows", "params"), [(0, IVFParams()), (10, IVFParams(nlist=11)), (100, IVFParams(nlist=20, train_rows=19))]
)
def test_too_few_rows_are_refused(n_rows: int, params: IVFParams) -> None:
    with pytest.raises(UsageError, match="too few rows"):
        IVFIndex.build(Rows(np.zeros((n_rows, DIM), np.float32)), params, torch.device("cpu"))


def test_number_of_lists() -> None:
    assert [IVFParams().lists_for(n) for n in (1, 15, 16, 1000, 1024, 60_000, 1_000_000)] == [
        1,
        1,
        2,
        125,
        128,
        980,
        4000,
    ]


def test_choice_of_backend() -> None:
    assert choose_index("auto", 99_999, 768).kind == "flat"
    assert choose_index("auto", 100_000, 768).kind == "ivf"
    assert "100,000 rows" in choose_index("auto", 100_000, 768).reason
    assert [choose_index(kind, 10, 4).kind for kind in ("flat", "ivf")] == ["flat", "ivf"]
    with pytest.raises(UsageError, match="'hnsw'"):
        choose_index("hnsw", 10, 4)
