"""A toy task with ids and awkward text, its file and its index."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tasks.toy import CONFIG, RATES, Toy, make_rows, make_toy_task, save_checkpoints
from tracin_ann import Checkpoint, Description, Task, build
from tracin_ann.operations.removal import remove

N, QUERIES = 40, 7
GONE = [4, 11]
HERE = [row for row in range(N) if row not in GONE]
AWKWARD = ["plain", 'with, comma and "quotes"', "two\nlines", "naïve ✓", "<script>alert(1)</script>", "=1+1", "null"]
TASK = """
import sys
sys.path[:0] = {paths!r}
from tasks.own_ids import make_task as made
from tracin_ann import Task
def task(folder, kind="words") -> Task:
    return made(folder, kind)
"""


def make_numbered_rows(n: int, seed: int) -> list[tuple[torch.Tensor, int, int]]:
    """Return rows with a unique number each."""
    return [(x, label, 100 * seed + i) for i, (x, label) in enumerate(make_rows(n, seed))]


def row_id(row: Sequence[Any]) -> str:
    """Return a row's id."""
    return f"row-{row[2]:04}" if row[2] != 206 else "row, 206"


def make_task(folder: str | Path, kind: str) -> Task:
    """Return the task, with words, numbers or no ids."""
    ids = {"words": row_id, "numbers": lambda row: row[2], "positions": None}[kind]
    return make_toy_task(
        Path(folder),
        train_data=lambda: make_numbered_rows(N, 1),
        query_data=lambda: make_numbered_rows(QUERIES, 2),
        checkpoints=[Checkpoint(Path(folder) / f"checkpoint{i}.pt", rate) for i, rate in enumerate(RATES)],
        columns=lambda row: {"label": row[1]},
        describe=lambda row: Description(text=AWKWARD[row[2] % len(AWKWARD)]),
        ids=ids,
    )


def build_indexes(folder: Path, file: str, kinds: Sequence[str] = ("words",), gone: Sequence[int] = ()) -> None:
    """Write checkpoints, the task's file and an index of each kind to a folder, and remove some rows."""
    torch.manual_seed(3)
    save_checkpoints(Toy(), folder)
    (folder / file).write_text(TASK.format(paths=[str(Path(__file__).parent.parent)]))
    for kind in kinds:
        build(make_task(folder, kind), folder / kind, CONFIG)
        if gone:
            remove(folder / kind, gone)
