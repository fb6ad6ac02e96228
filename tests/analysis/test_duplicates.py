"""Duplicates compared with the float64 cosine of every pair, with small blocks and reduced rows."""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from paths import SUPPORT
from tasks.toy import CONFIG, RATES, Toy, cross_entropy, make_rows, save_checkpoints
from tracin_ann import Checkpoint, InfluenceIndex, Task, build
from tracin_ann.analysis import find_duplicates
from tracin_ann.analysis.duplicates import Duplicates
from tracin_ann.cli.duplicates import main as duplicates_command
from tracin_ann.errors import UsageError
from tracin_ann.operations.removal import remove
from tracin_ann.store.columns import RowFilter

N = 60
COPIES = {7: 3, 30: 3, 31: 12, 45: 2, 50: 2}
NEAR = {20: 1, 21: 20, 55: 40}
FLAT = (9, 33, 48)
GONE = [45]
SMALL = {"_BLOCK": 7, "_DIRECTIONS": 5, "_ENTRIES": 500}
NAMED = """
import sys
sys.path[:0] = {paths!r}
from test_duplicates import make_task as made
def task(folder):
    return made(folder)
"""


def make_rows_with_copies() -> list[tuple[torch.Tensor, int, int]]:
    """Return rows that include exact copies, near copies, and rows without a gradient."""
    made = make_rows(N)
    for row, of in COPIES.items():
        made[row] = made[of]
    for row, of in NEAR.items():
        made[row] = (made[of][0] + 0.01 * made[row][0], made[of][1])
    return [(x, y, i) for i, (x, y) in enumerate(made)]


def loss(model: torch.nn.Module, batch: Any) -> torch.Tensor:
    return cross_entropy(model, batch) * torch.tensor([int(i) not in FLAT for i in batch[2]])


