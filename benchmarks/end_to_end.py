"""From the query to true TracInCP: recall of the answers over all MNIST rows, and what exact re-scoring costs for it.

The truth is brute force: every row's forward and backward at every checkpoint, against all queries.
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

from benchmarks import common, features
from benchmarks.models import MODELS
from examples import mnist
from tracin_ann import BuildConfig, InfluenceIndex, QueryOptions, build
from tracin_ann.scoring.exact import ExactScorer, exact_scores

K = 10
ALONE = 10


@contextmanager
def watched(n_checkpoints: int) -> Iterator[list[tuple[int, float]]]:
    """Yield a list that gets (rows × checkpoints, seconds) of every round of exact scores."""
    plain: Any = ExactScorer.scores
    rounds: list[tuple[int, float]] = []

    def counting(scorer: ExactScorer, chosen: list[int], *rest: object) -> object:
        began = time.perf_counter()
        found = plain(scorer, chosen, *rest)
        rounds.append((len(chosen) * n_checkpoints, time.perf_counter() - began))
        return found

    ExactScorer.scores = counting  # type: ignore[method-assign, assignment]
    try:
        yield rounds
    finally:
        ExactScorer.scores = plain  # type: ignore[method-assign]


def asked(index: InfluenceIndex, ids: list[int], candidates: int, brute: float, step: Callable[[], float]) -> dict:
    """Return what the queries cost, at once and alone, beside an exact scan and plain training steps; and answers."""
    n_checkpoints, n_rows = len(index.task.checkpoints), len(index)
    options = QueryOptions(k=K, rerank="exact", candidates=candidates, search="lists", recall=0.98)
    steps = [step()]
    with watched(n_checkpoints) as pooled:
        began = time.perf_counter()
        answers = index.query(ids, options=options)
        seconds = time.perf_counter() - began
    with watched(n_checkpoints) as alone:
        for query in ids[:ALONE]:
            index.query([query], options=options)
    steps.append(step())
    plain_step = sum(steps) / len(steps)
    passes, spent = (sum(column) for column in zip(*pooled, strict=True))
    return {
        "answers": answers,
        "candidates": candidates,
        "seconds": seconds,
        "rows_run": passes // n_checkpoints,
        "share_of_scan": passes / (n_rows * n_checkpoints),
        "share_alone": sum(n for n, _ in alone) / (ALONE * n_rows * n_checkpoints),
        "time_of_scan": seconds / brute,
        "plain_step_us": plain_step * 1e6,
        "steps_a_row": spent / passes / plain_step,
        # Of the second round: proofs and the queries' own gradients are done.
        "more_steps_a_row": pooled[-1][1] / pooled[-1][0] / plain_step,
    }


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
        results.append({"brute_seconds": brute})
        for candidates in options.candidates:
            step = partial(features.plain, model, rows, model.batch_size)
            result = asked(index, ids, candidates, brute, step)
            answers = result.pop("answers")
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
