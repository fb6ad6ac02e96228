"""Time of the exact scan (kernel alone), relative to reading the stored rows from memory.

Rows of random numbers are written to feature files, which are then in the page cache and verified. Each round times a
sum over the mapped bytes, the scan of the stored rows, and the scan of decoded float32 blocks; the results are medians.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.common.results import report_results
from tracin_ann.search import FlatIndex
from tracin_ann.search.half_scanner import share_memory
from tracin_ann.store import FeatureStore, FeatureView, StoreLayout, choose_partition_rows
from tracin_ann.store.feature_file import FeatureBlock
from tracin_ann.types import Float32, Int64

RESULT = "scan"
K = 10
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Decoded:
    """The rows of a view as a RowSource without the stored format, so that a scan decodes blocks of float32 rows."""

    view: FeatureView

    @property
    def dim(self) -> int:
        return self.view.dim

    def __len__(self) -> int:
        return len(self.view)

    def blocks(self, block_rows: int, start: int = 0) -> Iterator[tuple[Int64, Float32]]:
        return self.view.blocks(block_rows, start)

    def take(self, ids: Sequence[int] | Int64) -> Float32:
        return self.view.take(ids)


def write_rows(folder: Path, options: argparse.Namespace) -> FeatureView:
    """Return the view of a new store with rows of random numbers and random norms."""
    digests = tuple(f"checkpoint {c}" for c in range(options.checkpoints))
    store = FeatureStore(folder, StoreLayout(options.rows, options.partition_rows, options.dim, "float16", digests))
    random = np.random.default_rng(0)
    for partition, (start, stop) in enumerate(store.partitions()):
        ids, one_N = np.arange(start, stop, dtype=np.int64), np.ones(stop - start)
        scale_N1 = np.exp(0.7 * random.standard_normal((len(ids), 1))).astype(np.float32)
        for checkpoint in range(options.checkpoints):
            row_ND = scale_N1 * random.standard_normal((len(ids), options.dim), dtype=np.float32)
            store.write(partition, checkpoint, FeatureBlock(ids, row_ND, one_N, one_N.astype(np.float32)))
    return store.view()


def make_read(view: FeatureView) -> Callable[[], None]:
    """Return a function that reads all stored bytes: the sum of their 64-bit integers, on all threads."""
    n_partitions = view.store.layout.n_partitions
    files = [view.store.file(partition, c) for partition in range(n_partitions) for c in view.checkpoints]
    tensors = [torch.from_numpy(share_memory(file.stored_ND).view(np.int64)) for file in files]

    def read() -> None:
        for tensor in tensors:
            tensor.sum()

    return read


def time_call(call: Callable[[], Any]) -> float:
    start_s = time.perf_counter()
    call()
    return time.perf_counter() - start_s


def measure(view: FeatureView, n_queries: int, rounds: int) -> dict[str, float]:
    """Return median seconds of a read and of both scans, for both directions."""
    query_QF = np.random.default_rng(1).standard_normal((n_queries, view.dim)).astype(np.float32)
    query_QF /= 2 * np.linalg.norm(query_QF, axis=1, keepdims=True)
    stored, decoded = FlatIndex(view, CPU), FlatIndex(Decoded(view), CPU)
    calls = {
        "read_seconds": make_read(view),
        "stored_seconds": partial(stored.search_both, query_QF, K),
        "decoded_seconds": partial(decoded.search_both, query_QF, K),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(time_call(call))
    return {"queries": n_queries} | {name: median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=400_000, help="number of rows")
    parser.add_argument("--checkpoints", type=int, default=3, help="number of checkpoints")
    parser.add_argument("--dim", type=int, default=256, help="sketch dimensions per checkpoint")
    parser.add_argument("--partition-rows", type=int, help="rows of a feature file; default: that of a build")
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 10, 100], help="numbers of queries")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of interleaved measurements")
    options = parser.parse_args()
    options.partition_rows = options.partition_rows or choose_partition_rows(options.rows)
    with tempfile.TemporaryDirectory() as folder:
        view = write_rows(Path(folder), options)
        results = (measure(view, n_queries, options.rounds) for n_queries in options.queries)
        report_results(RESULT, vars(options), results)


if __name__ == "__main__":
    main()
