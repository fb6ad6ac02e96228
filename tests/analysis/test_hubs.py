"""Hubs compared with a brute-force count of the hits of every query."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from tasks.own_ids import GONE, HERE, QUERIES, N
from tracin_ann import InfluenceIndex, QueryOptions
from tracin_ann.analysis import find_hubs
from tracin_ann.analysis.hubs import Counts
from tracin_ann.cli.hubs import main as hubs_command
from tracin_ann.errors import UsageError
from tracin_ann.store.columns import RowFilter


def count_hits(
    index: InfluenceIndex, side: str, ids: list[int], k: int, rows: list[int], **options: bool
) -> tuple[list[int], list[int]]:
    """Return N_k of all rows, of proponents and of opponents, by sorting all scores of every query."""
    asked = index.features(side, ids).astype(np.float64)  # type: ignore[arg-type]
    own = index.view().take(np.arange(N)).astype(np.float64)
    if options:
        rates = np.array([0.5, 0.125])
        asked, own = (
            (part / np.linalg.norm(part, axis=2, keepdims=True) * weight[:, None]).reshape(len(part), -1)
            for part, weight in (
                (asked.reshape(len(asked), 2, -1), rates / rates.sum()),
                (own.reshape(N, 2, -1), rates * 0 + 1),
            )
        )
    found: tuple[list[int], list[int]] = ([0] * N, [0] * N)
    for query, score_N in zip(ids, asked @ own.T, strict=True):
        allowed = [row for row in rows if side == "query" or row != query]
        for counts, sign in zip(found, (1, -1), strict=True):
            for row in sorted(allowed, key=lambda row: -sign * score_N[row])[:k]:
                counts[row] += sign * score_N[row] > 0
    return found


@pytest.mark.parametrize("side", ["query", "train"])
@pytest.mark.parametrize(("k", "lot"), [(1, 512), (4, 5)])
def test_counts_equal_those_of_brute_force(
    index: InfluenceIndex, side: str, k: int, lot: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[Counts.__module__], "_LOT", lot)
    ids = list(range(QUERIES)) if side == "query" else HERE
    found = find_hubs(index, None, k, side)  # type: ignore[arg-type]
    true = count_hits(index, side, ids, k, HERE)
    expected = {row: (up, down) for row, (up, down) in enumerate(zip(*true, strict=True)) if up or down}
    assert {hub.row: (hub.proponent_of, hub.opponent_of) for hub in found} == expected
    assert [hub.row for hub in found] == sorted(expected, key=lambda r: (-expected[r][0], -expected[r][1], r))
    assert [hub.rank for hub in found] == list(range(1, len(found) + 1))
    assert all(hub.id == f"row-{100 + hub.row:04}" for hub in found)
    census = found.census
    assert (census.n_queries, census.k) == (len(ids), k)
    for counts, all_rows in ((census.proponents, true[0]), (census.opponents, true[1])):
        assert counts.row_N.tolist() == HERE
        assert counts.count_N.tolist() == [all_rows[row] for row in HERE]
        assert counts.expected == pytest.approx(sum(all_rows) / len(HERE))
        deviations = np.array([all_rows[row] for row in HERE]) - counts.expected
        assert counts.skewness == pytest.approx(np.mean(deviations**3) / np.std(deviations) ** 3)


def test_options_and_rows_have_the_meaning_that_they_have_in_a_query(index: InfluenceIndex) -> None:
    only = (1, 4, 5, 8, 13, 21, 30)
    options = QueryOptions(cosine=True, rows=RowFilter(only=only), k=99)
    found = find_hubs(index, [2, 0, 2, 5], 2, options=options)
    allowed = [row for row in only if row not in GONE]
    true = count_hits(index, "query", [2, 0, 5], 2, allowed, cosine=True)
    assert found.census.n_queries == 3
    assert found.census.proponents.row_N.tolist() == allowed
    assert {h.row: (h.proponent_of, h.opponent_of) for h in found} == {
        row: pair for row, pair in enumerate(zip(*true, strict=True)) if any(pair)
    }
    by = found.ranked("opponents", 2)
    assert [hub.opponent_of for hub in by] == sorted((h.opponent_of for h in found), reverse=True)[:2]


def test_skewness_of_equal_counts_is_none() -> None:
    rows = np.arange(4)
    assert Counts(rows, np.full(4, 7)).skewness == 0
    assert Counts(rows[:0], rows[:0]).skewness == Counts(rows[:0], rows[:0]).expected == 0
    assert Counts(rows, np.array([0, 0, 0, 4])).skewness == pytest.approx(2 / 3**0.5)


@pytest.mark.parametrize(
    ("ids", "k", "message"), [([], 1, "no query"), ([QUERIES], 1, "no such row"), ([0], 0, "bad -k: got 0")]
)
def test_invalid_arguments_are_rejected(index: InfluenceIndex, ids: list[int], k: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        find_hubs(index, ids, k)


def run_command(folder: Path, *arguments: object) -> Result:
    named = ("--task", folder / "of_hubs.py:task", "--task-arg", f"folder={folder}", "--task-arg", "kind=words")
    words = (folder / "words", *named, "--device", "cpu", *arguments)
    return CliRunner().invoke(hubs_command, [str(word) for word in words])


def test_the_command_returns_the_result_of_the_function(folder: Path, index: InfluenceIndex, tmp_path: Path) -> None:
    result = run_command(folder, "-k", 3, "--top", 4, "--format", "jsonl")
    assert result.exit_code == 0, result.stderr
    assert [json.loads(line) for line in result.stdout.splitlines()] == find_hubs(index, None, 3).ranked(top=4).lines()
    assert f"queries:    {QUERIES}, k = 3\nsearch:     exact scan" in result.stderr
    assert "skewness" in result.stderr
    own = run_command(
        folder,
        "--own-ids",
        "--train-ids",
        "row-0101,row-0102",
        "--without",
        "row-0103",
        "--by",
        "opponents",
        "--output",
        tmp_path / "hubs.csv",
    )
    assert own.exit_code == 0, own.stderr
    true = find_hubs(index, [1, 2], 10, "train", QueryOptions(rows=RowFilter(without=(3,)))).ranked("opponents", 20)
    assert [line.split(",")[1] for line in (tmp_path / "hubs.csv").read_text().splitlines() if line[0].isdigit()] == [
        str(hub.id) for hub in true
    ]
    table = run_command(folder, "--ids", "0-3", "-k", 2)
    assert "proponent_of" in table.stdout
    both = run_command(folder, "--ids", "0", "--train-ids", "1")
    assert (both.exit_code, both.stdout) == (2, "")
    assert "--ids and --train-ids" in both.stderr


def test_hubs_have_a_text_form_and_a_plot(index: InfluenceIndex) -> None:
    calls: list[tuple[str, int, int]] = []
    found = find_hubs(index, range(5), 2, progress=lambda *message: calls.append(message))
    assert calls == [("queries", 5, 5)]
    found.plot().canvas.draw()
    assert "<table>" in found._repr_html_()
    assert found.to_pandas()["proponent_of"].sum() == found.census.proponents.count_N.sum()
