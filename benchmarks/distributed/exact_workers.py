"""Time of exact scores by the workers of two shards, compared with one process of one thread."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.common import models
from benchmarks.common.results import write_results
from tracin_ann import BuildConfig, InfluenceIndex, QueryOptions, Task, build

RESULT = "exact_workers"
MODEL, SHARDS = "MNIST CNN", 2
NAME = "benchmarks.distributed.exact_workers:make_task"


def make_task(folder: str, n_rows: str) -> Task:
    return models.make_task(MODEL, folder, int(n_rows))


def time_query(index: InfluenceIndex, queries: range, options: QueryOptions) -> float:
    start_s = time.perf_counter()
    index.query(train_ids=queries, options=options)
    return time.perf_counter() - start_s


def measure(
    one: InfluenceIndex, many: InfluenceIndex, queries: range, options: QueryOptions, rounds: int
) -> dict[str, Any]:
    """Return the seconds of a query by an index of one process and by one with workers, in alternate rounds."""
    # The first queries load the task.
    for index in (one, many):
        index.query(train_ids=queries, options=options)
    pairs = [(time_query(one, queries, options), time_query(many, queries, options)) for _ in range(rounds)]
    ratios = [alone_s / workers_s for alone_s, workers_s in pairs]
    alone_s, workers_s = (median(times) for times in zip(*pairs, strict=True))
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
        one, many = (InfluenceIndex.open(directory, NAME, arguments=arguments, device="cpu") for _ in range(2))
        # Each of the workers gets one thread.
        torch.set_num_threads(SHARDS)
        many.start_workers()
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
