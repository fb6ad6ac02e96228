"""From the query to true TracInCP: recall of the answers over all MNIST rows, and what exact re-scoring costs for it.

The truth is brute force: every row's forward and backward at every checkpoint, against all queries.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks import common, features
from benchmarks.models import MODELS
from examples import mnist
from tracin_ann import BuildConfig, InfluenceIndex, QueryOptions, build, ranking
from tracin_ann.exact import exact_scores

K = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--rows", type=int, default=60_000)
    parser.add_argument("--queries", type=int, default=50)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--candidates", type=int, nargs="+", default=[100, 200, 400])
    options = parser.parse_args()
    ids, results = list(range(options.queries)), []
    with tempfile.TemporaryDirectory() as folder:
        mnist.train(options.data, folder, options.rows, 0)
        task = mnist.task(options.data, folder, str(options.rows))
        build(task, f"{folder}/index", BuildConfig(dim=options.dim, index="ivf"))
        index = InfluenceIndex.open(f"{folder}/index", task)
        checkpoints = range(len(task.checkpoints))
        began = time.perf_counter()
        true = exact_scores(index.passes, ("query", ids), range(options.rows), checkpoints)
        brute = time.perf_counter() - began
        model = MODELS["MNIST CNN"]
        rows = [task.train_data()[i] for i in range(4096)]
        step = features.plain(model, rows, model.batch_size)
        results.append({"brute_seconds": brute, "plain_step_us": step * 1e6})
        plain = ranking.exact_scores
        for candidates in options.candidates:
            run: list[int] = []

            def counting(
                passes: object, asked: object, chosen: list[int], *rest: object, run: list[int] = run
            ) -> object:
                run.append(len(chosen))
                return plain(passes, asked, chosen, *rest)

            ranking.exact_scores = counting
            began = time.perf_counter()
            asked = QueryOptions(k=K, rerank="exact", candidates=candidates, search="lists", recall=0.98)
            answers = index.query(ids, options=asked)
            seconds = time.perf_counter() - began
            ranking.exact_scores = plain
            result = {"candidates": candidates, "seconds": seconds, "rows_run": sum(run)}
            result["share_of_scan"] = sum(run) / (options.rows * len(ids))
            result["steps_a_row"] = seconds / (sum(run) * len(checkpoints)) / step
            for side, signed in (("proponents", true), ("opponents", -true)):
                found = [[int(hit.id) for hit in getattr(answer, side)] for answer in answers]
                recall = common.recalls(common.top(signed, K), found)
                result |= {side: float(recall.mean()), f"{side}_p10": float(np.percentile(recall, 10))}
            print(result, flush=True)
            results.append(result)
    settings = {key: value for key, value in vars(options).items() if key != "data"}
    print(common.write("end_to_end", settings, results), Path(options.data).name)


if __name__ == "__main__":
    main()
