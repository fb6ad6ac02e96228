"""Subsets compared with a row-by-row selection over the full matrix of scores."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from tasks.own_ids import GONE, HERE, QUERIES, N, row_id
from tasks.toy import CONFIG, make_toy_task
from tracin_ann import InfluenceIndex, build
from tracin_ann.analysis import select
from tracin_ann.analysis import subset as module
from tracin_ann.cli.query import main as query_command
from tracin_ann.cli.select import main as select_command
from tracin_ann.errors import UsageError
from tracin_ann.store.columns import RowFilter


def matrix(index: InfluenceIndex, ids: Sequence[int], checkpoints: Sequence[int] | None = None) -> np.ndarray:
    row_NF = index.view(checkpoints).take(np.arange(len(index))).astype(np.float64)
    return index.features("query", ids, checkpoints).astype(np.float64) @ row_NF.T


def select_in_turn(score_QN: np.ndarray, n: int, allowed: Sequence[int]) -> list[tuple[int, int]]:
    """Return (query, row) of every turn, chosen from all scores."""
    left, turns = list(allowed), []
    while len(turns) < n and left:
        query = len(turns) % len(score_QN)
        row = min(left, key=lambda row: (-score_QN[query, row], row))  # noqa: B023
        left.remove(row)
        turns.append((query, row))
    return turns


@pytest.mark.parametrize("n", [1, 2, 7, 20, 37, 38, 100])
@pytest.mark.parametrize("at_once", [1, 1 << 23])
def test_round_robin_equals_a_selection_over_the_full_matrix(
    index: InfluenceIndex, n: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CANDIDATES", at_once)
    found = select(index, n)
    score_QN = matrix(index, range(QUERIES))
    expected = select_in_turn(score_QN, n, HERE)
    assert [(row.query_row, row.row) for row in found] == expected
    assert [row.score for row in found] == pytest.approx([score_QN[turn] for turn in expected], rel=1e-4, abs=1e-6)
    assert [row.rank for row in found] == list(range(1, min(n, len(HERE)) + 1))
    assert [row.query for row in found] == [row_id((0, 0, 200 + query)) for query, _ in expected]
    assert [row.id for row in found] == [f"row-{100 + row:04}" for _, row in expected]
    assert found.rows == [row for _, row in expected]


def test_similar_queries_share_their_rows(index: InfluenceIndex) -> None:
    # Similar queries share candidates, so each needs more than its share of them.
    found = select(index, 30, [5, 2, 5, 3])
    expected = select_in_turn(matrix(index, [5, 2, 3]), 30, HERE)
    assert [(row.query_row, row.row) for row in found] == [((5, 2, 3)[query], row) for query, row in expected]


def test_mean_equals_a_selection_over_the_full_matrix_with_filters_and_checkpoints(index: InfluenceIndex) -> None:
    passing = [row for row in HERE if row % 3 == 1 and row != 7]
    chosen = RowFilter(without=(7,), where=("label=1",))
    for checkpoints in (None, (1,)):
        score_QN = matrix(index, range(QUERIES), checkpoints)
        mean_N = score_QN.mean(axis=0)
        found = select(index, 9, method="mean", rows=chosen, checkpoints=checkpoints)
        assert found.rows == sorted(passing, key=lambda row: (-mean_N[row], row))[:9]
        assert [row.score for row in found] == pytest.approx(mean_N[found.rows], rel=1e-4, abs=1e-6)
        assert all(row.query is None for row in found)
        turns = select(index, 9, rows=chosen, checkpoints=checkpoints)
        assert [(row.query_row, row.row) for row in turns] == select_in_turn(score_QN, 9, passing)


def test_equal_scores_are_ordered_by_rising_row(tmp_path: Path) -> None:
    torch.manual_seed(0)
    same = (torch.ones(5), 1)
    other = (torch.ones(5), 2)
    task = make_toy_task(tmp_path, train_data=lambda: [other, *[same] * 30], query_data=lambda: [same, same, other])
    build(task, tmp_path / "index", CONFIG)
    index = InfluenceIndex.open(tmp_path / "index", task)
    score_QN = matrix(index, range(3))
    if np.ptp(score_QN[0, 1:]) == 0:
        assert select(index, 5, [0, 1]).rows == [1, 2, 3, 4, 5]
        assert select(index, 5, [0, 1], "mean").rows == [1, 2, 3, 4, 5]
    assert select(index, 3).rows[2] == 0


def test_without_eligible_rows_the_selection_is_empty(index: InfluenceIndex) -> None:
    nothing = RowFilter(only=tuple(GONE))
    assert select(index, 3, rows=nothing) == []
    assert select(index, 3, method="mean", rows=nothing) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0,), "bad --n"), ((3, [QUERIES]), "query"), ((3, []), "no query"), ((3, None, "best"), "bad --method")],
)
def test_invalid_arguments_are_rejected(index: InfluenceIndex, arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        select(index, *arguments)  # type: ignore[arg-type]


def run_command(command: object, folder: Path, *words: str) -> Result:
    sys.path_importer_cache.clear()
    task = ["--task", f"{folder / 'of_subset.py'}:task", "--task-arg", f"folder={folder}"]
    return CliRunner().invoke(command, [str(folder / "words"), *task, *words])  # type: ignore[arg-type]


def test_the_query_command_reads_the_list_that_the_command_writes(folder: Path, index: InfluenceIndex) -> None:
    listed = folder / "chosen.txt"
    result = run_command(select_command, folder, "--n", "9", "--ids", "0-3", "--output", str(listed))
    assert result.exit_code == 0, result.output
    found = select(index, 9, range(4))
    assert listed.read_text() == "".join(f"{row}\n" for row in found.rows)
    assert f"9 of {N} rows for 4 queries, by round-robin" in result.stderr
    hits = run_command(query_command, folder, "--ids", "0", "-k", "40", "--only", f"@{listed}", "--format", "jsonl")
    answer = json.loads(hits.stdout)
    assert {hit["row"] for hit in answer["proponents"] + answer["opponents"]} == set(found.rows)
    refused = run_command(select_command, folder, "--n", "9", "--output", str(listed), "--csv-raw")
    assert refused.exit_code == 2 and "--csv-raw applies to CSV only" in refused.stderr


def test_the_query_command_reads_a_list_with_ids_of_the_task(folder: Path, index: InfluenceIndex) -> None:
    listed = folder / "names.txt"
    words = ["--own-ids", "--n", "5", "--ids", "row-0201,row-0200", "--method", "mean", "--output", str(listed)]
    assert run_command(select_command, folder, *words).exit_code == 0
    found = select(index, 5, [1, 0], "mean")
    assert listed.read_text().split() == [row.id for row in found]
    words = ["--own-ids", "--ids", "row-0200", "-k", "40", "--only", f"@{listed}", "--format", "jsonl"]
    answer = json.loads(run_command(query_command, folder, *words).stdout)
    assert {hit["row"] for hit in answer["proponents"] + answer["opponents"]} == set(found.rows)


def test_the_command_writes_the_results_of_the_function(folder: Path, index: InfluenceIndex) -> None:
    result = run_command(select_command, folder, "--n", "6", "--format", "jsonl")
    found = select(index, 6)
    assert [json.loads(line) for line in result.stdout.splitlines()] == json.loads(json.dumps(found.lines()))
    assert run_command(select_command, folder, "--n", "6", "--output", str(folder / "six.parquet")).exit_code == 0
    assert len(run_command(select_command, folder, "--n", "3").stdout.splitlines()) == 5
