"""Peak memory of a build beside plain training at the same batch size, and of builds of more and more rows.

Each figure is the peak resident memory of a process of its own. Plain training is forward, backward and a step of SGD.
The data are made on the spot, a few rows repeated, so that they take no memory on either side.
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
from torch import nn
from torch.nn import functional as F

from benchmarks import common, models
from tracin_ann import BuildConfig, Checkpoint, Task, build

CHEAP_ROWS = (100_000, 300_000, 1_000_000)


class Repeated(torch.utils.data.Dataset):
    """A few rows again and again."""

    def __init__(self, few: list, n_rows: int) -> None:
        self.few, self.n_rows = few, n_rows

    def __len__(self) -> int:
        return self.n_rows

    def __getitem__(self, i: int) -> object:
        return self.few[i % len(self.few)]


def plain(name: str, n_rows: int) -> None:
    chosen = models.MODELS[name]
    net = chosen.make()
    optimiser = torch.optim.SGD(net.parameters(), lr=1e-3)
    with tempfile.TemporaryDirectory() as folder:
        rows = models.task(name, folder, n_rows).train_data()
    for start in range(0, n_rows, chosen.batch_size):
        batch = torch.utils.data.default_collate(rows[start : start + chosen.batch_size])
        optimiser.zero_grad()
        chosen.loss(net, batch).mean().backward()
        optimiser.step()


def built(name: str, n_rows: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        config = BuildConfig(batch_size=models.MODELS[name].batch_size, index="flat")
        build(models.task(name, folder, n_rows), Path(folder) / "index", config)


def cheap(name: str, n_rows: int) -> None:
    """Build an index of a small MLP over many rows, D = 64."""
    g = torch.Generator().manual_seed(0)
    few = [(torch.randn(16, generator=g), i % 4) for i in range(512)]
    with tempfile.TemporaryDirectory() as folder:
        net = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
        torch.save(net.state_dict(), f"{folder}/0.pt")
        task = Task(
            model=lambda: net,
            loss=lambda m, batch: F.cross_entropy(m(batch[0]), batch[1], reduction="none"),
            train_data=lambda: Repeated(few, n_rows),
            query_data=lambda: few[:4],
            checkpoints=[Checkpoint(f"{folder}/0.pt", learning_rate=0.1)],
        )
        build(task, Path(folder) / "index", BuildConfig(dim=64, index="flat", batch_size=512))


SIDES = {"plain": plain, "build": built, "cheap": cheap}


def peak(side: str, name: str, n_rows: int, threads: int) -> float:
    """Return the peak memory, in MB, of a process that does this."""
    words = ["--side", side, "--model", name, "--rows", str(n_rows), "--threads", str(threads)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", *words], capture_output=True, text=True, check=True
    )
    return float(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(models.MODELS), choices=list(models.MODELS))
    parser.add_argument("--cheap-rows", nargs="*", type=int, default=CHEAP_ROWS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--side", choices=list(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.side:
        SIDES[options.side](options.model, options.rows)
        print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000))
        return
    results = []
    for name in options.models:
        # Enough rows for a full partition of the cheap models, so that all buffers are there.
        n_rows = models.MODELS[name].batch_size * (130 if "CNN" in name else 12)
        figures = {side: peak(side, name, n_rows, options.threads) for side in ("plain", "build")}
        results.append({"model": name, "rows": n_rows, **{f"{k}_mb": v for k, v in figures.items()}})
        print(results[-1], flush=True)
    for n_rows in options.cheap_rows:
        results.append({"model": "cheap MLP", "rows": n_rows, "build_mb": peak("cheap", "", n_rows, options.threads)})
        print(results[-1], flush=True)
    settings = {"models": options.models, "cheap_rows": list(options.cheap_rows), "threads": options.threads}
    print(common.write("memory", settings, results))


if __name__ == "__main__":
    main()
