"""Recall of true TracInCP and cost of queries with exact re-scoring, over all MNIST rows.

The true scores come from an exact scan: forward and backward of every row at every checkpoint.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.brute_force import compute_recalls, find_top
from benchmarks.common.models import MODELS
from benchmarks.common.plain_step import time_plain_step
from benchmarks.common.results import write_results
from examples import mnist
from tracin_ann import BuildConfig, InfluenceIndex, QueryOptions, build
from tracin_ann.scoring.exact import ExactScorer, exact_scores

RESULT = "end_to_end"
K = 10
SINGLE_QUERIES = 10


@contextmanager
def record_rounds(n_checkpoints: int) -> Iterator[list[tuple[int, float]]]:
    """Yield a list to which every round of exact scores appends (rows × checkpoints, seconds)."""
    original: Any = ExactScorer.scores
    rounds: list[tuple[int, float]] = []

    def score(scorer: ExactScorer, ids: list[int], *rest: object) -> object:
        start_s = time.perf_counter()
        found = original(scorer, ids, *rest)
        rounds.append((len(ids) * n_checkpoints, time.perf_counter() - start_s))
        return found

    ExactScorer.scores = score  # type: ignore[method-assign, assignment]
    try:
        yield rounds
    finally:
        ExactScorer.scores = original  # type: ignore[method-assign]


def measure_queries(
    index: InfluenceIndex, ids: list[int], candidates: int, scan_s: float, step: Callable[[], float]
) -> dict:
    """Return the answers, and the cost of queries in one batch and one by one relative to a scan and plain steps."""
    n_checkpoints, n_rows = len(index.task.checkpoints), len(index)
    options = QueryOptions(k=K, rerank="exact", candidates=candidates, search="lists", recall=0.98)
    steps = [step()]
    with record_rounds(n_checkpoints) as batched:
        start_s = time.perf_counter()
        answers = index.query(ids, options=options)
        seconds = time.perf_counter() - start_s
    with record_rounds(n_checkpoints) as single:
        for query in ids[:SINGLE_QUERIES]:
            index.query([query], options=options)
    steps.append(step())
    plain_step = sum(steps) / len(steps)
    runner, spent = (sum(column) for column in zip(*batched, strict=True))
    return {
        "answers": answers,
        "candidates": candidates,
        "seconds": seconds,
        "rows_run": runner // n_checkpoints,
        "share_of_scan": runner / (n_rows * n_checkpoints),
        "share_alone": sum(n for n, _ in single) / (SINGLE_QUERIES * n_rows * n_checkpoints),
        "time_of_scan": seconds / scan_s,
        "plain_step_us": plain_step * 1e6,
        "steps_a_row": spent / runner / plain_step,
        # The second round, which excludes proofs and the gradients of the queries.
        "more_steps_a_row": batched[-1][1] / batched[-1][0] / plain_step,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True, help="path of mnist.npz")
    parser.add_argument("--rows", type=int, default=60_000, help="training rows")
    parser.add_argument("--queries", type=int, default=50, help="number of queries")
    parser.add_argument("--dim", type=int, default=256, help="sketch dimensions per checkpoint")
    parser.add_argument("--candidates", type=int, nargs="+", default=[100, 200, 400], help="candidates per direction")
    options = parser.parse_args()
    ids, results = list(range(options.queries)), []
    with tempfile.TemporaryDirectory() as folder:
        mnist.train(options.data, folder, options.rows, 0)
        task = mnist.task(options.data, folder, str(options.rows))
        build(task, f"{folder}/index", BuildConfig(dim=options.dim, index="ivf"))
        index = InfluenceIndex.open(f"{folder}/index", task)
        checkpoints = range(len(task.checkpoints))
        start_s = time.perf_counter()
        true = exact_scores(index.runner, ("query", ids), range(options.rows), checkpoints)
        scan_s = time.perf_counter() - start_s
        model = MODELS["MNIST CNN"]
        rows = [task.train_data()[i] for i in range(4096)]
        results.append({"brute_seconds": scan_s})
        for candidates in options.candidates:
            step = partial(time_plain_step, model, rows, model.batch_size)
            result = measure_queries(index, ids, candidates, scan_s, step)
            answers = result.pop("answers")
            for side, signed in (("proponents", true), ("opponents", -true)):
                found = [[int(hit.id) for hit in getattr(answer, side)] for answer in answers]
                recall = compute_recalls(find_top(signed, K), found)
                result |= {side: float(recall.mean()), f"{side}_p10": float(np.percentile(recall, 10))}
            print(result, flush=True)
            results.append(result)
    settings = {key: value for key, value in vars(options).items() if key != "data"}
    print(write_results(RESULT, settings, results), Path(options.data).name)


if __name__ == "__main__":
    main()
