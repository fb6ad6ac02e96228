"""The recall of the true top ten by the stored ranking, estimated from exact scores of a sample of rows.

The noise model: the stored score of a row is a line of its exact score plus a normal error in proportion to the
standard deviation of the sketch. The line is an error that all rows have in common, so it does not change the ranking.
The rows that are scored exactly are drawn with probabilities that the model gives, and each counts with
the inverse of its probability (Horvitz and Thompson 1952). `predict_recall` needs only the exact scores of rows drawn
uniformly; it states the recall of a sketch that does not exist yet.

All functions treat one direction: scores of opponents are negated by the caller.

Shapes: N rows, M rows scored exactly, Q queries, R depths of the ranking.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch

from tracin_ann.store import Estimate
from tracin_ann.types import Float64

K = 10
"""How many rows of the exact ranking are to be found."""
_DEFENSIVE_SHARE = 0.1
"""Share of the probabilities from a model with twice the deviation: the rows that the model excludes are drawn too."""
_HAZARDS = 40
"""Ranks at which the density of the stored scores is estimated."""
_FEWEST_ABOVE = 20
_LEAST_SPREAD = 1e-6
"""The least deviation of a stored score that is assumed, as a share of the largest score."""
_STEPS = 50
"""Bisections of a threshold."""
_COUNTED_ROWS = 100
"""The most rows, by their weights, from which the tail of a query's exact scores is estimated."""
_TAIL_ROWS = 40
"""The most rows of a uniform sample from which it is estimated."""
_TAIL_POINTS = 60
_MODEL_ERROR = 0.03
"""Standard deviation of the noise model's own error of a recall."""
_TINY = 1e-300
_LEAST_SLOPE = 0.1
_REACH = 9.0
"""Standard deviations beyond which a normal variable is neglected."""


@dataclass(frozen=True, eq=False)
class NoiseModel:
    """The errors of the stored scores of each query.

    Attributes:
        slope_Q: the stored score is expected to be this times the exact score,
        offset_Q: plus this.
        scale_Q: root mean square of the difference, in standard deviations of the sketch.
    """

    slope_Q: Float64
    offset_Q: Float64
    scale_Q: Float64

    @classmethod
    def fit(cls, exact_QM: Float64, stored_QM: Float64, deviation_QM: Float64) -> NoiseModel:
        """Return the model of rows drawn independently of their stored scores.

        Slopes are least squares estimates, shrunk to their mean by their standard errors.
        """
        inverse_QM = np.divide(1, deviation_QM, out=np.zeros_like(deviation_QM), where=deviation_QM > 0)
        weight_QM = np.square(inverse_QM / np.maximum(inverse_QM.max(1, keepdims=True), _TINY))
        total_Q = np.maximum(weight_QM.sum(1), _TINY)
        exact_Q, stored_Q = ((weight_QM * score_QM).sum(1) / total_Q for score_QM in (exact_QM, stored_QM))
        centred_QM, response_QM = exact_QM - exact_Q[:, None], stored_QM - stored_Q[:, None]
        spread_Q = np.maximum((weight_QM * centred_QM**2).sum(1), _TINY)
        slope_Q = (weight_QM * centred_QM * response_QM).sum(1) / spread_Q
        error_QM = weight_QM * (response_QM - slope_Q[:, None] * centred_QM) ** 2
        variance_Q = error_QM.mean(1) / spread_Q
        between = max(0.0, float(slope_Q.var() - variance_Q.mean()))
        slope_Q = slope_Q.mean() + between / np.maximum(between + variance_Q, _TINY) * (slope_Q - slope_Q.mean())
        slope_Q = np.maximum(slope_Q, _LEAST_SLOPE)
        offset_Q = stored_Q - slope_Q * exact_Q
        error_QM = (stored_QM - slope_Q[:, None] * exact_QM - offset_Q[:, None]) * inverse_QM
        return cls(slope_Q, offset_Q, np.sqrt(np.mean(error_QM**2, axis=1)))

    def expect(self, exact_QM: Float64) -> Float64:
        """Return the expected stored scores of rows, which have the same ranking as the exact scores."""
        return self.slope_Q[:, None] * exact_QM + self.offset_Q[:, None]


