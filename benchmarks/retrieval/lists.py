"""Recall, scored rows, speed, memory and build time of inverted lists on real features, as the rows grow.

Reads the rows and queries that benchmarks.retrieval.rows wrote; a size of N uses the first N rows. Recall is measured
against the top k of the exact scan, with scores recomputed from the rows. Times are medians of interleaved rounds in
one process. `--rivals` adds other indexes of the same rows.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.common.brute_force import compute_recalls
from benchmarks.common.results import write_results
from benchmarks.retrieval.rivals import RIVALS
from tracin_ann.search import FlatIndex, IVFIndex, IVFParams
from tracin_ann.search.settings import Setting
from tracin_ann.store import FeatureStore, FeatureView
from tracin_ann.store.manifest import FEATURES, Manifest
from tracin_ann.types import CodedPart, Float32, Int64, StoredPart

RESULT = "retrieval"
CPU = torch.device("cpu")
SIDES = (("proponents", 1), ("opponents", -1))
TARGETS = (0.95, 0.98)
ALPHAS = (0.1, 0.2, 0.3)
ROUNDS = 3
SINGLES = 100


@dataclass(frozen=True)
class First:
    """The first N rows of a feature store, as a RowSource."""

    view: FeatureView
    rows: int

    @property
    def dim(self) -> int:
        return self.view.dim

    def __len__(self) -> int:
        return self.rows

    def blocks(self, block_rows: int, start: int = 0) -> Iterator[tuple[Int64, Float32]]:
        for ids, rows in self.view.blocks(block_rows, start):
            if ids[0] >= self.rows:
                return
            yield ids[: self.rows - ids[0]], rows[: self.rows - ids[0]]

    def stored_blocks(self, block_rows: int) -> Iterator[tuple[Int64, list[StoredPart]]]:
        for ids, parts in self.view.stored_blocks(block_rows):
            if ids[0] >= self.rows:
                return
            n = int(self.rows - ids[0])
            yield (
                ids[:n],
                [replace(part, stored_BD=part.stored_BD[:n], exponent_B=part.exponent_B[:n]) for part in parts],
            )

    def take(self, ids: Sequence[int] | Int64) -> Float32:
        return self.view.take(ids)

    def take_stored(self, ids: Int64) -> Iterator[StoredPart | CodedPart]:
        return self.view.take_stored(ids)


@dataclass(frozen=True)
class Truth:
    """Ids and scores [Q, 100] of the exact scan, by direction."""

    ids: dict[str, np.ndarray]
    scores: dict[str, np.ndarray]

    def compare(self, side: str, sign: int, found: Sequence[np.ndarray], queries: Float32, rows: First) -> dict:
        """Return recall@10, its 10th percentile and the regret: how the relative loss of score."""
        k = 10
        recall = compute_recalls(self.ids[side][:, :k], [ids[:k].tolist() for ids in found])
        best = np.abs(self.scores[side][:, :k]).sum(1)
        sample = range(0, len(found), 10)
        own = np.array([(sign * rows.take(found[q][:k]) @ queries[q]).sum() for q in sample])
        regret = float(np.mean((best[::10] - own) / best[::10]))
        return {"recall": float(recall.mean()), "p10": float(np.percentile(recall, 10)), "regret": regret}


def time_call(call: Callable[[], Any]) -> float:
    start_s = time.perf_counter()
    call()
    return time.perf_counter() - start_s


def measure_curve(index: IVFIndex, truth: Truth, queries: Float32, rows: First, side: str, sign: int) -> list[dict]:
    """Return recall at settings of increasing budget, until the recall exceeds 0.985."""
    signed = np.ascontiguousarray(sign * queries)
    points = []
    codes = 250
    while codes <= len(rows) // 8:
        for ratio in (0.6, 1.0, 1.6):
            for alpha in ALPHAS:
                setting = Setting(codes, round(ratio * codes), alpha)
                top = index.with_settings(setting).search(signed, 10)
                figures = truth.compare(side, sign, top.ids, queries, rows)
                settings = {"codes": codes, "centroids": setting.centroids, "alpha": alpha}
                points.append(settings | figures | {"scored": float(top.rows_scored.mean())})
        if min(f["recall"] for f in points[-len(ALPHAS) * 3 :]) > 0.985:
            break
        codes = round(codes * 1.4)
    return points


def choose_point(points: list[dict], target: float) -> dict:
    """Return the point that reaches a recall with the fewest scored rows; from 0.98 on, its p10 is at least 0.9."""
    sufficient = [p for p in points if p["recall"] >= target and (target < 0.98 or p["p10"] >= 0.9)]
    return min(sufficient or [max(points, key=lambda p: p["recall"])], key=lambda p: p["scored"])


def time_searches(searches: dict[str, Callable[[Float32], Any]], queries: Float32) -> dict[str, dict[str, float]]:
    """Return median seconds per query of each search, for all queries at once and one by one."""
    batch: dict[str, list[float]] = {name: [] for name in searches}
    single: dict[str, list[float]] = {name: [] for name in searches}
    for _ in range(ROUNDS):
        for name, search in searches.items():
            batch[name].append(time_call(partial(search, queries)) / len(queries))
            count = SINGLES if batch[name][-1] < 1e-3 else 5
            single[name] += [time_call(partial(search, queries[q : q + 1])) for q in range(count)]
    return {name: {"batch": median(batch[name]), "single": median(single[name])} for name in searches}


def read_rows(rows: First) -> Float32:
    """Return all rows [N, F] in float32, without a second copy at any time."""
    row_NF, done = np.empty((len(rows), rows.dim), np.float32), 0
    for _, block_BF in rows.blocks(65_536):
        row_NF[done : done + len(block_BF)] = block_BF
        done += len(block_BF)
    return row_NF


def scan_memory(row_NF: Float32, queries: Float32, k: int = 10) -> None:
    """Run the fastest exact scan: rows in memory, matrix products in blocks, both directions from each."""
    query_QF, best = torch.from_numpy(queries), [[], []]
    for start in range(0, len(row_NF), 16_384):
        scores = query_QF @ torch.from_numpy(row_NF[start : start + 16_384]).T
        for side, largest in enumerate((True, False)):
            best[side].append(scores.topk(min(k, scores.shape[1]), largest=largest))
    for side, largest in enumerate((True, False)):
        torch.cat([b.values for b in best[side]], 1).topk(k, largest=largest)


def measure_rival(name: str, rows: First, queries: Float32, truth: Truth) -> Iterator[dict[str, Any]]:
    """Yield recall, scored rows and seconds per query of another index by direction, at each of its settings."""
    start_s = time.perf_counter()
    rival = RIVALS[name](read_rows(rows))
    build_s = time.perf_counter() - start_s
    for setting in rival.settings:
        figures: dict[str, Any] = {"rival": rival.name, rival.parameter: setting}
        for side, sign in SIDES:
            search = partial(rival.search, np.ascontiguousarray(sign * queries), 10, setting)
            found, scored = search()
            seconds = median(time_call(search) for _ in range(ROUNDS)) / len(queries)
            figures[side] = truth.compare(side, sign, found, queries, rows) | {"scored": scored, "batch": seconds}
        yield figures | {"build_seconds": build_s, "bytes_a_row": rival.bytes_a_row}


def measure_size(rows: First, queries: Float32, options: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of one number of rows."""
    flat = FlatIndex(rows, CPU)
    top = flat.search_both(queries, 100)
    truth = Truth(
        {side: np.stack(t.ids) for (side, _), t in zip(SIDES, top, strict=True)},
        {side: np.stack(t.scores) for (side, _), t in zip(SIDES, top, strict=True)},
    )
    result: dict[str, Any] = {"rows": len(rows)}
    for codes in options.codes:
        start_s = time.perf_counter()
        index = IVFIndex.build(rows, IVFParams(codes=codes), CPU)
        ours: dict[str, Any] = {"build_seconds": time.perf_counter() - start_s, "lists": index.tree.n_lists}
        ours["bytes_a_row"] = index.resident_bytes / len(rows)
        ours["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        points = {side: measure_curve(index, truth, queries, rows, side, sign) for side, sign in SIDES}
        searches: dict[str, Callable[[Float32], Any]] = {}
        for target in TARGETS:
            chosen = {side: choose_point(points[side], target) for side, _ in SIDES}
            ours[f"at_{target}"] = chosen
            for side, sign in SIDES:
                point = chosen[side]
                at = index.with_settings(Setting(point["codes"], point["centroids"], point["alpha"]))
                searches[f"{side} {target}"] = lambda q, at=at, sign=sign: at.search(sign * q, 10)
                found = at.search(np.ascontiguousarray(sign * queries), 100)
                deep = compute_recalls(truth.ids[side], [ids.tolist() for ids in found.ids])
                point["recall_100"] = float(deep.mean())
        if codes == options.codes[0] and options.scan:
            searches["scan"] = partial(scan_memory, read_rows(rows))
            searches["scan of the files"] = lambda q: flat.search_both(q, 10)
        ours["times"] = time_searches(searches, queries)
        ours["points"] = points
        result[codes] = ours
        print(len(rows), codes, json.dumps({k: v for k, v in ours.items() if k != "points"}), flush=True)
        del index, searches
    if len(rows) == options.rivals_rows:
        result["rivals"] = [f for name in options.rivals for f in measure_rival(name, rows, queries, truth)]
        print(*result["rivals"], sep="\n", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", required=True, help="folder that benchmarks.retrieval.rows wrote")
    parser.add_argument("--index", default="index-1000000", help="index in the folder")
    parser.add_argument(
        "--sizes",
        nargs="+",
        type=int,
        default=[100_000, 200_000, 400_000, 1_000_000],
        help="numbers of rows",
    )
    parser.add_argument("--queries", type=int, default=1000, help="number of queries")
    parser.add_argument("--codes", nargs="+", default=["sq8"], help="codes of the lists: sq8, sq4")
    parser.add_argument("--scan", action=argparse.BooleanOptionalAction, default=True, help="time the exact scans")
    parser.add_argument("--rivals", nargs="*", default=[], choices=list(RIVALS), help="other indexes to measure")
    parser.add_argument("--rivals-rows", type=int, default=1_000_000, help="number of rows for these")
    parser.add_argument("--threads", type=int, default=2, help="number of CPU threads")
    parser.add_argument("--name", default=RESULT, help="name of the result file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    directory = Path(options.folder) / options.index
    layout = Manifest.read(directory).build.layout
    view = FeatureStore(directory / FEATURES, layout).view()
    queries = np.load(Path(options.folder) / "queries.npy")[: options.queries].astype(np.float32)
    results = []
    settings = {key: value for key, value in vars(options).items() if key not in ("folder", "name")}
    settings["partition_rows"] = layout.partition_rows
    for size in options.sizes:
        results.append(measure_size(First(view, size), queries, options))
        path = write_results(options.name, settings, results)
    print(path)


if __name__ == "__main__":
    main()
