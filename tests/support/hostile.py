"""A task whose ids, labels and texts attack terminals, spreadsheets and pages, and queries of its index."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from click.testing import Result

from invocation import run
from paths import ROOT, SUPPORT
from tasks.own_ids import QUERIES, N, make_numbered_rows
from tasks.toy import CONFIG, RATES, Toy, make_toy_task, save_checkpoints
from tracin_ann import Checkpoint, Description, Task, build
from tracin_ann.cli.query import main as query_command

HANGS_AFTER = 300
SIGNS = {
    "\x1b[2Jcleared": r"\x1b[2Jcleared",
    "\x9b31mred": r"\x9b31mred",
    "\u202egnp.exe": r"\u202egnp.exe",
    "\u2066isolated\u2069": r"\u2066isolated\u2069",
    "bell\x07 and del\x7f": r"bell\x07 and del\x7f",
    "nul\0inside": r"nul\x00inside",
    "lone \ud800": r"lone \ud800",
}
RAW = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
TEXTS = [*SIGNS, "=HYPERLINK(A1)", "-2.5", "@SUM(A1)"]
TASK = """
import sys
sys.path[:0] = {paths!r}
from hostile import hostile_task as made
def task(folder):
    return made(folder)
"""


def hostile_task(folder: str | Path) -> Task:
    """Return a task whose ids, labels and texts are hostile."""

    def text(row: Any) -> str:
        return TEXTS[row[2] % len(TEXTS)]

    return make_toy_task(
        Path(folder),
        train_data=lambda: make_numbered_rows(N, 1),
        query_data=lambda: make_numbered_rows(QUERIES, 2),
        checkpoints=[Checkpoint(Path(folder) / f"checkpoint{i}.pt", rate) for i, rate in enumerate(RATES)],
        columns=lambda row: {"label": text(row)},
        describe=lambda row: Description(text=text(row), table={"of it": text(row)}),
        ids=lambda row: f"{row[2]} {text(row)}",
    )


def build_hostile_index(folder: Path) -> Path:
    """Write the task's file, its checkpoints and its index to a folder, and return the folder."""
    save_checkpoints(Toy(), folder)
    task_file(folder).write_text(TASK.format(paths=[str(SUPPORT), str(ROOT)]))
    build(hostile_task(folder), folder / "index", CONFIG)
    return folder


def task_file(folder: Path) -> Path:
    """Return the path of the task's file, which is a separate module for each folder."""
    return folder / f"task_{folder.name.replace('-', '_')}.py"


def query_arguments(folder: Path, *more: object) -> list[str]:
    named = ("--task", f"{task_file(folder)}:task", "--task-arg", f"folder={folder}", "--device", "cpu")
    return [str(word) for word in (folder / "index", *named, *more)]


def query_index(folder: Path, *more: object) -> Result:
    return run(query_command, *query_arguments(folder, *more))


def shell(line: str, *given: object, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run a line of bash in which "$@" is a query's command line."""
    command = [sys.executable, str(ROOT / "query.py"), *map(str, given)]
    return subprocess.run(
        ["bash", "-c", line, "bash", *command],
        env=os.environ | {"TERM": "dumb", "COLUMNS": "100"} | environment,
        capture_output=True,
        timeout=HANGS_AFTER,
        check=False,
    )
