"""Search in inverted lists: recall, counts of scored rows, outliers and rows near zero, filters, calibration."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from test_search_contract import DIM, Rows, heavy_tailed, integers, normal, oracle

from tracin_ann.errors import NonFiniteError, UsageError
from tracin_ann.files.json_records import read_record
from tracin_ann.search import FlatIndex, IVFIndex, IVFParams, coarse_quantizer, search_both
from tracin_ann.search import calibration as calibration_module
from tracin_ann.search.calibration import Calibration, Cost, calibrate, compute_recalls, recall_lower_bound
from tracin_ann.search.clustering import survey
from tracin_ann.search.coarse_quantizer import train_assigner
from tracin_ann.search.construction import scale_rows
from tracin_ann.search.query_distribution import Comparison, QueryDistribution
from tracin_ann.search.reduction import fit_axes, fit_reduction
from tracin_ann.search.settings import Setting
from tracin_ann.search.topk import negate
from tracin_ann.types import Float32, Int64, TopK

CPU = torch.device("cpu")
N = 3000


@pytest.fixture(scope="module")
def source() -> Rows:
    return Rows(normal(N, 0))


@pytest.fixture(scope="module")
def index(source: Rows) -> IVFIndex:
    return IVFIndex.build(source, IVFParams(), CPU)


def mean_recall(found: TopK, source: Rows, queries: np.ndarray, k: int = 10) -> float:
    ids, _ = oracle(source, queries, k)
    return float(np.mean([len(np.intersect1d(a, b)) / k for a, b in zip(found.ids, ids, strict=True)]))


@pytest.mark.parametrize("codes", ["sq8", "sq4", "fp16"])
def test_scoring_a_part_of_the_rows_finds_the_answers(source: Rows, codes: str) -> None:
    queries = normal(60, 1)
    lists = IVFIndex.build(source, IVFParams(codes=codes), CPU).with_settings(Setting(N // 6, N // 6, 0.2))
    for signed in (queries, -queries):
        found = lists.search(signed, 10)
        assert found.rows_scored.max() < N / 2
        assert mean_recall(found, source, signed) >= 0.95
        exact = source.rows.astype(np.float64) @ signed.T.astype(np.float64)
        for q, (ids, scores) in enumerate(zip(found.ids, found.scores, strict=True)):
            np.testing.assert_allclose(scores, exact[ids, q], rtol=1e-4, atol=1e-4)
            assert (np.diff(scores) <= 0).all()


def test_recall_grows_with_the_budget(index: IVFIndex, source: Rows) -> None:
    queries = normal(60, 2)
    found = [index.with_settings(Setting(codes, codes, 0.2)).search(queries, 10) for codes in (64, 400, 1500)]
    recall = [mean_recall(top, source, queries) for top in found]
    scored = [float(top.rows_scored.mean()) for top in found]
    assert recall == sorted(recall) and scored == sorted(scored)
    assert recall[-1] >= 0.99


def count_scored(index: IVFIndex, setting: Setting, queries: np.ndarray, aside: int = 0) -> list[int]:
    """Return the numbers of scored groups, list centroids and rows, counted in a loop, for each query."""
    tree, counts = index.tree, []
    n_groups = int(np.ceil(setting.centroids * len(tree.group_GR) / tree.n_lists))
    for query in queries / np.linalg.norm(queries, axis=1, keepdims=True):
        worth_G = tree.group_GR @ query + setting.alpha * tree.group_radius_G
        near = np.isin(tree.parent_L, np.argsort(-worth_G)[:n_groups]) & (tree.size_L > 0)
        worth_L = (tree.centroid_LR @ query + setting.alpha * tree.radius_L)[near]
        rows = 0
        for size in tree.size_L[near][np.argsort(-worth_L)].tolist():
            rows += size if rows < setting.codes else 0
        counts.append(len(tree.group_GR) + int(near.sum()) + rows + aside)
    return counts


COUNTED = [Setting(400, 200, 0.2), Setting(300, 100, 0.0), Setting(10**3, 10**6, 0.5), Setting(100, 10**6, 0.1)]


@pytest.mark.parametrize("setting", COUNTED)
def test_the_count_equals_the_number_of_scored_rows(index: IVFIndex, source: Rows, setting: Setting) -> None:
    queries = normal(20, 3)
    assert index.tree.size_L.sum() == N
    found = index.with_settings(setting).search(queries, 10)
    assert found.rows_scored.tolist() == count_scored(index, setting, queries)
    rows = source.rows.copy()
    rows[:5] *= np.float32(1e6)
    spoilt = IVFIndex.build(Rows(rows), IVFParams(), CPU)
    assert spoilt.tree.size_L.sum() == N - 5
    assert spoilt.with_settings(setting).search(queries, 10).rows_scored.tolist() == count_scored(
        spoilt, setting, queries, aside=5
    )


def test_groups_are_found_for_each_query_as_for_all_together(index: IVFIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    queries = normal(16, 41)
    found = index.tree.probe(queries, 0.2, 5, 20)
    assert index.tree.probe(queries[:0], 0.2, 5, 20).list_QW.shape == (0, 20)
    monkeypatch.setattr(coarse_quantizer, "_FEW_QUERIES", 0)
    together = index.tree.probe(queries, 0.2, 5, 20)
    assert np.array_equal(found.list_QW, together.list_QW)
    assert np.array_equal(found.scored_Q, together.scored_Q)


def test_a_tree_stores_the_extents_of_its_lists() -> None:
    rows = normal(900, 42)
    assigner = train_assigner(rows[:500], 60, 0)
    list_B = np.concatenate([assigner.assign(rows[:400]), assigner.assign(rows[400:])])
    tree = assigner.make_tree(assigner.take_extents())
    assert tree.size_L.tolist() == np.bincount(list_B, minlength=tree.n_lists).tolist()
    parent_B = tree.parent_L[list_B]
    for radii, centres, of_B in (
        (tree.radius_L, tree.centroid_LR, list_B),
        (tree.group_radius_G, tree.group_GR, parent_B),
    ):
        square_B = np.square(rows.astype(np.float64) - centres[of_B]).sum(axis=1)
        mean = [square_B[of_B == at].mean() if (of_B == at).any() else 0.0 for at in range(len(centres))]
        np.testing.assert_allclose(radii, 1.5 * np.sqrt(mean), rtol=1e-3, atol=1e-3)
    square_BL = np.square(rows[:, None] - tree.centroid_LR).sum(axis=2)
    square_BG = np.square(rows[:, None] - tree.group_GR).sum(axis=2)
    for row, nearest in enumerate(np.argsort(square_BG, axis=1)[:, :3]):
        open_L = np.isin(tree.parent_L, nearest)
        assert square_BL[row, list_B[row]] <= square_BL[row, open_L].min() * (1 + 1e-4)


def test_lists_without_rows_are_not_counted() -> None:
    lists = IVFIndex.build(Rows(np.repeat(normal(30, 8), 30, axis=0)), IVFParams(), CPU)
    assert (lists.tree.size_L == 0).any()
    setting, queries = Setting(200, 10**6, 0.1), normal(6, 9)
    assert lists.with_settings(setting).search(queries, 10).rows_scored.tolist() == count_scored(
        lists, setting, queries
    )


@pytest.mark.parametrize("codes", ["sq8", "fp16"])
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_probing_all_lists_gives_the_scores_of_the_scan(source: Rows, codes: str, alpha: float) -> None:
    queries = normal(30, 29)
    lists = IVFIndex.build(source, IVFParams(codes=codes), CPU).with_settings(Setting(N - 1, 10**6, alpha))
    for found, signed, sign in zip(search_both(lists, queries, 10), (queries, -queries), (1, -1), strict=True):
        assert (found.rows_scored > N).all()  # more than a scan: centroids are counted as well
        _, scores = oracle(source, signed, 10)
        np.testing.assert_allclose(sign * np.stack(found.scores), scores, rtol=1e-4)


def test_a_nonfinite_score_is_rejected(source: Rows) -> None:
    """As in the scan: a product that overflows float32, and a row that was damaged after the build."""
    query, setting = normal(1, 30), Setting(500, 500, 0.2)
    huge = Rows(source.rows * np.float32(1e28))
    with pytest.raises(NonFiniteError):
        IVFIndex.build(huge, IVFParams(), CPU).with_settings(setting).search(query * np.float32(1e15), 3)
    spoilt = Rows(source.rows.copy())
    lists = IVFIndex.build(spoilt, IVFParams(), CPU).with_settings(setting)
    best = int(oracle(source, query, 1)[0][0, 0])
    assert lists.search(query, 1).ids[0].tolist() == [best]
    spoilt.rows = source.rows.copy()
    spoilt.rows[best] = np.nan
    with pytest.raises(NonFiniteError, match=f"row {best} "):
        lists.search(query, 1)


def test_each_direction_has_its_own_settings(index: IVFIndex) -> None:
    few, many = Setting(64, 64, 0.1), Setting(1500, 1500, 0.1)
    queries = normal(5, 4)
    proponents, opponents = search_both(index.with_settings(few, many), queries, 10)
    assert proponents.rows_scored.tolist() == index.with_settings(few).search(queries, 10).rows_scored.tolist()
    assert opponents.rows_scored.tolist() == index.with_settings(many).search(-queries, 10).rows_scored.tolist()


class CountedRows(Rows):
    """Rows that count the calls of `take`."""

    def __init__(self, rows: np.ndarray) -> None:
        super().__init__(rows)
        self.taken: list[int] = []

    def take(self, ids: Sequence[int] | Int64) -> Float32:
        self.taken.append(len(ids))
        return super().take(ids)


def make_difficult_rows() -> CountedRows:
    """Return rows with outliers, and rows near zero."""
    rows = normal(N, 60)
    rows[:5] *= np.float32(1e6)
    rows[5:40] *= np.float32(1e-12)
    return CountedRows(rows)


@pytest.mark.parametrize("passing", [None, 0.7, 0.01])
@pytest.mark.parametrize("settings", [(Setting(300, 200, 0.2), Setting(100, 100, 0.0)), (Setting(300, 300, 0.1),) * 2])
@pytest.mark.parametrize("n_queries", [1, 40, 300])
def test_both_directions_together_equal_two_searches(
    settings: tuple[Setting, Setting], n_queries: int, passing: float | None
) -> None:
    """To the bit, also for a zero query, for which all rows are scanned."""
    lists = IVFIndex.build(make_difficult_rows(), IVFParams(), CPU)
    queries = normal(n_queries, 61)
    queries[1:2] = 0
    allowed = None if passing is None else np.flatnonzero(np.random.default_rng(62).random(N) < passing)
    proponents, opponents = lists.with_settings(*settings).search_both(queries, 10, allowed)
    for found, setting, sign in ((proponents, settings[0], 1), (negate(opponents), settings[1], -1)):
        alone = lists.with_settings(setting).search(np.float32(sign) * queries, 10, allowed)
        assert [ids.tolist() for ids in found.ids] == [ids.tolist() for ids in alone.ids]
        assert [scores.tolist() for scores in found.scores] == [scores.tolist() for scores in alone.scores]
        assert found.rows_scored.tolist() == alone.rows_scored.tolist()


def test_one_direction_can_be_scanned_while_the_other_is_not(source: Rows) -> None:
    lists, queries = IVFIndex.build(source, IVFParams(), CPU), normal(3, 63)
    proponents, opponents = lists.with_settings(Setting(N, N, 0.1), Setting(300, 300, 0.2)).search_both(queries, 10)
    assert proponents.rows_scored.tolist() == [N] * 3
    assert opponents.rows_scored.max() < N
    for found, signed in ((proponents, queries), (negate(opponents), -queries)):
        assert mean_recall(found, source, signed) >= 0.95


def test_candidates_of_both_directions_are_read_once() -> None:
    source = CountedRows(normal(N, 64))
    lists = IVFIndex.build(source, IVFParams(), CPU).with_settings(Setting(300, 300, 0.2))
    source.taken.clear()
    lists.search_both(normal(1, 65), 10)
    assert source.taken == [80]
    source.taken.clear()
    lists.search_both(normal(100, 65), 10)
    assert len(source.taken) == 1


@pytest.mark.parametrize("factor", [1e6, 1e10])
@pytest.mark.parametrize("n_outliers", [1, 5])
def test_outliers_are_found_and_do_not_reduce_recall(source: Rows, factor: float, n_outliers: int) -> None:
    rows, queries = source.rows.copy(), normal(40, 5)
    rows[:n_outliers] *= np.float32(factor)
    spoilt = Rows(rows)
    assert survey(spoilt, 500).outlier_N.tolist() == [i < n_outliers for i in range(N)]
    found = IVFIndex.build(spoilt, IVFParams(), CPU).with_settings(Setting(N // 6, N // 6, 0.2)).search(queries, 10)
    assert mean_recall(found, spoilt, queries) >= 0.95
    best, _ = oracle(spoilt, queries, 1)
    assert [ids[0] for ids in found.ids] == best[:, 0].tolist()


@pytest.mark.parametrize("loud", [0, 5, 19])
def test_rows_near_zero_do_not_fill_the_lists_and_are_found(loud: int) -> None:
    """The best 20 rows are some rows with large norms and then rows near zero with a scale and order of their own."""
    rows = normal(1000, 6)
    rows[:, 0] = np.where((np.arange(1000) < loud) | (np.arange(1000) >= 100), 1, -1) * (np.abs(rows[:, 0]) + 0.1)
    rows[100:] *= np.float32(1e-12)
    rows[500:] = 0
    quiet, queries = Rows(rows), np.eye(1, DIM, dtype=np.float32)
    lists = IVFIndex.build(quiet, IVFParams(), CPU)
    assert lists.tree.size_L.sum() == 100
    found = lists.with_settings(Setting(90, 90, 0.1)).search(queries, 20)
    ids, scores = oracle(quiet, queries, 20)
    assert (ids[0] >= 100).sum() == 20 - loud
    assert found.ids[0].tolist() == ids[0].tolist()
    np.testing.assert_allclose(found.scores[0], scores[0], rtol=1e-5)


@pytest.mark.parametrize("rows", [np.tile(integers(1, 7), (900, 1)), np.repeat(normal(30, 8), 30, axis=0)])
def test_equal_rows_have_the_right_scores(rows: np.ndarray) -> None:
    source, queries = Rows(rows), normal(6, 9)
    found = IVFIndex.build(source, IVFParams(), CPU).with_settings(Setting(200, 200, 0.1)).search(queries, 10)
    _, scores = oracle(source, queries, 10)
    np.testing.assert_allclose(np.stack(found.scores), scores, rtol=1e-4)
    assert all(len(set(ids.tolist())) == 10 for ids in found.ids)


def test_k_results_are_returned_even_beyond_the_budget(index: IVFIndex, source: Rows) -> None:
    found = index.with_settings(Setting(5, 5, 0.1)).search(normal(4, 10), 300)
    assert [len(set(ids.tolist())) for ids in found.ids] == [300] * 4
    assert found.rows_scored.max() < N  # with a larger budget, not an exact scan


FAR = 5_000_000_000 + 7 * np.arange(N)


@pytest.mark.parametrize("ids", [np.arange(N), FAR], ids=["near", "far"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.8])
def test_a_filter_does_not_reduce_recall(source: Rows, ids: np.ndarray, share: float) -> None:
    """A filter of few rows is scanned; for more rows lists are probed, with FAISS's bitmap or its set of ids."""
    passing, queries = np.random.default_rng(11).random(N) < share, normal(40, 12)
    chosen = Rows(source.rows[passing], ids[passing])
    lists = IVFIndex.build(Rows(source.rows, ids), IVFParams(), CPU).with_settings(Setting(300, 300, 0.2))
    found = lists.search(queries, 10, chosen.ids)
    assert (found.rows_scored == len(chosen)).all() == (share < 0.1)
    assert share < 0.1 or found.rows_scored.mean() > 1.1 * lists.search(queries, 10).rows_scored.mean()
    assert found.rows_scored.max() <= len(chosen)
    assert all(np.isin(ids, chosen.ids).all() and len(set(ids.tolist())) == 10 for ids in found.ids)
    assert mean_recall(found, chosen, queries) >= 0.95


