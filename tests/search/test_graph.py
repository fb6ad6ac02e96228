"""Search in a graph: recall, exact scores, filters, counts of scored rows, reproducible builds, and its files."""

from __future__ import annotations

import io
import json
import math
import re
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from test_search_contract import DIM, Rows, heavy_tailed, integers, normal, oracle

from tracin_ann.device import import_faiss
from tracin_ann.errors import DamagedIndexError, UsageError
from tracin_ann.files import file_digest
from tracin_ann.search import FlatIndex, construction, graph, search_both
from tracin_ann.search.calibration import calibrate
from tracin_ann.search.clustering import survey
from tracin_ann.search.graph import GraphIndex, GraphParams
from tracin_ann.search.settings import Setting
from tracin_ann.types import Float32, Int64, TopK

CPU = torch.device("cpu")
N = 3000
PARAMS = GraphParams()


@pytest.fixture(scope="module")
def source() -> Rows:
    return Rows(normal(N, 0))


@pytest.fixture(scope="module")
def index(source: Rows) -> GraphIndex:
    return GraphIndex.build(source, PARAMS, CPU)


def mean_recall(found: TopK, source: Rows, queries: np.ndarray, k: int = 10) -> float:
    ids, _ = oracle(source, queries, k)
    return float(np.mean([len(np.intersect1d(a, b)) / k for a, b in zip(found.ids, ids, strict=True)]))


def read_files(index: GraphIndex, folder: Path) -> dict[str, bytes]:
    folder.mkdir(exist_ok=True)
    index.save(folder)
    return {name: (folder / name).read_bytes() for name in GraphIndex.FILES}


def test_scoring_a_part_of_the_rows_finds_the_answers(index: GraphIndex, source: Rows) -> None:
    queries = normal(60, 1)
    narrow = index.with_settings(Setting(100))
    for signed in (queries, -queries):
        found = narrow.search(signed, 10)
        assert found.rows_scored.max() < N / 3
        assert mean_recall(found, source, signed) >= 0.95
        exact = source.rows.astype(np.float64) @ signed.T.astype(np.float64)
        for q, (ids, scores) in enumerate(zip(found.ids, found.scores, strict=True)):
            np.testing.assert_allclose(scores, exact[ids, q], rtol=1e-4, atol=1e-4)
            assert (np.diff(scores) <= 0).all()


def test_the_longest_beam_is_proposed(index: GraphIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "_LARGEST_BEAM", 128)
    beams = [setting.codes for settings in index.propose_settings(lambda setting: 0.0) for setting in settings]
    assert beams == [32, 45, 64, 91, 128]


def test_rows_of_many_dimensions_are_reduced() -> None:
    source, queries = Rows(normal(1500, 2, 80)), normal(30, 3, 80)
    narrow = GraphIndex.build(source, GraphParams(width=24, links=8), CPU).with_settings(Setting(128))
    assert mean_recall(narrow.search(queries, 10), source, queries) >= 0.95


def test_recall_grows_with_the_beam() -> None:
    source = Rows(np.random.default_rng(4).standard_normal((N, 40)).astype(np.float32))
    index, queries = GraphIndex.build(source, GraphParams(links=8), CPU), normal(60, 2, 40)
    found = [index.with_settings(Setting(beam)).search(queries, 10) for beam in (40, 100, 400)]
    recall = [mean_recall(top, source, queries) for top in found]
    scored = [float(top.rows_scored.mean()) for top in found]
    assert recall == sorted(recall) and scored == sorted(scored)
    assert recall[0] < 0.95 and recall[-1] > 0.98


@pytest.mark.parametrize("beam", [40, 91, 200, 300])
def test_the_count_of_scored_rows_is_near_the_one_of_faiss(index: GraphIndex, beam: int) -> None:
    statistics, queries = import_faiss().cvar.hnsw_stats, normal(40, 3)
    for signed in (queries, -queries):
        statistics.reset()
        estimate = index.with_settings(Setting(beam)).search(signed, 10).rows_scored
        assert estimate.tolist() == pytest.approx([statistics.ndis / len(signed)] * len(signed), rel=0.25)


def test_the_rows_of_an_index_are_its_results_at_any_beam(index: GraphIndex, source: Rows) -> None:
    found = index.with_settings(Setting(1)).search(normal(4, 10), 300)
    assert [len(set(ids.tolist())) for ids in found.ids] == [300] * 4
    everything = index.with_settings(Setting(1)).search(normal(2, 11), N + 5)
    assert [sorted(ids.tolist()) for ids in everything.ids] == [list(range(N))] * 2


