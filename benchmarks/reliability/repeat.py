"""Reproducibility of builds: uninterrupted, killed and resumed, and grown by appended rows.

Every build runs in its own process with a random hash seed. The task has images; the library chooses the batch size,
the memory format and the settings of the lists. The benchmark compares the bytes of features and lists, the search
settings, and the answers of lists and scans. The status is 1 if they differ.
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

from benchmarks.common.results import strip_times, write_results
from examples import mnist
from tracin_ann import BuildConfig, Checkpoint, InfluenceIndex, QueryOptions, Task, build
from tracin_ann.store.generations import generation_folder
from tracin_ann.store.manifest import FEATURES, MANIFEST

RESULT = "repeat"
CONFIG = BuildConfig(dim=64, partition_rows=256, device="cpu", index="ivf", target_recall=0.8)
MOST_ROWS, QUERIES, CHECKPOINTS = 20_000, 60, 2
READY, MOST_KILLS = "ready", 2


def make_model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 5)
    )


def make_task(folder: Path, n_rows: int) -> Task:
    def rows(n: int, seed: int) -> list[tuple[torch.Tensor, int]]:
        images = torch.randn(MOST_ROWS, 1, 14, 14, generator=torch.Generator().manual_seed(seed))
        return [(images[i], i % 5) for i in range(n)]

    return Task(
        model=make_model,
        loss=mnist.loss,
        train_data=lambda: rows(n_rows, 1),
        query_data=lambda: rows(QUERIES, 2),
        checkpoints=[Checkpoint(folder / f"{i}.pt", learning_rate=0.1 / (i + 1)) for i in range(CHECKPOINTS)],
    )


def compute_digest(*contents: bytes) -> str:
    return hashlib.blake2b(b"".join(contents), digest_size=8).hexdigest()


def query(index: InfluenceIndex, search: str) -> str:
    answers = index.query(range(QUERIES), options=QueryOptions(k=10, search=search))
    hits = [[(hit.id, hit.score) for hit in (*answer.proponents, *answer.opponents)] for answer in answers]
    return compute_digest(json.dumps(hits).encode())


def describe_index(out: Path, folder: Path, n_rows: int) -> dict[str, str]:
    """Return digests of all parts; only `auto` may differ, because measured times choose between lists and scan."""
    index = InfluenceIndex.open(out, make_task(folder, n_rows), device="cpu")
    own = generation_folder(out, index.manifest.generation)
    settings = json.loads(strip_times((own / MANIFEST).read_bytes()))
    settings.pop("generation")
    return {
        "features": compute_digest(*(path.read_bytes() for path in sorted((out / FEATURES).iterdir()))),
        "lists": compute_digest(*(path.read_bytes() for path in sorted(own.glob("ivf*")))),
        "canaries": compute_digest((own / index.manifest.canaries.name).read_bytes()),
        "settings": compute_digest(json.dumps(settings, sort_keys=True).encode()),
        "by_lists": query(index, "lists"),
        "by_scan": query(index, "scan"),
        "auto": query(index, "auto"),
    }


def run_build(options: argparse.Namespace) -> None:
    """Build in this process, after printing `ready`, and print the digests and the time."""
    torch.set_num_threads(options.threads)
    config = replace(CONFIG, append=options.append)
    print(READY, flush=True)
    start_s = time.perf_counter()
    build(make_task(options.folder, options.rows), options.work, config)
    seconds = time.perf_counter() - start_s
    print(json.dumps([describe_index(options.work, options.folder, options.rows), seconds]))


@contextmanager
def start_build(options: argparse.Namespace, out: Path, n_rows: int, *more: str) -> Iterator[subprocess.Popen[str]]:
    """Yield a process that is ready to build."""
    arguments = [
        sys.executable,
        "-m",
        "benchmarks.reliability.repeat",
        "--work",
        out,
        "--folder",
        options.folder,
        "--rows",
        n_rows,
    ]
    arguments += ["--threads", options.threads, *more]
    environment = {**os.environ, "PYTHONHASHSEED": str(options.random.randrange(2**32))}
    with subprocess.Popen(
        [str(argument) for argument in arguments], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None and process.stdout.readline().strip() == READY
        yield process


def finish_build(options: argparse.Namespace, out: Path, n_rows: int, *more: str) -> tuple[dict[str, str], float]:
    """Return the digests of a build, and its seconds."""
    with start_build(options, out, n_rows, *more) as process:
        printed, _ = process.communicate()
    if process.returncode != 0:
        raise SystemExit("a build failed; its traceback is printed above")
    found, seconds = json.loads(printed)
    return found, seconds


def kill_build(options: argparse.Namespace, out: Path, seconds: float) -> tuple[dict[str, str], int]:
    """Kill a build at random times, resume it, and return its digests and the number of kills."""
    kills, wanted = 0, options.random.randint(1, MOST_KILLS)
    while kills < wanted:
        with start_build(options, out, options.rows) as process:
            time.sleep(options.random.uniform(0, seconds))
            process.kill()
            if process.wait() == -signal.SIGKILL:
                kills += 1
            elif kills:
                break
            else:
                shutil.rmtree(out)
    return finish_build(options, out, options.rows)[0], kills


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--builds", type=int, default=20, help="number of uninterrupted builds, and of killed builds")
    parser.add_argument("--appends", type=int, default=10, help="number of builds by append")
    parser.add_argument("--rows", type=int, default=3000, help="training rows")
    parser.add_argument("--threads", type=int, default=2, help="number of CPU threads")
    parser.add_argument("--seed", type=int, default=0, help="seed of the kill times")
    parser.add_argument("--print", action="store_true", help="print the results and write no file")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--append", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work is not None:
        run_build(options)
        return
    options.random = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        options.folder = Path(name)
        for i in range(CHECKPOINTS):
            torch.manual_seed(i)
            torch.save(make_model().state_dict(), options.folder / f"{i}.pt")
        results = run_builds(options)
    settings = {key: getattr(options, key) for key in ("builds", "appends", "rows", "threads", "seed")}
    print(json.dumps(results) if options.print else write_results(RESULT, settings, results))
    if any(number != 1 for what, number in results["different"].items() if what != "auto"):
        raise SystemExit(1)


def run_builds(options: argparse.Namespace) -> dict[str, Any]:
    """Return the number of different indexes, by part."""
    found: list[dict[str, str]] = []
    kills, times_s = 0, []
    for number in range(options.builds):
        one, took = finish_build(options, options.folder / f"uninterrupted-{number}", options.rows)
        found.append(one)
        times_s.append(took)
        print(f"uninterrupted {number}: {one}", file=sys.stderr, flush=True)
    for number in range(options.builds):
        one, times = kill_build(options, options.folder / f"killed-{number}", median(times_s))
        found.append(one)
        kills += times
        print(f"killed {times} times {number}: {one}", file=sys.stderr, flush=True)
    for number in range(options.appends):
        out = options.folder / f"grown-{number}"
        finish_build(options, out, options.rows * 2 // 3)
        one, _ = finish_build(options, out, options.rows, "--append")
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
