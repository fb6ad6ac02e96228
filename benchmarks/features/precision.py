"""bf16 compared with fp32 on trained models: error of scores, recall of true TracInCP, time per row."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch

from benchmarks.common.brute_force import compute_recalls, find_top
from benchmarks.common.results import report_results
from benchmarks.common.trained_models import SUBJECTS
from tracin_ann import Task
from tracin_ann.features import RunOptions, TaskRunner
from tracin_ann.features.extractor import FeatureExtractor, FeatureOptions
from tracin_ann.scoring.exact import exact_scores
from tracin_ann.sketch import make_sketch

RESULT = "precision"
K = 10
PRECISIONS = ("fp32", "bf16")


def compute_features(runner: TaskRunner, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the features of queries [Q, F] and of training rows [N, F]."""
    sides: dict[str, list[np.ndarray]] = {"query": [], "train": []}
    with runner.model() as model:
        for checkpoint in range(len(runner.task.checkpoints)):
            model.load(checkpoint)
            rank_one = model.engine("train").choose_methods(next(model.batches("train", range(8)))).rank_one
            extractor = FeatureExtractor(model, FeatureOptions(make_sketch("factored", dim), 0, rank_one))
            for side, parts in sides.items():
                parts.append(extractor.rows(side, range(runner.n_rows(side))).feature_ND)
    return np.concatenate(sides["query"], 1), np.concatenate(sides["train"], 1)


def time_row_us(runner: TaskRunner, dim: int, n_rows: int) -> float:
    """Return the microseconds per row of extraction at one checkpoint."""
    with runner.model() as model:
        model.load(0)
        extractor = FeatureExtractor(model, FeatureOptions(make_sketch("factored", dim), 0, frozenset()))
        loaded = list(runner.read("train", range(n_rows)))
        for _ in extractor.stream("train", loaded[:2]):
            pass
        start_s = time.perf_counter()
        for _ in extractor.stream("train", loaded):
            pass
        return (time.perf_counter() - start_s) / n_rows * 1e6


def measure_model(name: str, options: argparse.Namespace) -> dict[str, object]:
    """Train a model, and return its figures."""
    with tempfile.TemporaryDirectory() as folder:
        return compare_precisions(name, SUBJECTS[name].train_task(options.data, folder, 0), options)


def compare_precisions(name: str, task: Task, options: argparse.Namespace) -> dict[str, object]:
    """Return recall, errors and times of both precisions."""
    by_precision = {p: TaskRunner(task, RunOptions(torch.device("cpu"), 64, precision=p)) for p in PRECISIONS}
    n_queries, n_rows = (len(data()) for data in (task.query_data, task.train_data))
    runner = by_precision["fp32"]
    true = exact_scores(runner, ("query", range(n_queries)), range(n_rows), range(len(task.checkpoints)))
    row: dict[str, object] = {"model": name}
    scores = {}
    for precision, each in by_precision.items():
        query, train = compute_features(each, options.dim)
        scores[precision] = query @ train.T
        for side, sign in (("proponents", 1), ("opponents", -1)):
            found = find_top(sign * scores[precision], K).tolist()
            row[f"{side}_{precision}"] = float(compute_recalls(find_top(sign * true, K), found).mean())
    error = scores["bf16"] - scores["fp32"]
    row["score_error"] = float(np.sqrt((error**2).mean() / (scores["fp32"] ** 2).mean()))
    row["sketch_error"] = float(np.sqrt(((scores["fp32"] - true) ** 2).mean() / (true**2).mean()))
    times: dict[str, list[float]] = {p: [] for p in PRECISIONS}
    for _ in range(options.rounds):
        for precision, each in by_precision.items():
            times[precision].append(time_row_us(each, options.dim, options.rows))
    return row | {f"row_us_{p}": median(values) for p, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument(
        "--models", nargs="+", choices=SUBJECTS, default=["CNN", "ResNet-9", "GPT"], help="models to measure"
    )
    parser.add_argument("--dim", type=int, default=1024, help="sketch dimensions per checkpoint")
    parser.add_argument("--rows", type=int, default=256, help="rows per round")
    parser.add_argument("--rounds", type=int, default=5, help="number of measured rounds")
    parser.add_argument("--threads", type=int, default=2, help="number of CPU threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settings = {key: value for key, value in vars(options).items() if key != "data"}
    report_results(RESULT, settings, (measure_model(name, options) for name in options.models))


if __name__ == "__main__":
    main()
