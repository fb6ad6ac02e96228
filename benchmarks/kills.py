"""Real kills at random times: builds, fillings of lists, appends, removals, each killed and run again until it is done.

One process gets ready, in one thread, and forks the rest. After every kill a reader must find the old index or the new
one (for a first build: none, or the new one); what is there when a command at last comes to its end must equal, file
by file and answer by answer, what it makes undisturbed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import common
from tracin_ann import BuildConfig, Checkpoint, InfluenceIndex, QueryOptions, Task, build
from tracin_ann.errors import DamagedIndexError
from tracin_ann.operations.removal import remove
from tracin_ann.store.generations import UNFINISHED_INDEX
from tracin_ann.store.locks import WRITER
from tracin_ann.store.manifest import MANIFEST, Manifest

CONFIG = BuildConfig(dim=16, partition_rows=128, batch_size=64, device="cpu", yardstick=False, index="flat")
LISTS = replace(CONFIG, index="ivf")
GONE = range(0, 200, 2)
QUERIES = 4
MOST_ROWS = 20_000


@dataclass(frozen=True)
class Command:
    """What is killed: how its directory comes to be, and how it changes."""

    name: str
    start: Callable[[Path], object]
    run: Callable[[Path], object]


class Rows:
    """The first of many rows: more of them begin with the same."""

    def __init__(self, n_rows: int, seed: int) -> None:
        self.x_NX = torch.randn(MOST_ROWS, 12, generator=torch.Generator().manual_seed(seed))[:n_rows]

    def __len__(self) -> int:
        return len(self.x_NX)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.x_NX[i], i % 5


def task(folder: Path, n_rows: int, n_checkpoints: int = 2) -> Task:
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 5))
    return Task(
        model=lambda: model,
        loss=lambda net, batch: nn.functional.cross_entropy(net(batch[0]), batch[1], reduction="none"),
        train_data=lambda: Rows(n_rows, 1),
        query_data=lambda: Rows(QUERIES, 2),
        checkpoints=[Checkpoint(folder / f"{i}.pt", learning_rate=0.1 / (i + 1)) for i in range(n_checkpoints)],
        columns=lambda row: {"label": int(row[1])},
    )


def checkpoints(folder: Path) -> None:
    for i in range(2):
        torch.manual_seed(i)
        torch.save(task(folder, 1).model().state_dict(), folder / f"{i}.pt")


def commands(folder: Path, n_rows: int) -> list[Command]:
    few = n_rows * 3 // 4

    def made(out: Path, rows: int, config: BuildConfig, n_checkpoints: int = 2) -> None:
        build(task(folder, rows, n_checkpoints), out, config)

    def lacking_lists(out: Path) -> None:
        """Leave what a build leaves that is killed before its lists."""
        made(out, n_rows, CONFIG)
        (out / MANIFEST).unlink()
        shutil.rmtree(next(out.glob("generation-*")))

    def with_gone(out: Path) -> None:
        made(out, few, LISTS)
        remove(out, GONE[:50])

    return [
        Command("build", lambda out: None, partial(made, rows=n_rows, config=CONFIG)),
        Command("fill lists", lacking_lists, partial(made, rows=n_rows, config=LISTS)),
        Command("append", with_gone, partial(made, rows=n_rows, config=replace(LISTS, append=True))),
        Command(
            "add a checkpoint",
            partial(made, rows=n_rows, config=CONFIG, n_checkpoints=1),
            partial(made, rows=n_rows, config=replace(CONFIG, add_checkpoint=True)),
        ),
        Command("remove", with_gone, lambda out: remove(out, GONE)),
    ]


def answers(folder: Path, out: Path) -> Any:
    """Return what an index answers, None where there is none."""
    try:
        spec = Manifest.read(out).build.spec
        index = InfluenceIndex.open(out, task(folder, spec.train_rows, len(spec.checkpoints)))
    except DamagedIndexError:
        if (out / MANIFEST).exists():
            raise
        return None
    found = index.query(range(QUERIES), options=QueryOptions(k=20, search="scan"))
    return [[[hit.id, hit.score] for hit in (*answer.proponents, *answer.opponents)] for answer in found]


def files(out: Path) -> dict[str, str]:
    """Return every file's bytes, in hexadecimal; of manifests, all but what a clock said."""
    found = {}
    for path in sorted(out.rglob("*")):
        if path.is_dir():
            continue
        content = path.read_bytes()
        if path.name == MANIFEST:
            content = common.timeless(content)
        found[str(path.relative_to(out))] = content.hex()
    return found


