"""True recall of a score with a curvature matrix as a build predicts it, beside the measured one, and its cost.

The model is an MLP of MNIST digits with three checkpoints of a run with SGD; the score is gauss-newton. The truth is
the exact score of every row, over all parameters, for 64 queries. A case is a draw of 16 of these queries and of the
rows that a build scores exactly. The build predicts the share of the true top ten in the first 10, 100 and 1,000 rows
of the stored ranking; the prediction covers the measured share of all 64 queries if it is within the 95% interval. The
cost is the CPU time of builds with and without the measurement, for TracIn as the default score and for gauss-newton.

Shapes: N rows, Q queries, C checkpoints.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.attribution.settings import Setting, Training, compute_loss, load_digits, make_mlp
from benchmarks.common.results import write_results
from tracin_ann import BuildConfig, InfluenceIndex, Task, build
from tracin_ann.scoring import Queries, make_exact_scorer
from tracin_ann.scoring.quality import DEPTHS, QUERIES, RankedRows, measure_fidelity, score_rows
from tracin_ann.types import Float64

RESULT = "true_recall_curvature"
N_QUERIES = 64
EPOCHS = (2, 6, 12)
SIZES, DIMS = (10_000, 50_000), (256, 1024)
BUILD_SIZES = (5000, 20_000)
_K = 10
_SIDES = (("proponents", 1), ("opponents", -1))


def make_task(data: Path, folder: Path, n_rows: int) -> Task:
    """Train the MLP if necessary, and return the task."""
    load = partial(load_digits, shape=(784,), n_rows=n_rows)
    setting = Setting(make_mlp, compute_loss, load, Training(0.1, 64, EPOCHS), truth_seeds=1)
    setting.train_runs(data, folder / f"runs-{n_rows}", [0])
    return setting.make_task(data, folder / f"runs-{n_rows}", [0])


class Subject:
    """Stored and exact scores of all rows for some queries.

    Args:
        task: the task.
        folder: of the index, which is built if it does not exist.
        dim: D.
    """

    def __init__(self, task: Task, folder: Path, dim: int) -> None:
        build(task, folder, BuildConfig(dim=dim, index="flat", yardstick=False, device="cpu"))
        index = InfluenceIndex.open(folder, task, device="cpu")
        score, ids, checkpoints = index.make_score(), list(range(N_QUERIES)), range(len(EPOCHS))
        rate_C = np.array([checkpoint.learning_rate for checkpoint in index.manifest.build.spec.checkpoints])
        self.vector_QF = score.weigh(index.features("query", ids), checkpoints).vector_QF
        self.sqnorm_NC = index.view().store.sqnorms() * rate_C
        self.stored_QN = score_rows(index.view(), self.vector_QF)
        with make_exact_scorer(index.runner, Queries("query", ids), checkpoints, None, score.direction_map) as scorer:
            self.true_QN = scorer.scores(range(len(index)))
        self.method = score.direction_map.summary if score.direction_map is not None else ""

    def measure(self, sign: int) -> list[float]:
        """Return the share of the true top ten in the first rows of the stored ranking, at each depth."""
        shares_QR = []
        for true_N, stored_N in zip(sign * self.true_QN, sign * self.stored_QN, strict=True):
            place_K = (stored_N[None, :] > stored_N[np.argpartition(-true_N, _K)[:_K], None]).sum(1)
            shares_QR.append([float((place_K < depth).mean()) for depth in DEPTHS])
        return [float(share) for share in np.mean(shares_QR, axis=0)]

    def predict(self, seed: int) -> Iterator[dict[str, Any]]:
        """Yield the predicted and the measured share of a case, for each direction and depth."""
        n_rows = self.true_QN.shape[1]
        chosen = np.sort(np.random.default_rng(seed).permutation(N_QUERIES)[:QUERIES])

        def score_exactly(rows: Any) -> Float64:
            return self.true_QN[np.ix_(chosen, rows)]

        ranked = RankedRows(np.arange(n_rows), self.stored_QN[chosen], self.sqnorm_NC, self.vector_QF[chosen])
        found = measure_fidelity(ranked, score_exactly, seed)
        for side, sign in _SIDES:
            for depth, share, recall in zip(DEPTHS, self.measure(sign), found.true_recall, strict=True):
                build = vars(getattr(recall, side))
                yield {"seed": seed, "side": side, "depth": depth, "measured": share, "build": build}


def measure_builds(data: Path, folder: Path, n_rows: int, dim: int) -> dict[str, Any]:
    """Return the CPU seconds of a build without measurement, and with it, by the default score of the task."""
    task, times = make_task(data, folder, n_rows), {}
    for score in ("tracin", "gauss-newton"):
        for measured in (False, True):
            out = folder / f"build-{n_rows}-{dim}"
            shutil.rmtree(out, ignore_errors=True)
            began_s = time.process_time()
            config = BuildConfig(dim=dim, index="flat", yardstick=measured, device="cpu")
            found = build(replace(task, score=score), out, config).manifest.score_fidelity
            times[f"{score}, measured" if measured else score] = time.process_time() - began_s
            assert (found is not None) == (measured and score != "tracin")
    return {"rows": n_rows, "dim": dim, "seconds": times}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True, type=Path, help="folder of mnist.npz")
    parser.add_argument("--folder", required=True, type=Path, help="folder to write")
    parser.add_argument("--cases", type=int, default=20, help="cases of each size and D")
    options = parser.parse_args()
    builds = [measure_builds(options.data, options.folder, n, DIMS[-1]) for n in BUILD_SIZES]
    print(*builds, sep="\n", flush=True)
    cases: list[dict[str, Any]] = []
    for n_rows in SIZES:
        for dim in DIMS:
            subject = Subject(
                make_task(options.data, options.folder, n_rows), options.folder / f"index-{n_rows}-{dim}", dim
            )
            setting = {"rows": n_rows, "dim": dim, "method": subject.method}
            cases += [setting | cell for seed in range(options.cases) for cell in subject.predict(seed)]
            print(cases[-2 * len(DEPTHS)], flush=True)
    settings = {"cases": options.cases, "queries": QUERIES, "measured_queries": N_QUERIES, "checkpoints": len(EPOCHS)}
    print(write_results(RESULT, settings, {"cases": cases, "builds": builds}))


if __name__ == "__main__":
    main()
