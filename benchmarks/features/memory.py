"""Peak memory of a build compared with plain training, and as the number of rows grows.

Each figure is the peak resident memory of one process. Plain training is forward, backward and a step of SGD at the
same batch size. The data repeat a few synthetic rows, so that they need almost no memory in either process.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.common import models
from benchmarks.common.results import write_results
from tracin_ann import BuildConfig, build

RESULT = "memory"
MLP_ROWS = (100_000, 300_000, 1_000_000)


def train(name: str, n_rows: int) -> None:
    """Train for one epoch."""
    benchmarked = models.MODELS[name]
    net = benchmarked.make()
    optimiser = torch.optim.SGD(net.parameters(), lr=1e-3)
    with tempfile.TemporaryDirectory() as folder:
        rows = models.make_task(name, folder, n_rows).train_data()
    for start in range(0, n_rows, benchmarked.batch_size):
        batch = torch.utils.data.default_collate(rows[start : start + benchmarked.batch_size])
        optimiser.zero_grad()
        benchmarked.loss(net, batch).mean().backward()
        optimiser.step()


def build_model(name: str, n_rows: int) -> None:
    """Build an index of one of the models."""
    with tempfile.TemporaryDirectory() as folder:
        config = BuildConfig(batch_size=models.MODELS[name].batch_size, index="flat")
        build(models.make_task(name, folder, n_rows), Path(folder) / "index", config)


def build_mlp(name: str, n_rows: int) -> None:
    """Build an index of a small MLP with D = 64."""
    with tempfile.TemporaryDirectory() as folder:
        config = BuildConfig(dim=64, index="flat", batch_size=512)
        build(models.make_mlp_task(folder, n_rows), Path(folder) / "index", config)


WORK = {"plain": train, "build": build_model, "mlp": build_mlp}


def measure_peak(work: str, name: str, n_rows: int, threads: int) -> float:
    """Return the peak memory, in MB, of a process that does one kind of work."""
    arguments = ["--work", work, "--model", name, "--rows", str(n_rows), "--threads", str(threads)]
    process = subprocess.run(
        [sys.executable, "-m", "benchmarks.features.memory", *arguments], capture_output=True, text=True, check=True
    )
    return float(json.loads(process.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--models", nargs="+", default=list(models.MODELS), choices=list(models.MODELS), help="models to measure"
    )
    parser.add_argument("--mlp-rows", nargs="*", type=int, default=MLP_ROWS, help="sizes of the builds of a small MLP")
    parser.add_argument("--threads", type=int, default=2, help="number of CPU threads")
    parser.add_argument("--work", choices=list(WORK), help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.work:
        WORK[options.work](options.model, options.rows)
        print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000))
        return
    results = []
    for name in options.models:
        # Enough rows to fill a partition of the small models, so that all buffers are allocated.
        n_rows = models.MODELS[name].batch_size * (130 if "CNN" in name else 12)
        figures = {work: measure_peak(work, name, n_rows, options.threads) for work in ("plain", "build")}
        results.append({"model": name, "rows": n_rows, **{f"{k}_mb": v for k, v in figures.items()}})
        print(results[-1], flush=True)
    for n_rows in options.mlp_rows:
        results.append(
            {"model": "small MLP", "rows": n_rows, "build_mb": measure_peak("mlp", "", n_rows, options.threads)}
        )
        print(results[-1], flush=True)
    settings = {"models": options.models, "mlp_rows": list(options.mlp_rows), "threads": options.threads}
    print(write_results(RESULT, settings, results))


if __name__ == "__main__":
    main()
