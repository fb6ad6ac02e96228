"""Product codes in shards: results, filters, files and faults, compared with codes in one file."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_coded_scan import noise
from test_list_shards import assert_same
from test_search_contract import Rows

from tasks.toy import CONFIG, make_rows, make_toy_task
from tracin_ann import InfluenceIndex, QueryOptions, build
from tracin_ann.errors import DamagedIndexError, UsageError
from tracin_ann.operations import remove, repair, verify
from tracin_ann.search import CodedScan, CodeQuery, search_both
from tracin_ann.search.code_shards import list_code_files
from tracin_ann.search.coded_scan import CodedScanParams, list_coded_files
from tracin_ann.search.settings import Setting
from tracin_ann.store import Manifest

CPU = torch.device("cpu")
N, SHARDS = 3000, 4
SETTING = Setting(300)


def make_params(shards: int) -> CodedScanParams:
    return CodedScanParams(bits=256, shards=shards)


@pytest.fixture(scope="module")
def source() -> Rows:
    """Return rows with ids that are not their positions; some rows are outliers or quiet."""
    rows = noise(N, 0)
    rows[[3, 1500]] *= 1e6
    rows[[4, 2999]] *= 1e-9
    return Rows(rows, ids=10 + 3 * np.arange(N))


@pytest.fixture(scope="module")
def folder(source: Rows, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("codes")
    CodedScan.build(source, make_params(SHARDS), CPU).save(path)
    return path


@pytest.fixture(scope="module")
def sharded(source: Rows, folder: Path) -> CodedScan:
    return CodedScan.load(folder, source, CPU).with_settings(SETTING)


@pytest.mark.parametrize("k", [1, 10, 60])
def test_shards_find_the_results_of_one_file(source: Rows, sharded: CodedScan, k: int) -> None:
    single = CodedScan.build(source, make_params(1), CPU).with_settings(SETTING)
    queries = noise(100, 1)
    for found, expected in zip(search_both(sharded, queries, k), search_both(single, queries, k), strict=True):
        assert found.rows_scored.tolist() == expected.rows_scored.tolist()
        same = [len(np.intersect1d(a, b)) / k for a, b in zip(found.ids, expected.ids, strict=True)]
        # Of equal estimates of the last candidates, others may be scored.
        assert np.mean(same) > 0.995


def test_shards_that_are_searched_elsewhere_have_the_same_results(
    source: Rows, folder: Path, sharded: CodedScan
) -> None:
    files = CodedScan.load(folder, source, CPU).list_shards(folder)
    asked: list[list[CodeQuery]] = []

    def scan(queries: Any) -> Any:
        asked.append(list(queries))
        return [query.run(file.open()) for query, file in zip(queries, files, strict=True)]

    # The calling process reads no codes.
    elsewhere = CodedScan.load(folder, source, CPU).with_scanner(scan).with_settings(SETTING)
    for queries in (noise(1, 2), noise(40, 3)):
        for allowed in (None, source.ids[::2]):
            results = (search_both(index, queries, 10, allowed) for index in (elsewhere, sharded))
            for found, expected in zip(*results, strict=True):
                assert_same(found, expected)
    assert not elsewhere._parts.codes._opened
    assert {len(queries) for queries in asked} == {SHARDS}


def test_candidates_of_missing_shards_are_missing(source: Rows, folder: Path) -> None:
    files = CodedScan.load(folder, source, CPU).list_shards(folder)
    partial = CodedScan.load(folder, source, CPU).with_settings(SETTING)
    found = partial.with_scanner(lambda queries: [queries[1].run(files[1].open())]).search(noise(5, 4), 10)
    uncoded = source.ids[[3, 4, 1500, 2999]]
    first, end = partial._parts.codes.ranges[1]
    rows = np.setdiff1d(np.concatenate(found.ids), uncoded)
    assert len(rows) and ((rows >= first) & (rows < end)).all()


@pytest.mark.parametrize("part", [slice(0, 700), slice(1600, 2300), slice(0, N, 2)])
def test_filters_can_leave_no_row_of_a_shard(source: Rows, sharded: CodedScan, part: slice) -> None:
    """The first two filters leave no row of some shards."""
    allowed, queries = source.ids[part], noise(30, 5)
    found = sharded.with_settings(Setting(100)).search(queries, 10, allowed)
    assert np.isin(np.concatenate(found.ids), allowed).all() and {len(ids) for ids in found.ids} == {10}


def test_more_shards_than_rows_are_empty(tmp_path: Path) -> None:
    few = Rows(noise(3, 6))
    index = CodedScan.build(few, make_params(5), CPU)
    index.save(tmp_path)
    (found,), _ = CodedScan.load(tmp_path, few, CPU)._parts.codes.scan(index._reduce(noise(1, 7))[0], 10)
    assert sorted(found.tolist()) == [0, 1, 2]
    assert index.find_faults(3, seed=0) == []


def test_files_of_two_builds_are_equal(source: Rows, folder: Path, tmp_path: Path) -> None:
    CodedScan.build(source, make_params(SHARDS), CPU).save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(list_coded_files(SHARDS))
    for name in list_coded_files(SHARDS):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_unchanged_rows_have_no_faults(source: Rows, sharded: CodedScan) -> None:
    assert sharded.find_faults(500, seed=0) == []
    rows = source.rows.copy()
    rows[::10] = noise(N // 10, 8)
    other = CodedScan(Rows(rows, source.ids), sharded._reduction, sharded._uncoded, CPU, sharded._parts)
    (fault,) = other.find_faults(N, seed=0)
    assert "have wrong codes" in fault


def copy_changed(folder: Path, path: Path, **changes: Any) -> Path:
    """Copy the files, with changes of the arrays."""
    shutil.copytree(folder, path, dirs_exist_ok=True)
    with np.load(folder / "codes.npz") as arrays:
        np.savez(path / "codes.npz", **{**arrays, **changes})
    return path


def test_rows_in_the_file_of_another_shard_are_a_fault(source: Rows, folder: Path, tmp_path: Path) -> None:
    with np.load(folder / "codes.npz") as arrays:
        first_id_S = arrays["first_id_S"]
    first_id_S[2] += 6
    index = CodedScan.load(copy_changed(folder, tmp_path, first_id_S=first_id_S), source, CPU)
    assert index.find_faults(10, seed=0) == ["2 rows are in the file of another shard"]


@pytest.mark.parametrize(
    "changes",
    [
        {"first_id_S": np.zeros(3, np.int64)},
        {"rows_S": np.ones(SHARDS, np.int64)},
        {"rows_S": np.array([N, -N, N - 4, 0])},
        {"first_id_S": np.array([0, 9, 6, 12])},
    ],
)
def test_arrays_of_other_shards_are_damage(source: Rows, folder: Path, tmp_path: Path, changes: Any) -> None:
    with pytest.raises(DamagedIndexError, match=r"codes\.npz"):
        CodedScan.load(copy_changed(folder, tmp_path, **changes), source, CPU)


def test_a_missing_record_of_a_file_is_damage(source: Rows, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    caption = json.loads((tmp_path / "codes.json").read_text())
    caption["others"].pop()
    (tmp_path / "codes.json").write_text(json.dumps(caption))
    with pytest.raises(DamagedIndexError, match=r"codes\.json"):
        CodedScan.load(tmp_path, source, CPU)


@pytest.mark.parametrize("change", ["missing", "altered"])
def test_a_damaged_shard_is_reported_when_it_is_searched(
    source: Rows, folder: Path, tmp_path: Path, change: str
) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    path = tmp_path / list_code_files(SHARDS)[2]
    if change == "missing":
        path.unlink()
    else:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    index = CodedScan.load(tmp_path, source, CPU).with_settings(SETTING)
    with pytest.raises(DamagedIndexError, match=path.name):
        index.search(noise(1, 9), 10)


def test_a_forged_number_of_shards_is_damage(source: Rows, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    caption = json.loads((tmp_path / "codes.json").read_text())
    caption["params"]["shards"] = 10**15
    (tmp_path / "codes.json").write_text(json.dumps(caption))
    with pytest.raises(DamagedIndexError, match=r"codes\.npz"):
        CodedScan.load(tmp_path, source, CPU)


@pytest.mark.slow
def test_an_index_in_shards_is_extended_verified_repaired_and_loses_rows(tmp_path: Path) -> None:
    config = replace(CONFIG, index="codes", index_shards=3, partition_rows=128)
    tasks = [
        make_toy_task(tmp_path, train_data=lambda n=n: make_rows(n), query_data=lambda: make_rows(30, seed=2))
        for n in (400, 500)
    ]
    out = tmp_path / "out"
    build(tasks[0], out, config)
    report = build(tasks[0], out, replace(config, index_shards=1))
    assert (report.rows_extracted, report.manifest.index.shards, report.manifest.generation) == (0, 1, 2)
    report = build(tasks[1], out, replace(config, append=True))
    assert [record.name for record in report.manifest.index.files] == list(list_coded_files(3))
    remove(out, [7, 300])
    assert verify(out).damage == ()
    manifest = Manifest.read(out)
    name = list_code_files(3)[1]
    (out / f"generation-{manifest.generation:06d}" / name).write_bytes(b"nothing")
    assert any(name in str(damage.path) for damage in verify(out).damage)
    repair(out, tasks[1], device="cpu")
    assert verify(out).damage == () and Manifest.read(out).index.shards == 3
    index = InfluenceIndex.open(out, tasks[1])
    listed, scanned = (
        [{hit.row for hit in answer.hits} for answer in index.query(range(30), options=QueryOptions(search=search))]
        for search in ("index", "scan")
    )
    assert np.mean([len(a & b) / len(b) for a, b in zip(listed, scanned, strict=True)]) > 0.9
    assert not {7, 300} & set().union(*listed)


def test_a_number_of_shards_below_one_is_rejected() -> None:
    with pytest.raises(UsageError, match="invalid shards"):
        CodedScanParams(shards=0)
