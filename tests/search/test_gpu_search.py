"""Search on GPUs, with CPU twins of FAISS's GPU classes that have the same restrictions (`support/gpu_twins.py`)."""

from __future__ import annotations

import threading
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from test_search_contract import CASES, DIM, Rows, assert_exact, heavy_tailed, integers, normal, oracle

import gpu_twins
from benchmarks.retrieval import gpu as benchmark
from gpu_twins import GpuIndexIVFScalarQuantizer, TwinGpu
from tracin_ann.device import list_gpus
from tracin_ann.search import CODES, Codes, FlatIndex, GpuScan, IVFIndex, IVFParams, open_scan, search_both
from tracin_ann.search.gpu import MOST_RESULTS, GpuLists, GpuRows, plan_gpus
from tracin_ann.search.gpu_scan import GpuRates, ScanRate
from tracin_ann.search.settings import Setting

CPU = torch.device("cpu")
_HOW = "in float16 with exact scores of the candidates"
FREE, DEAR = ScanRate(0.0, 0.0, 0.0), ScanRate(1.0, 0.0, 0.0)
FAISS_WINS = GpuRates(pytorch=DEAR, faiss=FREE, read=0.0, take=0.0)


@pytest.fixture(params=[1, 3], ids=["one GPU", "three GPUs"])
def gpus(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[TwinGpu, ...]:
    """Return twins that FAISS uses; of three, each is too small for more than its part."""
    found = tuple(TwinGpu(number) for number in range(request.param))
    gpu_twins.install(monkeypatch, found)
    if len(found) > 1:
        for module in ("gpu", "gpu_scan"):
            monkeypatch.setattr(f"tracin_ann.search.{module}.plan_gpus", lambda n_bytes, gpus: gpus)
    return found


def make_scan(source: Rows, gpus: tuple[TwinGpu, ...], rates: GpuRates = FAISS_WINS) -> GpuScan:
    return GpuScan(FlatIndex(source, CPU, block_rows=37), gpus, rates)


@pytest.mark.parametrize("k", [1, 10, 1000])
@pytest.mark.parametrize("case", CASES)
def test_a_scan_equals_the_oracle(gpus: tuple[TwinGpu, ...], case: str, k: int) -> None:
    """Ties are not separated by float16 scores, so PyTorch scans for such queries."""
    source = Rows(CASES[case])
    assert_exact(make_scan(source, gpus), source, np.concatenate([integers(6, 20), np.zeros((1, DIM))]), k)


def test_proven_queries_are_not_scanned(gpus: tuple[TwinGpu, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    source = Rows(normal(4000, 3, 64), ids=10 + 3 * np.arange(4000))
    queries, scan = normal(20, 4, 64), make_scan(source, gpus)
    expected = search_both(FlatIndex(source, CPU), queries, 10)
    monkeypatch.setattr(FlatIndex, "search_both", lambda *_: pytest.fail("a scan"))
    for found, exact, signed in zip(scan.search_both(queries, 10), expected, (queries, -queries), strict=True):
        assert [row.tolist() for row in found.ids] == oracle(source, signed, 10)[0].tolist()
        np.testing.assert_allclose(found.scores, exact.scores, rtol=1e-5)
    assert gpu_twins.n_scans[0] == len(gpus)
    assert scan.describe_place(10) == f"scanned on {', '.join(['cpu'] * len(gpus))} by FAISS, {_HOW}"


def test_a_row_hidden_by_rounding_is_found(gpus: tuple[TwinGpu, ...]) -> None:
    """The best row has the same float16 numbers as a hundred others, which FAISS may return instead."""
    rows = np.full((300, 8), 1.0, np.float32)
    rows[100:] = 0.5
    rows[:100] += np.float32(2.0**-13) * np.random.default_rng(0).random((100, 1), np.float32)
    source, query = Rows(rows), np.ones((1, 8), np.float32)
    scan = make_scan(source, gpus)
    assert scan.search(query, 5).ids[0].tolist() == oracle(source, query, 5)[0][0].tolist()
    assert scan.describe_place(5).endswith("1 of 1 queries scanned by PyTorch, because scores are too close")


@pytest.mark.parametrize("scale", [2.0**-70, 1.0, 2.0**70])
def test_the_error_bound_holds(gpus: tuple[TwinGpu, ...], scale: float) -> None:
    source = Rows(normal(500, 5, 96) * np.float32(scale))
    queries = normal(30, 6, 96)
    queries /= 1.0001 * np.linalg.norm(queries, axis=1, keepdims=True)
    rows = GpuRows.load(source, gpus)
    ids, scores = rows.find(queries, 50)
    exact = np.take_along_axis(queries.astype(np.float64) @ source.rows.T.astype(np.float64), ids, axis=1)
    assert 0 < np.abs(scores - exact).max() <= rows.error
    assert rows.error < 0.003 * np.linalg.norm(source.rows.astype(np.float64), axis=1).max()  # noqa: PLR2004


def test_filters_and_many_results_are_for_pytorch(gpus: tuple[TwinGpu, ...]) -> None:
    source, queries = Rows(heavy_tailed(4000, 7)), integers(2, 8)
    scan, chosen = make_scan(source, gpus), source.ids[::5]
    found = scan.search(queries, 10, chosen)
    assert [row.tolist() for row in found.ids] == oracle(Rows(source.rows[::5], chosen), queries, 10)[0].tolist()
    many = scan.search(queries, 1800)
    assert [row.tolist() for row in many.ids] == oracle(source, queries, 1800)[0].tolist()
    assert gpu_twins.n_scans[0] == 0


def test_rows_are_loaded_once_the_searches_would_have_saved_as_much(gpus: tuple[TwinGpu, ...]) -> None:
    """Loading takes 2 × 100 × 0.01 s, and each search with FAISS instead of PyTorch saves 0.75 s."""
    source = Rows(normal(100, 9, 32))
    rates = GpuRates(ScanRate(1.0, 0.0, 0.0), ScanRate(0.25, 0.0, 0.0), read=0.01, take=0.0)
    exact = FlatIndex(source, CPU)
    exact._resident = [(ids, torch.tensor(rows)) for ids, rows in source.blocks(50)]
    scan, used = GpuScan(exact, gpus, rates), []
    for _ in range(4):
        scan.search(normal(1, 10, 32), 5)
        used.append(gpu_twins.n_scans[0] // len(gpus))
    assert used == [0, 0, 1, 2]
    assert scan.estimate_seconds(1, 5) == pytest.approx(0.25)


def test_rates_are_fitted_to_their_model() -> None:
    rate = ScanRate.fit(lambda n, q: 0.5 + n * (1e-6 + q * 1e-8), (1000, 9000))
    assert (rate.fixed, rate.row, rate.product) == pytest.approx((0.5, 1e-6, 1e-8))
    assert rate.seconds(10**6, 100) == pytest.approx(2.5)


def test_rates_that_cannot_be_measured_leave_the_scan_to_pytorch(
    gpus: tuple[TwinGpu, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def reject(*_: object) -> None:
        raise RuntimeError("out of memory\nin a kernel")

    source = Rows(heavy_tailed(300, 12))
    scan = open_scan(source, torch.device("cpu"))
    monkeypatch.setattr(GpuRows, "load", reject)
    assert scan.estimate_seconds(1, 5) is None
    assert_exact(scan, source, integers(2, 13), 5)
    assert scan.describe_place(5) == " (the GPU rejects a sample of the rows: out of memory)"


@pytest.mark.slow
def test_rates_are_measured(gpus: tuple[TwinGpu, ...]) -> None:
    rates = open_scan(Rows(normal(500, 11)), torch.device("cpu"))._rates
    assert rates.pytorch.seconds(10**6, 10) > 0 < rates.faiss.seconds(10**6, 10)
    assert rates.read > 0 < rates.take


def test_too_little_memory_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    small = TwinGpu(0, free_bytes=2**31)
    gpu_twins.install(monkeypatch, (small,))
    source, queries = Rows(heavy_tailed(300, 12)), integers(2, 13)
    scan = make_scan(source, (small,))
    assert_exact(scan, source, queries, 5)
    assert "0.0 GiB of rows in float16 do not fit" in scan.describe_place(5)
    index = IVFIndex.build(source, IVFParams(), CPU).with_settings(Setting(20, 20))
    index.search(queries, 5)
    assert "of lists do not fit in the memory" in index._describe_code_search(5, None)
    assert GpuIndexIVFScalarQuantizer.n_searches == 0


def test_the_fewest_gpus_are_planned() -> None:
    """Of the memory, 2 GiB are for temporary results, and a fifth of the rest stays free: 8, 32 and 16 GiB are left."""
    gpus = [TwinGpu(number, 2**31 + gib * 2**30) for number, gib in enumerate((10, 40, 20))]
    for gib, expected in ((0, [1]), (32, [1]), (33, []), (36, [])):
        assert [gpu.number for gpu in plan_gpus(gib * 2**30, gpus)] == expected
    pair = gpus[::2]
    for gib, expected in ((16, [2]), (17, []), (12, [2])):
        assert [gpu.number for gpu in plan_gpus(gib * 2**30, pair)] == expected
    equal = [TwinGpu(number, 12 * 2**30) for number in range(4)]
    for gib, count in ((8, 1), (9, 2), (17, 3), (32, 4), (33, 0)):
        assert len(plan_gpus(gib * 2**30, equal)) == count
    assert plan_gpus(1, ()) == ()


@pytest.mark.parametrize("codes", CODES)
def test_lists_on_gpus_find_the_same(gpus: tuple[TwinGpu, ...], codes: Codes) -> None:
    source = Rows(normal(3000, 14, 24), ids=7 + 2 * np.arange(3000))
    queries = normal(40, 15, 24)
    index = IVFIndex.build(source, IVFParams(codes=codes), CPU).with_settings(Setting(400, 200, 0.2))
    found = search_both(index, queries, 10)
    assert GpuIndexIVFScalarQuantizer.n_searches == 2 * len(gpus)
    index._parts.gpu_lists._device = CPU
    index._parts.gpu_lists.__dict__["_copy"] = "no GPU"
    for own, on_cpu in zip(found, search_both(index, queries, 10), strict=True):
        assert [row.tolist() for row in own.ids] == [row.tolist() for row in on_cpu.ids]
        assert own.rows_scored.tolist() == on_cpu.rows_scored.tolist()


def test_many_keys_and_queries_are_scanned_in_batches(
    gpus: tuple[TwinGpu, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Rows(normal(2000, 16, 24))
    index = IVFIndex.build(source, IVFParams(nlist=150), CPU)
    lists, tree = index._parts.lists.whole, index._parts.tree
    queries = index._reduce(normal(30, 17, 24))[0]
    keys = np.tile(np.arange(tree.n_lists), (30, 1))
    keys[::2, 5:] = -1
    expected = lists.scan(queries, 20, keys)
    monkeypatch.setattr("tracin_ann.search.gpu._MOST_LISTS", 40)
    monkeypatch.setattr("tracin_ann.search.gpu._CENTROID_BYTES", 4 * 24 * 40 * 7)
    ids, scores = GpuLists.load(lists, tree.centroid_LR, gpus).scan(queries, 20, keys)
    assert np.sort(ids).tolist() == np.sort(expected[0]).tolist()
    is_real = np.sort(ids) >= 0
    assert np.array_equal(np.sort(scores * (ids >= 0)), np.sort(expected[1] * (expected[0] >= 0)))
    assert is_real.all(axis=1).sum() >= 15  # noqa: PLR2004
    batches = -(-30 // 7) * -(-tree.n_lists // 40)
    assert GpuIndexIVFScalarQuantizer.n_searches == batches * len(gpus)


def test_what_gpus_cannot_do_is_done_and_reported_on_the_cpu(gpus: tuple[TwinGpu, ...]) -> None:
    source, queries = Rows(normal(9000, 18, 24)), normal(3, 19, 24)
    index = IVFIndex.build(source, IVFParams(nlist=60), CPU).with_settings(Setting(2500, 60))
    index.search(queries, 10, source.ids[::2])
    assert GpuIndexIVFScalarQuantizer.n_searches == 0
    assert "searched on the CPU: FAISS ignores filters" in index._describe_code_search(10, source.ids[::2])
    many = MOST_RESULTS
    assert "at most 2,048 candidates" in index._describe_code_search(many, None)
    assert len(index.search(queries, many).ids[0]) == many
    assert GpuIndexIVFScalarQuantizer.n_searches == 0
    assert "scanned on cpu" in index._describe_code_search(10, None)
    index.search(queries, 10)
    assert GpuIndexIVFScalarQuantizer.n_searches == len(gpus)


def test_an_index_on_gpus_saves_its_lists_in_main_memory(gpus: tuple[TwinGpu, ...], tmp_path: Path) -> None:
    source, queries = Rows(normal(2000, 20, 24)), normal(5, 21, 24)
    index = IVFIndex.build(source, IVFParams(), CPU).with_settings(Setting(100, 100))
    before, after = tmp_path / "before", tmp_path / "after"
    for folder in (before, after):
        folder.mkdir()
        index.save(folder)
        found = index.search(queries, 5)
    assert GpuIndexIVFScalarQuantizer.n_searches == 2 * len(gpus)
    assert all((before / name).read_bytes() == (after / name).read_bytes() for name in IVFIndex.FILES)
    reopened = IVFIndex.load(after, source, CPU).with_settings(Setting(100, 100))
    assert [row.tolist() for row in reopened.search(queries, 5).ids] == [row.tolist() for row in found.ids]
    with pytest.raises(Exception, match="write_index|argument"):
        faiss.write_index(next(iter(index._parts.gpu_lists.find(5, None)._parts))[1], str(tmp_path / "gpu"))


def test_threads_share_the_gpu(gpus: tuple[TwinGpu, ...]) -> None:
    source, queries = Rows(normal(2000, 22, 24)), normal(8, 23, 24)
    index = IVFIndex.build(source, IVFParams(), CPU).with_settings(Setting(100, 100))
    scan, errors = make_scan(source, gpus), []

    def search() -> None:
        try:
            for _ in range(5):
                index.search(queries, 5)
                scan.search(queries, 5)
        except RuntimeError as error:
            errors.append(error)

    threads = [threading.Thread(target=search) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_without_gpus_nothing_changes() -> None:
    source = Rows(normal(300, 24))
    scan = open_scan(source, CPU)
    assert isinstance(scan, FlatIndex)
    assert scan.describe_place(5) == ""
    assert IVFIndex.build(source, IVFParams(), CPU).describe_place(5) == ""
    assert FlatIndex(source, torch.device("meta")).describe_place(5) == "scanned on meta by PyTorch"


def test_parts_of_rows_are_placed_on_their_gpus() -> None:
    """Tensors of the device `meta` have shapes and no values."""
    gpus = [TwinGpu(number) for number in range(3)]
    for gpu in gpus:
        gpu.device = torch.device("meta")
    rows = GpuRows.load(Rows(normal(1000, 27, 16)), gpus)
    assert [(part.gpu.number, part.first, part.row_NF.shape) for part in rows._parts] == [
        (0, 0, (333, 16)),
        (1, 333, (333, 16)),
        (2, 666, (334, 16)),
    ]
    assert {(part.row_NF.dtype, part.row_NF.device.type) for part in rows._parts} == {(torch.float16, "meta")}
    assert GpuRows.count_bytes(1000, 16) == sum(part.row_NF.nbytes for part in rows._parts)


@pytest.mark.slow
def test_the_benchmark_runs_with_twins(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = TwinGpu(0)
    gpu_twins.install(monkeypatch, (gpu,))
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: None)
    monkeypatch.setattr(benchmark, "_GIB", 2**20)
    scans = list(benchmark.measure_scan(gpu, 3000, 64, 1))
    assert [scan["queries"] for scan in scans] == [1, 64, 1000]
    assert all(scan["faiss_to_limit"] > 0 for scan in scans)
    lists = benchmark.measure_lists(CPU, 5000, 32, 1)
    assert lists["agreement"] > 0.99  # noqa: PLR2004
    assert GpuIndexIVFScalarQuantizer.n_searches > 0


@pytest.mark.parametrize("codes", CODES)
def test_a_real_gpu_finds_what_the_cpu_finds(device: torch.device, codes: Codes) -> None:
    real = list_gpus(device)
    if not real:
        pytest.skip("FAISS has no GPU for this device")
    source, queries = Rows(normal(20_000, 25, 96), ids=7 + 2 * np.arange(20_000)), normal(300, 26, 96)
    scan = GpuScan(FlatIndex(source, device), real, FAISS_WINS)
    found = scan.search(queries, 10)
    assert [row.tolist() for row in found.ids] == oracle(source, queries, 10)[0].tolist()
    assert "by FAISS" in scan.describe_place(10)
    on_cpu = IVFIndex.build(source, IVFParams(codes=codes), CPU).with_settings(Setting(2000, 1000, 0.2))
    on_gpu = IVFIndex.build(source, IVFParams(codes=codes), device).with_settings(Setting(2000, 1000, 0.2))
    assert "by FAISS" in on_gpu.describe_place(10)
    for own, other in zip(search_both(on_gpu, queries, 10), search_both(on_cpu, queries, 10), strict=True):
        same = [len(set(a.tolist()) & set(b.tolist())) for a, b in zip(own.ids, other.ids, strict=True)]
        assert np.mean(same) > 9.95  # noqa: PLR2004


def test_a_scan_multiplies_in_full_precision_whatever_the_process_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, multiply = [], torch.mm
    torch.set_float32_matmul_precision("medium")
    monkeypatch.setattr(
        torch, "mm", lambda *a, **k: seen.append(torch.get_float32_matmul_precision()) or multiply(*a, **k)
    )
    try:
        scan = FlatIndex(Rows(normal(50, 3, DIM)), CPU, block_rows=20)
        scan.search(normal(4, 5, DIM), 3)
        list(scan.iter_scores(torch.from_numpy(normal(4, 5, DIM))))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert len(seen) == 2 * 3
    assert set(seen) == {"highest"}
