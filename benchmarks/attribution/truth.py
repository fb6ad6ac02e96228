"""Losses of the queries after retraining on half of the rows, and the linear datamodeling score against them.

Shapes: N training rows, M subsets, S seeds, Q queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.attribution.settings import SETTINGS, Setting
from benchmarks.common.results import read_results
from tracin_ann.evaluation import Retraining, compute_lds, draw_subsets
from tracin_ann.features import RunOptions, TaskRunner
from tracin_ann.types import Float32, Float64, Int64

N_SUBSETS = 50
RESAMPLES = 200


@dataclass(frozen=True, eq=False)
class Truth:
    """Subsets of the training rows, and the losses [M, S, Q] of the queries after training on them."""

    subsets: list[Int64]
    loss_MSQ: Float64


def open_retraining(setting: Setting, data: Path, work: Path, queries: Sequence[int] | None = None) -> Retraining:
    """Return the retrained losses in `work`, for some queries of a setting; None: for all, which has to be first."""
    setting.train_runs(data, work / "runs", [0])
    runner = TaskRunner(setting.make_task(data, work / "runs", [0]), RunOptions(torch.device("cpu")))
    return Retraining.open(runner, work / "truth", range(runner.n_rows("query")) if queries is None else queries)


def measure_truth(setting: Setting, data: Path, work: Path) -> Truth:
    """Return the losses after retraining on random halves; those that are not in `work` are computed."""
    retraining = open_retraining(setting, data, work)
    n_rows = len(setting.load(data)[0][0])
    subsets = draw_subsets(np.arange(n_rows), N_SUBSETS)
    return Truth(subsets, retraining.measure(subsets, range(setting.truth_seeds)))


def summarise(score_QN: Float32 | Float64, truth: Truth) -> tuple[float, float, float]:
    """Return the linear datamodeling score, and the ends of its 95% bootstrap interval.

    A resample has some subsets twice, and tied ranks lower its correlations: the resamples are centred on the score.
    """
    found = compute_lds(score_QN, truth.subsets, truth.loss_MSQ, RESAMPLES)
    shift = found.mean - float(found.resampled_R.mean())
    return found.mean, found.interval[0] + shift, found.interval[1] + shift


def merge_results(name: str, found: Sequence[dict[str, Any]], keys: Sequence[str]) -> list[dict[str, Any]]:
    """Return the results of a file with those that were found in place of those with the same values of the keys."""

    def identify(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row[key] for key in keys)

    try:
        kept = read_results(name)["results"]
    except FileNotFoundError:
        kept = []
    merged = {identify(row): row for row in (*kept, *found)}
    order = list(SETTINGS)
    return sorted(merged.values(), key=lambda row: order.index(row["setting"]))
