"""Calibration of an approximate index: recall@10 and cost of search settings, measured against an exact scan.

Both directions (proponents, opponents) are measured separately. Recall is the share of the 10 rows of largest (or
most negative) inner product that is found; ties count as found. The lower bound of a recall is one-sided at 95%. It
is the smaller bound of two halves of the queries: the search picks the fastest setting whose bound reaches the
target, and a single bound would favor settings whose recall is high by chance.

Shapes: N rows, Q queries, F feature dimension, K results.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Literal

import numpy as np

from tracin_ann.search.base import CalibratedIndex, scale_to_unit, search_both
from tracin_ann.search.flat import FlatIndex
from tracin_ann.search.query_distribution import QueryDistribution, measure_queries
from tracin_ann.search.settings import Setting
from tracin_ann.search.topk import concatenate
from tracin_ann.types import Float32, Float64, PendingReads, TopK

Direction = Literal["proponents", "opponents"]
RECALL_AT = 10
"""k of the measured recall@k."""
_FULL_RECALL = 0.9995
_NORMAL_95 = 1.645
_TIMED_QUERIES = 5
"""Searches for one query whose median time is the cost of one query."""
_BATCH = 100
"""Queries of a timed scan. From about this number on, the time of a scan is linear in the number of queries."""
_TIMED_BATCHES = 3
"""Searches for all queries whose median time is the cost of a batch."""


@dataclass(frozen=True)
class Point:
    """The measurement of one setting.

    Attributes:
        codes, centroids, alpha: the setting, see `Setting`.
        recall: recall@10, mean over the queries.
        lower: one-sided 95% lower bound of the recall.
        tenth: 10th percentile of the recall over the queries.
        scored: rows and centroids scored per query.
        seconds: time per query in a large batch.
    """

    codes: int
    centroids: int
    alpha: float
    recall: float
    lower: float
    tenth: float
    scored: float
    seconds: float

    @property
    def setting(self) -> Setting:
        """Return the setting."""
        return Setting(self.codes, self.centroids, self.alpha)


@dataclass(frozen=True)
class Cost:
    """Seconds for both directions of a batch of Q queries: `fixed` + Q · `each`."""

    fixed: float
    each: float

    def seconds(self, n_queries: int) -> float:
        """Return the seconds for a batch of n_queries."""
        return self.fixed + n_queries * self.each

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.fixed - other.fixed, self.each - other.each)


@dataclass(frozen=True)
class FirstUseCost:
    """Cost of the first use of stored rows by an open index.

    Attributes:
        per_file: seconds to open a file.
        per_byte: seconds to verify a byte of rows.
    """

    per_file: float = 0.0
    per_byte: float = 0.0

    def scan_seconds(self, pending: PendingReads) -> float:
        """Return the seconds for a scan, which opens all files and verifies all rows."""
        return self.per_file * pending.files + self.per_byte * pending.n_bytes

    def take_seconds(self, pending: PendingReads, n_rows: int) -> float:
        """Return the seconds for at most n_rows rows read by id, which may be in as many files.

        Rows that are read by id are verified at every read, so the measured cost of a search includes this.
        """
        return self.per_file * min(pending.files, pending.files_per_row * n_rows)


@dataclass(frozen=True)
class Calibration:
    """The recall and cost of an index, measured when it is built.

    The costs are those of an open index whose files are open and verified. `first_use` has the rest.

    Attributes:
        target: target recall.
        queries: number of queries.
        train_queries: how many of them are training rows.
        proponents: measured settings in increasing order of cost; each has a higher lower bound than those before.
        opponents: the same for the other direction.
        scan: cost of an exact scan.
        index_fixed: seconds per batch in addition to those of its queries.
        looks: distribution of the queries (named as in the manifest).
        both_ratio: time per query of a search in both directions, including the comparison with `looks`, divided by
            the sum of the times of the two points. Measured with the points of the target recall. 1 in the manifests of
            earlier versions.
        first_use: cost of the first use. Zero in the manifests of earlier versions, whose `scan` includes it.
    """

    target: float
    queries: int
    train_queries: int
    proponents: tuple[Point, ...]
    opponents: tuple[Point, ...]
    scan: Cost
    index_fixed: float
    looks: QueryDistribution
    both_ratio: float = 1.0
    first_use: FirstUseCost = FirstUseCost()

    def __post_init__(self) -> None:
        """Check that both directions have valid settings.

        Raises:
            ValueError: a direction has no point.
            UsageError: a setting is out of range.
        """
        if not self.proponents or not self.opponents:
            raise ValueError("a calibration without settings")
        for point in (*self.proponents, *self.opponents):
            _ = point.setting

    def fastest_point(self, direction: Direction, recall: float) -> Point | None:
        """Return the fastest point whose lower bound reaches a recall, or None."""
        return next((point for point in getattr(self, direction) if point.lower >= recall), None)

    def best(self, direction: Direction) -> Point:
        """Return the point with the highest lower bound."""
        points: tuple[Point, ...] = getattr(self, direction)
        return max(points, key=lambda point: point.lower)

    def usual_point(self, direction: Direction) -> Point:
        """Return the point for the target recall; if none reaches it, the one with the highest lower bound."""
        return self.fastest_point(direction, self.target) or self.best(direction)

    def index_cost(self, proponents: Point, opponents: Point) -> Cost:
        """Return the cost of both directions with these settings."""
        return Cost(self.index_fixed, self.both_ratio * (proponents.seconds + opponents.seconds))


def calibrate(
    index: CalibratedIndex,
    exact: FlatIndex,
    queries_QF: Float32,
    target: float,
    train_queries: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Calibration:
    """Measure recall and cost of an index, without the cost of its first use.

    Args:
        index: the index.
        exact: the exact scan of the same rows.
        queries_QF: queries that are typical for later use, in random order.
        target: target recall.
        train_queries: how many of the queries are training rows.
        progress: called with (directions done, 2).
    """
    distribution = measure_queries(index, queries_QF)
    queries_QF, _ = scale_to_unit(queries_QF)
    truth, scan = _scan(exact, queries_QF)
    points: dict[str, tuple[Point, ...]] = {}
    for done, (direction, sign) in enumerate((("proponents", 1.0), ("opponents", -1.0))):
        signed = np.ascontiguousarray(queries_QF * np.float32(sign))
        best_scores = [sign * scores for scores in truth[direction].scores]
        points[direction] = _measure_settings(index, signed, truth[direction], best_scores)
        if progress is not None:
            progress(done + 1, 2)
    n_queries, both = len(queries_QF), (points["proponents"], points["opponents"])
    calibration = Calibration(target, n_queries, train_queries, *both, scan, 0.0, distribution)
    return _time_searches(index, calibration, queries_QF)


def _scan(exact: FlatIndex, queries_QF: Float32) -> tuple[dict[str, TopK], Cost]:
    """Return the true results of both directions, and the cost of a scan."""

    def scan(queries_BF: Float32) -> tuple[tuple[TopK, TopK], float]:
        """Return the results for a batch and the seconds."""
        began = time.perf_counter()
        found = search_both(exact.without_resident_rows(), queries_BF, RECALL_AT)
        # A query reads the results of a scan to compute their scores. Other searches have already read their results.
        exact.source.take(np.unique(np.concatenate([ids for top in found for ids in top.ids])))
        return found, time.perf_counter() - began

    # The time of the first scan is not used: it opens files and verifies rows.
    scan(queries_QF[:1])
    single = median(scan(query_F[None])[1] for query_F in queries_QF[:_TIMED_QUERIES])
    batches = np.array_split(queries_QF, -(-len(queries_QF) // _BATCH))
    found, seconds = zip(*map(scan, batches), strict=True)
    truth = [concatenate(side) for side in zip(*found, strict=True)]
    cost = _fit_cost(single, list(zip(map(len, batches), seconds, strict=True)))
    return dict(zip(("proponents", "opponents"), truth, strict=True)), cost


def _time_searches(index: CalibratedIndex, calibration: Calibration, queries_QF: Float32) -> Calibration:
    """Return the calibration with the cost of a search: both directions and the comparison of queries."""
    points = calibration.usual_point("proponents"), calibration.usual_point("opponents")
    chosen = index.with_settings(*(point.setting for point in points))

    def search(queries_BF: Float32) -> float:
        """Return the seconds for a batch."""
        began = time.perf_counter()
        calibration.looks.compare(index, queries_BF)
        search_both(chosen, queries_BF, RECALL_AT)
        return time.perf_counter() - began

    single = median(search(query_F[None]) for query_F in queries_QF[:_TIMED_QUERIES])
    cost = _fit_cost(single, [(len(queries_QF), search(queries_QF)) for _ in range(_TIMED_BATCHES)])
    apart = sum(point.seconds for point in points)
    return replace(calibration, index_fixed=cost.fixed, both_ratio=cost.each / apart if apart > 0 else 1.0)


def _fit_cost(single: float, batches: Sequence[tuple[int, float]]) -> Cost:
    """Return the cost by the seconds for one query and for batches (number of queries, seconds)."""
    each = median(max(0.0, (seconds - single) / (n - 1)) if n > 1 else single for n, seconds in batches)
    return Cost(max(0.0, single - each), each)


def _measure_settings(
    index: CalibratedIndex, signed_QF: Float32, truth: TopK, scores: Sequence[Float32]
) -> tuple[Point, ...]:
    """Return the useful settings of one direction: each has a higher recall bound than all faster ones.

    Budgets grow until (nearly) all results are found, or the index proposes no larger one. No decision depends on
    measured times, so equal indexes get equal settings.
    """
    half = max(1, len(signed_QF) // 2)

    def recall_of(setting: Setting) -> float:
        found = index.with_settings(setting).search(signed_QF[:half], RECALL_AT)
        return float(compute_recalls(found, truth, scores).mean())

    measured: list[Point] = []
    for settings in index.propose_settings(recall_of):
        measured += [_measure_setting(index, setting, signed_QF, truth, scores) for setting in settings]
        if measured[-1].recall >= _FULL_RECALL:
            break
    useful: list[Point] = []
    for point in sorted(measured, key=lambda p: (p.scored, -p.lower)):
        if not useful or point.lower > useful[-1].lower:
            useful.append(point)
    return tuple(useful)


def _measure_setting(
    index: CalibratedIndex, setting: Setting, signed_QF: Float32, truth: TopK, scores: Sequence[Float32]
) -> Point:
    """Return the recall and cost of one setting in one direction."""
    searched = index.with_settings(setting)
    began = time.perf_counter()
    found = searched.search(signed_QF, RECALL_AT)
    seconds = (time.perf_counter() - began) / max(1, len(signed_QF))
    recall_Q = compute_recalls(found, truth, scores)
    half = max(1, len(recall_Q) // 2)
    return Point(
        setting.codes,
        setting.centroids,
        setting.alpha,
        float(recall_Q.mean()),
        # A proof needs no statistics.
        1.0
        if index.is_exact
        else min(
            recall_lower_bound(recall_Q[:half]),
            recall_lower_bound(recall_Q[half:] if len(recall_Q) > half else recall_Q),
        ),
        float(np.percentile(recall_Q, 10)),
        float(found.rows_scored.mean()),
        seconds,
    )


def recall_lower_bound(recall_Q: Float64) -> float:
    """Return the one-sided 95% lower bound of a mean recall.

    The bound is a normal approximation. The variance has an additional term, as if one more query could deviate by
    1/2, so that the bound stays below 1 where all recalls are equal.
    """
    n = len(recall_Q)
    spread = math.sqrt(float(recall_Q.var()) * n / max(1, n - 1) / n + 0.25 / (n + 1) ** 2)
    return max(0.0, float(recall_Q.mean()) - _NORMAL_95 * spread)


def compute_recalls(found: TopK, truth: TopK, truth_scores: Sequence[Float32]) -> Float64:
    """Return the share of the true results that was found, for each query [Q]; results with equal scores count.

    Args:
        found: the results to assess, for the first queries of `truth` or all of them.
        truth: the true results.
        truth_scores: their scores, decreasing.
    """
    recall_Q = np.ones(len(found.ids))
    for at, (ids, scores) in enumerate(zip(found.ids, found.scores, strict=True)):
        n_true = len(truth.ids[at])
        if n_true:
            last = float(truth_scores[at][-1])
            hit = np.isin(ids, truth.ids[at]) | (scores >= last - 1e-6 * abs(last))
            recall_Q[at] = min(1.0, int(hit.sum()) / n_true)
    return recall_Q
