"""Predicted true recall beside the measured one: cases with random rows and queries of several models.

Reads the rows, queries and true scores that benchmarks.retrieval.rows wrote. A case is a random half of the rows with
16 random queries, as a build uses them. A build predicts the share of the true top ten in the first 10, 100 and 1,000
rows of the stored ranking from exact scores of a sample of rows (`measure_fidelity`); before a build, `--dim auto`
predicts it from a pilot of fewer rows, drawn uniformly. The measured share is the mean over all queries with true
scores. The prediction covers it if it is within the 95% interval. Predictions use only scores that a build computes.

Shapes: N rows of a case, M rows scored exactly, Q queries, F feature dimension.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.results import write_results
from benchmarks.retrieval.families import find_only
from tracin_ann.scoring.pilot import ROWS as PILOT_ROWS
from tracin_ann.scoring.pilot import Pilot
from tracin_ann.scoring.quality import DEPTHS, QUERIES, RankedRows, measure_deviations, measure_fidelity
from tracin_ann.scoring.true_recall import NoiseModel
from tracin_ann.store import FEATURES, Estimate, FeatureStore, Manifest
from tracin_ann.types import Float32, Float64, Int64

RESULT = "true_recall"
_K = 10
_SIDES = (("proponents", 1), ("opponents", -1))


class Subject:
    """Rows and queries of a model with stored and true scores of all pairs.

    Args:
        name: of the model.
        folder: of its files.
    """

    def __init__(self, name: str, folder: Path) -> None:
        index, queries, true = (find_only(folder, pattern) for pattern in ("index-*", "queries*.npy", "true-*.npy"))
        build = Manifest.read(index).build
        store = FeatureStore(index / FEATURES, build.layout)
        rates_C = np.array([checkpoint.learning_rate for checkpoint in build.spec.checkpoints])
        self.name, self.dim, self.n_checkpoints = name, build.layout.dim, len(rates_C)
        self.true_QN = np.load(true)
        n_rows = self.true_QN.shape[1]
        self.row_NF = store.view().take(np.arange(n_rows))
        self.query_QF: Float32 = np.load(queries)[: len(self.true_QN)].astype(np.float32)
        self.stored_QN: Float64 = self.query_QF.astype(np.float64) @ self.row_NF.T.astype(np.float64)
        self.sqnorm_NC = store.sqnorms()[:n_rows] * rates_C

    def measure(self, rows_N: Int64, sign: int) -> list[float]:
        """Return the share of the true top ten in the first rows of the stored ranking, at each depth."""
        shares_QR = []
        for true_N, stored_N in zip(sign * self.true_QN[:, rows_N], sign * self.stored_QN[:, rows_N], strict=True):
            ranked_K = np.argpartition(-true_N, _K)[:_K]
            place_K = (stored_N[None, :] > stored_N[ranked_K, None]).sum(1)
            shares_QR.append([float((place_K < depth).mean()) for depth in DEPTHS])
        return [float(share) for share in np.mean(shares_QR, axis=0)]

    def predict(self, rows_N: Int64, queries: Int64, seed: int) -> dict[str, list[Estimate]]:
        """Return what a build with these rows and queries expects at each depth, by direction."""
        ranked = RankedRows(
            rows_N, self.stored_QN[np.ix_(queries, rows_N)], self.sqnorm_NC[rows_N], self.query_QF[queries]
        )
        found = measure_fidelity(ranked, lambda ids: self.true_QN[np.ix_(queries, ids)].astype(np.float64), seed)
        return {side: [getattr(recall, side) for recall in found.true_recall] for side, _ in _SIDES}

    def predict_before(self, rows_N: Int64, queries: Int64, random: np.random.Generator) -> dict[str, list[Estimate]]:
        """Return what a pilot of these rows expects at each depth, by direction."""
        drawn = np.sort(random.permutation(rows_N)[:PILOT_ROWS])
        exact_QM = self.true_QN[np.ix_(queries, drawn)].astype(np.float64)
        deviation_QM = measure_deviations(self.query_QF[queries], self.row_NF[drawn], self.n_checkpoints)
        scale_Q = NoiseModel.fit(exact_QM, self.stored_QN[np.ix_(queries, drawn)], deviation_QM).scale_Q
        norm_QM = deviation_QM * self.dim**0.5
        pilot = Pilot(len(rows_N), exact_QM, scale_Q[:, None] * norm_QM, norm_QM)
        sides = zip(*(pilot.predict(self.dim, depth) for depth in DEPTHS), strict=True)
        return {side: list(estimates) for (side, _), estimates in zip(_SIDES, sides, strict=True)}


def measure_case(subject: Subject, seed: int) -> list[dict[str, Any]]:
    """Return the measured share and both predictions of a case, for each direction and depth."""
    random = np.random.default_rng(seed)
    n_queries, n_rows = subject.true_QN.shape
    rows_N = np.sort(random.permutation(n_rows)[: n_rows // 2])
    queries = np.sort(random.permutation(n_queries)[:QUERIES])
    predictions = {
        "build": subject.predict(rows_N, queries, seed),
        "pilot": subject.predict_before(rows_N, queries, random),
    }
    cells = []
    for side, sign in _SIDES:
        for place, (depth, measured) in enumerate(zip(DEPTHS, subject.measure(rows_N, sign), strict=True)):
            cell = {"model": subject.name, "seed": seed, "rows": len(rows_N), "side": side, "depth": depth}
            expected = {name: vars(found[side][place]) for name, found in predictions.items()}
            cells.append({**cell, "measured": measured, **expected})
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="+", metavar="NAME=FOLDER", help="folders that benchmarks.retrieval.rows wrote")
    parser.add_argument("--cases", type=int, default=10, help="cases of each model")
    options = parser.parse_args()
    results: list[dict[str, Any]] = []
    for word in options.models:
        name, _, folder = word.partition("=")
        subject = Subject(name, Path(folder))
        for seed in range(options.cases):
            results += measure_case(subject, seed)
            print(*results[-2 * len(DEPTHS) :], sep="\n", flush=True)
    settings = {"cases": options.cases, "queries": QUERIES, "pilot_rows": PILOT_ROWS}
    print(write_results(RESULT, settings, results))


if __name__ == "__main__":
    main()
