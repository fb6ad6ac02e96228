"""Retrieval on real features: recall, what is scored, speed, memory and building time, ours and rivals', as rows grow.

Reads the rows and queries that benchmarks.retrieval_rows made; N rows are the first N of them. Recall is of the exact
scan's top k; every found row's score is computed anew from the rows. Times are medians of rounds in which all sides
take turns, in one process.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks import common
from benchmarks.retrieval_rivals import RIVALS
from tracin_ann.search import FlatIndex, IVFIndex, IVFParams
from tracin_ann.search.settings import Setting
from tracin_ann.store import FeatureStore, FeatureView
from tracin_ann.store.manifest import FEATURES, Manifest
from tracin_ann.types import Float32, Int64

CPU = torch.device("cpu")
SIDES = (("proponents", 1), ("opponents", -1))
TARGETS = (0.95, 0.98)
ALPHAS = (0.1, 0.2, 0.3)
ROUNDS = 3
SINGLES = 100


@dataclass(frozen=True)
class First:
    """The first N rows of a store, as a RowSource."""

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

    def take(self, ids: Sequence[int] | Int64) -> Float32:
        return self.view.take(ids)


@dataclass(frozen=True)
class Truth:
    """The exact scan's ids [Q, 100] of both directions."""

    ids: dict[str, np.ndarray]
    scores: dict[str, np.ndarray]

    def figures(self, side: str, sign: int, found: Sequence[np.ndarray], queries: Float32, rows: First) -> dict:
        """Return recall@10, its 10th percentile and the regret: how far the found ten's scores fall short."""
        k = 10
        recall = common.recalls(self.ids[side][:, :k], [ids[:k].tolist() for ids in found])
        best = np.abs(self.scores[side][:, :k]).sum(1)
        some = range(0, len(found), 10)
        own = np.array([(sign * rows.take(found[q][:k]) @ queries[q]).sum() for q in some])
        regret = float(np.mean((best[::10] - own) / best[::10]))
        return {"recall": float(recall.mean()), "p10": float(np.percentile(recall, 10)), "regret": regret}


def seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def curve(index: IVFIndex, truth: Truth, queries: Float32, rows: First, side: str, sign: int) -> list[dict]:
    """Return settings in rising order of budgets until recall is nearly whole."""
    signed = np.ascontiguousarray(sign * queries)
    found = []
    codes = 250
    while codes <= len(rows) // 8:
        for ratio in (0.6, 1.0, 1.6):
            for alpha in ALPHAS:
                setting = Setting(codes, round(ratio * codes), alpha)
                top = index.at(setting).search(signed, 10)
                figures = truth.figures(side, sign, top.ids, queries, rows)
                settings = {"codes": codes, "centroids": setting.centroids, "alpha": alpha}
                found.append(settings | figures | {"scored": float(top.rows_scored.mean())})
        if min(f["recall"] for f in found[-len(ALPHAS) * 3 :]) > 0.985:
            break
        codes = round(codes * 1.4)
    return found


def cheapest(points: list[dict], target: float) -> dict:
    """Return the point that reaches a recall (and .9 at the 10th percentile, from .98 on) by scoring least."""
    fine = [p for p in points if p["recall"] >= target and (target < 0.98 or p["p10"] >= 0.9)]
    return min(fine or [max(points, key=lambda p: p["recall"])], key=lambda p: p["scored"])


def timed(sides: dict[str, Callable[[Float32], Any]], queries: Float32) -> dict[str, dict[str, float]]:
    """Return seconds a query of each side, of all queries at once and one by one; interleaved, medians."""
    batch: dict[str, list[float]] = {name: [] for name in sides}
    single: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(ROUNDS):
        for name, search in sides.items():
            batch[name].append(seconds(partial(search, queries)) / len(queries))
            few = SINGLES if batch[name][-1] < 1e-3 else 5
            single[name] += [seconds(partial(search, queries[q : q + 1])) for q in range(few)]
    return {name: {"batch": median(batch[name]), "single": median(single[name])} for name in sides}


