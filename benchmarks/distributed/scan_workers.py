"""CPU time of an exact scan on the longest path through two workers, compared with one process.

See `exact_workers` for the path. Results are compared to the bit.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.common.results import write_results
from benchmarks.distributed.exact_workers import read_cpu_seconds
from tracin_ann.distributed import ProcessLauncher, ShardOptions, open_shard_search
from tracin_ann.search import FlatIndex, SearchIndex, search_both
from tracin_ann.store import FeatureBlock, FeatureStore, StoreLayout
from tracin_ann.types import Float32, TopK

RESULT = "scan_workers"
WORKERS, RESULTS = 2, 200
BATCHES = {1: 32, 8: 8, 100: 2}
"""Queries that are scanned together, and scans of which the time is taken: it is counted in units of 10 ms."""


def write_rows(folder: Path, n_rows: int, dim: int) -> FeatureStore:
    """Write normal rows of float16 into feature files."""
    layout = StoreLayout(n_rows=n_rows, dim=dim, digests=("0" * 64,), partition_rows=32_768, dtype="float16")
    store, rng = FeatureStore(folder, layout), np.random.default_rng(0)
    for partition, (first, last) in enumerate(store.partitions()):
        row_ND = rng.standard_normal((last - first, dim), dtype=np.float32)
        norms_N = np.square(row_ND).sum(axis=1).astype(np.float64)
        block = FeatureBlock(np.arange(first, last), row_ND, norms_N, np.zeros(last - first, np.float32))
        store.write(partition, 0, block)
    return store


def time_scans(
    index: SearchIndex, workers: Sequence[int], queries_QF: Float32, n_scans: int
) -> tuple[float, tuple[TopK, TopK]]:
    """Return the CPU time of a scan in this process and in the worker that takes longest, and the results."""
    before = [read_cpu_seconds(pid) for pid in workers]
    start_s = time.process_time()
    for _ in range(n_scans):
        found = search_both(index, queries_QF, RESULTS)
    own_s = time.process_time() - start_s
    others = (read_cpu_seconds(pid) - s for pid, s in zip(workers, before, strict=True))
    return (own_s + max(others, default=0.0)) / n_scans, found


def is_equal(one: TopK, other: TopK) -> bool:
    """Return whether ids and scores are equal to the bit."""
    pairs = [*zip(one.ids, other.ids, strict=True), *zip(one.scores, other.scores, strict=True)]
    return all(np.array_equal(a, b) for a, b in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=200_000, help="number of rows")
    parser.add_argument("--dim", type=int, default=768, help="numbers of a row")
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each way")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        store = write_rows(Path(folder), options.rows, options.dim)
        one = FlatIndex(store.view(), torch.device("cpu"))
        launcher = ProcessLauncher(["cpu"] * WORKERS)
        search = open_shard_search(one, Path(folder), store, None, launcher, ShardOptions())
        pids = [pid for pid in search.pids if pid is not None]
        try:
            for n_queries, n_scans in BATCHES.items():
                queries_QF = np.random.default_rng(1).standard_normal((n_queries, options.dim), dtype=np.float32)
                pairs, n_different = [], 0
                # The first scans verify the rows.
                for _ in range(options.rounds + 1):
                    alone_s, expected = time_scans(one, (), queries_QF, n_scans)
                    workers_s, found = time_scans(search.index, pids, queries_QF, n_scans)
                    pairs.append((alone_s, workers_s))
                    n_different += sum(not is_equal(a, b) for a, b in zip(expected, found, strict=True))
                alone, workers = (median(times) for times in zip(*pairs[1:], strict=True))
                ratio = median(alone_s / workers_s for alone_s, workers_s in pairs[1:])
                times = {"one_s": alone, "workers_s": workers, "ratio": ratio}
                results.append({"queries": n_queries, **times, "different": n_different})
                print(results[-1], flush=True)
        finally:
            search.close()
    print(write_results(RESULT, vars(options), results))


if __name__ == "__main__":
    main()
