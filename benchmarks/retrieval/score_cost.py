"""CPU time of queries by score, and CPU time and memory of the curvature matrices.

Queries are those of an open index that benchmarks.retrieval.rows wrote: all of a query, features included, by an exact
scan on one thread. Each round has one call for each score. The first call, which reads the matrix and factorises it, is
listed apart. The matrices are computed from rows of random numbers, in a process of their own.
"""

from __future__ import annotations

import argparse
import re
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.common.results import report_results
from benchmarks.retrieval.rows import make_digits_task
from tracin_ann import InfluenceIndex, QueryOptions
from tracin_ann.scoring import CurvatureSource
from tracin_ann.store import FeatureStore, StoreLayout
from tracin_ann.store.feature_file import FeatureBlock

RESULT = "score_cost"
STEPS = 5625
COUNTS = (1, 100)
PARTITION = 4096
CHECKPOINTS = 3


def time_query(index: InfluenceIndex, n_queries: int, options: QueryOptions) -> float:
    """Return the CPU seconds of a call."""
    start_s = time.process_time()
    index.query(range(n_queries), options=options)
    return time.process_time() - start_s


def measure_queries(folder: str, rows: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return median CPU seconds of a call by score and number of queries, and ratios to TracIn."""
    index = InfluenceIndex.open(f"{folder}/index-{rows}", make_digits_task(options.data, folder, rows), device="cpu")
    dampings = {"tracin": None, "fisher": 1 / (0.05 * STEPS), "gauss-newton": 1 / (0.05 * STEPS)}
    scores = {
        name: QueryOptions(score=name, damping=damping, search="scan")  # type: ignore[arg-type]
        for name, damping in dampings.items()
    }
    for name in scores:
        if name != "tracin":
            index.score_maker.load(name)  # type: ignore[arg-type]
    result: dict[str, Any] = {"rows": rows, "dim": index.manifest.build.layout.dim}
    result["first"] = {name: time_query(index, 1, each) for name, each in scores.items()}
    for n_queries in COUNTS:
        for each in scores.values():
            time_query(index, n_queries, each)
        seconds: dict[str, list[float]] = {name: [] for name in scores}
        for _ in range(options.rounds):
            for name, each in scores.items():
                seconds[name].append(time_query(index, n_queries, each))
        medians = {name: median(times) for name, times in seconds.items()}
        result[f"{n_queries} queries"] = medians
        result[f"ratio, {n_queries} queries"] = {name: s / medians["tracin"] for name, s in medians.items()}
    return result


def read_peak_kb() -> int:
    """Return the peak memory of this process, without that of its parent."""
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1])


def measure_curvature(rows: int, dim: int) -> dict[str, Any]:
    """Return CPU seconds and the growth of the peak memory for the matrices of rows of random numbers."""
    torch.set_num_threads(1)
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        digests = tuple(f"checkpoint {c}" for c in range(CHECKPOINTS))
        store = FeatureStore(Path(folder) / "features", StoreLayout(rows, PARTITION, dim, "float16", digests))
        store.directory.mkdir()
        for partition, (start, stop) in enumerate(store.partitions()):
            ids, one_N = np.arange(start, stop, dtype=np.int64), np.ones(stop - start)
            row_ND = random.standard_normal((len(ids), dim), dtype=np.float32)
            for checkpoint in range(CHECKPOINTS):
                store.write(partition, checkpoint, FeatureBlock(ids, row_ND, one_N, one_N.astype(np.float32)))
        before_kb = read_peak_kb()
        start_s = time.process_time()
        CurvatureSource(store, np.arange(rows), [0.1] * CHECKPOINTS, True, Path(folder)).load("gauss-newton")
        seconds = time.process_time() - start_s
    figures = {"rows": rows, "dim": dim, "checkpoints": CHECKPOINTS, "curvature_seconds": seconds}
    return figures | {"before_mb": before_kb / 1e3, "peak_mb": read_peak_kb() / 1e3}


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the figures of each index, then those of each size of a matrix."""
    torch.set_num_threads(1)
    for name in options.indexes:
        folder, rows = name.rsplit(":", 1)
        yield measure_queries(folder, int(rows), options)
    for size in options.curvatures:
        rows, dim = map(int, size.split("x"))
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            yield process.submit(measure_curvature, rows, dim).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True, help="path of mnist.npz")
    parser.add_argument("--indexes", nargs="*", default=[], help="FOLDER:ROWS that benchmarks.retrieval.rows wrote")
    parser.add_argument("--curvatures", nargs="*", default=["70000x1024", "16384x4096"], help="ROWSxDIM of matrices")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of timed queries")
    options = parser.parse_args()
    settings = {"rounds": options.rounds, "threads": 1, "steps": STEPS}
    report_results(RESULT, settings, measure(options))


if __name__ == "__main__":
    main()
