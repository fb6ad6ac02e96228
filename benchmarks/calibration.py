"""Whether the calibrated recall holds: its lower bound on fresh queries, case after case, and shifted queries flagged.

Reads the rows and queries that benchmarks.retrieval_rows made. A case is a random subset of the rows with lists of its
own, calibrated on 400 queries; 1,000 others are fresh. The bound is broken where their mean recall lies below it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks import common
from tracin_ann.search import FlatIndex, IVFIndex, IVFParams
from tracin_ann.search.calibration import CALIBRATED_FOR, calibrate, compute_recalls
from tracin_ann.search.flat import Subset
from tracin_ann.store import FeatureStore
from tracin_ann.store.manifest import FEATURES, Manifest

CPU = torch.device("cpu")
FRESH, MEASURED = 1000, 400


def shifts(queries: np.ndarray, random: np.random.Generator) -> Iterator[tuple[str, np.ndarray]]:
    """Yield sets of 100 queries drawn from elsewhere."""
    some = queries[random.choice(len(queries), 100, replace=False)]
    yield "norms x 10", some * 10
    yield "norms / 10", some / 10
    noise = random.standard_normal(some.shape).astype(np.float32)
    yield "noise of like norms", noise * np.linalg.norm(some, axis=1, keepdims=True) / noise.shape[1] ** 0.5
    yield "coordinates permuted", some[:, random.permutation(some.shape[1])]


def case(rows: Subset, queries: np.ndarray, seed: int, target: float) -> dict[str, object]:
    random = np.random.default_rng(seed)
    order = random.permutation(len(queries))
    measured, fresh = queries[order[:MEASURED]], queries[order[MEASURED : MEASURED + FRESH]]
    index, exact = IVFIndex.build(rows, IVFParams(seed=seed), CPU), FlatIndex(rows, CPU)
    calibration = calibrate(index, exact, measured, target)
    found: dict[str, object] = {"seed": seed, "rows": len(rows)}
    for side, sign in (("proponents", 1), ("opponents", -1)):
        point = calibration.reaching(side, target) or calibration.best(side)
        signed = sign * fresh
        truth = exact.search(signed, CALIBRATED_FOR)
        recall = float(compute_recalls(index.at(point.setting).search(signed, CALIBRATED_FOR), truth, truth.scores).mean())
        reached = calibration.reaching(side, target) is not None
        found[side] = {"lower": point.lower, "fresh": recall, "broken": recall < point.lower, "reached": reached}
    looks = calibration.looks
    found["flagged"] = {name: bool(looks.is_shifted(index, q)) for name, q in shifts(fresh, random)}
    found["falsely_flagged"] = bool(looks.is_shifted(index, fresh[:100]))
    found["strange_share"] = float(looks.strange(index, fresh).mean())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", required=True, help="where benchmarks.retrieval_rows made its rows")
    parser.add_argument("--index", default="index-60000")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--cases", type=int, default=40)
    parser.add_argument("--target", type=float, default=0.95)
    options = parser.parse_args()
    directory = Path(options.folder) / options.index
    view = FeatureStore(directory / FEATURES, Manifest.read(directory).build.layout).view()
    queries = np.load(Path(options.folder) / "queries.npy")
    results = []
    for seed in range(options.cases):
        ids = np.sort(np.random.default_rng(1000 + seed).choice(len(view), options.rows, replace=False))
        results.append(case(Subset(view, ids), queries, seed, options.target))
        print(results[-1], flush=True)
    sides = [result[side] for result in results for side in ("proponents", "opponents")]
    summary = {
        "cases": len(sides),
        "broken": sum(side["broken"] for side in sides),
        "flagged": {name: sum(r["flagged"][name] for r in results) for name in results[0]["flagged"]},
        "falsely_flagged": sum(r["falsely_flagged"] for r in results),
    }
    print(summary)
    settings = {key: value for key, value in vars(options).items() if key != "folder"}
    print(common.write("calibration", settings, [summary, *results]))


if __name__ == "__main__":
    main()
