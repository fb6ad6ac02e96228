"""Coded scan: layout of product codes, their estimates, recall, filters, threads, damage, calibration."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from test_search_contract import Rows, normal, oracle

from tracin_ann.errors import UsageError
from tracin_ann.search import FlatIndex, product_scan, search_both
from tracin_ann.search.calibration import calibrate
from tracin_ann.search.coded_scan import CodedScan, CodedScanParams
from tracin_ann.search.product_codes import Layout, ProductCoder
from tracin_ann.search.product_scan import scan_codes
from tracin_ann.search.settings import Setting
from tracin_ann.types import Float32, TopK

CPU = torch.device("cpu")
N, DIM = 3000, 96
FEW_BITS = CodedScanParams(bits=128)
LOSS = {1: 0.0124, 2: 0.109, 4: 0.343, 8: 0.601}


def noise(n: int, seed: int, dim: int = DIM) -> Float32:
    """Return rows without clusters, with slowly decreasing variances in random directions."""
    random = np.random.default_rng(seed)
    rotation = np.linalg.qr(np.random.default_rng(99).standard_normal((dim, dim)))[0]
    return ((random.standard_normal((n, dim)) / (1 + np.arange(dim)) ** 0.25) @ rotation).astype(np.float32)


@pytest.fixture(scope="module")
def source() -> Rows:
    return Rows(noise(N, 0), ids=5_000_000_000 + 7 * np.arange(N))


@pytest.fixture(scope="module")
def index(source: Rows) -> CodedScan:
    return CodedScan.build(source, FEW_BITS, CPU)


def mean_recall(found: TopK, source: Rows, queries: np.ndarray, k: int = 10) -> float:
    ids, _ = oracle(source, queries, k)
    return float(np.mean([len(np.intersect1d(a, b)) / k for a, b in zip(found.ids, ids, strict=True)]))


def iter_sizes(n_dims: int, n_codes: int) -> Iterator[list[int]]:
    """Yield the sizes of all layouts of at most n_codes codes for at most n_dims coordinates."""
    for counts in itertools.product(range(n_codes + 1), repeat=4):
        sizes = [size for size, count in zip((1, 2, 4, 8), counts, strict=True) for _ in range(count)]
        if 0 < len(sizes) <= n_codes and sum(sizes) <= n_dims:
            yield sizes


def compute_loss(sizes: list[int], variance: np.ndarray) -> float:
    share = np.ones(len(variance))
    share[: sum(sizes)] = np.repeat([LOSS[size] for size in sizes], sizes)
    return float((share * variance).sum())


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize(("n_dims", "n_codes"), [(20, 12), (40, 8), (64, 12)])
def test_the_layout_loses_nearly_the_least_variance(power: float, n_dims: int, n_codes: int) -> None:
    variance = (1 + np.arange(n_dims)) ** -power
    sizes = Layout.allocate(variance, n_codes).size_C.tolist()
    best = min(compute_loss(each, variance) for each in iter_sizes(n_dims, n_codes))
    assert len(sizes) <= n_codes and sizes == sorted(sizes)
    # The best layout can use up a remainder of coordinates that fills no code.
    assert compute_loss(sizes, variance) <= best + 0.05 * variance.sum()


def test_few_coordinates_have_one_code_each() -> None:
    assert Layout.allocate(1 / (1 + np.arange(12)), 16).size_C.tolist() == [1] * 12


def test_padded_rows_have_equal_inner_products_and_codes_their_own_coordinates() -> None:
    layout = Layout(np.array([1, 1, 2, 2, 8], dtype=np.int64))
    rows, queries = noise(5, 1, 14), noise(3, 2, 14)
    np.testing.assert_allclose(layout.pad(rows) @ layout.pad(queries).T, rows @ queries.T, rtol=1e-5)
    slots = layout.pad(np.arange(1, 15, dtype=np.float32)[None]).reshape(5, 8)
    assert [sorted(each[each > 0].tolist()) for each in slots] == [[1], [2], [3, 4], [5, 6], list(range(7, 15))]


def test_the_rotation_mixes_coordinates_of_codes_of_equal_size() -> None:
    rotation = Layout(np.array([1, 1, 1, 2, 8], dtype=np.int64)).make_rotation(3)
    np.testing.assert_allclose(rotation.T @ rotation, np.eye(13), atol=1e-5)
    same = np.repeat([0, 1, 2], [3, 2, 8])
    assert np.array_equal(rotation != 0, same[:, None] == same)


@pytest.mark.parametrize("sizes", [[], [2, 1], [3], [16]])
def test_invalid_layouts_are_rejected(sizes: list[int]) -> None:
    with pytest.raises(ValueError, match="product codes"):
        Layout(np.array(sizes, dtype=np.int64))


def test_estimates_are_unbiased_with_the_factors() -> None:
    rows = noise(2000, 3, 64)
    # Codes of queries like the rows would have smaller errors than those of queries of random directions.
    queries = np.random.default_rng(4).standard_normal((400, 64)).astype(np.float32)
    layout = Layout.allocate(rows.var(axis=0), 16)
    coder = ProductCoder.train(rows[:, : layout.width], layout, seed=0)
    width = coder.layout.width
    codes, factor = coder.encode(rows[:, :width])
    decoded = coder.decode(codes)
    exact = rows[:, :width].astype(np.float64) @ queries[:, :width].T
    plain = decoded.astype(np.float64) @ coder.layout.pad(queries[:, :width]).T
    norms = np.linalg.norm(rows[:, :width], axis=1)
    slopes = [
        float((estimate * exact).sum() / (exact**2).sum())
        for estimate in (norms[:, None] * plain, factor[:, None] * plain)
    ]
    assert slopes[0] < 0.95
    assert abs(slopes[1] - 1) < 0.03


def test_candidates_are_the_rows_of_the_best_estimates() -> None:
    rows, queries = noise(2000, 5), noise(40, 6)
    layout = Layout.allocate(rows.var(axis=0), 32)
    coder = ProductCoder.train(rows[:, : layout.width], layout, seed=0)
    ids = np.arange(2000, dtype=np.int64) * 3
    rows, queries = rows[:, : coder.layout.width], queries[:, : coder.layout.width]
    coder.add(rows[:700], ids[:700])
    coder.add(rows[700:], ids[700:])
    codes, factor = coder.encode(rows)
    found, _ = scan_codes(coder.finish(), queries, 50)
    estimate = coder.layout.pad(queries).astype(np.float64) @ coder.decode(codes).T * factor
    expected = ids[np.argsort(-estimate, axis=1)[:, :50]]
    # FAISS rounds the tables to 8 bits.
    assert np.mean([len(np.intersect1d(a, b)) / 50 for a, b in zip(found, expected, strict=True)]) > 0.95


@pytest.mark.parametrize("make", [normal, noise])
def test_rescoring_few_candidates_finds_the_answers(make: type) -> None:
    source, queries = Rows(make(N, 7, DIM)), make(60, 8, DIM)
    scan = CodedScan.build(source, FEW_BITS, CPU).with_settings(Setting(N // 20))
    for signed in (queries, -queries):
        found = scan.search(signed, 10)
        assert mean_recall(found, source, signed) >= 0.95
        exact = source.rows.astype(np.float64) @ signed.T.astype(np.float64)
        for q, (ids, scores) in enumerate(zip(found.ids, found.scores, strict=True)):
            np.testing.assert_allclose(scores, exact[ids, q], rtol=1e-4, atol=1e-4)


def test_recall_grows_with_the_candidates_and_with_the_bits(index: CodedScan, source: Rows) -> None:
    queries = noise(60, 9)
    found = [index.with_settings(Setting(n)).search(queries, 10) for n in (40, 100, 300)]
    recall = [mean_recall(top, source, queries) for top in found]
    assert recall == sorted(recall) and recall[0] < 0.9 < recall[-1]
    assert [top.rows_scored.tolist() for top in found] == [[N + n] * 60 for n in (40, 100, 300)]
    more = CodedScan.build(source, CodedScanParams(bits=256), CPU).with_settings(Setting(40))
    assert mean_recall(more.search(queries, 10), source, queries) > recall[0] + 0.1


def test_one_query_is_answered_as_among_many(index: CodedScan) -> None:
    queries = noise(30, 10)
    together = search_both(index, queries, 10)
    for at in range(30):
        alone = search_both(index, queries[at : at + 1], 10)
        assert [top.ids[0].tolist() for top in alone] == [top.ids[at].tolist() for top in together]


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_candidates_of_a_filter_are_the_best_allowed_rows(index: CodedScan, source: Rows, share: float) -> None:
    passing = np.random.default_rng(11).random(N) < share
    chosen, queries = Rows(source.rows[passing], source.ids[passing]), noise(40, 12)
    found = index.with_settings(Setting(120)).search(queries, 10, chosen.ids)
    assert np.isin(np.concatenate(found.ids), chosen.ids).all()
    assert found.rows_scored.tolist() == [N + 120] * 40
    assert mean_recall(found, chosen, queries) >= 0.95


def test_rows_of_extreme_norms_are_found() -> None:
    rows = noise(N, 13)
    rows[[5, 700]] *= np.float32(1e6)
    rows[[8, 90]] *= np.float32(1e-9)
    source, queries = Rows(rows), noise(20, 14)
    scan = CodedScan.build(source, CodedScanParams(), CPU).with_settings(Setting(300))
    found = scan.search(queries, 10)
    assert mean_recall(found, source, queries) >= 0.99
    assert found.rows_scored.tolist() == [N - 4 + 300 + 2] * 20


def test_threads_with_different_settings_do_not_disturb_each_other(index: CodedScan, source: Rows) -> None:
    queries, allowed = noise(40, 15), source.ids[::2]
    settings = [(Setting(n), filtered) for n in (40, 200) for filtered in (None, allowed)]

    def search(setting: Setting, filtered: np.ndarray | None) -> list[list[int]]:
        return [ids.tolist() for ids in index.with_settings(setting).search(queries, 10, filtered).ids]

    expected = [search(*each) for each in settings]
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(10):
            if search(*settings[number]) != expected[number]:
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_two_builds_give_the_same_files(source: Rows, tmp_path: Path) -> None:
    contents, progress = [], []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        CodedScan.build(source, FEW_BITS, CPU, lambda *done: progress.append(done)).save(tmp_path / name)
        contents.append([(tmp_path / name / file).read_bytes() for file in CodedScan.FILES])
    assert contents[0] == contents[1]
    assert progress[-1] == (N, N)


def test_the_estimated_size_is_that_of_the_files(tmp_path: Path) -> None:
    source = Rows(noise(2000, 16, 300))
    for params in (CodedScanParams(bits=256), CodedScanParams(width=50), CodedScanParams()):
        index = CodedScan.build(source, params, CPU)
        index.save(tmp_path)
        size = sum((tmp_path / name).stat().st_size for name in CodedScan.FILES)
        assert size == pytest.approx(params.estimate_bytes(2000, 300), rel=0.3)
        assert size == pytest.approx(index.resident_bytes, rel=0.3)


def test_unchanged_rows_have_no_faults(index: CodedScan, source: Rows, tmp_path: Path) -> None:
    index.save(tmp_path)
    for each in (index, CodedScan.load(tmp_path, source, CPU)):
        assert each.find_faults(500, seed=0) == []


def test_changed_rows_and_unknown_ids_are_faults(index: CodedScan, source: Rows, tmp_path: Path) -> None:
    index.save(tmp_path)
    rows = source.rows.copy()
    rows[::10] = noise(N // 10, 17)
    (fault,) = CodedScan.load(tmp_path, Rows(rows, source.ids), CPU).find_faults(N, seed=0)
    assert fault == f"of {N:,} rows checked, {N // 10} have wrong codes"
    other = Rows(source.rows, np.concatenate([source.ids[:-1], source.ids[-1:] + 1]))
    (fault,) = CodedScan.load(tmp_path, other, CPU).find_faults(500, seed=0)
    assert "do not match 3,000 stored rows" in fault


@pytest.mark.parametrize(("name", "value"), [("width", 0), ("bits", 32), ("seed", -1)])
def test_invalid_parameters_are_rejected(name: str, value: int) -> None:
    with pytest.raises(UsageError, match=f"invalid {name}"):
        CodedScanParams(**{name: value})


def test_calibration_finds_the_candidates_for_the_target(index: CodedScan, source: Rows) -> None:
    calibration = calibrate(index, FlatIndex(source, CPU), noise(200, 18), target=0.95)
    for direction in (calibration.proponents, calibration.opponents):
        budgets = [point.codes for point in direction]
        assert budgets == sorted(budgets) and set(budgets) <= {32 * 2**n for n in range(8)}
        assert any(point.lower >= 0.95 for point in direction)


@pytest.mark.parametrize("n_queries", [1, 3, 40])
@pytest.mark.parametrize("allowed", [None, 5_000_000_000 + 7 * np.arange(0, N, 3)], ids=["all", "some"])
def test_one_scan_gives_the_results_of_both_directions(
    source: Rows, index: CodedScan, n_queries: int, allowed: np.ndarray | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with threads, and with fewer queries at a time."""
    queries = noise(n_queries, 31)
    both = index.with_settings(Setting(60), Setting(250))
    apart = (both.search(queries, 10, allowed), index.with_settings(Setting(250)).search(-queries, 10, allowed))
    for n_rows, n_results in ((product_scan._FEW_ROWS, product_scan._RESULTS_AT_ONCE), (0, 3000)):
        monkeypatch.setattr(product_scan, "_FEW_ROWS", n_rows)
        monkeypatch.setattr(product_scan, "_RESULTS_AT_ONCE", n_results)
        for found, expected, sign in zip(both.search_both(queries, 10, allowed), apart, (1, -1), strict=True):
            assert [row.tolist() for row in found.ids] == [row.tolist() for row in expected.ids]
            assert [(sign * row).tolist() for row in found.scores] == [row.tolist() for row in expected.scores]
            assert found.rows_scored.tolist() == expected.rows_scored.tolist()
