"""bf16 beside fp32: error of scores, recall of true TracInCP, and the cost of a row, on real models."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch

from benchmarks import common
from benchmarks.fidelity_models import SUBJECTS
from tracin_ann import Task
from tracin_ann.features.extractor import FeatureExtractor, FeatureOptions
from tracin_ann.features.passes import Passes, PassOptions
from tracin_ann.scoring.exact import exact_scores
from tracin_ann.sketch import make_sketch

K = 10
PRECISIONS = ("fp32", "bf16")


def features(passes: Passes, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the feature rows of queries [Q, F] and training rows [N, F]."""
    sides: dict[str, list[np.ndarray]] = {"query": [], "train": []}
    with passes.model() as model:
        for checkpoint in range(len(passes.task.checkpoints)):
            model.load(checkpoint)
            rank_one = model.engine("train").prove(next(model.batches("train", range(8)))).rank_one
            extractor = FeatureExtractor(model, FeatureOptions(make_sketch("factored", dim), 0, rank_one))
            for side, parts in sides.items():
                parts.append(extractor.rows(side, range(passes.n_rows(side))).feature_ND)
    return np.concatenate(sides["query"], 1), np.concatenate(sides["train"], 1)


def row_us(passes: Passes, dim: int, n_rows: int) -> float:
    """Return the microseconds a row of features at one checkpoint."""
    with passes.model() as model:
        model.load(0)
        extractor = FeatureExtractor(model, FeatureOptions(make_sketch("factored", dim), 0, frozenset()))
        read = list(passes.read("train", range(n_rows)))
        for _ in extractor.stream("train", read[:2]):
            pass
        began = time.perf_counter()
        for _ in extractor.stream("train", read):
            pass
        return (time.perf_counter() - began) / n_rows * 1e6


def measured(name: str, options: argparse.Namespace) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as folder:
        return compared(name, SUBJECTS[name].task(options.data, folder, 0), options)


def compared(name: str, task: Task, options: argparse.Namespace) -> dict[str, object]:
    by_precision = {p: Passes(task, PassOptions(torch.device("cpu"), 64, precision=p)) for p in PRECISIONS}
    n_queries, n_rows = (len(data()) for data in (task.query_data, task.train_data))
    passes = by_precision["fp32"]
    true = exact_scores(passes, ("query", range(n_queries)), range(n_rows), range(len(task.checkpoints)))
    row: dict[str, object] = {"model": name}
    scores = {}
    for precision, each in by_precision.items():
        query, train = features(each, options.dim)
        scores[precision] = query @ train.T
        for side, sign in (("proponents", 1), ("opponents", -1)):
            found = common.top(sign * scores[precision], K).tolist()
            row[f"{side}_{precision}"] = float(common.recalls(common.top(sign * true, K), found).mean())
    off = scores["bf16"] - scores["fp32"]
    row["score_error"] = float(np.sqrt((off**2).mean() / (scores["fp32"] ** 2).mean()))
    row["sketch_error"] = float(np.sqrt(((scores["fp32"] - true) ** 2).mean() / (true**2).mean()))
    times: dict[str, list[float]] = {p: [] for p in PRECISIONS}
    for _ in range(options.rounds):
        for precision, each in by_precision.items():
            times[precision].append(row_us(each, options.dim, options.rows))
    return row | {f"row_us_{p}": median(values) for p, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", nargs="+", choices=SUBJECTS, default=["CNN", "ResNet-9", "GPT"])
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=256, help="timed a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settings = {key: value for key, value in vars(options).items() if key != "data"}
    common.reported("precision", settings, (measured(name, options) for name in options.models))


if __name__ == "__main__":
    main()