def test_the_number_of_hits_is_never_below_the_number_of_rows_that_pass_the_filter(
    index: IVFIndex, source: Rows
) -> None:
    counts = []
    for query in normal(20, 12):
        away = np.sort(np.argsort(source.rows @ query, kind="stable")[: N // 2])
        found = index.with_settings(Setting(40, 40, 0.2)).search(query[None], 10, away)
        assert len(np.intersect1d(found.ids[0], away)) == 10
        counts.append(int(found.rows_scored[0]))
    assert max(counts) > N // 2  # the lists have too few allowed rows, so a scan follows


@pytest.mark.parametrize("n_outliers", [5, 180])
def test_outliers_that_a_filter_excludes_do_not_reduce_recall(n_outliers: int) -> None:
    rows, queries = normal(20_000, 40), normal(20, 41)
    rows[:n_outliers] *= np.float32(1e6)
    remaining = np.arange(n_outliers, len(rows))
    lists = IVFIndex.build(Rows(rows), IVFParams(), CPU).with_settings(Setting(2000, 2000, 0.2))
    assert mean_recall(lists.search(queries, 10, remaining), Rows(rows[remaining], remaining), queries) >= 0.95


def test_the_stored_form_of_the_last_queries_is_not_used_for_others(index: IVFIndex) -> None:
    queries = normal(300, 11)
    alone = {n: index.measure(queries[:n])[1] for n in (1, 40, 256, 300)}
    for n in (300, 256, 40, 300, 1, 256):
        np.testing.assert_allclose(index.measure(queries[:n])[1], alone[n], rtol=1e-6)
    changed = queries[:40].copy()
    index.search(changed, 5)
    changed[7] = queries[250]
    np.testing.assert_allclose(index.measure(changed)[1][7], alone[300][250], rtol=1e-5)


def test_concurrent_searches_give_the_same_results(index: IVFIndex, source: Rows) -> None:
    queries = normal(30, 13)
    cases = [(Setting(codes, codes, 0.1), allowed) for codes in (100, 700) for allowed in (None, np.arange(0, N, 2))]
    alone = [index.with_settings(setting).search(queries, 10, allowed) for setting, allowed in cases]
    done: list[int] = []
    cold, together = IVFIndex.build(source, IVFParams(), CPU), threading.Barrier(len(cases))

    def search(which: int) -> None:
        setting, allowed = cases[which]
        together.wait()
        for _ in range(10):
            found = cold.with_settings(setting).search(queries, 10, allowed)
            right = [i.tolist() for i in found.ids] == [i.tolist() for i in alone[which].ids]
            if right and found.rows_scored.tolist() == alone[which].rows_scored.tolist():
                done.append(which)

    threads = [threading.Thread(target=search, args=(which,)) for which in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == [which for which in range(len(cases)) for _ in range(10)]


def test_the_reduction_does_not_centre_the_rows() -> None:
    rows = normal(800, 14, 96) @ np.diag(np.geomspace(1, 1e-3, 96)).astype(np.float32) + 5
    reduction = fit_reduction(rows, 24, 0)
    inner, reduced = rows @ rows.T, reduction.apply(rows) @ reduction.apply(rows).T
    assert np.abs(inner - reduced).max() <= 0.01 * np.abs(inner).max()
    assert reduction.energy > 0.99
    assert fit_reduction(rows, 96, 0).basis_FR is None


def test_the_randomised_reduction_retains_as_much_as_the_exact_one() -> None:
    random = np.random.default_rng(15)
    rows = (random.standard_normal((300, 2100)) * np.geomspace(1, 0.01, 2100)).astype(np.float32)
    found = fit_reduction(rows, 40, 0)
    values = np.linalg.svd(rows.astype(np.float64), compute_uv=False) ** 2
    assert found.energy >= 0.99 * values[:40].sum() / values.sum()
    basis = found.basis_FR
    assert basis is not None
    np.testing.assert_allclose(basis.T @ basis, np.eye(40), atol=1e-4)


@pytest.mark.parametrize(("dim", "width"), [(60, 100), (300, 40), (2100, 40)])
def test_the_squares_along_the_axes_are_those_of_the_sample(dim: int, width: int) -> None:
    # Rows of low rank: rounding can make an eigenvalue negative.
    rows = (normal(300, 16, 30) @ normal(30, 17, dim) * 1e3).astype(np.float32)
    axes = fit_axes(rows, width, 0)
    wide = rows.astype(np.float64)
    total = np.square(wide).sum()
    expected = np.square(wide @ axes.axis_FR).sum(axis=0)
    assert len(axes.square_R) == min(dim, width)
    np.testing.assert_allclose(axes.square_R, expected, atol=1e-5 * total)
    assert (axes.square_R >= 0).all()
    assert axes.total == pytest.approx(total, rel=1e-5)
    assert axes.reduce(10).energy == pytest.approx(expected[:10].sum() / total, rel=1e-4)
    assert axes.reduce(min(dim, width)).energy == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("shift", [-140, -126, -3, 0, 12, 126, 140])
def test_rows_are_scaled_by_any_power_of_two(shift: int) -> None:
    rows = np.array([[1.5, -3.25, 0.0, 2.0**-20]], np.float32) * np.float32(2.0 ** (-shift / 2))
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(scale_rows(rows, shift), np.ldexp(rows, shift))


def test_two_builds_give_the_same_results(source: Rows) -> None:
    queries = normal(10, 16)
    first, second = (
        IVFIndex.build(source, IVFParams(seed=5), CPU).with_settings(Setting(300, 300, 0.1)).search(queries, 10)
        for _ in range(2)
    )
    assert [ids.tolist() for ids in first.ids] == [ids.tolist() for ids in second.ids]
    assert first.rows_scored.tolist() == second.rows_scored.tolist()


@pytest.mark.parametrize("bad", [{"nlist": 0}, {"width": 0}, {"codes": "pq"}, {"seed": -1}, {"train_rows": 0}])
def test_invalid_parameters_are_rejected(bad: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=next(iter(bad))):
        IVFParams(**bad)


@pytest.mark.parametrize("bad", [(0, 1, 0.1), (1, 0, 0.1), (1, 1, -0.1), (1, 1, np.inf)])
def test_invalid_settings_are_rejected(bad: tuple[int, int, float]) -> None:
    with pytest.raises(UsageError):
        Setting(*bad)


@pytest.mark.parametrize(
    ("n_rows", "params"), [(0, IVFParams()), (10, IVFParams(nlist=11)), (100, IVFParams(nlist=20, train_rows=19))]
)
def test_too_few_rows_are_rejected(n_rows: int, params: IVFParams) -> None:
    with pytest.raises(UsageError, match="too few rows"):
        IVFIndex.build(Rows(np.zeros((n_rows, DIM), np.float32)), params, CPU)


def test_the_number_of_lists_depends_on_the_number_of_rows() -> None:
    sizes = (1, 15, 16, 1000, 100_000, 1_000_000)
    assert [IVFParams().count_lists(n) for n in sizes] == [1, 1, 2, 125, 7589, 24_000]


def test_recall_accepts_ties_and_short_results() -> None:
    def top(ids: list[int], scores: list[float]) -> TopK:
        return TopK((np.array(ids, np.int64),), (np.array(scores, np.float32),), np.array([1]))

    truth = top([1, 2, 3], [5.0, 4.0, 4.0])
    for ids, scores, expected in (
        ([1, 2, 3], [5, 4, 4], 1.0),
        ([1, 2, 9], [5, 4, 4], 1.0),
        ([1, 2, 9], [5, 4, 3], 2 / 3),
        ([9], [3], 0.0),
    ):
        assert compute_recalls(top(ids, scores), truth, truth.scores).tolist() == pytest.approx([expected])


def test_the_lower_bound_is_below_the_mean_and_below_1() -> None:
    random = np.random.default_rng(19)
    broken = 0
    for _ in range(300):
        values = random.binomial(10, 0.96, 200) / 10
        broken += recall_lower_bound(values) > 0.96
    assert broken <= 300 * 0.08
    assert 0.99 < recall_lower_bound(np.ones(200)) < 1


@pytest.fixture(scope="module")
def calibration(index: IVFIndex, source: Rows) -> Calibration:
    return calibrate(index, FlatIndex(source, CPU), normal(200, 20), 0.9)


def test_calibrated_settings_reach_their_recall_on_other_queries(
    calibration: Calibration, index: IVFIndex, source: Rows
) -> None:
    fresh = normal(300, 21)
    for side, sign in (("proponents", 1), ("opponents", -1)):
        points = getattr(calibration, side)
        assert [p.scored for p in points] == sorted(p.scored for p in points)
        assert [p.lower for p in points] == sorted(p.lower for p in points)
        point = calibration.fastest_point(side, 0.9)
        assert point is not None
        assert (
            mean_recall(index.with_settings(point.setting).search(sign * fresh, 10), source, sign * fresh)
            >= point.lower - 0.01
        )
        assert calibration.fastest_point(side, 1.0) is None


def test_queries_of_another_distribution_are_detected(calibration: Calibration, index: IVFIndex) -> None:
    distribution = calibration.looks
    assert not distribution.compare(index, normal(100, 22)).is_shifted
    assert distribution.compare(index, normal(100, 23)).outlier_Q.mean() <= 0.02
    assert distribution.compare(index, normal(100, 24) * 30).is_shifted
    assert distribution.compare(index, normal(10, 25) * 1e4).outlier_Q.all()
    assert not distribution.compare(index, normal(19, 26) * 30).is_shifted


def test_a_calibration_is_read_back_from_json_unchanged(calibration: Calibration) -> None:
    assert read_record(Calibration, json.loads(json.dumps(asdict(calibration)))) == calibration


class SlowFirstPass(Rows):
    """Rows whose first pass takes 1,000 seconds of a clock, and each later pass 1 second."""

    seconds, is_read = 0.0, False

    def blocks(self, block_rows: int, start: int = 0) -> Iterator[tuple[Int64, Float32]]:
        self.seconds += 1 if self.is_read else 1000
        self.is_read = True
        return super().blocks(block_rows, start)


def test_the_costs_of_a_calibration_are_those_of_later_queries(
    index: IVFIndex, source: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first scan does not count, and the comparison with the calibration queries counts for the lists."""
    rows, compare = SlowFirstPass(source.rows), QueryDistribution.compare

    def slow_compare(distribution: QueryDistribution, lists: IVFIndex, queries: Float32) -> Comparison:
        rows.seconds += 5 + 2 * len(queries)
        return compare(distribution, lists, queries)

    monkeypatch.setattr(QueryDistribution, "compare", slow_compare)
    monkeypatch.setattr("time.perf_counter", lambda: rows.seconds)
    measure = calibration_module._measure_setting
    monkeypatch.setattr(calibration_module, "_measure_setting", lambda *given: replace(measure(*given), seconds=4.0))
    found = calibrate(index, FlatIndex(rows, CPU), normal(130, 29), 0.9)
    assert found.scan == Cost(1.0, 0.0)
    cost = found.index_cost(found.usual_point("proponents"), found.usual_point("opponents"))
    assert (cost.fixed, cost.each) == pytest.approx((5.0, 2.0))
    assert found.both_ratio == pytest.approx(2.0 / 8.0)


def test_one_query_is_enough_for_a_calibration(index: IVFIndex, source: Rows) -> None:
    found = calibrate(index, FlatIndex(source, CPU), normal(1, 30), 0.9)
    assert found.queries == 1
    assert found.scan.fixed == 0 and found.scan.each > 0


def test_the_tail_index_is_estimated() -> None:
    source = Rows(heavy_tailed(4000, 27))
    queries = normal(50, 28)
    found = IVFIndex.build(source, IVFParams(), CPU).with_settings(Setting(800, 800, 0.2)).search(queries, 10)
    _, scores = oracle(source, queries, 10)
    hits = [np.mean(s >= t[-1] - 1e-4) for s, t in zip(found.scores, scores, strict=True)]
    assert np.mean(hits) >= 0.95
