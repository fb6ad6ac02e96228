"""Recall of true TracInCP with each sketch, and after exact re-scoring, for the MNIST CNN."""

from __future__ import annotations

import argparse
import tempfile

import numpy as np

from benchmarks.common.brute_force import compute_recalls, compute_scores, find_top
from benchmarks.common.results import write_results
from examples import mnist
from tracin_ann import BuildConfig, InfluenceIndex, QueryOptions, build

RESULT = "recall_mnist"
K = 10


def measure_recall(index: InfluenceIndex, scores: np.ndarray, options: QueryOptions) -> dict[str, float]:
    """Return recall@10 of proponents and opponents: mean and 10th percentile over queries."""
    answers = index.query(range(len(scores)), options=options)
    figures = {}
    for side, signed in (("proponents", scores), ("opponents", -scores)):
        found = [[int(hit.id) for hit in getattr(answer, side)] for answer in answers]
        recall = compute_recalls(find_top(signed, K), found)
        figures |= {side: float(recall.mean()), f"{side}_p10": float(np.percentile(recall, 10))}
    return figures


def measure_seed(options: argparse.Namespace, seed: int, folder: str) -> list[dict]:
    """Train with a seed, build an index with each sketch, and return their recalls."""
    mnist.train(options.data, folder, options.rows, seed)
    task = mnist.task(options.data, folder, str(options.rows), str(seed))
    scores = compute_scores(task, range(options.queries), options.rows)
    results = []
    for sketch in options.sketches:
        out = f"{folder}/{sketch}"
        report = build(task, out, BuildConfig(dim=options.dim, sketch=sketch, seed=seed))
        index = InfluenceIndex.open(out, task)
        row = {"sketch": sketch, "seed": seed, "rows_a_second": report.rows_extracted / report.seconds}
        row["stored"] = measure_recall(index, scores, QueryOptions(k=K))
        row["exact"] = measure_recall(index, scores, QueryOptions(k=K, rerank="exact", candidates=options.candidates))
        print(row, flush=True)
        results.append(row)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True, help="path of mnist.npz")
    parser.add_argument("--rows", type=int, default=5000, help="training rows")
    parser.add_argument("--queries", type=int, default=50, help="number of queries")
    parser.add_argument("--dim", type=int, default=1024, help="sketch dimensions per checkpoint")
    parser.add_argument("--candidates", type=int, default=200, help="candidates that are re-scored")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--sketches", nargs="+", default=["factored", "kronecker", "dense"], help="sketches to measure")
    options = parser.parse_args()
    results = []
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as folder:
            results += measure_seed(options, seed, folder)
    settings = {key: value for key, value in vars(options).items() if key != "data"}
    print(write_results(RESULT, settings, results))


if __name__ == "__main__":
    main()
