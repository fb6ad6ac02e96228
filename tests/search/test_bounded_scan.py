"""Exact search by bounds: the certificate holds in floating point, and only rows that can be results are scored."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from test_search_contract import HARMS, Rows, normal, npz

from tracin_ann.errors import DamagedIndexError, NonFiniteError, UsageError
from tracin_ann.files import file_digest
from tracin_ann.search import FlatIndex, calibrate, scale_to_unit, search_both
from tracin_ann.search import bounded_search as module
from tracin_ann.search.bounded_scan import BoundedScan, BoundedScanParams
from tracin_ann.search.bounds import ReducedQueries, reduce_rows
from tracin_ann.search.settings import Setting
from tracin_ann.types import Float32, Int64, TopK

CPU = torch.device("cpu")
NEVER_SCAN = Setting(10**9)


def concentrated(n: int, seed: int, dim: int = 60) -> Float32:
    """Return rows with heavy-tailed norms, whose energy decreases fast with the dimension, in a random basis."""
    random = np.random.default_rng(seed)
    rows = random.standard_normal((n, dim)) * np.arange(1, dim + 1) ** -1.2
    basis = np.linalg.qr(random.standard_normal((dim, dim)))[0]
    return (rows @ basis * np.exp(random.standard_normal((n, 1)))).astype(np.float32)


def rank(scores: np.ndarray, ids: np.ndarray, k: int) -> list[list[tuple[int, float]]]:
    """Return (id, score) of the best k scores, rounded to float32, for each query; ties by increasing id."""
    rounded = scores.astype(np.float32)
    order = [np.lexsort((ids, -row))[:k] for row in rounded]
    return [list(zip(ids[at].tolist(), row[at].tolist(), strict=True)) for at, row in zip(order, rounded, strict=True)]


def make_hits(top: TopK) -> list[list[tuple[int, float]]]:
    pairs = zip(top.ids, top.scores, strict=True)
    return [list(zip(ids.tolist(), scores.tolist(), strict=True)) for ids, scores in pairs]


def assert_exact(index: BoundedScan, queries: Float32, k: int, allowed: Int64 | None = None) -> tuple[TopK, TopK]:
    source = index.source
    ids = source.ids if allowed is None else allowed
    scores = queries.astype(np.float64) @ source.take(ids).astype(np.float64).T
    proponents, opponents = search_both(index, queries, k, allowed)
    assert make_hits(proponents) == make_hits(index.search(queries, k, allowed)) == rank(scores, ids, k)
    assert make_hits(opponents) == [[(id_, -score) for id_, score in row] for row in rank(-scores, ids, k)]
    return proponents, opponents


whole = st.integers(-4095, 4095).map(float)


@st.composite
def adversarial_rows(draw: st.DrawFn, dim: int = 7) -> Float32:
    """Return rows of whole numbers times powers of two, with ties, near ties and zero rows, and extreme norms.

    Float64 sums of products with whole numbers are exact, and can be equal after rounding to float32.
    """
    rows = draw(hnp.arrays(np.float64, st.tuples(st.integers(1, 40), st.just(dim)), elements=whole))
    powers = draw(st.lists(st.sampled_from([-60, -1, 0, 0, 1, 60]), min_size=len(rows), max_size=len(rows)))
    rows = np.ldexp(rows, np.array(powers)[:, None])
    again = draw(st.lists(st.integers(0, len(rows) - 1), max_size=20))
    rows = np.concatenate([rows, rows[again]])
    for at in draw(st.lists(st.integers(0, len(rows) - 1), max_size=5)):
        rows[at, draw(st.integers(0, dim - 1))] *= draw(st.sampled_from([-1.0, 0.0, 1 + 2.0**-11]))
    return rows.astype(np.float32)


queries_strategy = hnp.arrays(np.float32, st.tuples(st.integers(1, 4), st.just(7)), elements=whole)


@settings(max_examples=80, deadline=None)
@given(adversarial_rows(), queries_strategy, st.integers(1, 7), st.integers(1, 70), st.booleans(), st.data())
def test_results_equal_those_of_all_exact_scores(
    rows: Float32, queries: Float32, width: int, k: int, is_scanned: bool, data: st.DataObject
) -> None:
    """Blocks of a few rows, so that all steps of a search occur."""
    source = Rows(rows, ids=100 + 3 * np.arange(len(rows)))
    passing = data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows)))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (
            ("_FIRST_ROWS", 3),
            ("_SCORES_AT_ONCE", 16),
            ("_MORE_FIRST", 1),
            ("_ROWS_READ_AT_ONCE", 5),
        ):
            patch.setattr(module, name, value)
        if is_scanned:
            patch.setattr("tracin_ann.search.bounded_scan._LEAST_SCANNED", 1)
        elif data.draw(st.booleans()):
            patch.setattr(module, "_MOST_PAIRS", 6)
        index = BoundedScan.build(source, BoundedScanParams(width), CPU).with_settings(
            Setting(1 if is_scanned else 10**9)
        )
        for allowed in (None, source.ids[np.array(passing)]):
            assert_exact(index, queries, k, allowed)


numbers = st.floats(-1, 1, width=32)


@settings(max_examples=150, deadline=None)
@given(
    hnp.arrays(np.float32, (4, 6), elements=numbers),
    hnp.arrays(np.float32, (2, 6), elements=numbers),
    hnp.arrays(np.float64, st.tuples(st.just(6), st.integers(1, 6)), elements=st.floats(-1, 1)),
    st.lists(st.sampled_from([-148, -120, -70, -3, 0, 60, 126]), min_size=4, max_size=4),
)
def test_bounds_hold_for_any_basis_and_any_order_of_sums(
    rows: Float32, queries: Float32, basis: np.ndarray, powers: list[int]
) -> None:
    """The margins include all rounding errors; the exact products are rational numbers."""
    norms = np.linalg.norm(basis, axis=0)
    basis = basis / np.maximum(norms, 1) / np.sqrt(basis.shape[1])
    rows, (queries, _) = np.ldexp(rows, np.array(powers)[:, None]), scale_to_unit(queries)
    row_norms = np.linalg.norm(rows.astype(np.float64), axis=1)
    reduced, asked = reduce_rows(np.arange(4), rows, row_norms, basis), ReducedQueries.reduce(queries, basis)
    stored = np.ldexp(reduced.stored_NR.astype(np.float32), reduced.exponent_N[:, None])
    for q, query in enumerate(queries):
        for row, values in enumerate(rows):
            exact = sum(Fraction(float(a)) * Fraction(float(b)) for a, b in zip(query, values, strict=True))
            products = asked.reduced_QR[q] * stored[row]
            margin = asked.whole_Q[q] * reduced.rounding_N[row] + asked.missing_Q[q] * reduced.missing_N[row]
            for order in (products, products[::-1]):
                score = order.cumsum(dtype=np.float32)[-1]
                assert Fraction(float(score - margin)) <= exact <= Fraction(float(score + margin))
            assert Fraction(float(reduced.norm_N[row])) ** 2 >= sum(Fraction(float(a)) ** 2 for a in values)


def test_few_rows_are_scored_where_the_energy_is_concentrated() -> None:
    source, queries = Rows(concentrated(8000, 1)), concentrated(40, 2)
    queries[3] = 0
    index = BoundedScan.build(source, BoundedScanParams(width=24), CPU)
    tops = assert_exact(index, queries, 10)
    for top in tops:
        few = np.delete(top.rows_scored, 3)
        assert few.max() < 8000 / 8 and few.mean() < 400
        assert top.rows_scored[3] >= 8000  # all scores of a zero query are equal
    none, some = TopK((), (), np.zeros(0, np.int64)), TopK(((),), ((),), np.array([124]))
    assert index.describe_exactness(some, none) == (
        "exact: 1.55% and 0.00% of the rows scored for proponents and opponents"
    )


def test_few_pairs_wait_to_be_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    source, queries = Rows(concentrated(3000, 27)), concentrated(20, 28)
    index = BoundedScan.build(source, BoundedScanParams(width=10), CPU).with_settings(NEVER_SCAN)
    usual = np.concatenate([top.rows_scored for top in index.search_both(queries, 10)])
    limit = int((usual - 32).clip(0).sum()) // 2
    monkeypatch.setattr(module, "_MOST_PAIRS", limit)
    few = np.concatenate([top.rows_scored for top in assert_exact(index, queries, 10)])
    is_scanned = few >= 3000
    assert 0 < is_scanned.sum() < len(few) and few[~is_scanned].sum() <= limit + 64 * len(few)
    assert usual[is_scanned].min() > np.median(usual)


def test_all_rows_are_scanned_where_bounds_exclude_none() -> None:
    source, queries = Rows(np.random.default_rng(3).standard_normal((3000, 40))), normal(9, 4, 40)
    index = BoundedScan.build(source, BoundedScanParams(width=2), CPU)
    for top in assert_exact(index, queries, 10):
        assert (top.rows_scored > 3000).all()
    for top in assert_exact(index.with_settings(NEVER_SCAN), queries, 10):
        assert (top.rows_scored <= 3000).all()


class CountingScorer(module.StoredScorer):
    """A scorer that counts reduced rows."""

    rows = 0

    def start(self, parts, where_A, out_QA):
        CountingScorer.rows += len(parts[0].exponent_B)
        super().start(parts, where_A, out_QA)


@pytest.mark.parametrize("factor", [1.0, 1e-3])
def test_a_pass_ends_where_the_largest_norm_of_the_rest_is_too_small(
    monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    random = np.random.default_rng(5)
    rows = random.standard_normal((2000, 30)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    rows[50:] *= np.float32(factor)
    query = rows[:1] + rows[1:2]
    monkeypatch.setattr(module, "StoredScorer", CountingScorer)
    monkeypatch.setattr(module, "_FIRST_ROWS", 100)
    CountingScorer.rows = 0
    index = BoundedScan.build(Rows(rows), BoundedScanParams(width=20), CPU).with_settings(NEVER_SCAN)
    top = index.search(query, 3)
    scores = query.astype(np.float64) @ rows.astype(np.float64).T
    assert make_hits(top) == rank(scores, np.arange(2000), 3)
    assert CountingScorer.rows == 100 if factor < 1 else 100 < CountingScorer.rows <= 2000


class CountedRows(Rows):
    """Rows that count those that are read by id."""

    taken = 0

    def take(self, ids: Sequence[int] | Int64) -> Float32:
        self.taken += len(ids)
        return super().take(ids)


def test_each_row_is_read_once_for_a_batch_and_again_if_it_may_be_a_result() -> None:
    source, queries = CountedRows(concentrated(6000, 6)), concentrated(30, 7)
    index = BoundedScan.build(source, BoundedScanParams(width=40), CPU).with_settings(NEVER_SCAN)
    for some in (queries[:1], queries):
        source.taken = 0
        tops = index.search_both(some, 5)
        n_scored = sum(int(top.rows_scored.sum()) for top in tops)
        assert source.taken <= n_scored + 2 * 2 * 5 * len(some)
        assert source.taken < 3 * len(source)
    assert index.most_rows_read(30, 5) == len(source)


@pytest.mark.parametrize("power", [-140, -60, 0, 60, 100])
def test_queries_of_any_norm_give_the_same_rows(power: int) -> None:
    source, queries = Rows(concentrated(3000, 8)), concentrated(5, 9)
    index = BoundedScan.build(source, BoundedScanParams(width=30), CPU)
    assert_exact(index, np.ldexp(queries, power), 10)


def test_norms_from_the_smallest_to_the_largest_numbers() -> None:
    """The norm of a row and its reduced score can exceed float32, although its score does not."""
    rows = concentrated(2000, 10)
    rows /= np.abs(rows).max(axis=1, keepdims=True)
    powers = np.random.default_rng(11).integers(-140, 127, 2000)
    source = Rows(np.ldexp(rows, powers[:, None]).astype(np.float32))
    queries = concentrated(6, 12) * np.float32(1e-4)
    queries[5] = 0
    queries[5, 4] = 2.0**-100
    index = BoundedScan.build(source, BoundedScanParams(width=20), CPU)
    assert_exact(index, queries, 1500)
    tiny = np.flatnonzero(powers < -100)
    assert_exact(index, queries, 20, tiny)


def test_a_score_that_is_not_finite_is_rejected() -> None:
    source, query = Rows(concentrated(900, 13)), concentrated(1, 14)
    huge = Rows(source.rows * np.float32(1e37))
    with pytest.raises(NonFiniteError, match="inner product with row"):
        BoundedScan.build(huge, BoundedScanParams(), CPU).search(query * np.float32(1e15), 3)
    index = BoundedScan.build(source, BoundedScanParams(), CPU)
    best = int(index.search(query, 1).ids[0][0])
    source.rows = source.rows.copy()
    source.rows[best] = np.nan
    with pytest.raises(NonFiniteError, match=f"row {best} "):
        index.search(query, 1)


def test_results_do_not_depend_on_threads_batches_or_torch_modes() -> None:
    source, queries = Rows(concentrated(5000, 15)), concentrated(24, 16)
    index = BoundedScan.build(source, BoundedScanParams(width=16), CPU)
    expected = [make_hits(top) for top in index.search_both(queries, 10)]
    with ThreadPoolExecutor(4) as threads:
        for tops in threads.map(lambda _: index.search_both(queries, 10), range(8)):
            assert [make_hits(top) for top in tops] == expected
    singles = [index.search_both(query[None], 10) for query in queries]
    assert [[make_hits(pair[side])[0] for pair in singles] for side in (0, 1)] == expected
    with torch.inference_mode():
        assert [make_hits(top) for top in index.search_both(queries, 10)] == expected


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Rows, dict[str, bytes]]:
    """Return rows that the index reduces, and the files of the index."""
    source, folder = Rows(concentrated(600, 17, 300)), tmp_path_factory.mktemp("built")
    BoundedScan.build(source, BoundedScanParams(width=20), CPU).save(folder)
    return source, {name: (folder / name).read_bytes() for name in BoundedScan.FILES}


def write(folder: Path, files: dict[str, bytes | None]) -> None:
    for name, content in files.items():
        if content is not None:
            (folder / name).write_bytes(content)


def assert_refused(folder: Path, source: Rows, files: dict[str, bytes | None]) -> None:
    write(folder, files)
    with pytest.raises(DamagedIndexError, match="rebuild the index"):
        BoundedScan.load(folder, source, CPU)


def test_a_build_reports_its_progress_and_writes_the_same_files_again(
    tmp_path: Path, built: tuple[Rows, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, files = built
    monkeypatch.setattr("tracin_ann.search.bounded_scan._BLOCK_NUMBERS", 250 * 300)
    reported: list[tuple[int, int]] = []
    index = BoundedScan.build(
        source, BoundedScanParams(width=20), CPU, progress=lambda done, total: reported.append((done, total))
    )
    assert reported == [(250, 600), (500, 600), (600, 600)]
    index.save(tmp_path)
    loaded = BoundedScan.load(tmp_path, source, CPU)
    assert isinstance(loaded._rows.stored_NR.base, np.memmap) or isinstance(loaded._rows.stored_NR, np.memmap)
    assert loaded.params == index.params and loaded.find_faults(600, 0) == []
    queries = concentrated(5, 18, 300)
    assert make_hits(loaded.search(queries, 9)) == make_hits(index.search(queries, 9))
    monkeypatch.undo()
    BoundedScan.build(source, BoundedScanParams(width=20), CPU).save(tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in BoundedScan.FILES} == files
    size = sum(map(len, files.values()))
    assert 0 <= size - index.params.estimate_bytes(600, 300) < 3000


@pytest.mark.parametrize("name", BoundedScan.FILES)
@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_file_is_rejected(tmp_path: Path, built: tuple[Rows, dict[str, bytes]], name: str, harm: str) -> None:
    source, files = built
    assert_refused(tmp_path, source, files | {name: HARMS[harm](files[name])})


@pytest.mark.parametrize("name", BoundedScan.FILES)
def test_a_file_of_other_rows_is_rejected(tmp_path: Path, built: tuple[Rows, dict[str, bytes]], name: str) -> None:
    source, files = built
    BoundedScan.build(Rows(concentrated(600, 19, 300)), BoundedScanParams(width=20), CPU).save(tmp_path)
    assert_refused(tmp_path, source, {other: files[other] for other in BoundedScan.FILES if other != name})


@pytest.mark.parametrize(("n", "dim"), [(599, 300), (600, 299), (600, 301)])
def test_rows_of_another_shape_are_rejected(
    tmp_path: Path, built: tuple[Rows, dict[str, bytes]], n: int, dim: int
) -> None:
    assert_refused(tmp_path, Rows(concentrated(n, 17, dim)), built[1])


@pytest.mark.parametrize(
    "change",
    [{"version": 99}, {"caption": "lists"}, {"rows": 599}, {"files": []}, {"files": None}, {"more": 1}]
    + [{"params": {"width": -1, "seed": 0}}, {"energy": "1"}],
)
def test_an_altered_header_is_rejected(
    tmp_path: Path, built: tuple[Rows, dict[str, bytes]], change: dict[str, object]
) -> None:
    source, files = built
    caption = json.dumps(json.loads(files["bounds.json"]) | change).encode()
    assert_refused(tmp_path, source, files | {"bounds.json": caption})


@pytest.mark.parametrize("array", ["basis_FR", "ids_N", "exponent_N", "rounding_N", "missing_N", "norm_N"])
@pytest.mark.parametrize("change", ["shorter", "deeper", "other numbers"])
def test_arrays_that_do_not_fit_are_rejected(
    tmp_path: Path, built: tuple[Rows, dict[str, bytes]], array: str, change: str
) -> None:
    """Also if the digest is that of the altered file."""
    source, files = built
    write(tmp_path, files)
    with np.load(tmp_path / "bounds.npz") as stored:
        original = stored[array]
    altered = {"shorter": original[:-1], "deeper": original[..., None], "other numbers": original.astype(np.float64)}
    (tmp_path / "bounds.npz").write_bytes(npz(files["bounds.npz"], **{array: altered[change]}))
    caption = json.loads(files["bounds.json"])
    path = tmp_path / "bounds.npz"
    caption["files"][1] = {"size": path.stat().st_size, "digest": file_digest(path)}
    (tmp_path / "bounds.json").write_text(json.dumps(caption))
    with pytest.raises(DamagedIndexError, match="rebuild the index"):
        BoundedScan.load(tmp_path, source, CPU)


def test_wrong_reduced_rows_are_found() -> None:
    source = Rows(concentrated(500, 20), ids=7 + 2 * np.arange(500))
    assert BoundedScan.build(source, BoundedScanParams(width=12), CPU).find_faults(500, 0) == []
    for name, change, message in (
        ("stored_NR", lambda array: np.roll(array, 1, axis=0), "wrong bounds"),
        ("missing_N", lambda array: array * np.float32(0.99), "wrong bounds"),
        ("rounding_N", lambda array: array * np.float32(0.3), "wrong bounds"),
        ("norm_N", lambda array: array[::-1].copy(), "not sorted"),
        ("norm_N", lambda array: array * np.float32(0.99), "wrong bounds"),
        ("ids_N", lambda array: array + 1, "do not match 500 stored rows"),
    ):
        index = BoundedScan.build(source, BoundedScanParams(width=12), CPU)
        getattr(index._rows, name)[:] = change(getattr(index._rows, name))
        assert message in "; ".join(index.find_faults(500, 0)), name


def test_an_unknown_row_is_reported() -> None:
    source = Rows(concentrated(300, 21))
    index = BoundedScan.build(source, BoundedScanParams(width=12), CPU)
    index._rows.ids_N[:] += 1
    with pytest.raises(DamagedIndexError, match="unknown row: got id 300, .*rebuild the index"):
        index.search(normal(3, 22, source.dim), 300)


@pytest.mark.parametrize(("params", "name"), [({"width": 0}, "width"), ({"seed": -1}, "seed")])
def test_invalid_parameters_are_rejected(params: dict[str, int], name: str) -> None:
    with pytest.raises(UsageError, match=f"invalid {name}"):
        BoundedScanParams(**params)
    with pytest.raises(UsageError, match="too few rows"):
        BoundedScan.build(Rows(np.zeros((0, 5))), BoundedScanParams(), CPU)


def test_the_width_preserves_most_of_the_energy() -> None:
    random = np.random.default_rng(23)
    widths = []
    for rank_ in (30, 100, 280, 3000):
        rows = random.standard_normal((900, rank_)) @ random.standard_normal((rank_, 320))
        index = BoundedScan.build(Rows(rows), BoundedScanParams(), CPU)
        widths.append(index.width)
        assert index._reduction.energy > 0.8
    assert widths == [64, 128, 192, 256]
    assert BoundedScan.build(Rows(normal(50, 24, 40)), BoundedScanParams(), CPU).width == 40


def test_calibration_measures_the_only_setting() -> None:
    source, queries = Rows(concentrated(2000, 25)), concentrated(60, 26)
    index = BoundedScan.build(source, BoundedScanParams(width=24), CPU)
    calibration = calibrate(index, FlatIndex(source, CPU), queries, 0.95)
    for points in (calibration.proponents, calibration.opponents):
        (point,) = points
        assert point.recall == 1.0 and point.scored < 1000 and point.setting == index.settings[0]
    assert not index.will_scan(10) and index.will_scan(2000) and index.will_scan(5, np.arange(5))
    norms, shares = index.measure(np.concatenate([queries, np.zeros((1, 60), np.float32)]))
    np.testing.assert_allclose(norms[:-1], np.linalg.norm(queries.astype(np.float64), axis=1))
    assert ((shares[:-1] > 0.3) & (shares[:-1] <= 1 + 1e-6)).all() and norms[-1] == shares[-1] == 0
