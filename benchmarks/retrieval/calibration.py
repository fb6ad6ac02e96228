"""Validity of the calibrated lower bound of recall on new queries, and detection of shifted queries.

Reads the rows and queries that benchmarks.retrieval.rows wrote. A case is a random subset of the rows with its own
lists, calibrated on 400 queries. The bound is violated if the mean recall of 1,000 other queries is below it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks.common.results import write_results
from tracin_ann.search import FlatIndex, IVFIndex, IVFParams
from tracin_ann.search.calibration import RECALL_AT, calibrate, compute_recalls
from tracin_ann.search.flat import Subset
from tracin_ann.store import FeatureStore
from tracin_ann.store.manifest import FEATURES, Manifest

RESULT = "calibration"
CPU = torch.device("cpu")
NEW, CALIBRATION = 1000, 400


def make_shifts(queries: np.ndarray, random: np.random.Generator) -> Iterator[tuple[str, np.ndarray]]:
    """Yield sets of 100 queries from other distributions, by name."""
    sample = queries[random.choice(len(queries), 100, replace=False)]
    yield "norms x 10", sample * 10
    yield "norms / 10", sample / 10
    noise = random.standard_normal(sample.shape).astype(np.float32)
    yield "noise of like norms", noise * np.linalg.norm(sample, axis=1, keepdims=True) / noise.shape[1] ** 0.5
    yield "coordinates permuted", sample[:, random.permutation(sample.shape[1])]


def run_case(rows: Subset, queries: np.ndarray, seed: int, target: float) -> dict[str, object]:
    """Calibrate lists of these rows, and compare the bound with the recall of new queries."""
    random = np.random.default_rng(seed)
    order = random.permutation(len(queries))
    known, new = queries[order[:CALIBRATION]], queries[order[CALIBRATION : CALIBRATION + NEW]]
    index, exact = IVFIndex.build(rows, IVFParams(seed=seed), CPU), FlatIndex(rows, CPU)
    calibration = calibrate(index, exact, known, target)
    found: dict[str, object] = {"seed": seed, "rows": len(rows)}
    for side, sign in (("proponents", 1), ("opponents", -1)):
        point = calibration.fastest_point(side, target) or calibration.best(side)
        signed = sign * new
        truth = exact.search(signed, RECALL_AT)
        recall = float(
            compute_recalls(index.with_settings(point.setting).search(signed, RECALL_AT), truth, truth.scores).mean()
        )
        reached = calibration.fastest_point(side, target) is not None
        found[side] = {"lower": point.lower, "fresh": recall, "broken": recall < point.lower, "reached": reached}
    distribution = calibration.looks
    found["flagged"] = {name: bool(distribution.compare(index, q).is_shifted) for name, q in make_shifts(new, random)}
    found["falsely_flagged"] = bool(distribution.compare(index, new[:100]).is_shifted)
    found["strange_share"] = float(distribution.compare(index, new).outlier_Q.mean())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", required=True, help="folder that benchmarks.retrieval.rows wrote")
    parser.add_argument("--index", default="index-60000", help="index in the folder")
    parser.add_argument("--rows", type=int, default=20_000, help="rows per case")
    parser.add_argument("--cases", type=int, default=40, help="number of cases")
    parser.add_argument("--target", type=float, default=0.95, help="target recall")
    options = parser.parse_args()
    directory = Path(options.folder) / options.index
    view = FeatureStore(directory / FEATURES, Manifest.read(directory).build.layout).view()
    queries = np.load(Path(options.folder) / "queries.npy")
    results = []
    for seed in range(options.cases):
        ids = np.sort(np.random.default_rng(1000 + seed).choice(len(view), options.rows, replace=False))
        results.append(run_case(Subset(view, ids), queries, seed, options.target))
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
    print(write_results(RESULT, settings, [summary, *results]))


if __name__ == "__main__":
    main()
