"""Comparison of scores, dampings and checkpoints of an index by one protocol of evaluation.

Shapes: N training rows, Q queries, K rows of each, M subsets, S seeds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tracin_ann.choices import DAMPED_SCORES, EvaluationProtocol, ScoreName
from tracin_ann.errors import UsageError, problem
from tracin_ann.evaluation.estimates import Estimate, estimate_mean
from tracin_ann.evaluation.lds import compute_ceiling, compute_lds
from tracin_ann.evaluation.removal import draw_random_rows, find_top_rows, measure_removal
from tracin_ann.evaluation.retraining import Retraining
from tracin_ann.evaluation.tail_patch import measure_tail_patch
from tracin_ann.index import InfluenceIndex
from tracin_ann.results import Describe, Fields, Record, RowList
from tracin_ann.scoring import QueryOptions
from tracin_ann.types import Float64, Int64, ProgressCallback

RANDOM, CEILING = "random", "ceiling"
"""Names of results that are not those of a score: random rows, and the LDS of exact predictions."""


@dataclass(frozen=True)
class Candidate:
    """A score with its damping and checkpoints.

    Attributes:
        score: the score.
        damping: λ; None: by the automatic rule, or a score without damping.
        checkpoints: positions; None: all.
    """

    score: ScoreName
    damping: float | None = None
    checkpoints: tuple[int, ...] | None = None

    @property
    def options(self) -> QueryOptions:
        """Return the options of a query with this score."""
        return QueryOptions(score=self.score, damping=self.damping, checkpoints=self.checkpoints)


@dataclass(frozen=True, eq=False)
class Result:
    """The value of a candidate under a protocol.

    Attributes:
        protocol: `lds` and `leave-one-out`: the mean Spearman correlation; `removal`: the mean rise of the loss without
            the top K rows; `tail-patch`: the mean fall of the loss by a step on one of the top K rows.
        name: the score, `random` or `ceiling`.
        value: the mean over the queries.
        estimate: the mean with its interval and the value of each query; None for the ceiling.
        candidate: what was evaluated; None for `random` and `ceiling`.
        k: number of rows of each query, for `removal` and `tail-patch`.
        overturned: queries that lose the majority for their label, for `removal` and a loss that is -log p; see
            `Removal.n_overturned`.
    """

    protocol: EvaluationProtocol
    name: str
    value: float
    estimate: Estimate | None = None
    candidate: Candidate | None = None
    k: int | None = None
    overturned: int | None = None


class Comparison(RowList[Result]):
    """Results of candidates, the highest value first."""

    FIELDS = Fields(
        (
            ("protocol", "id"),
            ("score", "id"),
            ("damping", "id"),
            ("checkpoints", "id"),
            ("k", "int"),
            ("value", "float"),
            ("low", "float"),
            ("high", "float"),
            ("overturned", "int"),
        )
    )

    def __init__(self, results: Iterable[Result], describe: Describe) -> None:
        super().__init__(sorted(results, key=lambda result: -result.value), describe)

    def record(self, row: Result) -> Record:
        """Return a result's record."""
        low, high = (None, None) if row.estimate is None else row.estimate.interval
        damping, checkpoints = None, None
        if row.candidate is not None:
            chosen = row.candidate.checkpoints
            checkpoints = "all" if chosen is None else ",".join(map(str, chosen))
            if row.candidate.score in DAMPED_SCORES:
                damping = "auto" if row.candidate.damping is None else f"{row.candidate.damping:g}"
        return {
            "protocol": row.protocol,
            "score": row.name,
            "damping": damping,
            "checkpoints": checkpoints,
            "k": row.k,
            "value": row.value,
            "low": low,
            "high": high,
            "overturned": row.overturned,
        }


def list_candidates(
    index: InfluenceIndex,
    scores: Sequence[ScoreName],
    dampings: Sequence[float | None] = (None,),
    checkpoints: tuple[int, ...] | None = None,
) -> list[Candidate]:
    """Return every combination of score, damping (if the score has one), and all checkpoints or the last of each run.

    Args:
        index: an open index.
        scores: the scores.
        dampings: λ; None: by the automatic rule.
        checkpoints: positions of the checkpoints to use; None: all.

    Raises:
        UsageError: a checkpoint is out of range.
    """
    spec, record = index.manifest.build.spec, index.manifest.score
    used = [c for c in sorted(index.view(checkpoints).checkpoints) if spec.checkpoints[c].learning_rate > 0]
    last = tuple({"" if record is None else record.runs[c]: c for c in used}.values())
    sets = [checkpoints, last] if len(last) < len(used) else [checkpoints]
    return [
        Candidate(score, damping, chosen)
        for score in dict.fromkeys(scores)
        for damping in (dict.fromkeys(dampings) if score in DAMPED_SCORES else (None,))
        for chosen in sets
    ]


