"""Inverted lists in shards: results, files, faults and interrupted builds, compared with lists that are not split."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_search_contract import Rows, normal

from tasks.toy import CONFIG, make_rows, make_toy_task
from tracin_ann import InfluenceIndex, QueryOptions, build
from tracin_ann.config import BuildConfig
from tracin_ann.errors import DamagedIndexError, UsageError
from tracin_ann.operations import remove, repair, verify
from tracin_ann.search import IVFIndex, IVFParams, construction
from tracin_ann.search.construction import UnfinishedLists, digest_inputs
from tracin_ann.search.diagnosis import Diagnosis
from tracin_ann.search.flat import Subset
from tracin_ann.search.ivf import list_ivf_files
from tracin_ann.search.settings import Setting
from tracin_ann.store.manifest import Manifest
from tracin_ann.types import Float32, TopK

CPU = torch.device("cpu")
N, SHARDS = 3000, 4
SETTING = Setting(300, 200, 0.2)


@pytest.fixture(scope="module")
def source() -> Rows:
    """Return rows with ids that are not their positions; some rows are outliers or quiet."""
    rows = normal(N, 0)
    rows[[3, 1500]] *= 1e6
    rows[[4, 2999]] *= 1e-9
    return Rows(rows, ids=10 + 3 * np.arange(N))


@pytest.fixture(scope="module")
def single(source: Rows) -> IVFIndex:
    return IVFIndex.build(source, IVFParams(), CPU).with_settings(SETTING)


@pytest.fixture(scope="module")
def folder(source: Rows, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sharded")
    IVFIndex.build(source, IVFParams(shards=SHARDS), CPU).save(path)
    return path


@pytest.fixture(scope="module")
def sharded(source: Rows, folder: Path) -> IVFIndex:
    return IVFIndex.load(folder, source, CPU).with_settings(SETTING)


def assert_same(found: TopK, expected: TopK) -> None:
    """Compare ids, scores and counts to the bit."""
    for name in ("ids", "scores"):
        for own, other in zip(getattr(found, name), getattr(expected, name), strict=True):
            assert own.tolist() == other.tolist()
    assert found.rows_scored.tolist() == expected.rows_scored.tolist()


@pytest.mark.parametrize("k", [1, 10, 60])
def test_shards_have_the_results_of_one_file(single: IVFIndex, sharded: IVFIndex, k: int) -> None:
    queries = normal(100, 1)
    for found, expected in zip(sharded.search_both(queries, k), single.search_both(queries, k), strict=True):
        assert expected.rows_scored.max() < N
        assert_same(found, expected)


@pytest.mark.parametrize("part", [slice(0, 600), slice(700, 2300), slice(0, N, 2)])
def test_shards_have_the_filtered_results_of_one_file(
    source: Rows, single: IVFIndex, sharded: IVFIndex, part: slice
) -> None:
    """The first two filters leave no row to some shards."""
    queries = normal(30, 2)
    assert_same(sharded.search(queries, 5, source.ids[part]), single.search(queries, 5, source.ids[part]))


def test_equal_rows_have_the_scores_of_one_file() -> None:
    """Among more equal rows than candidates, ids may differ."""
    source = Rows(np.repeat(normal(60, 3), 50, axis=0))
    queries = normal(40, 4)
    indexes = [IVFIndex.build(source, IVFParams(shards=n), CPU).with_settings(SETTING) for n in (1, SHARDS)]
    one, many = (index.search(queries, 10) for index in indexes)
    assert [scores.tolist() for scores in many.scores] == [scores.tolist() for scores in one.scores]


def test_each_shard_has_its_range_of_rows(source: Rows, sharded: IVFIndex) -> None:
    firsts = source.ids[[0, 750, 1500, 2250]]
    assert [first for first, _ in sharded.lists.ranges] == [0, *firsts[1:]]
    assert sharded.lists.first_id_S.tolist() == firsts.tolist()
    assert len(sharded.lists) == N - 4
    assert sharded.find_faults(N, seed=0) == []


def test_more_shards_than_rows() -> None:
    source = Rows(normal(3, 5))
    index = IVFIndex.build(source, IVFParams(nlist=1, shards=5), CPU)
    assert index.find_faults(3, seed=0) == []
    assert (
        index.search(normal(1, 6), 3).ids[0].tolist()
        == IVFIndex.build(source, IVFParams(nlist=1), CPU).search(normal(1, 6), 3).ids[0].tolist()
    )


def test_a_row_in_the_file_of_another_shard_is_a_fault(source: Rows, folder: Path, tmp_path: Path) -> None:
    names = list_ivf_files(SHARDS)
    for name, content in zip(names, names[1::-1] + names[2:], strict=True):
        (tmp_path / name).write_bytes((folder / content).read_bytes())
    (fault,) = IVFIndex.load(tmp_path, source, CPU).find_faults(10, seed=0)
    assert fault == "1,498 rows are in the file of another shard"


@pytest.mark.parametrize("name", list_ivf_files(SHARDS))
@pytest.mark.parametrize("cut", [None, 7, 300])
def test_a_damaged_file_of_a_shard_is_rejected(
    source: Rows, folder: Path, tmp_path: Path, name: str, cut: int | None
) -> None:
    for other in list_ivf_files(SHARDS):
        (tmp_path / other).write_bytes((folder / other).read_bytes())
    if cut is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes((folder / name).read_bytes()[:-cut])
    with pytest.raises(DamagedIndexError, match=name if name != "ivf.npz" else "ivf"):
        IVFIndex.load(tmp_path, source, CPU)


def save_arrays(folder: Path, **changed: np.ndarray) -> None:
    arrays = dict(np.load(io.BytesIO((folder / "ivf.npz").read_bytes()))) | changed
    np.savez(folder / "ivf.npz", **arrays)


@pytest.mark.parametrize("first_ids", [[0, 5, 10], [0, 5, 10, 2], [[0], [5], [10], [20]], [0.0, 1.0, 2.0, 3.0]])
def test_altered_ranges_are_rejected(source: Rows, folder: Path, tmp_path: Path, first_ids: list) -> None:
    for name in list_ivf_files(SHARDS):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    save_arrays(tmp_path, first_id_S=np.array(first_ids))
    with pytest.raises(DamagedIndexError, match=r"ivf\.npz"):
        IVFIndex.load(tmp_path, source, CPU)


def test_a_forged_number_of_shards_is_rejected(source: Rows, folder: Path, tmp_path: Path) -> None:
    for name in list_ivf_files(SHARDS):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    caption = json.loads((folder / "ivf.json").read_text())
    caption["params"]["shards"] = 10**15
    (tmp_path / "ivf.json").write_text(json.dumps(caption))
    with pytest.raises(DamagedIndexError, match=r"ivf\.npz"):
        IVFIndex.load(tmp_path, source, CPU)


class Killed(BaseException):
    """Raised instead of the end of the process."""


@pytest.mark.parametrize("n", [0, 4, 7, 12, 18])
def test_a_killed_build_resumes_to_the_same_bytes(
    source: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n: int
) -> None:
    monkeypatch.setattr(construction, "STRETCH_ROWS", 500)
    params = IVFParams(shards=SHARDS)
    expected, found = tmp_path / "expected", tmp_path / "found"
    for path in (expected, found):
        path.mkdir()
    IVFIndex.build(source, params, CPU).save(expected)
    scratch = UnfinishedLists(tmp_path / "scratch", digest_inputs(params, "rows"))
    with monkeypatch.context() as patched:
        os_replace, count = construction.atomic_path.__globals__["os"].replace, []

        def replace_or_die(*paths: object) -> None:
            if len(count) == n:
                raise Killed
            count.append(paths)
            os_replace(*paths)

        patched.setattr("tracin_ann.files.durable.os.replace", replace_or_die)
        with pytest.raises(Killed):
            IVFIndex.build(source, params, CPU, scratch)
    index = IVFIndex.build(source, params, CPU, scratch)
    assert len(list(scratch.directory.glob("shard-*"))) == SHARDS
    index.save(found)
    for name in list_ivf_files(SHARDS):
        assert (found / name).read_bytes() == (expected / name).read_bytes(), name


def test_shards_do_not_depend_on_the_stretches(
    source: Rows, sharded: IVFIndex, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Neither does the result depend on whether the shards are mapped."""
    monkeypatch.setattr(construction, "STRETCH_ROWS", 400)
    scratch = UnfinishedLists(tmp_path / "scratch", "rows")
    index = IVFIndex.build(source, IVFParams(shards=SHARDS), CPU, scratch).with_settings(SETTING)
    queries: Float32 = normal(30, 7)
    for found, expected in zip(index.search_both(queries, 10), sharded.search_both(queries, 10), strict=True):
        assert_same(found, expected)


