"""Cost of a feature store by the number of rows of a partition: writing, opening, `take`, scans, memory and kills.

The same synthetic rows are written with each size. A new process reads them, so that memory that the writer released
does not count.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common.results import write_results
from tracin_ann.search import FlatIndex, search_both
from tracin_ann.store import FeatureBlock, FeatureStore, StoreLayout

RESULT = "partitions"
SIZES = (4096, 8192, 16_384, 32_768, 65_536)
TAKES = (40, 200)
ROW_SECONDS = (50e-6, 5e-3)
"""Times of one row at one checkpoint, for which the work that a kill repeats is given."""
_POOL = 65_536


@contextmanager
def count_fsyncs() -> Iterator[list[int]]:
    """Yield a list to which each call of `os.fsync` appends the descriptor."""
    original, calls = os.fsync, []

    def fsync(descriptor: int) -> None:
        calls.append(descriptor)
        original(descriptor)

    os.fsync = fsync  # type: ignore[assignment]
    try:
        yield calls
    finally:
        os.fsync = original


def write_rows(store: FeatureStore) -> tuple[float, int]:
    """Write all files of a store, and return the seconds and the number of fsyncs without making the rows."""
    layout, seconds = store.layout, 0.0
    pool = np.random.default_rng(0).standard_normal((_POOL, layout.dim), dtype=np.float32)
    with count_fsyncs() as calls:
        for checkpoint in range(layout.n_checkpoints):
            for partition, (start, stop) in enumerate(store.partitions()):
                ids = np.arange(start, stop)
                rows = pool[ids % _POOL] * np.float32(1 + checkpoint)
                squares, losses = np.ones(len(ids)), np.ones(len(ids), np.float32)
                block = FeatureBlock(ids, rows, squares, losses)
                start_s = time.perf_counter()
                store.write(partition, checkpoint, block)
                seconds += time.perf_counter() - start_s
    return seconds, len(calls)


def open_files(store: FeatureStore) -> None:
    """Open every file of a store."""
    for partition in range(store.layout.n_partitions):
        for checkpoint in range(store.layout.n_checkpoints):
            store.file(partition, checkpoint)


def measure_times(call: Callable[[], Any], rounds: int) -> dict[str, float]:
    """Return the first time of a call, and the median and the 90th percentile of the others."""
    times = []
    for _ in range(rounds + 1):
        start_s = time.perf_counter()
        call()
        times.append(time.perf_counter() - start_s)
    return {"first": times[0], "median": float(np.median(times[1:])), "p90": float(np.percentile(times[1:], 90))}


def make_layout(partition_rows: int, options: argparse.Namespace) -> StoreLayout:
    digests = tuple(f"checkpoint {c}" for c in range(options.checkpoints))
    return StoreLayout(options.rows, partition_rows, options.dim, "float16", digests)


def measure_writing(partition_rows: int, folder: str, options: argparse.Namespace) -> dict[str, Any]:
    """Write a store, and return the cost of writing it."""
    layout = make_layout(partition_rows, options)
    write_s, fsyncs = write_rows(FeatureStore(Path(folder), layout))
    return {
        "partition_rows": partition_rows,
        "files": layout.n_partitions * layout.n_checkpoints,
        "write_us_a_row": 1e6 * write_s / options.rows,
        "fsyncs_a_row": fsyncs / options.rows,
        "repeated_s": [partition_rows * seconds for seconds in ROW_SECONDS],
    }


def measure_reading(partition_rows: int, folder: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return the cost of opening and reading a store."""
    torch.set_num_threads(options.threads)
    store = FeatureStore(Path(folder), make_layout(partition_rows, options))
    private_kb = read_private_kb()
    open_files(store)
    result: dict[str, Any] = {"open_store_mb": (read_private_kb() - private_kb) / 1e3}
    result["open"] = measure_times(lambda: open_files(FeatureStore(store.directory, store.layout)), 3)
    random, view = np.random.default_rng(1), store.view()
    for count in TAKES:
        result[f"take_{count}"] = measure_times(
            lambda n=count: view.take(random.integers(0, options.rows, n)), options.rounds
        )
    queries = random.standard_normal((options.rounds + 1, view.dim), dtype=np.float32)
    scan, each = FlatIndex(view, torch.device("cpu")), iter(queries)
    result["scan"] = measure_times(lambda: search_both(scan, next(each)[None], 10), min(options.rounds, options.scans))
    return result


def read_private_kb() -> int:
    """Return the private memory of this process in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000, help="number of rows")
    parser.add_argument("--checkpoints", type=int, default=3, help="number of checkpoints")
    parser.add_argument("--dim", type=int, default=256, help="sketch dimensions per checkpoint")
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES, help="partition sizes")
    parser.add_argument("--rounds", type=int, default=60, help="number of calls of `take`")
    parser.add_argument("--scans", type=int, default=5, help="number of scans")
    parser.add_argument("--threads", type=int, default=2, help="number of CPU threads")
    parser.add_argument("--folder", help="folder for the store, which is removed; default: the system's")
    options = parser.parse_args()
    settings = {key: value for key, value in vars(options).items() if key != "folder"}
    results = []
    for size in options.sizes:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            found: dict[str, Any] = {}
            for measure in (measure_writing, measure_reading):
                spawn = multiprocessing.get_context("spawn")
                with ProcessPoolExecutor(max_workers=1, mp_context=spawn) as pool:
                    found |= pool.submit(measure, size, folder, options).result()
        results.append(found)
        print(found, flush=True)
    torch.set_num_threads(options.threads)
    print(write_results(RESULT, settings, results))


if __name__ == "__main__":
    main()
