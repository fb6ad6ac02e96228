"""Integrity of an index after SIGKILL at random times during builds, appends and removals.

Each command is killed and started again until it finishes. After every kill, a reader must find the old index or the
new one (for a first build: no index, or the new one). At the end, all files and answers must equal those of a run
without kills. One single-threaded process prepares the data and forks the others.
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

from benchmarks.common.results import strip_times, write_results
from tracin_ann import BuildConfig, Checkpoint, InfluenceIndex, QueryOptions, Task, build
from tracin_ann.errors import DamagedIndexError
from tracin_ann.operations.removal import remove
from tracin_ann.store.generations import UNFINISHED_INDEX
from tracin_ann.store.locks import WRITER
from tracin_ann.store.manifest import MANIFEST, Manifest

RESULT = "kills"
CONFIG = BuildConfig(dim=16, partition_rows=128, batch_size=64, device="cpu", yardstick=False, index="flat")
LISTS = replace(CONFIG, index="ivf")
REMOVED = range(0, 200, 2)
QUERIES = 4
MOST_ROWS = 20_000


@dataclass(frozen=True)
class Command:
    """A command to kill: how its directory is prepared, and how the command changes it."""

    name: str
    prepare: Callable[[Path], object]
    run: Callable[[Path], object]


class Rows:
    """The first `n_rows` rows of a fixed sequence."""

    def __init__(self, n_rows: int, seed: int) -> None:
        self.x_NX = torch.randn(MOST_ROWS, 12, generator=torch.Generator().manual_seed(seed))[:n_rows]

    def __len__(self) -> int:
        return len(self.x_NX)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.x_NX[i], i % 5


def make_task(folder: Path, n_rows: int, n_checkpoints: int = 2) -> Task:
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 5))
    return Task(
        model=lambda: model,
        loss=lambda net, batch: nn.functional.cross_entropy(net(batch[0]), batch[1], reduction="none"),
        train_data=lambda: Rows(n_rows, 1),
        query_data=lambda: Rows(QUERIES, 2),
        checkpoints=[Checkpoint(folder / f"{i}.pt", learning_rate=0.1 / (i + 1)) for i in range(n_checkpoints)],
        columns=lambda row: {"label": int(row[1])},
    )


def save_checkpoints(folder: Path) -> None:
    """Save two random checkpoints."""
    for i in range(2):
        torch.manual_seed(i)
        torch.save(make_task(folder, 1).model().state_dict(), folder / f"{i}.pt")


def make_commands(folder: Path, n_rows: int) -> list[Command]:
    """Return the commands to kill."""
    first_rows = n_rows * 3 // 4

    def build_rows(out: Path, rows: int, config: BuildConfig, n_checkpoints: int = 2) -> None:
        build(make_task(folder, rows, n_checkpoints), out, config)

    def build_without_lists(out: Path) -> None:
        """Leave the files of a build that was killed before it wrote its lists."""
        build_rows(out, n_rows, CONFIG)
        (out / MANIFEST).unlink()
        shutil.rmtree(next(out.glob("generation-*")))

    def build_and_remove(out: Path) -> None:
        build_rows(out, first_rows, LISTS)
        remove(out, REMOVED[:50])

    return [
        Command("build", lambda out: None, partial(build_rows, rows=n_rows, config=CONFIG)),
        Command("fill lists", build_without_lists, partial(build_rows, rows=n_rows, config=LISTS)),
        Command("append", build_and_remove, partial(build_rows, rows=n_rows, config=replace(LISTS, append=True))),
        Command(
            "add a checkpoint",
            partial(build_rows, rows=n_rows, config=CONFIG, n_checkpoints=1),
            partial(build_rows, rows=n_rows, config=replace(CONFIG, add_checkpoint=True)),
        ),
        Command("remove", build_and_remove, lambda out: remove(out, REMOVED)),
    ]


def query(folder: Path, out: Path) -> Any:
    """Return the answers of an index, or None if there is none."""
    try:
        spec = Manifest.read(out).build.spec
        index = InfluenceIndex.open(out, make_task(folder, spec.train_rows, len(spec.checkpoints)))
    except DamagedIndexError:
        if (out / MANIFEST).exists():
            raise
        return None
    answers = index.query(range(QUERIES), options=QueryOptions(k=20, search="scan"))
    return [[[hit.id, hit.score] for hit in (*answer.proponents, *answer.opponents)] for answer in answers]


def read_files(out: Path) -> dict[str, str]:
    """Return the bytes of every file in hexadecimal; manifests without measured times."""
    found = {}
    for path in sorted(out.rglob("*")):
        if path.is_dir():
            continue
        content = path.read_bytes()
        if path.name == MANIFEST:
            content = strip_times(content)
        found[str(path.relative_to(out))] = content.hex()
    return found


def start(function: Callable[[], object]) -> int:
    """Run a function in a forked process, and return its process id."""
    child = os.fork()
    if child == 0:
        try:
            function()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    return child


def run_forked(function: Callable[[], Any]) -> Any:
    """Return the result of a function that runs in a forked process."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        child = start(lambda: path.write_text(json.dumps(function())))
        if os.waitpid(child, 0)[1] != 0:
            raise SystemExit("a check failed; its traceback is printed above")
        return json.loads(path.read_text())