def test_rows_that_a_rebuilt_index_leaves_out(source: Rows) -> None:
    rows = Subset(source, np.setdiff1d(source.ids, source.ids[5:900:7]))
    queries = normal(30, 8)
    one, many = (IVFIndex.build(rows, IVFParams(shards=n), CPU).with_settings(SETTING) for n in (1, SHARDS))
    assert_same(many.search(queries, 10), one.search(queries, 10))


def test_shards_need_inverted_lists() -> None:
    for kind in ("flat", "bounds", "graph"):
        with pytest.raises(UsageError, match=f"only inverted lists and coded scans have shards: got --index {kind}"):
            BuildConfig(index=kind, index_shards=2)
    with pytest.raises(UsageError, match="bad --index-shards: got 0"):
        BuildConfig(index="ivf", index_shards=0)


def ids(index: InfluenceIndex) -> list[list[int]]:
    answers = index.query(range(30), options=QueryOptions(k=5, search="index"))
    return [[hit.row for hit in answer.hits] for answer in answers]


@pytest.mark.parametrize("kind", ["ivf", "flat"])
def test_auto_makes_shards_of_the_index_that_it_chooses(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "ivf":
        monkeypatch.setattr("tracin_ann.search.backend.FLAT_BELOW_ROWS", 100)
        monkeypatch.setattr(
            "tracin_ann.scoring.search_index.diagnose", lambda *given: Diagnosis(20.0, energy=0.9, bounded_share=0.5)
        )
        monkeypatch.setattr("tracin_ann.scoring.search_index._is_efficient", lambda *given: True)
    task = make_toy_task(tmp_path, train_data=lambda: make_rows(400), query_data=lambda: make_rows(30, seed=2))
    out, config = tmp_path / "out", replace(CONFIG, index="auto", index_shards=3)
    index = build(task, out, config).manifest.index
    assert (index.kind, index.shards, index.requested) == (kind, 3 if kind == "ivf" else 1, "auto")
    # The same command changes nothing; another number of shards makes another index of the same features.
    assert build(task, out, config).manifest.generation == 1
    report = build(task, out, replace(config, index_shards=2))
    assert (report.rows_extracted, report.manifest.generation) == (0, 2 if kind == "ivf" else 1)
    assert report.manifest.index.shards == (2 if kind == "ivf" else 1)
    assert verify(out).damage == ()
    if kind == "ivf":
        assert ids(InfluenceIndex.open(out, task))


@pytest.mark.slow
def test_an_index_in_shards_is_extended_verified_repaired_and_loses_rows(tmp_path: Path) -> None:
    config = replace(CONFIG, index="ivf", index_shards=3, partition_rows=128)
    tasks = [
        make_toy_task(tmp_path, train_data=lambda n=n: make_rows(n), query_data=lambda: make_rows(30, seed=2))
        for n in (400, 500)
    ]
    out, plain = tmp_path / "out", tmp_path / "plain"
    build(tasks[0], out, config)
    build(tasks[0], plain, replace(config, index_shards=1))
    assert ids(InfluenceIndex.open(out, tasks[0])) == ids(InfluenceIndex.open(plain, tasks[0]))
    # A build with another number of shards makes another index of the same features.
    report = build(tasks[0], out, replace(config, index_shards=2))
    assert (report.rows_extracted, report.manifest.index.shards, report.manifest.generation) == (0, 2, 2)
    report = build(tasks[1], out, replace(config, append=True))
    assert [record.name for record in report.manifest.index.files][:3] == [f"ivf-{n:04d}.faiss" for n in range(3)]
    build(tasks[1], plain, replace(config, index_shards=1, append=True))
    remove(out, [7, 300])
    remove(plain, [7, 300])
    expected = ids(InfluenceIndex.open(plain, tasks[1]))
    assert ids(InfluenceIndex.open(out, tasks[1])) == expected
    assert verify(out).damage == ()
    manifest = Manifest.read(out)
    (out / f"generation-{manifest.generation:06d}" / "ivf-0001.faiss").write_bytes(b"nothing")
    assert any("ivf-0001.faiss" in str(damage.path) for damage in verify(out).damage)
    repair(out, tasks[1], device="cpu")
    build(tasks[1], plain, replace(config, index_shards=1, rebuild_index=True))
    assert verify(out).damage == () and Manifest.read(out).index.shards == 3
    assert ids(InfluenceIndex.open(out, tasks[1])) == ids(InfluenceIndex.open(plain, tasks[1]))
