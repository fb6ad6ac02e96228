"""CPU time of exact scores on the longest path through the workers of two shards, compared with one process.

CPU time depends less on other load of the machine than the time of a clock: the path is that of this process and of the
worker that takes longest, as on a machine with a free core for each.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.common import models
from benchmarks.common.results import write_results
from tracin_ann import BuildConfig, InfluenceIndex, ProcessLauncher, QueryOptions, Task, build

RESULT = "exact_workers"
MODEL, SHARDS = "MNIST CNN", 2
NAME = "benchmarks.distributed.exact_workers:make_task"


def make_task(folder: str, n_rows: str) -> Task:
    return models.make_task(MODEL, folder, int(n_rows))


def read_cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process until now."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def time_query(index: InfluenceIndex, workers: Sequence[int], queries: range, options: QueryOptions) -> float:
    """Return the CPU time of a query in this process and in the worker that takes longest."""
    before = [read_cpu_seconds(pid) for pid in workers]
    start_s = time.process_time()
    index.query(train_ids=queries, options=options)
    own_s = time.process_time() - start_s
    return own_s + max((read_cpu_seconds(pid) - s for pid, s in zip(workers, before, strict=True)), default=0.0)


def measure(
    one: InfluenceIndex, many: InfluenceIndex, queries: range, options: QueryOptions, rounds: int
) -> dict[str, Any]:
    """Return the times of a query by an index of one process and by one with workers, in alternate rounds."""
    search: Any = many._workers
    pairs = []
    # The first queries load the task.
    for _ in range(rounds + 1):
        pairs.append((time_query(one, (), queries, options), time_query(many, search.pids, queries, options)))
    ratios = [alone_s / workers_s for alone_s, workers_s in pairs[1:]]
    alone_s, workers_s = (median(times) for times in zip(*pairs[1:], strict=True))
    return {"one_s": alone_s, "workers_s": workers_s, "ratio": median(ratios), "ratios": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=8192, help="training rows")
    parser.add_argument("--queries", type=int, default=16, help="training rows that are queries")
    parser.add_argument("--candidates", type=int, default=500, help="candidates that are re-scored, in each direction")
    parser.add_argument("--rounds", type=int, default=5, help="queries of each way")
    options = parser.parse_args()
    torch.set_num_threads(1)
    queries, results = range(options.queries), []
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "index"
        config = BuildConfig(dim=64, index="ivf", index_shards=SHARDS, yardstick=False, device="cpu")
        arguments = {"folder": folder, "n_rows": str(options.rows)}
        build(NAME, directory, config, arguments=arguments)
        one = InfluenceIndex.open(directory, NAME, arguments=arguments, device="cpu")
        # Each of the workers gets one thread.
        torch.set_num_threads(SHARDS)
        launcher = ProcessLauncher(["cpu"])
        many = InfluenceIndex.open(directory, NAME, arguments=arguments, device="cpu", launcher=launcher)
        torch.set_num_threads(1)
        for way, chosen in (
            ("candidates", QueryOptions(rerank="exact", candidates=options.candidates, search="index")),
            ("all rows", QueryOptions(exact=True)),
        ):
            results.append({"scored": way, **measure(one, many, queries, chosen, options.rounds)})
            print(results[-1], flush=True)
        many.close()
    print(write_results(RESULT, vars(options), results))


if __name__ == "__main__":
    main()
