"""Lists that are really probed: what they find, count and keep aside, how they are kept on disk, and calibrated."""

from __future__ import annotations

import json
import threading
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from test_search_contract import DIM, Rows, heavy_tailed, integers, oracle
from tracin_ann.errors import DamagedIndexError, UsageError
from tracin_ann.search import FlatIndex, IVFIndex, IVFParams, Setting, search_both
from tracin_ann.search.calibrate import Calibration, calibrated, lower_bound, recalls
from tracin_ann.search.cluster import survey
from tracin_ann.search.reduction import fitted
from tracin_ann.types import Float32, TopK

CPU = torch.device("cpu")
N = 3000


def normal(n: int, seed: int, dim: int = DIM) -> Float32:
    """Rows of heavy-tailed norms in a few directions."""
    random = np.random.default_rng(seed)
    centres = random.standard_normal((12, dim))
    rows = centres[random.integers(0, 12, n)] + 0.4 * random.standard_normal((n, dim))
    return (rows * np.exp(0.7 * random.standard_normal((n, 1)))).astype(np.float32)


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
def test_a_part_of_the_rows_holds_the_answers(source: Rows, codes: str) -> None:
    queries = normal(60, 1)
    lists = IVFIndex.build(source, IVFParams(codes=codes), CPU).at(Setting(N // 6, N // 6, 0.2))
    for signed in (queries, -queries):
        found = lists.search(signed, 10)
        assert found.rows_scored.max() < N / 2
        assert mean_recall(found, source, signed) >= 0.95
        exact = source.rows.astype(np.float64) @ signed.T.astype(np.float64)
        for q, (ids, scores) in enumerate(zip(found.ids, found.scores, strict=True)):
            np.testing.assert_allclose(scores, exact[ids, q], rtol=1e-4, atol=1e-4)
            assert (np.diff(scores) <= 0).all()


def test_more_is_found_for_more(index: IVFIndex, source: Rows) -> None:
    queries = normal(60, 2)
    found = [index.at(Setting(codes, codes, 0.2)).search(queries, 10) for codes in (64, 400, 1500)]
    recall = [mean_recall(top, source, queries) for top in found]
    scored = [float(top.rows_scored.mean()) for top in found]
    assert recall == sorted(recall) and scored == sorted(scored)
    assert recall[-1] >= 0.99


def test_what_is_counted_is_what_is_scored(index: IVFIndex) -> None:
    """All lists reached and a budget one short of all rows: every group, every centroid, every row but few."""
    tree = index.tree
    held = int((tree.size_L > 0).sum())
    found = index.at(Setting(N - 1, 10**6, 0.0)).search(normal(5, 3), 10)
    everything = len(tree.group_GR) + tree.n_lists + N
    assert held <= tree.n_lists
    assert (found.rows_scored <= everything).all()
    assert (found.rows_scored >= everything - tree.size_L.max()).all()
    assert tree.size_L.sum() == N


def test_directions_have_settings_of_their_own(index: IVFIndex) -> None:
    few, many = Setting(64, 64, 0.1), Setting(1500, 1500, 0.1)
    queries = normal(5, 4)
    proponents, opponents = search_both(index.at(few, many), queries, 10)
    assert proponents.rows_scored.tolist() == index.at(few).search(queries, 10).rows_scored.tolist()
    assert opponents.rows_scored.tolist() == index.at(many).search(-queries, 10).rows_scored.tolist()


@pytest.mark.parametrize("factor", [1e6, 1e10])
@pytest.mark.parametrize("n_outliers", [1, 5])
def test_outliers_spoil_nothing_and_are_found(source: Rows, factor: float, n_outliers: int) -> None:
    rows, queries = source.rows.copy(), normal(40, 5)
    rows[:n_outliers] *= np.float32(factor)
    spoilt = Rows(rows)
    assert survey(spoilt, 500).outlier_N.tolist() == [i < n_outliers for i in range(N)]
    found = IVFIndex.build(spoilt, IVFParams(), CPU).at(Setting(N // 6, N // 6, 0.2)).search(queries, 10)
    assert mean_recall(found, spoilt, queries) >= 0.95
    best, _ = oracle(spoilt, queries, 1)
    assert [ids[0] for ids in found.ids] == best[:, 0].tolist()


def test_rows_near_zero_crowd_no_list_and_are_found_where_they_belong() -> None:
    rows = normal(1000, 6)
    rows[:, 0] = np.abs(rows[:, 0])
    rows[100:] *= np.float32(1e-12)
    rows[500:] = 0
    quiet = Rows(rows)
    lists = IVFIndex.build(quiet, IVFParams(), CPU)
    assert lists.tree.size_L.sum() == 100
    queries = np.zeros((2, DIM), np.float32)
    queries[0, 0], queries[1, 0] = 1, -1
    found = lists.at(Setting(90, 90, 0.1)).search(queries, 20)
    ids, scores = oracle(quiet, queries, 20)
    assert np.abs(np.stack(found.scores) - scores).max() <= 1e-5 * np.abs(rows).max()
    assert found.ids[1].tolist() == ids[1].tolist()


@pytest.mark.parametrize("rows", [np.tile(integers(1, 7), (900, 1)), np.repeat(normal(30, 8), 30, axis=0)])
def test_equal_rows_have_the_right_scores(rows: np.ndarray) -> None:
    source, queries = Rows(rows), normal(6, 9)
    found = IVFIndex.build(source, IVFParams(), CPU).at(Setting(200, 200, 0.1)).search(queries, 10)
    _, scores = oracle(source, queries, 10)
    np.testing.assert_allclose(np.stack(found.scores), scores, rtol=1e-4)
    assert all(len(set(ids.tolist())) == 10 for ids in found.ids)


def test_k_past_the_budget_is_reached(index: IVFIndex, source: Rows) -> None:
    found = index.at(Setting(5, 5, 0.1)).search(normal(4, 10), 300)
    assert [len(set(ids.tolist())) for ids in found.ids] == [300] * 4


@pytest.mark.parametrize("share", [0.02, 0.3, 0.8])
def test_a_filter_keeps_the_recall(index: IVFIndex, source: Rows, share: float) -> None:
    passing = np.flatnonzero(np.random.default_rng(11).random(N) < share)
    queries = normal(40, 12)
    found = index.at(Setting(N // 6, N // 6, 0.2)).search(queries, 10, passing)
    assert all(np.isin(ids, passing).all() and len(ids) == 10 for ids in found.ids)
    chosen = Rows(source.rows[passing], passing)
    assert mean_recall(found, chosen, queries) >= 0.95


def test_threads_do_not_disturb_each_other(index: IVFIndex) -> None:
    queries = normal(30, 13)
    asked = [(Setting(codes, codes, 0.1), allowed) for codes in (100, 700) for allowed in (None, np.arange(0, N, 2))]
    alone = [index.at(setting).search(queries, 10, allowed) for setting, allowed in asked]
    wrong: list[int] = []

    def ask(which: int) -> None:
        setting, allowed = asked[which]
        for _ in range(10):
            found = index.at(setting).search(queries, 10, allowed)
            if [i.tolist() for i in found.ids] != [i.tolist() for i in alone[which].ids]:
                wrong.append(which)

    threads = [threading.Thread(target=ask, args=(which,)) for which in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_reduction_does_not_centre() -> None:
    rows = normal(800, 14, 96) @ np.diag(np.geomspace(1, 1e-3, 96)).astype(np.float32) + 5
    reduction = fitted(rows, 24, 0)
    inner, reduced = rows @ rows.T, reduction.apply(rows) @ reduction.apply(rows).T
    assert np.abs(inner - reduced).max() <= 0.01 * np.abs(inner).max()
    assert reduction.energy > 0.99
    assert fitted(rows, 96, 0).basis_FR is None


def test_the_randomised_reduction_keeps_what_the_exact_one_keeps() -> None:
    random = np.random.default_rng(15)
    rows = (random.standard_normal((300, 2100)) * np.geomspace(1, 0.01, 2100)).astype(np.float32)
    found = fitted(rows, 40, 0)
    values = np.linalg.svd(rows.astype(np.float64), compute_uv=False) ** 2
    assert found.energy >= 0.99 * values[:40].sum() / values.sum()
    basis = found.basis_FR
    assert basis is not None
    np.testing.assert_allclose(basis.T @ basis, np.eye(40), atol=1e-4)


def test_built_twice_answers_alike(source: Rows) -> None:
    queries = normal(10, 16)
    first, second = (
        IVFIndex.build(source, IVFParams(seed=5), CPU).at(Setting(300, 300, 0.1)).search(queries, 10) for _ in range(2)
    )
    assert [ids.tolist() for ids in first.ids] == [ids.tolist() for ids in second.ids]
    assert first.rows_scored.tolist() == second.rows_scored.tolist()


@pytest.mark.parametrize("wide", [False, True])
def test_a_saved_index_answers_alike(source: Rows, tmp_path: Path, wide: bool) -> None:
    source = Rows(normal(600, 17, 300)) if wide else source
    rows = source.rows.copy()
    rows[3] *= 1e7
    source = Rows(rows)
    index = IVFIndex.build(source, IVFParams(), CPU)
    index.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(IVFIndex.FILES)
    loaded, queries = IVFIndex.load(tmp_path, source, CPU), normal(10, 18, source.dim)
    assert loaded.params == index.params
    setting = Setting(200, 200, 0.3)
    pairs = zip(search_both(index.at(setting), queries, 10), search_both(loaded.at(setting), queries, 10), strict=True)
    for before, after in pairs:
        assert [ids.tolist() for ids in before.ids] == [ids.tolist() for ids in after.ids]
        assert before.rows_scored.tolist() == after.rows_scored.tolist()


@pytest.mark.parametrize(
    "harm",
    [
        *("no lists", "no caption", "no arrays", "short lists", "short caption", "short arrays"),
        "other version",
        "mixed",
        "pickle",
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, harm: str) -> None:
    source = Rows(integers(200, 34))
    IVFIndex.build(source, IVFParams(), CPU).save(tmp_path)
    lists, arrays, centroids, caption = (tmp_path / name for name in IVFIndex.FILES)
    what = {"lists": lists, "arrays": arrays, "centroids": centroids, "caption": caption}.get(
        harm.rsplit(maxsplit=1)[-1]
    )
    if harm.startswith("no"):
        assert what is not None
        what.unlink()
    elif harm.startswith("short"):
        assert what is not None
        what.write_bytes(what.read_bytes()[:-9] if what is caption else what.read_bytes()[:-300])
    elif harm == "other version":
        caption.write_text(caption.read_text().replace('"version": 2', '"version": 1'))
    elif harm == "pickle":
        held = dict(np.load(arrays))
        np.savez(arrays, **(held | {"outliers": np.array([None, 1], dtype=object)}))
    else:
        kept = arrays.read_bytes()
        IVFIndex.build(Rows(integers(400, 35)), IVFParams(), CPU).save(tmp_path)
        arrays.write_bytes(kept)
    with pytest.raises(DamagedIndexError, match="rebuild the index"):
        IVFIndex.load(tmp_path, source, CPU)


@pytest.mark.parametrize("bad", [{"nlist": 0}, {"width": 0}, {"codes": "pq"}, {"seed": -1}, {"train_rows": 0}])
def test_bad_params_are_refused(bad: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=next(iter(bad))):
        IVFParams(**bad)


@pytest.mark.parametrize("bad", [(0, 1, 0.1), (1, 0, 0.1), (1, 1, -0.1), (1, 1, np.inf)])
def test_bad_settings_are_refused(bad: tuple[int, int, float]) -> None:
    with pytest.raises(UsageError):
        Setting(*bad)


@pytest.mark.parametrize(
    ("n_rows", "params"), [(0, IVFParams()), (10, IVFParams(nlist=11)), (100, IVFParams(nlist=20, train_rows=19))]
)
def test_too_few_rows_are_refused(n_rows: int, params: IVFParams) -> None:
    with pytest.raises(UsageError, match="too few rows"):
        IVFIndex.build(Rows(np.zeros((n_rows, DIM), np.float32)), params, CPU)


def test_number_of_lists() -> None:
    sizes = (1, 15, 16, 1000, 100_000, 1_000_000)
    assert [IVFParams().lists_for(n) for n in sizes] == [1, 1, 2, 125, 7589, 24_000]


def test_recall_counts_ties_and_short_answers() -> None:
    def top(ids: list[int], scores: list[float]) -> TopK:
        return TopK((np.array(ids, np.int64),), (np.array(scores, np.float32),), np.array([1]))

    truth = top([1, 2, 3], [5.0, 4.0, 4.0])
    for ids, scores, expected in (
        ([1, 2, 3], [5, 4, 4], 1.0),
        ([1, 2, 9], [5, 4, 4], 1.0),
        ([1, 2, 9], [5, 4, 3], 2 / 3),
        ([9], [3], 0.0),
    ):
        assert recalls(top(ids, scores), truth, truth.scores).tolist() == pytest.approx([expected])


def test_the_bound_lies_under_the_mean_and_is_never_sure() -> None:
    random = np.random.default_rng(19)
    broken = 0
    for _ in range(300):
        values = random.binomial(10, 0.96, 200) / 10
        broken += lower_bound(values) > 0.96
    assert broken <= 300 * 0.08
    assert 0.99 < lower_bound(np.ones(200)) < 1


@pytest.fixture(scope="module")
def calibration(index: IVFIndex, source: Rows) -> Calibration:
    return calibrated(index, FlatIndex(source, CPU), normal(200, 20), 0.9)


def test_calibration_gives_settings_that_hold_on_other_queries(
    calibration: Calibration, index: IVFIndex, source: Rows
) -> None:
    fresh = normal(300, 21)
    for side, sign in (("proponents", 1), ("opponents", -1)):
        points = getattr(calibration, side)
        assert [p.scored for p in points] == sorted(p.scored for p in points)
        assert [p.lower for p in points] == sorted(p.lower for p in points)
        point = calibration.reaching(side, 0.9)
        assert point is not None
        assert mean_recall(index.at(point.setting).search(sign * fresh, 10), source, sign * fresh) >= point.lower - 0.01
        assert calibration.reaching(side, 1.0) is None


def test_queries_from_elsewhere_are_noticed(calibration: Calibration, index: IVFIndex) -> None:
    looks = calibration.looks
    assert not looks.shifted(index, normal(100, 22))
    assert looks.strange(index, normal(100, 23)).mean() <= 0.02
    assert looks.shifted(index, normal(100, 24) * 30)
    assert looks.strange(index, normal(10, 25) * 1e4).all()
    assert not looks.shifted(index, normal(19, 26) * 30)


def test_a_calibration_comes_back_from_json(calibration: Calibration) -> None:
    assert Calibration.from_json(json.loads(json.dumps(asdict(calibration)))) == calibration


def test_the_tail_is_found() -> None:
    source = Rows(heavy_tailed(4000, 27))
    queries = normal(50, 28)
    found = IVFIndex.build(source, IVFParams(), CPU).at(Setting(800, 800, 0.2)).search(queries, 10)
    _, scores = oracle(source, queries, 10)
    hits = [np.mean(s >= t[-1] - 1e-4) for s, t in zip(found.scores, scores, strict=True)]
    assert np.mean(hits) >= 0.95
