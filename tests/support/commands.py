"""Commands that change an index, on a small task: each takes a few hundredths of a second.

Each has a start state and an end state, both with answers; no other state is valid.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import disk
from benchmarks.common.results import strip_times
from disk import Tree
from tasks.toy import CONFIG, Toy, make_rows, make_toy_task, save_checkpoints
from tracin_ann import BuildConfig, InfluenceIndex, QueryOptions, Task, build
from tracin_ann.operations.removal import remove
from tracin_ann.store.manifest import MANIFEST, Manifest

OUT = "made/index"
KINDS = ("flat", "ivf", "codes", "bounds", "graph")
_MANY = QueryOptions(k=300)

Answers = list[list[tuple[str, float]]]


@dataclass(frozen=True)
class Command:
    """A change of an index: its name, the start state of the directory, and the function that changes it."""

    name: str
    start: Tree
    run: Callable[[Path], object]

    def at(self, root: Path) -> object:
        """Run it on the index below a directory."""
        return self.run(root / OUT)


@dataclass(frozen=True)
class Reference:
    """The result of a command without faults: the directory, and the answers before (None: no index) and after."""

    command: Command
    end: dict[str, bytes | None]
    before: Answers | None
    after: Answers


@cache
def make_checkpoints() -> tuple[Toy, list[Any]]:
    model = Toy()
    return model, save_checkpoints(model, Path(tempfile.mkdtemp(prefix="checkpoints-")))


@cache
def task(n_rows: int, n_checkpoints: int = 2) -> Task:
    """Return the task with the first rows and checkpoints."""
    model, checkpoints = make_checkpoints()
    return make_toy_task(
        Path(),
        model,
        train_data=lambda: make_rows(n_rows),
        checkpoints=checkpoints[:n_checkpoints],
        columns=lambda row: {"label": int(row[1])},
    )


def make_config(kind: str, **changes: Any) -> BuildConfig:
    """Return the build options of the small indexes."""
    return replace(CONFIG, dim=4, partition_rows=4, yardstick=False, index=kind, **changes)


@cache
def make_commands(kind: str) -> dict[str, Command]:
    """Return the commands by name."""

    def built(n_rows: int, n_checkpoints: int = 2, **changes: Any) -> Callable[[Path], object]:
        return lambda out: build(task(n_rows, n_checkpoints), out, make_config(kind, **changes))

    def removed(out: Path) -> None:
        built(10)(out)
        remove(out, [7])

    nothing: Tree = {}
    made = [
        Command("build", nothing, built(10)),
        Command("append", read_state(removed), built(15, append=True)),
        Command("add a checkpoint", read_state(built(10, 1)), built(10, add_checkpoint=True)),
        Command("remove", read_state(removed), lambda out: remove(out, [3])),
    ]
    return {command.name: command for command in made}


@cache
def run_reference(kind: str, name: str) -> Reference:
    """Return the result of a command without faults."""
    command = make_commands(kind)[name]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "root"
        disk.write_tree(command.start, root)
        before = collect_answers(root / OUT) if command.start else None
        command.at(root)
        return Reference(command, read_files(disk.read_tree(root)), before, collect_answers(root / OUT))


def read_state(run: Callable[[Path], object]) -> Tree:
    root = Path(tempfile.mkdtemp())
    try:
        run(root / OUT)
        return disk.read_tree(root)
    finally:
        shutil.rmtree(root)


def collect_answers(out: Path) -> Answers:
    """Return the answers of the index to all queries."""
    manifest = Manifest.read(out)
    its_task = task(manifest.build.spec.train_rows, len(manifest.build.spec.checkpoints))
    found = InfluenceIndex.open(out, its_task).query(range(3), options=_MANY)
    return [[(hit.id, hit.score) for hit in (*answer.proponents, *answer.opponents)] for answer in found]


def read_files(tree: Tree) -> dict[str, bytes | None]:
    """Return the content of every file, without the times in a manifest."""
    return {
        path: entry and (strip_times(entry[1]) if path.endswith(MANIFEST) else entry[1]) for path, entry in tree.items()
    }