def started(function: Callable[[], object]) -> int:
    """Return the number of a forked process that runs a function."""
    child = os.fork()
    if child == 0:
        try:
            function()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    return child


def forked(function: Callable[[], Any]) -> Any:
    """Return what a function returns, run in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "said"
        child = started(lambda: path.write_text(json.dumps(function())))
        if os.waitpid(child, 0)[1] != 0:
            raise SystemExit("a check failed; it is printed above")
        return json.loads(path.read_text())


@dataclass
class Trial:
    """One command, undisturbed once and then killed again and again."""

    command: Command
    folder: Path
    random: random.Random

    def __post_init__(self) -> None:
        self.start, self.out, whole = (self.folder / name for name in ("start", "out", "whole"))
        self.folder.mkdir()
        for path in (self.start, whole):
            forked(lambda path=path: bool(self.command.start(path)))
        began = time.perf_counter()
        forked(lambda: bool(self.command.run(whole)))
        self.seconds = time.perf_counter() - began
        self.files, self.after = files(whole), self.answers(whole)
        self.before = self.answers(self.start)
        if self.before == self.after:
            raise SystemExit(f"{self.command.name}: old and new answer alike, so that no reader could tell")
        self.left, self.seen, self.ends = Counter[str](), Counter[str](), 0

    def answers(self, out: Path) -> Any:
        return forked(lambda: answers(self.folder.parent, out))

    def until_done(self, most: int) -> None:
        """Kill the command at random times, at most so often, and run it again until it ends."""
        shutil.rmtree(self.out, ignore_errors=True)
        if self.start.exists():
            shutil.copytree(self.start, self.out)
        kills = 0
        while kills < most:
            child = started(lambda: self.command.run(self.out))
            time.sleep(self.random.uniform(0, 1.1 * self.seconds))
            os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
            if os.WIFEXITED(status):
                break
            kills += 1
            self.look()
        else:
            status = os.waitpid(started(lambda: self.command.run(self.out)), 0)[1]
        if status != 0:
            raise SystemExit(f"{self.command.name} failed after {kills} kills; see above")
        if files(self.out) != self.files or self.answers(self.out) != self.after:
            raise SystemExit(f"{self.command.name}: after {kills} kills, another index than undisturbed")
        self.ends += 1

    def look(self) -> None:
        """Count what a kill left, and what a reader finds."""
        names = [path.name for path in self.out.rglob("*")] if self.out.exists() else []
        self.left["a temporary"] += any(name.startswith(".tracin-tmp-") for name in names)
        self.left["the lock's file"] += WRITER in names
        self.left["unfinished lists"] += UNFINISHED_INDEX in names
        self.left["two generations"] += sum(name.startswith("generation-") for name in names) > 1
        found = self.answers(self.out)
        if found not in (self.before, self.after):
            raise SystemExit(f"{self.command.name}: a reader found neither the old index nor the new one")
        self.seen["none" if found is None else "new" if found == self.after else "old"] += 1

    def result(self) -> dict[str, Any]:
        return {
            "command": self.command.name,
            "seconds": self.seconds,
            "kills": self.seen.total(),
            "left": dict(self.left),
            "readers_found": {name: self.seen[name] for name in ("none", "old", "new")},
            "ended_as_undisturbed": self.ends,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--print", action="store_true", help="print the results and write no file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoints(folder)
        # What is imported late is imported here, once.
        for command in commands(folder, 300):
            command.start(folder / "first")
            command.run(folder / "first")
            answers(folder, folder / "first")
            shutil.rmtree(folder / "first")
        trials = [
            Trial(command, folder / str(number), random.Random(f"{options.seed} {number}"))
            for number, command in enumerate(commands(folder, options.rows))
        ]
        # Each its share, and the rest to the first.
        shares = [options.kills // len(trials)] * len(trials)
        shares[0] += options.kills % len(trials)
        for trial, share in zip(trials, shares, strict=True):
            while (left := share - trial.seen.total()) > 0:
                trial.until_done(left)
            print(trial.result(), file=sys.stderr, flush=True)
        results = [trial.result() for trial in trials]
    settings = {"kills": options.kills, "rows": options.rows, "seed": options.seed}
    print(json.dumps(results) if options.print else common.write("kills", settings, results))


if __name__ == "__main__":
    main()
