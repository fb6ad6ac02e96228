"""Lists filled in stretches: a build killed at any point resumes, gives the same bytes and reads no row again."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_search_contract import Rows

from tasks.toy import CONFIG, make_rows, make_toy_task
from tracin_ann import InfluenceIndex, build
from tracin_ann.search import IVFIndex, IVFParams, construction
from tracin_ann.search.construction import UnfinishedLists, digest_inputs
from tracin_ann.search.flat import Subset
from tracin_ann.store.generations import UNFINISHED_INDEX
from tracin_ann.store.manifest import Manifest
from tracin_ann.types import Float32, Int64

CPU = torch.device("cpu")
BUILD = importlib.import_module("tracin_ann.build")
N, F, STRETCH = 700, 12, 150
PARAMS = IVFParams(nlist=20)


class Killed(BaseException):
    """Raised instead of the end of the process."""


class Counting(Rows):
    """Rows that count how often each is read in blocks."""

    def __init__(self, values: np.ndarray) -> None:
        super().__init__(values)
        self.read = np.zeros(len(values), dtype=int)

    def blocks(self, block_rows: int, start: int = 0) -> Iterator[tuple[Int64, Float32]]:
        for ids, values in super().blocks(block_rows, start):
            self.read[ids] += 1
            yield ids, values


@pytest.fixture(scope="module")
def values() -> np.ndarray:
    random = np.random.default_rng(0)
    made = random.standard_normal((N, F)) * random.lognormal(0, 1, (N, 1))
    made[[5, 300, 699]] *= 1e6  # outliers
    made[[7, 449, 450]] = 0  # quiet
    return made.astype(np.float32)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(construction, "STRETCH_ROWS", STRETCH)
    monkeypatch.setattr(construction, "_BLOCK_ROWS", 64)


def save_and_read(index: IVFIndex, folder: Path) -> dict[str, bytes]:
    folder.mkdir(exist_ok=True)
    index.save(folder)
    return {name: (folder / name).read_bytes() for name in IVFIndex.FILES}


def kill_at(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    """Raise `Killed` after n files are written."""
    replace_, count = construction.atomic_path.__globals__["os"].replace, []

    def counted(*paths: object) -> None:
        if len(count) == n:
            raise Killed
        count.append(paths)
        replace_(*paths)

    monkeypatch.setattr("tracin_ann.files.durable.os.replace", counted)


def test_several_stretches_give_the_same_lists_as_one(
    values: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = IVFIndex.build(Rows(values), PARAMS, CPU)
    monkeypatch.setattr(construction, "STRETCH_ROWS", N)
    one = IVFIndex.build(Rows(values), PARAMS, CPU)
    queries = np.random.default_rng(1).standard_normal((20, F)).astype(np.float32)
    for a, b in zip(many.search(queries, 10).ids, one.search(queries, 10).ids, strict=True):
        assert a.tolist() == b.tolist()
    assert many.tree.size_L.tolist() == one.tree.size_L.tolist()
    np.testing.assert_allclose(many.tree.radius_L, one.tree.radius_L, rtol=1e-5)


@pytest.mark.parametrize("n", range(15))
def test_a_build_killed_at_any_file_resumes_to_the_same_bytes(
    values: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n: int
) -> None:
    """Training and each of four stretches write three files (the fifth is not stored): 15 places to be killed at."""
    expected = save_and_read(IVFIndex.build(Rows(values), PARAMS, CPU), tmp_path / "expected")
    scratch = UnfinishedLists(tmp_path / "scratch", digest_inputs(PARAMS, "rows"))
    with monkeypatch.context() as patched:
        kill_at(patched, n)
        with pytest.raises(Killed):
            IVFIndex.build(Rows(values), PARAMS, CPU, scratch)
    source, progress = Counting(values), []
    found = IVFIndex.build(source, PARAMS, CPU, scratch, lambda done, total: progress.append((done, total)))
    assert save_and_read(found, tmp_path / "found") == expected
    finished = max(0, n // 3 - 1) * STRETCH  # complete stretches, without the training
    surveyed = 1 if n < 3 else 0
    assert (source.read[:finished] == surveyed).all()
    # A block that crosses the end of a stretch is read for both.
    assert (source.read[finished:] >= surveyed + 1).all()
    assert progress == [(min(at, N), N) for at in range(STRETCH, N + STRETCH, STRETCH)]


@pytest.mark.parametrize("name", ["trained.npz", "trained.faiss", "trained.json", "stretch-000001.faiss"])
@pytest.mark.parametrize("harm", ["flipped", "cut", "gone", "empty"])
def test_damaged_intermediate_files_are_rebuilt(values: np.ndarray, tmp_path: Path, name: str, harm: str) -> None:
    scratch = UnfinishedLists(tmp_path / "scratch", "key")
    expected = save_and_read(IVFIndex.build(Rows(values), PARAMS, CPU, scratch), tmp_path / "expected")
    path = scratch.directory / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if harm == "gone":
        path.unlink()
    else:
        path.write_bytes({"flipped": bytes(content), "cut": bytes(content[:-9]), "empty": b""}[harm])
    assert save_and_read(IVFIndex.build(Rows(values), PARAMS, CPU, scratch), tmp_path / "found") == expected


def test_intermediate_files_of_other_rows_are_not_used(
    values: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = UnfinishedLists(tmp_path / "scratch", digest_inputs(PARAMS, "other rows"))
    IVFIndex.build(Rows(values[::-1].copy()), PARAMS, CPU, other)
    scratch = UnfinishedLists(tmp_path / "scratch", digest_inputs(PARAMS, "rows"))
    found = IVFIndex.build(Rows(values), PARAMS, CPU, scratch)
    assert save_and_read(found, tmp_path / "a") == save_and_read(
        IVFIndex.build(Rows(values), PARAMS, CPU), tmp_path / "b"
    )
    assert digest_inputs(PARAMS, 1) != digest_inputs(replace(PARAMS, seed=1), 1)


@pytest.mark.parametrize("start", [0, 1, 37, 63, 99, 100])
def test_blocks_from_a_start_are_the_remaining_rows(values: np.ndarray, start: int) -> None:
    all_rows = Rows(values[:100])
    for source in (all_rows, Subset(all_rows, np.arange(0, 100, dtype=np.int64))):
        blocks = list(source.blocks(37, start))
        assert np.concatenate([np.zeros(0, int), *(ids for ids, _ in blocks)]).tolist() == list(range(start, 100))
        assert all(np.array_equal(got, values[ids]) for ids, got in blocks)


def test_a_build_killed_while_it_indexes_resumes_and_leaves_no_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_toy_task(tmp_path, train_data=lambda: make_rows(400), query_data=lambda: make_rows(30, seed=2))
    config = replace(CONFIG, index="ivf")
    build(task, tmp_path / "reference", config)
    fill_stretch, done = construction._fill_stretch, []

    def killed(*given: object) -> None:
        if len(done) == 1:
            raise Killed
        done.append(given)
        fill_stretch(*given)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(construction, "_fill_stretch", killed)
        with pytest.raises(Killed):
            build(task, tmp_path / "out", config)
    assert (tmp_path / "out" / UNFINISHED_INDEX / "stretch-000000.json").exists()
    with monkeypatch.context() as patched:
        patched.setattr(construction, "survey", lambda *given: pytest.fail("trained again"))
        build(task, tmp_path / "out", config)
    assert not (tmp_path / "out" / UNFINISHED_INDEX).exists()
    both = [InfluenceIndex.open(tmp_path / name, task) for name in ("reference", "out")]
    records = [Manifest.read(tmp_path / name).index.files for name in ("reference", "out")]
    assert records[0] == records[1] and len(both[0]) == 400


def test_a_build_killed_after_its_lists_does_not_repeat_finished_stretches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_toy_task(tmp_path, train_data=lambda: make_rows(400), query_data=lambda: make_rows(30, seed=2))
    config = replace(CONFIG, index="ivf")
    build(task, tmp_path / "reference", config)

    def killed(*given: object) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(BUILD.QualityMeasurement, "fidelity", killed)
        with pytest.raises(Killed):
            build(task, tmp_path / "out", config)
    fill_stretch, starts = construction._fill_stretch, []

    def counted(*given: object) -> None:
        starts.append(given[3])
        fill_stretch(*given)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(construction, "_fill_stretch", counted)
        patched.setattr(construction, "survey", lambda *given: pytest.fail("trained again"))
        build(task, tmp_path / "out", config)
    assert starts == [300], "only the last stretch, which is never stored"
    assert not (tmp_path / "out" / UNFINISHED_INDEX).exists()
    both = [Manifest.read(tmp_path / name).index.files for name in ("reference", "out")]
    assert both[0] == both[1]


def test_stretches_of_another_training_are_not_used(values: np.ndarray, tmp_path: Path) -> None:
    scratch = UnfinishedLists(tmp_path / "scratch", "key")
    IVFIndex.build(Rows(values * 2), PARAMS, CPU, scratch)
    for path in scratch.directory.glob("trained*"):
        path.unlink()
    found = IVFIndex.build(Rows(values), PARAMS, CPU, scratch)
    assert save_and_read(found, tmp_path / "a") == save_and_read(
        IVFIndex.build(Rows(values), PARAMS, CPU), tmp_path / "b"
    )
