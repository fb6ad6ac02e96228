"""Speed of builds whose features are computed by workers, compared with one process, and the memory of the driver.

Each build runs in its own process with one CPU thread for each worker. The rate is that of the last three quarters of
the features; the start of workers is listed separately. Rounds alternate between the ways of building, so that changes
of the machine affect all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

from benchmarks.common import models
from benchmarks.common.paths import ROOT
from benchmarks.common.results import write_results
from tracin_ann import BuildConfig, ProcessLauncher, RayLauncher, Task, build
from tracin_ann.distributed import Launcher

RESULT = "launchers"
WAYS: dict[str, Callable[[], Launcher | None]] = {
    "one process": lambda: None,
    "2 processes": lambda: ProcessLauncher(["cpu", "cpu"]),
    "Ray, 1 worker": lambda: RayLauncher("local", workers=1),
    "Ray, 2 workers": lambda: RayLauncher("local", workers=2),
}
MODEL, PARTITION_ROWS = "MNIST CNN", 2048
MODULE = "benchmarks.distributed.launchers"


def make_speed_task(folder: str, n_rows: str) -> Task:
    return models.make_task(MODEL, folder, int(n_rows))


def make_memory_task(folder: str, n_rows: str) -> Task:
    return models.make_mlp_task(folder, int(n_rows))


def build_once(way: str, kind: str, n_rows: int) -> dict[str, float]:
    """Build an index and return the seconds until the first report, and the rate and peak memory of the features."""
    torch.set_num_threads(2 if way == "2 processes" else 1)
    reports: list[tuple[float, int]] = []
    peak_mb = 0.0
    began_s = perf_counter()

    def note(stage: str, done: int, total: int) -> None:
        nonlocal peak_mb
        if stage == "features":
            reports.append((perf_counter() - began_s, done))
            peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000

    is_speed = kind == "speed"
    config = BuildConfig(
        dim=1024 if is_speed else 64,
        batch_size=models.MODELS[MODEL].batch_size if is_speed else 512,
        partition_rows=PARTITION_ROWS,
        index="flat",
        yardstick=False,
        device="cpu",
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = {"folder": folder, "n_rows": str(n_rows)}
        name = f"{MODULE}:make_{kind}_task"
        build(name, Path(folder) / "index", config, arguments=arguments, progress=note, launcher=WAYS[way]())
    # Workers do not start at the same time.
    first, last = next(report for report in reports if report[1] >= n_rows / 4), reports[-1]
    rate = (last[1] - first[1]) / max(last[0] - first[0], 1e-9)
    end_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    seconds = {"first_report_s": reports[0][0], "total_s": perf_counter() - began_s}
    return {"rows_per_s": rate, **seconds, "features_mb": peak_mb, "build_mb": end_mb}


def run_alone(way: str, kind: str, n_rows: int) -> dict[str, float]:
    """Run one build in its own process."""
    words = ["--way", way, "--kind", kind, "--rows", str(n_rows)]
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", MODULE, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(way, kind, n_rows, found, flush=True)
    return found


def compare_speed(n_rows: int, rounds: int) -> list[dict[str, Any]]:
    """Return the median figures of every way, and their ratio to one process in the same round."""
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way, runs in found.items():
            runs.append(run_alone(way, "speed", n_rows))
    results = []
    for way, runs in found.items():
        ratios = [run["rows_per_s"] / one["rows_per_s"] for run, one in zip(runs, found["one process"], strict=True)]
        figures = {name: median(run[name] for run in runs) for name in runs[0]}
        results.append({"way": way, "rows": n_rows, **figures, "ratio": median(ratios), "ratios": ratios})
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--speed-rows", type=int, default=131_072, help="rows of the builds whose speed is measured")
    parser.add_argument("--rounds", type=int, default=2, help="builds of each way")
    parser.add_argument(
        "--memory-rows", type=int, nargs="*", default=[100_000, 1_000_000], help="sizes of the builds of a small MLP"
    )
    parser.add_argument("--way", choices=list(WAYS), help=argparse.SUPPRESS)
    parser.add_argument("--kind", choices=["speed", "memory"], help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(build_once(options.way, options.kind, options.rows)))
        return
    results = compare_speed(options.speed_rows, options.rounds) if options.rounds else []
    for n_rows in options.memory_rows:
        for way in ("one process", "2 processes", "Ray, 2 workers"):
            results.append({"way": way, "model": "small MLP", "rows": n_rows, **run_alone(way, "memory", n_rows)})
    settings = {"model": MODEL, "partition_rows": PARTITION_ROWS, "rounds": options.rounds}
    print(write_results(RESULT, settings, results))


if __name__ == "__main__":
    main()