def compare_by_lds(
    index: InfluenceIndex,
    candidates: Sequence[Candidate],
    query_ids: Sequence[int],
    subsets: Sequence[Int64],
    loss_MSQ: Float64,
    protocol: Literal["lds", "leave-one-out"] = "lds",
) -> Comparison:
    """Return the linear datamodeling scores of candidates on the same retrained losses.

    Args:
        index: an open index.
        candidates: what to evaluate.
        query_ids: positions in query_data, Q.
        subsets: M subsets, of `draw_subsets` or `draw_leave_one_out`.
        loss_MSQ: losses of the queries after training on each subset with each seed, of `Retraining.measure`.
        protocol: the name in the results.

    Raises:
        UsageError: there are fewer than 3 subsets, or the index does not have a score.
        MissingPackageError: SciPy is not installed.
    """
    results = []
    matrices = index.score_matrices("query", query_ids, [candidate.options for candidate in candidates])
    for candidate, score_QN in zip(candidates, matrices, strict=True):
        found = compute_lds(score_QN, subsets, loss_MSQ)
        results.append(Result(protocol, candidate.score, found.mean, found, candidate))
    ceiling = compute_ceiling(loss_MSQ)
    if ceiling is not None:
        results.append(Result(protocol, CEILING, ceiling))
    return Comparison(results, index.describe)


def compare_by_removal(
    index: InfluenceIndex,
    candidates: Sequence[Candidate],
    retraining: Retraining,
    k: int,
    seeds: Sequence[int],
    progress: ProgressCallback | None = None,
) -> Comparison:
    """Return how much the loss of queries rises when the model is trained without their top k rows.

    `random` is the same for k random rows. Each query and candidate needs a model for each seed.

    Raises:
        UsageError: k is not below the number of rows, or the index does not have a score.
        TaskError: a model is missing and the task has no `retrain`; see `Retraining.measure`.
    """
    results = []
    # All rows are ranked before the first model is trained.
    for name, candidate, row_QK in list(_rank_rows(index, candidates, retraining.query_ids, k)):
        found = measure_removal(retraining, index.present(), row_QK, seeds, progress)
        overturned = found.n_overturned if index.task.loss_is_nll else None
        rise = found.rise
        results.append(Result("removal", name, rise.mean, rise, candidate, k, overturned))
    return Comparison(results, index.describe)


def compare_by_tail_patch(
    index: InfluenceIndex,
    candidates: Sequence[Candidate],
    query_ids: Sequence[int],
    k: int,
    progress: ProgressCallback | None = None,
) -> Comparison:
    """Return how much the loss of queries falls by one step on one of their top k rows, the mean over the rows.

    Raises:
        UsageError: an id is out of range, or the index does not have a score.
    """
    ranked = list(_rank_rows(index, candidates, query_ids, k))
    all_rows = np.concatenate([row_QK for _, _, row_QK in ranked], axis=1)
    fall_QR = measure_tail_patch(index.runner, query_ids, all_rows, progress=progress)
    results = []
    for at, (name, candidate, _) in enumerate(ranked):
        fall = estimate_mean(fall_QR[:, at * k : (at + 1) * k].mean(axis=1))
        results.append(Result("tail-patch", name, fall.mean, fall, candidate, k))
    return Comparison(results, index.describe)


def _rank_rows(
    index: InfluenceIndex, candidates: Sequence[Candidate], query_ids: Sequence[int], k: int
) -> Iterable[tuple[str, Candidate | None, Int64]]:
    """Yield (name, candidate, the top k rows [Q, K]) of every candidate, and k random rows.

    Raises:
        UsageError: k is not below the number of rows.
    """
    row_N = index.present()
    if not 0 < k < len(row_N):
        raise UsageError(
            problem("bad -k", got=k, expected=f"1 to {len(row_N) - 1}, fewer than the rows", remedy="change -k")
        )
    matrices = index.score_matrices("query", query_ids, [candidate.options for candidate in candidates])
    for candidate, score_QN in zip(candidates, matrices, strict=True):
        yield candidate.score, candidate, find_top_rows(score_QN, row_N, k)
    yield RANDOM, None, draw_random_rows(row_N, k, len(query_ids))
