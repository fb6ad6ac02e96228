"""Recall of true TracInCP by each sketch, and after exact re-scoring: MNIST CNN, all 206,922 parameters."""

from __future__ import annotations

import argparse
import tempfile

import numpy as np

from benchmarks import common
from examples import mnist
from tracin_ann import BuildConfig, InfluenceIndex, QueryOptions, build

K = 10


def measured(index: InfluenceIndex, scores: np.ndarray, options: QueryOptions) -> dict[str, float]:
    """Return recall@10 of proponents and opponents, mean and 10th percentile of queries."""
    answers = index.query(range(len(scores)), options=options)
    figures = {}
    for side, signed in (("proponents", scores), ("opponents", -scores)):
        found = [[int(hit.id) for hit in getattr(answer, side)] for answer in answers]
        recall = common.recalls(common.top(signed, K), found)
        figures |= {side: float(recall.mean()), f"{side}_p10": float(np.percentile(recall, 10))}
    return figures


def one_seed(options: argparse.Namespace, seed: int, folder: str) -> list[dict]:
    mnist.train(options.data, folder, options.rows, seed)
    task = mnist.task(options.data, folder, str(options.rows), str(seed))
    scores = common.brute_force(task, range(options.queries), options.rows)
    results = []
    for sketch in options.sketches:
        out = f"{folder}/{sketch}"
        report = build(task, out, BuildConfig(dim=options.dim, sketch=sketch, seed=seed))
        index = InfluenceIndex.open(out, task)
        row = {"sketch": sketch, "seed": seed, "rows_a_second": report.rows_extracted / report.seconds}
        row["stored"] = measured(index, scores, QueryOptions(k=K))
        row["exact"] = measured(index, scores, QueryOptions(k=K, rerank="exact", candidates=options.candidates))
        print(row, flush=True)
        results.append(row)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--queries", type=int, default=50)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--candidates", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sketches", nargs="+", default=["factored", "kronecker", "dense"])
    options = parser.parse_args()
    results = []
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as folder:
            results += one_seed(options, seed, folder)
    settings = {key: value for key, value in vars(options).items() if key != "data"}
    print(common.write("recall_mnist", settings, results))


if __name__ == "__main__":
    main()