def in_memory(rows: First) -> Callable[[Float32], Any] | None:
    """Return the strongest exact scan: float32 rows in memory, blocks of products, both directions from each."""
    if rows.rows * rows.dim * 4 > 8e9:
        return None
    held = torch.from_numpy(np.concatenate([block for _, block in rows.blocks(65_536)]))

    def scan(queries: Float32) -> None:
        asked, best = torch.from_numpy(queries), [[], []]
        for start in range(0, len(held), 16_384):
            scores = asked @ held[start : start + 16_384].T
            for side, largest in enumerate((True, False)):
                best[side].append(scores.topk(10, largest=largest))
        for side, largest in enumerate((True, False)):
            torch.cat([b.values for b in best[side]], 1).topk(10, largest=largest)

    return scan


def one_size(rows: First, queries: Float32, options: argparse.Namespace) -> dict[str, Any]:
    flat = FlatIndex(rows, CPU)
    top = flat.search_both(queries, 100)
    truth = Truth(
        {side: np.stack(t.ids) for (side, _), t in zip(SIDES, top, strict=True)},
        {side: np.stack(t.scores) for (side, _), t in zip(SIDES, top, strict=True)},
    )
    result: dict[str, Any] = {"rows": len(rows)}
    for codes in options.codes:
        began = time.perf_counter()
        index = IVFIndex.build(rows, IVFParams(codes=codes), CPU)
        ours: dict[str, Any] = {"build_seconds": time.perf_counter() - began, "lists": index.tree.n_lists}
        ours["bytes_a_row"] = index.resident_bytes / len(rows)
        ours["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        points = {side: curve(index, truth, queries, rows, side, sign) for side, sign in SIDES}
        searches: dict[str, Callable[[Float32], Any]] = {}
        for target in TARGETS:
            chosen = {side: cheapest(points[side], target) for side, _ in SIDES}
            ours[f"at_{target}"] = chosen
            for side, sign in SIDES:
                point = chosen[side]
                at = index.at(Setting(point["codes"], point["centroids"], point["alpha"]))
                searches[f"{side} {target}"] = lambda q, at=at, sign=sign: at.search(sign * q, 10)
                found = at.search(np.ascontiguousarray(sign * queries), 100)
                deep = common.recalls(truth.ids[side], [ids.tolist() for ids in found.ids])
                point["recall_100"] = float(deep.mean())
        scan = in_memory(rows) if codes == options.codes[0] and options.scan else None
        if scan is not None:
            searches["scan"] = scan
            searches["scan of the files"] = lambda q: flat.search_both(q, 10)
        ours["times"] = timed(searches, queries)
        ours["points"] = points
        result[codes] = ours
        print(len(rows), codes, json.dumps({k: v for k, v in ours.items() if k != "points"}), flush=True)
        del index, searches, scan
    if len(rows) == options.rivals_rows:
        result["rivals"] = [
            measured | {"rival": name}
            for name in options.rivals
            for measured in RIVALS[name](rows, queries, truth, SIDES)
        ]
        print(*result["rivals"], sep="\n", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", required=True, help="where benchmarks.retrieval_rows made its rows")
    parser.add_argument("--index", default="index-3200000")
    parser.add_argument("--sizes", nargs="+", type=int, default=[100_000, 200_000, 400_000, 1_000_000, 3_200_000])
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--codes", nargs="+", default=["sq8"])
    parser.add_argument("--scan", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--rivals", nargs="*", default=[], choices=list(RIVALS))
    parser.add_argument("--rivals-rows", type=int, default=1_000_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--name", default="retrieval")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    directory = Path(options.folder) / options.index
    view = FeatureStore(directory / FEATURES, Manifest.read(directory).build.layout).view()
    queries = np.load(Path(options.folder) / "queries.npy")[: options.queries].astype(np.float32)
    results = []
    settings = {key: value for key, value in vars(options).items() if key not in ("folder", "name")}
    for size in options.sizes:
        results.append(one_size(First(view, size), queries, options))
        path = common.write(options.name, settings, results)
    print(path)


if __name__ == "__main__":
    main()