@pytest.mark.parametrize("ids", [np.arange(N), 5_000_000_000 + 7 * np.arange(N)], ids=["near", "far"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.8])
def test_a_filter_does_not_reduce_recall(source: Rows, ids: np.ndarray, share: float) -> None:
    passing, queries = np.random.default_rng(11).random(N) < share, normal(40, 12)
    chosen = Rows(source.rows[passing], ids[passing])
    found = GraphIndex.build(Rows(source.rows, ids), PARAMS, CPU).with_settings(Setting(60)).search_both(
        queries, 10, chosen.ids
    )  # fmt: skip
    for top, signed in zip(found, (queries, -queries), strict=True):
        assert (top.rows_scored == len(chosen)).all() == (share < 0.1)
        assert all(np.isin(ids, chosen.ids).all() and len(set(ids.tolist())) == 10 for ids in top.ids)
        assert mean_recall(top, chosen, signed) >= 0.95


def test_a_filter_of_rows_far_from_the_query_gives_all_results(index: GraphIndex, source: Rows) -> None:
    for query in normal(10, 13):
        away = np.sort(np.argsort(source.rows @ query, kind="stable")[: N // 2])
        found = index.with_settings(Setting(40)).search(query[None], 10, away)
        assert len(np.intersect1d(found.ids[0], away)) == 10


@pytest.mark.parametrize("factor", [1e6, 1e10])
def test_outliers_are_found_and_do_not_reduce_recall(source: Rows, factor: float) -> None:
    rows, queries = source.rows.copy(), normal(40, 5)
    rows[:5] *= np.float32(factor)
    spoilt = Rows(rows)
    assert survey(spoilt, 500).outlier_N.tolist() == [at < 5 for at in range(N)]
    found = GraphIndex.build(spoilt, PARAMS, CPU).with_settings(Setting(100)).search(queries, 10)
    assert mean_recall(found, spoilt, queries) >= 0.95


@pytest.mark.parametrize("loud", [0, 5, 19])
def test_rows_near_zero_are_found(loud: int) -> None:
    """The best 20 rows are some rows of large norm, and then rows near zero."""
    rows = normal(1000, 6)
    rows[:, 0] = np.where((np.arange(1000) < loud) | (np.arange(1000) >= 100), 1, -1) * (np.abs(rows[:, 0]) + 0.1)
    rows[100:] *= np.float32(1e-12)
    rows[500:] = 0
    quiet, queries = Rows(rows), np.eye(1, DIM, dtype=np.float32)
    index = GraphIndex.build(quiet, PARAMS, CPU).with_settings(Setting(20))
    found, (ids, _) = index.search(queries, 20), oracle(quiet, queries, 20)
    assert found.ids[0].tolist() == ids[0].tolist()


class Pieces(Rows):
    """Rows whose blocks end where those of several files would."""

    def blocks(self, block_rows: int, start: int = 0) -> Iterator[tuple[Int64, Float32]]:
        return super().blocks(min(block_rows, 70), start)


@pytest.mark.slow
def test_the_files_depend_neither_on_threads_nor_on_the_blocks_of_the_source(
    source: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(construction, "_BLOCK_ROWS", 800)
    faiss = import_faiss()
    before, found = faiss.omp_get_max_threads(), []
    try:
        for threads, rows in ((1, source), (3, source), (2, Pieces(source.rows))):
            faiss.omp_set_num_threads(threads)
            found.append(read_files(GraphIndex.build(rows, PARAMS, CPU), tmp_path / str(threads)))
    finally:
        faiss.omp_set_num_threads(before)
    assert found[0] == found[1] == found[2]
    other = GraphIndex.build(source, GraphParams(seed=1), CPU)
    assert read_files(other, tmp_path / "other") != found[0]


@pytest.mark.parametrize("beams", [(40, 40), (100, 300)])
def test_the_number_of_rows_read_is_known(beams: tuple[int, int]) -> None:
    taken: list[int] = []

    class Taken(Rows):
        def take(self, ids: Sequence[int] | Int64) -> Float32:
            taken.append(len(ids))
            return super().take(ids)

    rows = Taken(np.random.default_rng(0).standard_normal((3000, 60)).astype(np.float32))
    index = GraphIndex.build(rows, GraphParams(links=4), CPU).with_settings(*map(Setting, beams))
    taken.clear()
    index.search_both(normal(1, 2, 60), 10)
    assert taken == [index.most_rows_read(1, 10)] == [sum(min(beam, 200) for beam in beams)]


def test_progress_ends_with_all_rows(source: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(construction, "_BLOCK_ROWS", 1000)
    seen: list[tuple[int, int]] = []
    GraphIndex.build(source, PARAMS, CPU, progress=lambda done, rows: seen.append((done, rows)))
    assert seen == [(1000, N), (2000, N), (N, N)]


def test_one_row_of_each_level_in_links_is_in_the_next_one() -> None:
    levels = graph._draw_levels(400_000, 16, 9, 0)
    for level in (1, 2, 3):
        share = (levels > level).mean() / (levels >= level).mean()
        n = (levels >= level).sum()
        assert share == pytest.approx(1 / 16, abs=4 * math.sqrt(1 / 16 / n))
    assert graph._draw_levels(400_000, 2, 3, 0).max() == 3


def test_concurrent_searches_give_the_same_results(index: GraphIndex) -> None:
    queries = normal(30, 13)
    cases = [(Setting(beam), allowed) for beam in (40, 90) for allowed in (None, np.arange(0, N, 2))]
    alone = [index.with_settings(setting).search(queries, 10, allowed) for setting, allowed in cases]
    done, together = [], threading.Barrier(len(cases))

    def search(which: int) -> None:
        setting, allowed = cases[which]
        together.wait()
        for _ in range(10):
            found = index.with_settings(setting).search(queries, 10, allowed)
            right = [ids.tolist() for ids in found.ids] == [ids.tolist() for ids in alone[which].ids]
            if right and found.rows_scored.tolist() == alone[which].rows_scored.tolist():
                done.append(which)

    threads = [threading.Thread(target=search, args=(which,)) for which in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == [which for which in range(len(cases)) for _ in range(10)]


def test_calibration_measures_beams_until_all_results_are_found(index: GraphIndex, source: Rows) -> None:
    found = calibrate(index, FlatIndex(source, CPU), normal(100, 20), 0.9)
    for side in ("proponents", "opponents"):
        points = getattr(found, side)
        assert points[-1].recall > 0.98
        assert [point.scored for point in points] == sorted(point.scored for point in points)


@pytest.mark.parametrize("rows", [np.tile(integers(1, 7), (900, 1)), np.repeat(normal(30, 8), 30, axis=0)])
def test_equal_rows_have_the_right_scores(rows: np.ndarray) -> None:
    source, queries = Rows(rows), normal(6, 9)
    found = GraphIndex.build(source, PARAMS, CPU).with_settings(Setting(60)).search(queries, 10)
    _, scores = oracle(source, queries, 10)
    np.testing.assert_allclose(np.stack(found.scores), scores, rtol=1e-4)
    assert all(len(set(ids.tolist())) == 10 for ids in found.ids)


@pytest.mark.parametrize("bad", [{"width": 0}, {"links": 1}, {"ef_construction": 0}, {"seed": -1}])
def test_invalid_parameters_are_rejected(bad: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=next(iter(bad))):
        GraphParams(**bad)


def test_an_index_of_no_rows_is_rejected() -> None:
    with pytest.raises(UsageError, match="too few rows"):
        GraphIndex.build(Rows(np.zeros((0, DIM), np.float32)), PARAMS, CPU)


@pytest.mark.parametrize(("n", "dim", "links"), [(N, DIM, 8), (2000, 64, 16)])
def test_the_size_is_estimated(tmp_path: Path, n: int, dim: int, links: int) -> None:
    params = GraphParams(links=links)
    index = GraphIndex.build(Rows(normal(n, 15, dim)), params, CPU)
    n_bytes = sum(map(len, read_files(index, tmp_path / "index").values()))
    assert params.estimate_bytes(n, dim) == pytest.approx(n_bytes, rel=0.06)
    assert index.resident_bytes == pytest.approx(n_bytes, rel=0.06)


def test_faults_are_found(source: Rows) -> None:
    rows = source.rows.copy()
    rows[0] *= np.float32(1e7)
    index = GraphIndex.build(Rows(rows), PARAMS, CPU)
    assert index.find_faults(500, 0) == []
    changed = rows.copy()
    changed[1000:] = rows[:2000]
    for other, fault in (
        (Rows(changed), r"of 500 rows checked, \d+ have wrong codes"),
        (Rows(rows, np.arange(1, N + 1)), "do not match"),
        (Rows(rows[:-1]), "do not match"),
    ):
        found = GraphIndex(other, index._reduction, index._uncoded, CPU, index._parts).find_faults(500, 0)
        assert len(found) == 1
        assert re.search(fault, found[0])


def npz(content: bytes, **other: object) -> bytes:
    file = io.BytesIO()
    np.savez(file, **(dict(np.load(io.BytesIO(content))) | other))
    return file.getvalue()


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Rows, dict[str, bytes]]:
    """Return rows that the index reduces, one of them an outlier, and the files of the index."""
    rows = normal(600, 17, 30)
    rows[3] *= np.float32(1e7)
    index = GraphIndex.build(Rows(rows), GraphParams(width=20, links=8), CPU)
    return Rows(rows), read_files(index, tmp_path_factory.mktemp("wide"))


def assert_refused(folder: Path, source: Rows, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).write_bytes(content)
    with pytest.raises(DamagedIndexError, match="rebuild the index"):
        GraphIndex.load(folder, source, CPU)


@pytest.mark.parametrize("change", ["shorter", "deeper", "halves", "reversed"])
@pytest.mark.parametrize("array", ["id_N", "beam_E", "visited_E", "basis_FR"])
def test_an_altered_array_is_rejected(
    tmp_path: Path, wide: tuple[Rows, dict[str, bytes]], array: str, change: str
) -> None:
    source, files = wide
    original = np.load(io.BytesIO(files["graph.npz"]))[array]
    altered = {
        "shorter": original[:-1],
        "deeper": original[..., None],
        "halves": original.astype(np.float16),
        "reversed": original[::-1] if array != "basis_FR" else original[:, :-1],
    }[change]
    assert_refused(tmp_path, source, files | {"graph.npz": npz(files["graph.npz"], **{array: altered})})


@pytest.mark.parametrize("change", [{"version": 2}, {"caption": "lists"}, {"rows": 599}, {"quiet_rows": 1}])
def test_an_altered_header_is_rejected(
    tmp_path: Path, wide: tuple[Rows, dict[str, bytes]], change: dict[str, object]
) -> None:
    source, files = wide
    caption = json.dumps(json.loads(files["graph.json"]) | change).encode()
    assert_refused(tmp_path, source, files | {"graph.json": caption})


def test_a_graph_of_another_kind_is_rejected(tmp_path: Path, wide: tuple[Rows, dict[str, bytes]]) -> None:
    faiss, (source, files) = import_faiss(), wide
    for other in (faiss.IndexFlatIP(20), faiss.IndexHNSWSQ(20, faiss.ScalarQuantizer.QT_4bit, 8, faiss.METRIC_L2)):
        other.train(normal(600, 17, 20))
        other.add(normal(599, 17, 20))
        content = faiss.serialize_index(other).tobytes()
        (tmp_path / "graph.faiss").write_bytes(content)
        written = {"size": len(content), "digest": file_digest(tmp_path / "graph.faiss")}
        caption = json.dumps(json.loads(files["graph.json"]) | {"graph": written}).encode()
        assert_refused(tmp_path, source, files | {"graph.faiss": content, "graph.json": caption})


def test_a_saved_index_gives_the_same_results(tmp_path: Path, wide: tuple[Rows, dict[str, bytes]]) -> None:
    source, files = wide
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    loaded, queries = GraphIndex.load(tmp_path, source, CPU), normal(10, 18, source.dim)
    assert loaded.params == GraphParams(width=20, links=8)
    built = GraphIndex.build(source, loaded.params, CPU)
    setting = Setting(20)
    for before, after in zip(
        search_both(built.with_settings(setting), queries, 10),
        search_both(loaded.with_settings(setting), queries, 10),
        strict=True,
    ):
        assert [ids.tolist() for ids in before.ids] == [ids.tolist() for ids in after.ids]
        assert before.rows_scored.tolist() == after.rows_scored.tolist()
    assert read_files(loaded, tmp_path / "again") == files


def test_rows_of_another_shape_are_rejected(tmp_path: Path, wide: tuple[Rows, dict[str, bytes]]) -> None:
    source, files = wide
    for rows in (source.rows[:-1], source.rows[:, :-1]):
        assert_refused(tmp_path, Rows(rows), files)


def test_heavy_tails_do_not_reduce_recall() -> None:
    source, queries = Rows(heavy_tailed(N, 30)), normal(40, 31)
    found = GraphIndex.build(source, PARAMS, CPU).with_settings(Setting(100)).search(queries, 10)
    _, scores = oracle(source, queries, 10)
    assert np.mean([np.mean(s >= t[-1] - 1e-4) for s, t in zip(found.scores, scores, strict=True)]) >= 0.95