def find_probabilities(chance_N: Float64, n_drawn: int) -> Float64:
    """Return the probabilities [N] of drawing rows for which a weighted count varies least: ∝ √chance, at most 1.

    Args:
        chance_N: for each row, the expected number of lists of the true top ten that it belongs to.
        n_drawn: the expected number of rows drawn.
    """
    root_N = np.sqrt(chance_N)
    low, high = 0.0, 1.0
    while np.minimum(1, high * root_N).sum() < min(n_drawn, np.count_nonzero(root_N)) and high < 1e12:  # noqa: PLR2004
        high *= 2
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if np.minimum(1, middle * root_N).sum() < n_drawn else (low, middle)
    probability_N: Float64 = np.minimum(1, high * root_N)
    return probability_N


def find_chances(stored_N: Float64, deviation_N: Float64) -> Float64:
    """Return the chance of each row to be among the true top ten, by the noise model, [N].

    In units of its deviation, a row's exact score x is normal around y + (log f)'(y), where y is the stored score and f
    the density of the stored scores of all rows (Tweedie's formula, Efron 2011). The derivative is estimated by the
    mean excess over y.

    Args:
        stored_N: stored scores for one query.
        deviation_N: standard deviations of their errors.
    """
    largest = float(np.abs(stored_N).max())
    if largest == 0:
        return np.zeros(len(stored_N))
    spread_N = np.maximum(deviation_N, _LEAST_SPREAD * largest)
    y_N = stored_N / spread_N
    sorted_N = -np.sort(-y_N)
    rank_H = np.unique(np.geomspace(_FEWEST_ABOVE, max(_FEWEST_ABOVE, len(y_N) // 2), _HAZARDS).astype(np.int64))
    edge_H = sorted_N[rank_H - 1]
    excess_H = np.cumsum(sorted_N)[rank_H - 1] / rank_H - edge_H
    hazard_H = 1 / np.maximum(excess_H, 1 / _REACH)
    mean_N = (y_N - np.interp(y_N, edge_H[::-1], hazard_H[::-1])) * spread_N
    # Twice as many rows are above this threshold with a chance of one half or more.
    low, high = np.partition(mean_N, -2 * K - 1)[-2 * K - 1], float((mean_N + _REACH * spread_N).max())
    for _ in range(_STEPS // 2):
        middle = (low + high) / 2
        low, high = (middle, high) if _normal_cdf((mean_N - middle) / spread_N).sum() > K else (low, middle)
    wide_N = _normal_cdf((mean_N - low) / (2 * spread_N))
    chance_N: Float64 = (1 - _DEFENSIVE_SHARE) * _normal_cdf((mean_N - low) / spread_N)
    chance_N += _DEFENSIVE_SHARE * K / wide_N.sum() * wide_N
    return chance_N


def estimate_recall(
    exact_QM: Float64, stored_QM: Float64, deviation_QM: Float64, weight_M: Float64, cut_QR: Float64
) -> tuple[Float64, float]:
    """Return the share of each query's true top ten in the first rows of the stored ranking, for several depths.

    A sampled row counts 1 or 0 if its stored score was observed to be above the cut, and by the noise model its chance
    to be: the first has no model error, the second no sampling error. Their shares depend on the weights.

    Args:
        exact_QM: exact scores of the sampled rows, as expected stored scores (`NoiseModel.expect`).
        stored_QM: their stored scores.
        deviation_QM: standard deviations of the stored scores.
        weight_M: the number of rows that each stands for.
        cut_QR: the stored scores of the last rows within the depths.

    Returns:
        The recall [Q, R], and the share of observations in it: 1 if all rows near the top were certain to be drawn.
    """
    tops = [_select_top(exact_M, weight_M) for exact_M in exact_QM]
    top_weights = np.concatenate([weight_M[chosen] for chosen in tops])
    effect = float((top_weights**2).sum() / top_weights.sum())
    observed = 1 / effect
    recall_QR = np.empty(cut_QR.shape)
    for query, (exact_M, chosen) in enumerate(zip(exact_QM, tops, strict=True)):
        threshold = exact_M[chosen].min()
        if effect > 1:
            threshold = _find_threshold(exact_M, weight_M, min(K * effect, _COUNTED_ROWS))
        top = np.flatnonzero(exact_M >= min(threshold, exact_M.max()))
        cut_R, weight_T = cut_QR[query], weight_M[top, None]
        is_above_TR = stored_QM[query, top, None] >= cut_R
        spread_T = np.maximum(deviation_QM[query, top, None], _TINY)
        chance_TR = _normal_cdf((exact_M[top, None] - cut_R) / spread_T)
        mixed_TR = observed * is_above_TR + (1 - observed) * chance_TR
        recall_QR[query] = (weight_T * mixed_TR).sum(0) / weight_T.sum()
    return recall_QR, observed


def predict_recall(exact_QM: Float64, deviation_QM: Float64, n_rows: int, depth: int) -> Float64:
    """Return the share of each query's true top ten in the first `depth` of N rows, by the noise model, [Q].

    The largest scores of N rows are larger than those of a sample: in the tail, each query's scores are a quadratic
    function of the normal quantiles of their ranks, with a curvature that all queries have in common.

    Args:
        exact_QM: exact scores of rows drawn uniformly.
        deviation_QM: standard deviations of their stored scores.
        n_rows: N; if the sample is smaller, its rows stand for N / M rows each.
        depth: m, of the stored ranking.
    """
    n_queries, n_sampled = exact_QM.shape
    if depth >= n_rows:
        return np.ones(n_queries)
    order_QM = np.argsort(-exact_QM, axis=1, kind="stable")
    score_QJ = np.take_along_axis(exact_QM, order_QM, axis=1)
    deviation_QJ = np.maximum(np.take_along_axis(deviation_QM, order_QM, axis=1), _TINY)
    weight_J = np.full(n_sampled, n_rows / n_sampled)
    if n_rows > n_sampled:
        score_QJ, deviation_QJ, weight_J = _extend_tail(score_QJ, deviation_QJ, n_rows)
    low_Q = (score_QJ - _REACH * deviation_QJ).min(1)
    high_Q = (score_QJ + _REACH * deviation_QJ).max(1)
    for _ in range(_STEPS):
        middle_Q = (low_Q + high_Q) / 2
        is_low_Q = _normal_cdf((score_QJ - middle_Q[:, None]) / deviation_QJ) @ weight_J > depth
        low_Q, high_Q = np.where(is_low_Q, middle_Q, low_Q), np.where(is_low_Q, high_Q, middle_Q)
    k = min(K, n_rows)
    chance_QK = _normal_cdf((score_QJ[:, :k] - low_Q[:, None]) / deviation_QJ[:, :k])
    recall_Q: Float64 = chance_QK.mean(1)
    return recall_Q


def bound_mean(recall_Q: Float64, model_share: float = 0.0) -> Estimate:
    """Return the mean recall with a 95% interval by Student's t.

    The interval counts one additional query with recall ½, so that few queries without a miss do not give certainty.

    Args:
        recall_Q: the recall of each query.
        model_share: the share of the noise model in them.
    """
    counted = np.append(recall_Q, 0.5)
    variance = counted.var(ddof=1) / len(counted) + (model_share * _MODEL_ERROR) ** 2
    reach = _find_t_quantile(len(recall_Q)) * float(np.sqrt(variance))
    mean, middle = float(np.mean(recall_Q)), float(counted.mean())
    return Estimate(mean, max(0.0, min(mean, middle - reach)), min(1.0, max(mean, middle + reach)))


def find_cuts(stored_QN: Float64, depths: Sequence[int], sign: int) -> Float64:
    """Return sign × the stored scores [Q, R] of the last rows within the depths; -inf if there are no more rows."""
    n_rows = stored_QN.shape[1]
    cut_QR = np.full((len(stored_QN), len(depths)), -np.inf)
    places = [n_rows - depth for depth in depths if depth < n_rows]
    if not places:
        return cut_QR
    # One query at a time, because each is copied.
    for cut_R, stored_N in zip(cut_QR, stored_QN, strict=True):
        cut_R[: len(places)] = np.partition(sign * stored_N, places)[places]
    return cut_QR


def _select_top(exact_M: Float64, weight_M: Float64) -> np.ndarray[tuple[int], np.dtype[np.intp]]:
    """Return the sampled rows that stand for the ten rows of largest score."""
    order = np.argsort(-exact_M, kind="stable")
    before = np.cumsum(weight_M[order]) - weight_M[order]
    return order[before < K - 1e-9]


def _find_threshold(exact_M: Float64, weight_M: Float64, count: float) -> float:
    """Return the score that ten rows exceed, from an exponential tail of the rows that stand for the first `count`."""
    order = np.argsort(-exact_M, kind="stable")
    total = np.minimum(np.cumsum(weight_M[order]), count)
    last = min(int(np.searchsorted(total, count - 1e-9)), len(order) - 1)
    part = np.diff(total[: last + 1], prepend=0.0)
    edge = exact_M[order[last]]
    excess = float(part @ (exact_M[order[: last + 1]] - edge)) / total[last]
    return float(edge + excess * np.log(total[last] / K))


def _extend_tail(score_QJ: Float64, deviation_QJ: Float64, n_rows: int) -> tuple[Float64, Float64, Float64]:
    """Return scores, deviations and weights in which the largest scores are replaced by the fitted tail.

    The first ten have weight 1. Their deviation is that of the largest scores of the sample.
    """
    n_sampled = score_QJ.shape[1]
    n_tail = min(_TAIL_ROWS, max(2, n_sampled // 4))
    count = n_tail * n_rows / n_sampled
    edges = np.concatenate([np.arange(K + 1), np.geomspace(K, max(count, K + 1), _TAIL_POINTS)[1:]])
    sample_E = _normal_quantile((np.arange(n_tail) + 0.5) / n_sampled)
    centre = sample_E.mean()
    x_E, x_T = sample_E - centre, _normal_quantile((edges[1:] + edges[:-1]) / 2 / n_rows) - centre
    line = np.polyfit(x_E, x_E**2, 1)
    bend_E, bend_T = (x**2 - np.polyval(line, x) for x in (x_E, x_T))
    level_Q, slope_Q = score_QJ[:, :n_tail].mean(1), score_QJ[:, :n_tail] @ x_E / (x_E @ x_E)
    steep = slope_Q > 0
    rest_QE = score_QJ[steep, :n_tail] - level_Q[steep, None] - slope_Q[steep, None] * x_E
    relative_E = (rest_QE / slope_Q[steep, None]).sum(0) / max(1, np.count_nonzero(steep))
    # A smaller one would make the largest scores decrease.
    least = -1 / (2 * x_T[0] - line[0])
    curvature = max(least, float(relative_E @ bend_E / max(bend_E @ bend_E, _TINY)))
    tail_QT = level_Q[:, None] + slope_Q[:, None] * (x_T + curvature * bend_T)
    few = max(1, n_tail // 4)
    spread_Q = np.exp(np.log(deviation_QJ[:, :few]).mean(1))
    spread_QT = np.repeat(spread_Q[:, None], len(x_T), axis=1)
    weight_J = np.concatenate([np.diff(edges), np.full(n_sampled - n_tail, n_rows / n_sampled)])
    scores = np.concatenate([tail_QT, score_QJ[:, n_tail:]], axis=1)
    return scores, np.concatenate([spread_QT, deviation_QJ[:, n_tail:]], axis=1), weight_J


def _normal_cdf(x: Float64) -> Float64:
    """Return the distribution function of the standard normal distribution."""
    return torch.special.ndtr(torch.from_numpy(x)).numpy()  # type: ignore[no-any-return]


def _normal_quantile(beyond: Float64) -> Float64:
    """Return the values that a standard normal variable exceeds with these probabilities."""
    return -torch.special.ndtri(torch.from_numpy(beyond)).numpy()  # type: ignore[no-any-return]


def _find_t_quantile(freedom: int) -> float:
    """Return the .975 quantile of Student's t, by the series of Abramowitz and Stegun (26.7.5)."""
    z = NormalDist().inv_cdf(0.975)
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3
