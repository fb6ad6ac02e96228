"""Exact scans of the stored rows by workers, compared to the bit with those of one process."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_shard_search import kill, open_named, strip, workers

from inline_workers import Inline
from shard_folder import QUERIES, ROWS, make_config
from tracin_ann import InfluenceIndex, ProcessLauncher, QueryOptions, build
from tracin_ann.distributed import ShardOptions
from tracin_ann.errors import NonFiniteError, WorkerError
from tracin_ann.operations import remove
from tracin_ann.scoring import Coverage
from tracin_ann.search import FlatIndex, RowQuery
from tracin_ann.store import RowFilter
from tracin_ann.types import TopK

pytestmark = pytest.mark.xdist_group("shards")
SCAN = QueryOptions(k=5, search="scan")
KINDS = ("flat", "codes", "single", "sharded", "sharded-codes")


@pytest.fixture(scope="module")
def pair(folder: Path) -> Iterator[tuple[InfluenceIndex, InfluenceIndex]]:
    """Return the index without lists in one process, and with two workers."""
    with open_named(folder, "flat", ProcessLauncher(["cpu", "cpu"])) as scanned:
        yield open_named(folder, "flat"), scanned


@pytest.mark.parametrize(
    "options",
    [
        SCAN,
        replace(SCAN, k=150, rerank="none"),
        replace(SCAN, rerank="none", rows=RowFilter(without=tuple(range(0, ROWS, 3)))),
        # Fewer rows than a sixteenth, of one worker's range.
        replace(SCAN, rows=RowFilter(only=(3, 5, 77))),
        replace(SCAN, rerank="none", rows=RowFilter(only=tuple(range(300, 600)))),
        replace(SCAN, checkpoints=(1,), rerank="none"),
        replace(SCAN, score="cosine", rerank="none"),
        replace(SCAN, score="fisher"),
        replace(SCAN, score="gauss-newton", rerank="none"),
    ],
)
@pytest.mark.parametrize("n_queries", [1, 8, QUERIES])
def test_scans_are_those_of_one_process(
    pair: tuple[InfluenceIndex, InfluenceIndex], options: QueryOptions, n_queries: int
) -> None:
    one, many = pair
    expected = one.query(range(n_queries), options=options)
    found = many.query(range(n_queries), options=options)
    assert strip(found) == strip(expected)
    shards = () if options.rows.only == (3, 5, 77) else (0, 1)
    assert {(answer.shards, answer.missing_shards) for answer in found} == {(shards, ())}


def test_rows_that_a_score_transforms_are_scanned_here(pair: tuple[InfluenceIndex, InfluenceIndex]) -> None:
    one, many = pair
    options = replace(SCAN, score="trackstar")
    expected, found = (index.query([3], options=options) for index in (one, many))
    assert strip(found) == strip(expected) and found[0].shards == ()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_index_is_scanned_by_workers(folder: Path, kind: str) -> None:
    launcher = Inline()
    with open_named(folder, kind, launcher) as index:
        for search in ("scan", "auto"):
            options = replace(SCAN, search=search, k=400)  # type: ignore[arg-type]
            expected = open_named(folder, kind).query(range(20), options=options)
            found = index.query(range(20), options=options)
            assert strip(found) == strip(expected)
            assert {answer.shards for answer in found} == {(0, 1)}
            assert "shards answered" not in expected[0].how


@pytest.mark.parametrize(
    "options",
    [
        QueryOptions(k=5, search="index"),
        QueryOptions(k=60, search="index", rerank="none"),
        QueryOptions(k=5, search="index", rows=RowFilter(without=tuple(range(0, ROWS, 7))), candidates=40),
    ],
)
def test_codes_are_searched_by_workers(folder: Path, options: QueryOptions) -> None:
    launcher, one = Inline(), open_named(folder, "sharded-codes")
    with open_named(folder, "sharded-codes", launcher) as index:
        for ids in ([3], range(QUERIES)):
            found, expected = (each.query(ids, options=options) for each in (index, one))
            assert strip(found) == strip(expected)
            assert {answer.shards for answer in found} == {(0, 1)} and "coded scan" in found[0].how
        # The codes are in the workers only.
        codes: Any = index._loaded_index
        assert not codes._parts.codes._opened


@pytest.mark.slow
def test_a_killed_worker_reads_its_codes_again(folder: Path) -> None:
    options = QueryOptions(k=5, search="index")
    expected = strip(open_named(folder, "sharded-codes").query(range(QUERIES), options=options))
    with open_named(folder, "sharded-codes", ProcessLauncher(["cpu"])) as index:
        for shard in (0, 1):
            kill(index, shard)
            assert strip(index.query(range(QUERIES), options=options)) == expected


def test_codes_of_a_worker_that_ends_are_missing_from_partial_answers(folder: Path) -> None:
    launcher = Inline()
    launcher.dead.add(0)
    options = ShardOptions(allow_partial=True, restarts=0)
    with open_named(folder, "sharded-codes", launcher, options) as index:
        (found,) = index.query([3], options=QueryOptions(k=5, search="index"))
        assert found.missing_shards == (0,) and "partial results" in found.how
        codes: Any = index._loaded_index
        assert min(hit.row for hit in found.hits) >= codes._parts.codes.first_id_S[1]


def test_workers_without_rows_compute_exact_scores_only(folder: Path) -> None:
    launcher, one = Inline(7), open_named(folder, "flat")
    with open_named(folder, "flat", launcher) as index:
        assert [len(shard._service.ids) for shard in launcher.services] == [0, 0, 256, 0, 256, 0, 88]
        assert strip(index.query([1], options=SCAN)) == strip(one.query([1], options=SCAN))
        (found,), (expected,) = (each.query([1], options=QueryOptions(k=5, exact=True)) for each in (index, one))
        assert [hit.row for hit in found.hits] == [hit.row for hit in expected.hits]
        assert all("task" in vars(shard) for shard in launcher.services)


def test_a_worker_killed_between_scans_loses_no_row(pair: tuple[InfluenceIndex, InfluenceIndex]) -> None:
    one, many = pair
    before = [worker.pid for worker in workers(many)]
    kill(many, 1)
    expected, found = (strip(index.query(range(9), options=SCAN)) for index in (one, many))
    assert found == expected
    after = [worker.pid for worker in workers(many)]
    assert after[0] == before[0] and after[1] != before[1]


@pytest.mark.slow
def test_a_worker_that_hangs_is_missing_from_a_partial_scan(folder: Path) -> None:
    launcher, options = ProcessLauncher(["cpu", "cpu"]), ShardOptions(deadline_s=5, allow_partial=True)
    with open_named(folder, "flat", launcher, options) as index:
        index.query([0], options=SCAN)
        os.kill(workers(index)[1].pid or 0, signal.SIGSTOP)
        (partial,) = index.query([0], options=SCAN)
        assert (partial.shards, partial.missing_shards) == ((0,), (1,))
        assert "1 of 2 shards answered: partial results" in partial.how
        first = RowFilter(only=tuple(range(256)))
        (expected,) = open_named(folder, "flat").query([0], options=replace(SCAN, rows=first))
        assert strip([partial]) == strip([expected])


@pytest.mark.slow
def test_a_late_worker_is_an_error_unless_partial_results_are_allowed(folder: Path) -> None:
    launcher = ProcessLauncher(["cpu", "cpu"])
    with open_named(folder, "flat", launcher, ShardOptions(deadline_s=5)) as index:
        os.kill(workers(index)[0].pid or 0, signal.SIGSTOP)
        with pytest.raises(WorkerError, match="worker 0 is late: got no reply in 5 s"):
            index.query([0], options=SCAN)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["flat", "single"])
def test_removed_and_appended_rows_are_those_of_one_process(folder: Path, tmp_path: Path, kind: str) -> None:
    directory, task = tmp_path / "index", f"{folder}/shard_task.py:task"
    shutil.copytree(folder / kind, directory)
    for change in ("removed", "appended"):
        if change == "removed":
            remove(directory, range(5, 400, 7))
        else:
            config = make_config("flat" if kind == "flat" else "ivf", append=True)
            build(task, directory, config, arguments={"rows": "900"})
        opened: dict[str, Any] = {"device": "cpu", "arguments": {"rows": "900"} if change == "appended" else None}
        one = InfluenceIndex.open(directory, task, **opened)
        with InfluenceIndex.open(directory, task, launcher=Inline(), **opened) as many:
            expected, found = (strip(index.query(range(12), options=SCAN)) for index in (one, many))
            assert found == expected
        rows = {hit.row for answer in found for hit in answer.hits}
        assert not rows & set(range(5, 400, 7))
    assert len(one) == 900 and max(rows) >= ROWS


def make_top(*pairs: tuple[int, float]) -> TopK:
    ids, scores = (np.array(values) for values in zip(*pairs, strict=True))
    return TopK((ids.astype(np.int64),), (scores.astype(np.float32),), np.array([10]))


class Rows:
    """Ten stored rows that are not read here."""

    dim = 2

    def __len__(self) -> int:
        return 10

    def stored_blocks(self, block_rows: int) -> Iterator[Any]:
        pytest.fail("scanned in this process")
        yield

    blocks = take = stored_blocks


def scan(parts: list[TopK], k: int = 2) -> TopK:
    asked: list[RowQuery] = []

    def scanner(query: RowQuery) -> list[list[TopK]]:
        asked.append(query)
        return [[part] for part in parts]

    index = FlatIndex(Rows(), torch.device("cpu"), scanner=scanner)  # type: ignore[arg-type]
    found = index.search(np.ones((1, 2), np.float32), k)
    assert [(query.k, query.signs, query.allowed) for query in asked] == [(k, (1,), None)]
    return found


def test_equal_scores_of_parts_are_ordered_by_id() -> None:
    found = scan([make_top((6, 2.0), (7, 1.0)), make_top((1, 2.0), (3, 1.0))])
    assert found.ids[0].tolist() == [1, 6] and found.rows_scored.tolist() == [20]


def test_without_parts_there_are_no_results() -> None:
    assert scan([]).ids[0].tolist() == []


@pytest.mark.parametrize("score", [np.nan, np.inf])
def test_a_score_that_is_not_finite_is_reported(score: float) -> None:
    with pytest.raises(NonFiniteError, match="the inner product with row 3 is not finite"):
        scan([make_top((6, 2.0), (7, 1.0)), make_top((3, score), (1, 2.0))])


def test_minus_infinity_beyond_the_best_is_no_error() -> None:
    assert scan([make_top((6, 2.0), (7, 1.0)), make_top((1, 3.0), (3, -np.inf))]).ids[0].tolist() == [1, 6]


def test_a_shard_that_was_missing_is_not_asked_again(folder: Path) -> None:
    launcher = Inline()
    with open_named(folder, "flat", launcher) as index:
        search: Any = index._workers
        with search.watch() as coverage:
            coverage.missing.add(0)
            (part,) = search.scan_rows(index.view(), RowQuery(np.ones((1, 64), np.float32), 3, (1, -1), None))
        assert coverage == Coverage(2, {0}, True)
        assert min(ids.min() for top in part for ids in top.ids) >= 256
