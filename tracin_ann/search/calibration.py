"""Calibration of the inverted lists: recall@10 and cost of search settings, measured against an exact scan.

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
from dataclasses import dataclass
from statistics import median
from typing import Literal

import numpy as np

from tracin_ann.search.base import SearchIndex, scale_to_unit, search_both
from tracin_ann.search.flat import FlatIndex
from tracin_ann.search.ivf import IVFIndex
from tracin_ann.search.query_distribution import QueryDistribution, measure_queries
from tracin_ann.search.settings import Setting, choose_default_setting
from tracin_ann.types import Float32, Float64, TopK

Direction = Literal["proponents", "opponents"]
RECALL_AT = 10
"""k of the measured recall@k."""
_ALPHAS = (0.0, 0.1, 0.2, 0.3)
_RATIOS = (0.5, 1.0, 2.0)
_SMALLEST_BUDGET = 128
_FULL_RECALL = 0.9995
_LARGEST_SHARE = 0.25
_NORMAL_95 = 1.645
_TIMED_QUERIES = 3


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


@dataclass(frozen=True)
class Calibration:
    """The recall and cost of an index, measured when it is built.

    Attributes:
        target: target recall.
        queries: number of queries.
        train_queries: how many of them are training rows.
        proponents: measured settings in increasing order of cost; each has a higher lower bound than those before.
        opponents: the same for the other direction.
        scan: cost of an exact scan.
        index_fixed: seconds per batch in addition to those of its queries.
        looks: distribution of the queries (named as in the manifest).
    """

    target: float
    queries: int
    train_queries: int
    proponents: tuple[Point, ...]
    opponents: tuple[Point, ...]
    scan: Cost
    index_fixed: float
    looks: QueryDistribution

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

    def index_cost(self, proponents: Point, opponents: Point) -> Cost:
        """Return the cost of both directions with these settings."""
        return Cost(self.index_fixed, proponents.seconds + opponents.seconds)


def calibrate(
    index: IVFIndex,
    exact: FlatIndex,
    queries_QF: Float32,
    target: float,
    train_queries: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Calibration:
    """Measure recall and cost of an index.

    Args:
        index: the inverted lists.
        exact: the exact scan of the same rows.
        queries_QF: queries that are typical for later use, in random order.
        target: target recall.
        train_queries: how many of the queries are training rows.
        progress: called with (directions done, 2).
    """
    distribution = measure_queries(index, queries_QF)
    queries_QF, _ = scale_to_unit(queries_QF)
    began = time.perf_counter()
    truth = dict(zip(("proponents", "opponents"), search_both(exact, queries_QF, RECALL_AT), strict=True))
    batch_seconds = time.perf_counter() - began
    single = _time_single_queries(exact, queries_QF)
    each = max(0.0, (batch_seconds - single) / max(1, len(queries_QF) - 1))
    points: dict[str, tuple[Point, ...]] = {}
    for done, (direction, sign) in enumerate((("proponents", 1.0), ("opponents", -1.0))):
        signed = np.ascontiguousarray(queries_QF * np.float32(sign))
        best_scores = [sign * scores for scores in truth[direction].scores]
        points[direction] = _measure_settings(index, signed, truth[direction], best_scores)
        if progress is not None:
            progress(done + 1, 2)
    usual = choose_default_setting(len(index))
    index_single = _time_single_queries(index.with_settings(usual), queries_QF)
    began = time.perf_counter()
    search_both(index.with_settings(usual), queries_QF, RECALL_AT)
    index_each = (time.perf_counter() - began) / max(1, len(queries_QF))
    return Calibration(
        target,
        len(queries_QF),
        train_queries,
        points["proponents"],
        points["opponents"],
        Cost(max(0.0, single - each), each),
        max(0.0, index_single - index_each),
        distribution,
    )


def _time_single_queries(index: SearchIndex, queries_QF: Float32) -> float:
    """Return the median seconds of searches for one query."""
    times = []
    for at in range(min(_TIMED_QUERIES, len(queries_QF))):
        began = time.perf_counter()
        search_both(index, queries_QF[at : at + 1], RECALL_AT)
        times.append(time.perf_counter() - began)
    return median(times) if times else 0.0


def _measure_settings(index: IVFIndex, signed_QF: Float32, truth: TopK, scores: Sequence[Float32]) -> tuple[Point, ...]:
    """Return the useful settings of one direction: each has a higher recall bound than all faster ones.

    α is chosen on half of the queries; then budgets grow until (nearly) all results are found, or to a share of the
    rows. No decision depends on measured times, so equal lists get equal settings.
    """
    half = max(1, len(signed_QF) // 2)
    usual = choose_default_setting(len(index))

    def at_alpha(alpha: float) -> float:
        found = index.with_settings(Setting(usual.codes, usual.centroids, alpha)).search(signed_QF[:half], RECALL_AT)
        return float(compute_recalls(found, truth, scores).mean())

    alpha = max(_ALPHAS, key=at_alpha)
    measured: list[Point] = []
    codes = min(_SMALLEST_BUDGET, len(index))
    while True:
        for ratio in _RATIOS:
            measured.append(
                _measure_setting(index, Setting(codes, max(1, round(ratio * codes)), alpha), signed_QF, truth, scores)
            )
        found_all = measured[-1].recall >= _FULL_RECALL
        if found_all or codes >= _LARGEST_SHARE * len(index):
            break
        codes = math.ceil(codes * math.sqrt(2))
    useful: list[Point] = []
    for point in sorted(measured, key=lambda p: (p.scored, -p.lower)):
        if not useful or point.lower > useful[-1].lower:
            useful.append(point)
    return tuple(useful)


def _measure_setting(
    index: IVFIndex, setting: Setting, signed_QF: Float32, truth: TopK, scores: Sequence[Float32]
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
        min(
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
