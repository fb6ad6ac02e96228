"""Time of a query command as a new process on a small index, and the time of its stages.

Every round runs each command once, so that all medians are of the same period. The stages are measured in runs of their
own, by a process that runs the same command and records when each stage begins and ends.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common.paths import ROOT
from tracin_ann.cli.imports import pause_collector, wait_passively

RESULT = "cold_start"
BASE = "import torch, faiss"
STAGES = (
    "start",
    "torch and FAISS",
    "library",
    "opening",
    "task",
    "canaries and gradients",
    "search",
    "output",
    "exit",
)
LIMIT = (1.3, 1.0)
"""The limit of a query: a multiple of the time of BASE, and seconds added to it."""
INDEX, OTHER = "layers", "product"
"""The indexes: of a model of layers with a rule, and of one whose parameter no rule covers."""
TASK = """
import torch
from torch import nn
from torch.nn import functional as F

from tracin_ann import Checkpoint, Task


class Product(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 4))

    def forward(self, x_NF):
        return torch.tanh(x_NF @ self.weight)


MODELS = {
    "layers": lambda: nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)),
    "product": Product,
}


def loss(net, batch):
    return F.cross_entropy(net(batch[0]), batch[1], reduction="none")


def rows(n, seed):
    x_NF = torch.randn(n, 16, generator=torch.Generator().manual_seed(seed))
    return [(x_NF[i], i % 4) for i in range(n)]


def task(name) -> Task:
    return Task(
        model=MODELS[name],
        loss=loss,
        train_data=lambda: rows(1000, 1),
        query_data=lambda: rows(20, 2),
        checkpoints=[Checkpoint(f"{name}{i}.pt", learning_rate=0.1) for i in range(2)],
    )


def save(name):
    for i in range(2):
        torch.manual_seed(i)
        torch.save(MODELS[name]().state_dict(), f"{name}{i}.pt")
"""


class Stopwatch:
    """Seconds of stages; the time of a stage that runs inside another one is not counted in the outer one.

    Args:
        started: the time at which the first stage began (`time.monotonic`).
        stage: the first stage.
    """

    def __init__(self, started: float, stage: str) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._last, self._stage = started, stage

    def begin(self, stage: str) -> str:
        """End the current stage, begin the next one, and return the one that ended."""
        ended, now = self._stage, time.monotonic()
        self.seconds[ended] += now - self._last
        self._last, self._stage = now, stage
        return ended

    def wrap(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that runs as a stage; after it, the stage before it goes on."""

        @wraps(function)
        def measured(*args: Any, **kwargs: Any) -> Any:
            outer = self.begin(stage)
            try:
                return function(*args, **kwargs)
            finally:
                self.begin(outer)

        return measured


def run_stages(started: float, out: Path) -> None:
    """Run the query in this process, and write the seconds of its stages.

    Args:
        started: the time at which this process was started (`time.monotonic`).
        out: the file for the stages.
    """
    from tracin_ann.cli.query import main as query  # noqa: PLC0415 - part of what is measured

    watch = Stopwatch(started, "start")
    watch.begin("torch and FAISS")
    with pause_collector(), wait_passively():
        import faiss  # noqa: F401, PLC0415
        import torch  # noqa: F401, PLC0415

        watch.begin("library")
        from tracin_ann import index as library  # noqa: PLC0415
    watch.begin("output")
    of_index: Any = library.InfluenceIndex
    of_index.open = watch.wrap("opening", of_index.open)
    of_index.runner = property(watch.wrap("task", of_index.runner.fget))
    of_index.features = watch.wrap("canaries and gradients", of_index.features)
    of_index.query = watch.wrap("search", of_index.query)
    query([INDEX, "--ids", "0"], standalone_mode=False)
    watch.begin("exit")
    out.write_text(json.dumps(watch.seconds))


def make_commands() -> dict[str, list[str]]:
    """Return the commands to time, by name."""
    installed = Path(sys.executable).parent / "tracin-query"
    if not installed.is_file():
        raise SystemExit(f"no {installed.name} beside {sys.executable}: install the project there")
    query = [sys.executable, str(ROOT / "query.py")]
    return {
        f'python -c "{BASE}"': [sys.executable, "-c", BASE],
        "query.py DIR --ids 0": [*query, INDEX, "--ids", "0"],
        "tracin-query DIR --ids 0": [str(installed), INDEX, "--ids", "0"],
        "query.py OTHER --ids 0": [*query, OTHER, "--ids", "0"],
        "tracin-query --help": [str(installed), "--help"],
    }


class Folder:
    """A folder with a small task and its index, in which commands are run."""

    def __init__(self, path: Path, threads: int) -> None:
        self.path = path
        self._environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}

    def run(self, command: Sequence[str]) -> float:
        """Run a command and return its seconds."""
        started = time.monotonic()
        settings: dict[str, Any] = {"cwd": self.path, "env": self._environment}
        done = subprocess.run(command, check=False, capture_output=True, text=True, **settings)
        seconds = time.monotonic() - started
        if done.returncode:
            raise SystemExit(f"a command failed: {shlex.join(command)}\n{done.stderr}")
        return seconds

    def build(self, name: str) -> None:
        """Write the task, and the checkpoints and the index of a model."""
        (self.path / "tiny.py").write_text(TASK)
        self.run([sys.executable, "-c", f"import tiny; tiny.save({name!r})"])
        options = ["--task", "tiny.py:task", "--task-arg", f"name={name}", "--out", name, "--dim", "64"]
        self.run([sys.executable, str(ROOT / "build_index.py"), *options, "--device", "cpu"])

    def run_stages(self) -> dict[str, float]:
        """Return the seconds of each stage of a query."""
        out, started = self.path / "stages.json", time.monotonic()
        options = ["--stages", str(out), "--started", repr(started)]
        self.run([sys.executable, "-m", "benchmarks.retrieval.cold_start", *options])
        ended = time.monotonic()
        stages: dict[str, float] = json.loads(out.read_text())
        return stages | {"exit": ended - started - sum(stages.values())}


def measure(folder: Folder, rounds: int) -> dict[str, Any]:
    """Return the median seconds of each command and of each stage, and the limit of a query."""
    for name in (INDEX, OTHER):
        folder.build(name)
    commands = make_commands()
    times: dict[str, list[float]] = {name: [] for name in commands}
    stages: list[dict[str, float]] = []
    for number in range(rounds + 1):
        # The first round is not counted: it reads the files into memory.
        for name, command in commands.items():
            seconds = folder.run(command)
            times[name] += [seconds] if number else []
        stages += [folder.run_stages()][: number > 0]
        print(f"round {number}", file=sys.stderr, flush=True)
    medians = {name: median(values) for name, values in times.items()}
    base = next(iter(medians.values()))
    return {
        "seconds": medians,
        "fastest": {name: min(values) for name, values in times.items()},
        "stages": {stage: median(run[stage] for run in stages) for stage in STAGES},
        "limit": LIMIT[0] * base + LIMIT[1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11, help="number of times that each command is run")
    parser.add_argument("--threads", type=int, default=2, help="number of CPU threads")
    parser.add_argument("--stages", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stages is not None:
        run_stages(options.started, options.stages)
        return
    from benchmarks.common.results import write_results  # noqa: PLC0415 - imports torch, which `run_stages` measures

    with tempfile.TemporaryDirectory() as folder:
        results = measure(Folder(Path(folder), options.threads), options.rounds)
    settings = {"rounds": options.rounds, "threads": options.threads}
    print(json.dumps(results, indent=2), write_results(RESULT, settings, results), sep="\n")


if __name__ == "__main__":
    main()