@dataclass
class Trial:
    """One command, run once without kills and then killed repeatedly."""

    command: Command
    folder: Path
    random: random.Random

    def __post_init__(self) -> None:
        self.prepare, self.out, undisturbed = (self.folder / name for name in ("prepared", "out", "undisturbed"))
        self.folder.mkdir()
        for path in (self.prepare, undisturbed):
            run_forked(lambda path=path: bool(self.command.prepare(path)))
        start_s = time.perf_counter()
        run_forked(lambda: bool(self.command.run(undisturbed)))
        self.seconds = time.perf_counter() - start_s
        self.files, self.after = read_files(undisturbed), self.query(undisturbed)
        self.before = self.query(self.prepare)
        if self.before == self.after:
            raise SystemExit(
                f"{self.command.name}: the old and the new index give the same answers; expected different ones"
            )
        self.left, self.seen, self.ends = Counter[str](), Counter[str](), 0

    def query(self, out: Path) -> Any:
        return run_forked(lambda: query(self.folder.parent, out))

    def run_until_done(self, most: int) -> None:
        """Kill the command at random times, at most `most` times, and run it until it finishes."""
        shutil.rmtree(self.out, ignore_errors=True)
        if self.prepare.exists():
            shutil.copytree(self.prepare, self.out)
        kills = 0
        while kills < most:
            child = start(lambda: self.command.run(self.out))
            time.sleep(self.random.uniform(0, 1.1 * self.seconds))
            os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
            if os.WIFEXITED(status):
                break
            kills += 1
            self.inspect()
        else:
            status = os.waitpid(start(lambda: self.command.run(self.out)), 0)[1]
        if status != 0:
            raise SystemExit(f"{self.command.name} failed after {kills} kills; see above")
        if read_files(self.out) != self.files or self.query(self.out) != self.after:
            raise SystemExit(
                f"{self.command.name}: after {kills} kills, the index differs from that of a run without kills"
            )
        self.ends += 1

    def inspect(self) -> None:
        """Count the files that a kill left, and the index that a reader finds."""
        names = [path.name for path in self.out.rglob("*")] if self.out.exists() else []
        self.left["a temporary"] += any(name.startswith(".tracin-tmp-") for name in names)
        self.left["the lock's file"] += WRITER in names
        self.left["unfinished lists"] += UNFINISHED_INDEX in names
        self.left["two generations"] += sum(name.startswith("generation-") for name in names) > 1
        found = self.query(self.out)
        if found not in (self.before, self.after):
            raise SystemExit(f"{self.command.name}: a reader found neither the old index nor the new one")
        self.seen["none" if found is None else "new" if found == self.after else "old"] += 1

    def summarize(self) -> dict[str, Any]:
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
    parser.add_argument("--kills", type=int, default=200, help="number of kills, over all commands")
    parser.add_argument("--rows", type=int, default=2000, help="training rows")
    parser.add_argument("--seed", type=int, default=0, help="seed of the kill times")
    parser.add_argument("--print", action="store_true", help="print the results and write no file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_checkpoints(folder)
        # Run every command once, so that lazy imports happen before the forks.
        for command in make_commands(folder, 300):
            command.prepare(folder / "first")
            command.run(folder / "first")
            query(folder, folder / "first")
            shutil.rmtree(folder / "first")
        trials = [
            Trial(command, folder / str(number), random.Random(f"{options.seed} {number}"))
            for number, command in enumerate(make_commands(folder, options.rows))
        ]
        # Equal shares; the first command gets the remainder.
        shares = [options.kills // len(trials)] * len(trials)
        shares[0] += options.kills % len(trials)
        for trial, share in zip(trials, shares, strict=True):
            while (left := share - trial.seen.total()) > 0:
                trial.run_until_done(left)
            print(trial.summarize(), file=sys.stderr, flush=True)
        results = [trial.summarize() for trial in trials]
    settings = {"kills": options.kills, "rows": options.rows, "seed": options.seed}
    print(json.dumps(results) if options.print else write_results(RESULT, settings, results))


if __name__ == "__main__":
    main()
