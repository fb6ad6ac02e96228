"""The same build again and again: uninterrupted, killed and gone on with, grown by rows; are the indexes the same?

Every build is a process of its own with its own hash seed, on a task of pictures whose batch size, memory format and
list settings are left to the library. Compared are the bits of features and of lists, the settings of the search and
answers by lists and by scan; a difference ends the benchmark with status 1.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from benchmarks import common
from examples import mnist
from tracin_ann import BuildConfig, Checkpoint, InfluenceIndex, QueryOptions, Task, build
from tracin_ann.store.generations import generation_folder
from tracin_ann.store.manifest import FEATURES, MANIFEST

CONFIG = BuildConfig(dim=64, partition_rows=256, device="cpu", index="ivf", target_recall=0.8)
MOST_ROWS, QUERIES, CHECKPOINTS = 20_000, 60, 2
READY, MOST_KILLS = "ready", 2


def model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 5)
    )


def task(folder: Path, n_rows: int) -> Task:
    def rows(n: int, seed: int) -> list[tuple[torch.Tensor, int]]:
        pictures = torch.randn(MOST_ROWS, 1, 14, 14, generator=torch.Generator().manual_seed(seed))
        return [(pictures[i], i % 5) for i in range(n)]

    return Task(
        model=model,
        loss=mnist.loss,
        train_data=lambda: rows(n_rows, 1),
        query_data=lambda: rows(QUERIES, 2),
        checkpoints=[Checkpoint(folder / f"{i}.pt", learning_rate=0.1 / (i + 1)) for i in range(CHECKPOINTS)],
    )


def digest(*contents: bytes) -> str:
    return hashlib.blake2b(b"".join(contents), digest_size=8).hexdigest()


def answers(index: InfluenceIndex, search: str) -> str:
    found = index.query(range(QUERIES), options=QueryOptions(k=10, search=search))
    hits = [[(hit.id, hit.score) for hit in (*answer.proponents, *answer.opponents)] for answer in found]
    return digest(json.dumps(hits).encode())


def made(out: Path, folder: Path, n_rows: int) -> dict[str, str]:
    """Return digests of all that may not differ, and of what may: answers where the clock chooses lists or a scan."""
    index = InfluenceIndex.open(out, task(folder, n_rows), device="cpu")
    own = generation_folder(out, index.manifest.generation)
    settings = json.loads(common.timeless((own / MANIFEST).read_bytes()))
    settings.pop("generation")
    return {
        "features": digest(*(path.read_bytes() for path in sorted((out / FEATURES).iterdir()))),
        "lists": digest(*(path.read_bytes() for path in sorted(own.glob("ivf*")))),
        "canaries": digest((own / index.manifest.canaries.name).read_bytes()),
        "settings": digest(json.dumps(settings, sort_keys=True).encode()),
        "by_lists": answers(index, "lists"),
        "by_scan": answers(index, "scan"),
        "auto": answers(index, "auto"),
    }


def work(options: argparse.Namespace) -> None:
    """Build as a process of its own; `ready` is printed when only the build is left to do."""
    torch.set_num_threads(options.threads)
    config = replace(CONFIG, append=options.append)
    print(READY, flush=True)
    began = time.perf_counter()
    build(task(options.folder, options.rows), options.work, config)
    seconds = time.perf_counter() - began
    print(json.dumps([made(options.work, options.folder, options.rows), seconds]))


@contextmanager
def started(options: argparse.Namespace, out: Path, n_rows: int, *more: str) -> Iterator[subprocess.Popen[str]]:
    """Yield a process that is about to build."""
    words = [sys.executable, "-m", "benchmarks.repeat", "--work", out, "--folder", options.folder, "--rows", n_rows]
    words += ["--threads", options.threads, *more]
    environment = {**os.environ, "PYTHONHASHSEED": str(options.random.randrange(2**32))}
    with subprocess.Popen([str(word) for word in words], stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None and process.stdout.readline().strip() == READY
        yield process


def finished(options: argparse.Namespace, out: Path, n_rows: int, *more: str) -> tuple[dict[str, str], float]:
    """Return what a build made, and its seconds."""
    with started(options, out, n_rows, *more) as process:
        said, _ = process.communicate()
    if process.returncode != 0:
        raise SystemExit("a build failed; it is printed above")
    found, seconds = json.loads(said)
    return found, seconds


def killed(options: argparse.Namespace, out: Path, seconds: float) -> tuple[dict[str, str], int]:
    """Return what a build made that was killed at random times, once or more often, and how often it was."""
    kills, wanted = 0, options.random.randint(1, MOST_KILLS)
    while kills < wanted:
        with started(options, out, options.rows) as process:
            time.sleep(options.random.uniform(0, seconds))
            process.kill()
            if process.wait() == -signal.SIGKILL:
                kills += 1
            elif kills:
                break
            else:
                shutil.rmtree(out)
    return finished(options, out, options.rows)[0], kills


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--builds", type=int, default=20, help="uninterrupted, and as many killed ones")
    parser.add_argument("--appends", type=int, default=10)
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--print", action="store_true", help="print the results and write no file")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--append", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work is not None:
        work(options)
        return
    options.random = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        options.folder = Path(name)
        for i in range(CHECKPOINTS):
            torch.manual_seed(i)
            torch.save(model().state_dict(), options.folder / f"{i}.pt")
        results = repeated(options)
    settings = {key: getattr(options, key) for key in ("builds", "appends", "rows", "threads", "seed")}
    print(json.dumps(results) if options.print else common.write("repeat", settings, results))
    if any(number != 1 for what, number in results["different"].items() if what != "auto"):
        raise SystemExit(1)


def repeated(options: argparse.Namespace) -> dict[str, Any]:
    """Return how many different indexes there were, by what is compared."""
    found: list[dict[str, str]] = []
    kills, times_s = 0, []
    for number in range(options.builds):
        one, took = finished(options, options.folder / f"whole-{number}", options.rows)
        found.append(one)
        times_s.append(took)
        print(f"whole {number}: {one}", file=sys.stderr, flush=True)
    for number in range(options.builds):
        one, times = killed(options, options.folder / f"killed-{number}", median(times_s))
        found.append(one)
        kills += times
        print(f"killed {times} times {number}: {one}", file=sys.stderr, flush=True)
    for number in range(options.appends):
        out = options.folder / f"grown-{number}"
        finished(options, out, options.rows * 2 // 3)
        one, _ = finished(options, out, options.rows, "--append")
        found.append(one)
        print(f"grown {number}: {one}", file=sys.stderr, flush=True)
    return {
        "uninterrupted": options.builds,
        "killed": options.builds,
        "kills": kills,
        "appended": options.appends,
        "different": {what: len({one[what] for one in found}) for what in found[0]},
    }


if __name__ == "__main__":
    main()
