"""Removal of each query's top rows and retraining: the rise of its loss, by score, on real data.

Shapes: N training rows, Q queries, K removed rows.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.attribution.settings import SETTINGS, Setting
from benchmarks.attribution.truth import merge_results, open_retraining
from benchmarks.common.results import write_results
from tracin_ann import BuildConfig, InfluenceIndex, QueryOptions, build
from tracin_ann.choices import DAMPED_SCORES, ScoreName
from tracin_ann.evaluation import draw_random_rows, find_top_rows, measure_removal
from tracin_ann.types import Float32

RESULT = "removal"
SCORES: tuple[ScoreName, ...] = ("tracin", "fisher", "gauss-newton")


def compute_scores(setting: Setting, data: Path, work: Path, queries: list[int], dim: int) -> dict[str, Float32]:
    """Return the scores [Q, N] of the index of one run with λ = 1/(ηT), and the negative distances of the inputs."""
    task = setting.make_task(data, work / "runs", [0])
    damping = setting.training.compute_damping(len(setting.load(data)[0][0]))
    with tempfile.TemporaryDirectory() as folder:
        build(task, folder, BuildConfig(dim=dim, index="flat", yardstick=False, device="cpu"))
        index = InfluenceIndex.open(folder, task, device="cpu")
        chosen = {
            score: QueryOptions(score=score, damping=damping if score in DAMPED_SCORES else None) for score in SCORES
        }
        scores = {score: index.score_matrix("query", queries, options) for score, options in chosen.items()}
    inputs, query_inputs = (rows[0].flatten(1) for rows in setting.load(data))
    return {"nearest": -torch.cdist(query_inputs[queries], inputs).numpy(), **scores}


def measure_setting(name: str, data: Path, work: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a result for each score and number of removed rows."""
    setting = SETTINGS[name]
    row_N, seeds = np.arange(len(setting.load(data)[0][0])), range(options.seeds)
    loss_Q = open_retraining(setting, data, work).measure([row_N], seeds)[0].mean(axis=0)
    queries = np.flatnonzero(loss_Q < np.log(2))[: options.queries].tolist()
    retraining = open_retraining(setting, data, work, queries)
    labels, query_labels = (rows[1].numpy() for rows in setting.load(data))
    scores = compute_scores(setting, data, work, queries, options.dim)
    found = []
    for k in options.k:
        removed = {"random": draw_random_rows(row_N, k, len(queries))}
        removed |= {score: find_top_rows(score_QN, row_N, k) for score, score_QN in scores.items()}
        for score, row_QK in removed.items():
            removal = measure_removal(retraining, row_N, row_QK, seeds)
            row = {"setting": name, "score": score, "k": k, "queries": len(queries), "seeds": options.seeds}
            row["rise"] = (removal.rise.mean, *removal.rise.interval)
            row["overturned"] = removal.n_overturned
            row["same_label"] = float((labels[row_QK] == query_labels[queries][:, None]).mean())
            print(row, flush=True)
            found.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True, type=Path, help="folder of mnist.npz")
    parser.add_argument("--work", type=Path, default=Path("runs/attribution"), help="folder of models and their losses")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=["MLP", "CNN"], help="settings to measure")
    parser.add_argument("--queries", type=int, default=16, help="queries, the first that are classified correctly")
    parser.add_argument("--seeds", type=int, default=1, help="training runs of each removal")
    parser.add_argument("--k", type=int, nargs="+", default=[50, 100], help="numbers of removed rows")
    parser.add_argument("--dim", type=int, default=1024, help="sketch dimensions per checkpoint")
    parser.add_argument("--threads", type=int, default=1, help="number of CPU threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.settings:
        found = measure_setting(name, options.data, options.work / name, options)
        results = merge_results(RESULT, found, ("setting", "score", "k"))
        print(write_results(RESULT, {"dim": options.dim, "threads": options.threads}, results), flush=True)


if __name__ == "__main__":
    main()
