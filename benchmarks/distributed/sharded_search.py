"""Recall, scored rows and speed of inverted lists in shards, by one process and by workers, also if these are killed.

Reads the rows and queries that benchmarks.retrieval.rows wrote. Builds lists in one file and in shards, searches both
with the same settings and compares the results to the bit. Recall is measured against the exact scan.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.common.brute_force import compute_recalls
from benchmarks.common.results import write_results
from tracin_ann.distributed import ProcessLauncher, ShardOptions, ShardSearch, open_shard_search
from tracin_ann.search import FlatIndex, IVFIndex, IVFParams, search_both
from tracin_ann.search.construction import UnfinishedLists
from tracin_ann.search.settings import Setting
from tracin_ann.store import FeatureStore, FeatureView
from tracin_ann.store.manifest import FEATURES, Manifest
from tracin_ann.types import Float32, TopK

RESULT = "sharded_search"
CPU = torch.device("cpu")
SIDES = ("proponents", "opponents")
SETTINGS = {
    0.95: (Setting(1882, 1129, 0.3), Setting(686, 686, 0.3)),
    0.98: (Setting(2635, 1581, 0.3), Setting(1344, 806, 0.3)),
}
"""The settings of proponents and opponents by their recall with a million rows (benchmarks.retrieval.lists)."""
K = 10
RESAMPLES = 2000
KILLED_RECALL = 0.95

Both = tuple[TopK, TopK]


def build(view: FeatureView, folder: Path, shards: int) -> tuple[IVFIndex, float]:
    """Return lists in this many files, and the seconds to build and write them."""
    start_s = time.perf_counter()
    built = IVFIndex.build(view, IVFParams(shards=shards), CPU, UnfinishedLists(folder / f"scratch-{shards}", "rows"))
    directory = folder / str(shards)
    directory.mkdir()
    built.save(directory)
    seconds = time.perf_counter() - start_s
    return IVFIndex.load(directory, view, CPU), seconds


def search_in_batch(index: IVFIndex, queries: Float32) -> tuple[Both, float]:
    """Return the results of all queries at once, and the seconds per query."""
    start_s = time.perf_counter()
    found = search_both(index, queries, K)
    return found, (time.perf_counter() - start_s) / len(queries)


def search_one_by_one(index: IVFIndex, queries: Float32) -> tuple[list[Both], list[float]]:
    """Return the results of each query, and the seconds of each."""
    found, seconds = [], []
    for query_F in queries:
        start_s = time.perf_counter()
        found.append(search_both(index, query_F[None], K))
        seconds.append(time.perf_counter() - start_s)
    return found, seconds


def count_different(found: TopK, expected: TopK) -> int:
    """Return the number of queries whose ids or scores differ by a bit."""
    return sum(
        not (np.array_equal(a, b) and s.tobytes() == t.tobytes())
        for a, b, s, t in zip(found.ids, expected.ids, found.scores, expected.scores, strict=True)
    )


def count_different_pairs(found: Iterable[Both], expected: Iterable[Both]) -> int:
    """Return the number of searches with a different result in either direction."""
    return sum(any(map(count_different, own, true)) for own, true in zip(found, expected, strict=True))


def describe(found: Both, truth: Both, rng: np.random.Generator) -> dict[str, Any]:
    """Return recall@10 with its 95% interval over the queries, and rows scored per query, by direction."""
    figures = {}
    for side, own, true in zip(SIDES, found, truth, strict=True):
        recall_Q = compute_recalls(np.stack(true.ids), [ids.tolist() for ids in own.ids])
        means = recall_Q[rng.integers(0, len(recall_Q), (RESAMPLES, len(recall_Q)))].mean(axis=1)
        low, high = np.percentile(means, [2.5, 97.5]).tolist()
        scored = float(own.rows_scored.mean())
        figures[side] = {"recall": float(recall_Q.mean()), "interval": [low, high], "scored": scored}
    return figures


def kill_soon(search: ShardSearch, rng: random.Random) -> threading.Timer:
    """Kill a random worker with SIGKILL in at most two milliseconds, and return the timer that does it."""
    pids = [pid for pid in search.pids if pid is not None]
    timer = threading.Timer(rng.uniform(0, 2e-3), os.kill, (rng.choice(pids), signal.SIGKILL))
    timer.start()
    return timer


def measure_kills(
    search: ShardSearch, index: IVFIndex, queries: Float32, expected: list[Both], n_kills: int
) -> dict[str, Any]:
    """Return the wrong and lost answers of queries one by one while workers are killed."""
    rng, found, seconds = random.Random(0), [], []
    for at in range(0, len(queries), len(queries) // n_kills):
        timer = kill_soon(search, rng)
        own, own_s = search_one_by_one(index, queries[at : at + len(queries) // n_kills])
        timer.join()
        found += own
        seconds += own_s
    return {
        "queries": len(queries),
        "kills": n_kills,
        "wrong": count_different_pairs(found, expected),
        "lost": len(queries) - len(found),
        "median_ms": 1e3 * median(seconds),
        "longest_s": max(seconds),
    }


def measure(view: FeatureView, queries: Float32, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return all figures."""
    truth = FlatIndex(view, CPU).search_both(queries, K)
    (single, single_s), (sharded, sharded_s) = (build(view, folder, n) for n in (1, options.shards))
    result: dict[str, Any] = {"rows": len(view), "shards": options.shards, "queries": len(queries)}
    result["build_seconds"] = {"single": single_s, "shards": sharded_s}
    launcher = ProcessLauncher(["cpu"])
    search = open_shard_search(sharded, folder / str(options.shards), view.store, None, launcher, ShardOptions())
    try:
        for recall, settings in SETTINGS.items():
            figures: dict[str, Any] = {}
            expected, _ = search_in_batch(single.with_settings(*settings), queries)
            one_by_one, _ = search_one_by_one(single.with_settings(*settings), queries)
            for name, index in (("single", single), ("shards", sharded), ("workers", search.index)):
                chosen = index.with_settings(*settings)
                found, seconds = search_in_batch(chosen, queries)
                own, each_s = search_one_by_one(chosen, queries)
                figures[name] = describe(found, truth, np.random.default_rng(0)) | {
                    "different": sum(map(count_different, found, expected)),
                    "different_one_by_one": count_different_pairs(own, one_by_one),
                    "batch_ms": 1e3 * seconds,
                    "one_ms": 1e3 * median(each_s),
                }
            if recall == KILLED_RECALL:
                chosen = search.index.with_settings(*settings)
                result["kills"] = measure_kills(search, chosen, queries, one_by_one, options.kills)
            result[f"at_{recall}"] = figures
            print(recall, figures, result.get("kills"), flush=True)
    finally:
        search.close()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", required=True, help="folder that benchmarks.retrieval.rows wrote")
    parser.add_argument("--index", default="index-1000000", help="index in the folder")
    parser.add_argument("--shards", type=int, default=4, help="number of shards")
    parser.add_argument("--queries", type=int, default=1000, help="number of queries")
    parser.add_argument("--kills", type=int, default=20, help="number of kills during the queries")
    parser.add_argument("--threads", type=int, default=2, help="number of CPU threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    directory = Path(options.folder) / options.index
    view = FeatureStore(directory / FEATURES, Manifest.read(directory).build.layout).view()
    queries = np.load(Path(options.folder) / "queries.npy")[: options.queries].astype(np.float32)
    settings = {key: value for key, value in vars(options).items() if key != "folder"}
    with tempfile.TemporaryDirectory() as folder:
        print(write_results(RESULT, settings, [measure(view, queries, Path(folder), options)]))


if __name__ == "__main__":
    main()