def make_task(folder: str) -> Task:
    return Task(
        model=Toy,
        loss=loss,
        train_data=make_rows_with_copies,
        query_data=lambda: make_rows_with_copies()[:3],
        checkpoints=[Checkpoint(f"{folder}/checkpoint{i}.pt", rate) for i, rate in enumerate(RATES)],
        columns=lambda row: {"label": row[1]},
        ids=lambda row: f"row-{row[2]}",
        describe=lambda row: f"class {row[1]}",
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("duplicates")
    torch.manual_seed(3)
    save_checkpoints(Toy(), directory)
    (directory / "of_duplicates.py").write_text(NAMED.format(paths=[str(SUPPORT)]))
    build(make_task(str(directory)), directory / "index", replace(CONFIG, partition_rows=17, yardstick=False))
    remove(directory / "index", GONE)
    return directory


@pytest.fixture(scope="module")
def index(folder: Path) -> InfluenceIndex:
    return InfluenceIndex.open(folder / "index", make_task(str(folder)), device="cpu")


def find_by_brute_force(row_NF: np.ndarray, ids: list[int], threshold: float) -> dict[frozenset[int], float]:
    """Return each group with its lowest cosine."""
    wide_NF = row_NF.astype(np.float64)
    norm_N = np.linalg.norm(wide_NF, axis=1)
    unit = {i: wide_NF[i] / norm_N[i] for i in ids if norm_N[i] > 0}
    groups = {frozenset([i]) for i in unit}
    for i, j in itertools.combinations(unit, 2):
        if 1 - np.square(unit[i] - unit[j]).sum() / 2 >= threshold:
            joined = {group for group in groups if i in group or j in group}
            groups = (groups - joined) | {frozenset().union(*joined)}
    return {g: min(float(unit[i] @ unit[j]) for i in g for j in g) for g in groups if len(g) > 1}


def assert_groups(found: Duplicates, true: dict[frozenset[int], float]) -> None:
    assert {frozenset(group) for group in found.groups} == set(true)
    assert all(list(group) == sorted(group) for group in found.groups)
    order = [(-len(group), group[0]) for group in found.groups]
    assert order == sorted(order)
    for row in found:
        group = frozenset(found.groups[row.group - 1])
        assert row.row in group
        assert row.size == len(group)
        assert row.lowest_cosine == pytest.approx(true[group], abs=1e-12)


@pytest.mark.parametrize("threshold", [0.99999, 0.99, 0.5])
@pytest.mark.parametrize("sizes", [{}, SMALL, {"_BLOCK": 13, "_DIRECTIONS": 2, "_ENTRIES": 1}, {**SMALL, "_MANY": 1}])
def test_groups_equal_those_of_brute_force(
    index: InfluenceIndex, threshold: float, sizes: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in sizes.items():
        monkeypatch.setattr(sys.modules[Duplicates.__module__], name, value)
    found = find_duplicates(index, threshold)
    here = [i for i in range(N) if i not in GONE]
    assert_groups(found, find_by_brute_force(index.view().take(np.arange(N)), here, threshold))
    assert (found.extent.n_rows, found.extent.n_zero) == (N - len(GONE) - len(FLAT), len(FLAT))
    for group in [{3, 7, 30}, {12, 31}, {2, 50}, *([{1, 20}] if threshold < 0.999 else [])]:
        assert any(group <= set(other) for other in found.groups)


def test_rows_and_checkpoints_can_be_selected(index: InfluenceIndex) -> None:
    found = find_duplicates(index, 0.9, RowFilter(without=(50,), where=("label=0",)), checkpoints=[1])
    labels = index.columns["label"]
    here = [i for i in range(N) if i not in (*GONE, 50) and labels[i] == 0]
    assert_groups(found, find_by_brute_force(index.view([1]).take(np.arange(N)), here, 0.9))
    assert list(find_duplicates(index, rows=RowFilter(only=()))) == []
    assert list(find_duplicates(index, rows=RowFilter(only=FLAT))) == []
    assert list(find_duplicates(index, rows=RowFilter(only=(3,)))) == []


class FakeView:
    """A view of random rows."""

    def __init__(self, row_NF: np.ndarray) -> None:
        self.row_NF, self.dim = row_NF, row_NF.shape[1]

    def take(self, ids: np.ndarray) -> np.ndarray:
        return self.row_NF[ids]


class FakeIndex:
    """The part of an index that the duplicates analysis uses."""

    device, describe = torch.device("cpu"), staticmethod(lambda side, row: None)

    def __init__(self, row_NF: np.ndarray) -> None:
        self.row_NF = row_NF
        self.rows = self

    def view(self, checkpoints: object) -> FakeView:
        return FakeView(self.row_NF)

    def present(self, rows: object) -> np.ndarray:
        return np.arange(len(self.row_NF))

    def id_at(self, row: int) -> int:
        return row


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(0, 40),
    dim=st.integers(1, 90),
    threshold=st.floats(0.3, 1),
    scale=st.sampled_from([1e-30, 1.0, 1e30]),
)
def test_groups_of_random_rows_equal_those_of_brute_force(
    seed: int, n: int, dim: int, threshold: float, scale: float
) -> None:
    drawn = np.random.default_rng(seed)
    centres = drawn.standard_normal((4, dim))
    row_NF = centres[drawn.integers(0, 4, n)] * drawn.choice([-1, 1, 3], (n, 1))
    row_NF += drawn.standard_normal((n, dim)) * drawn.choice([0, 0, 1e-3, 0.1, 1], (n, 1))
    row_NF[drawn.random(n) < 0.1] = 0
    row_NF = (row_NF * scale).astype(np.float32)
    true = find_by_brute_force(row_NF, list(range(n)), threshold)
    # A pair at the threshold depends on rounding.
    if true == find_by_brute_force(row_NF, list(range(n)), threshold - 1e-12):
        assert_groups(find_duplicates(FakeIndex(row_NF), threshold), true)  # type: ignore[arg-type]


def test_a_thousand_copies_form_one_group() -> None:
    drawn = np.random.default_rng(5)
    row_NF = np.repeat(drawn.standard_normal((3, 8)).astype(np.float32), 1000, axis=0)
    found = find_duplicates(FakeIndex(row_NF))  # type: ignore[arg-type]
    assert [len(group) for group in found.groups] == [1000, 1000, 1000]
    assert found[0].lowest_cosine == pytest.approx(1)


@pytest.mark.parametrize("threshold", [0, -0.5, 1.01, float("nan")])
def test_an_invalid_threshold_is_rejected(index: InfluenceIndex, threshold: float) -> None:
    with pytest.raises(UsageError, match="bad --threshold"):
        find_duplicates(index, threshold)


def run_command(folder: Path, *arguments: object) -> Result:
    words = (folder / "index", "--task", folder / "of_duplicates.py:task", "--task-arg", f"folder={folder}", *arguments)
    return CliRunner().invoke(duplicates_command, [str(word) for word in words])


def test_the_command_returns_the_result_of_the_function(folder: Path, index: InfluenceIndex, tmp_path: Path) -> None:
    found = find_duplicates(index, 0.99)
    result = run_command(folder, "--threshold", 0.99, "--format", "jsonl")
    assert result.exit_code == 0, result.stderr
    assert [json.loads(line) for line in result.stdout.splitlines()] == found.lines()
    assert result.stderr.strip().endswith(
        f"duplicates: {len(found.groups)} groups, {len(found)} of 56 rows, cosine at least 0.99; "
        "3 rows with a zero gradient excluded"
    )
    own = run_command(folder, "--own-ids", "--only", "row-3,row-7,row-8", "--output", tmp_path / "made.csv")
    assert own.exit_code == 0, own.stderr
    assert (tmp_path / "made.csv").read_text().splitlines()[1:] == [
        f"1,2,{find_duplicates(index, rows=RowFilter(only=(3, 7)))[0].lowest_cosine},row-{i},{i},class 0"
        for i in (3, 7)
    ]
    assert "1 group, 2 of 3 rows" in own.stderr
    table = run_command(folder, "--threshold", 0.99999)
    assert "lowest_cosine" in table.stdout
    refused = run_command(folder, "--threshold", 2)
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "bad --threshold" in refused.stderr


def test_duplicates_need_no_task_and_report_progress(folder: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    index = InfluenceIndex.open(folder / "index", "nowhere.py:task", device="cpu")
    found = find_duplicates(index, progress=lambda *message: calls.append(message))
    assert calls == [("rows", 59, 59), ("pairs of blocks", 1, 1)]
    assert (found[0].id, found[0].row) == ("row-1", 1)
    assert "<table>" in found._repr_html_()
    assert found.to_pandas()["size"].tolist() == [row.size for row in found]
