"""The estimate of the recall of the true top ten from sampled rows, on scores whose truth is known."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest

from tracin_ann.files import read_record
from tracin_ann.scoring import quality, true_recall
from tracin_ann.scoring.quality import RankedRows, measure_fidelity
from tracin_ann.scoring.true_recall import (
    NoiseModel,
    bound_mean,
    find_chances,
    find_cuts,
    find_probabilities,
    predict_recall,
)
from tracin_ann.store import Estimate, Fidelity, TrueRecall
from tracin_ann.types import Float64

QUERIES, N, D = 6, 12_000, 64


class Problem:
    """Exact scores with a heavy tail for proponents only, and stored scores with the errors of a sketch."""

    def __init__(self, seed: int, noise: float = 1.0, slope: float = 1.0) -> None:
        random = np.random.default_rng(seed)
        norm_N = np.exp(0.3 * random.normal(size=N))
        tail_QN = np.where(random.random((QUERIES, N)) < 0.02, random.exponential(1.5, (QUERIES, N)), 0)
        self.exact_QN = norm_N * (random.normal(size=(QUERIES, N)) + tail_QN)
        errors_QN = noise * norm_N * random.normal(size=(QUERIES, N))
        # Squared norms for which the deviation of the sketch is `noise` times the norm.
        self.sqnorm_NC = (noise * norm_N[:, None]) ** 2
        query_QF = np.ones((QUERIES, D), np.float32)
        self.ranked = RankedRows(
            np.arange(N), (slope * self.exact_QN + errors_QN).astype(np.float32), self.sqnorm_NC, query_QF
        )

    def measure(self, seed: int) -> Fidelity:
        return measure_fidelity(self.ranked, lambda rows: self.exact_QN[:, rows], seed)

    def recall(self, sign: int, depth: int) -> Float64:
        """Return the true recall of each query by sorting all rows."""
        exact, stored = (np.argsort(-sign * s, axis=1) for s in (self.exact_QN, self.ranked.stored_QN))
        return np.array([len({*t[:10]} & {*s[:depth]}) / 10 for t, s in zip(exact, stored, strict=True)])


@pytest.mark.parametrize(("noise", "slope"), [(1.0, 1.0), (0.4, 1.0), (0.4, 1.3)])
def test_the_estimate_is_unbiased_and_its_interval_contains_the_truth(
    monkeypatch: pytest.MonkeyPatch, noise: float, slope: float
) -> None:
    """Scoring 4% of the rows; the recall of a pool of the first and last rows would be 1 at depth 100."""
    monkeypatch.setattr(quality, "DRAWN", 300)
    problems = [Problem(seed, noise, slope) for seed in range(6)]
    found = [problem.measure(seed) for problem in problems for seed in range(2)]
    assert max(fidelity.rows for fidelity in found) < 600
    covered = []
    for place, depth in enumerate(quality.DEPTHS):
        for side, sign in (("proponents", 1), ("opponents", -1)):
            true = np.repeat([problem.recall(sign, depth).mean() for problem in problems], 2)
            estimates: list[Estimate] = [getattr(fidelity.true_recall[place], side) for fidelity in found]
            error = np.array([estimate.mean for estimate in estimates]) - true
            assert abs(error.mean()) <= 0.05, (depth, side)
            covered += [e.lower <= t <= e.upper for e, t in zip(estimates, true, strict=True)]
    assert np.mean(covered) >= 0.9


def test_if_all_rows_are_scored_the_recall_is_that_of_brute_force(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "DRAWN", N)
    problem = Problem(0)
    found = problem.measure(0)
    assert found.rows == N
    for depth in found.true_recall:
        assert depth.proponents.mean == pytest.approx(problem.recall(1, depth.candidates).mean())
        assert depth.opponents.mean == pytest.approx(problem.recall(-1, depth.candidates).mean())
    assert found.deep_opponents == found.true_recall[1].opponents.mean < 0.9


def test_chances_are_about_the_shares_of_rows_in_the_true_top_ten() -> None:
    problem = Problem(1, noise=0.7)
    deviation_N = np.sqrt(problem.sqnorm_NC[:, 0])
    for sign in (1, -1):
        expected, hits, sums = [], [], 0.0
        for exact_N, stored_N in zip(sign * problem.exact_QN, sign * problem.ranked.stored_QN, strict=True):
            chance_N = find_chances(stored_N.astype(np.float64), deviation_N)
            order = np.argsort(-chance_N)
            top = np.argsort(-exact_N)[:10]
            sums += chance_N.sum()
            expected.append(chance_N[order[:20]].sum())
            hits.append(len(np.intersect1d(order[:20], top)))
        assert sums / QUERIES == pytest.approx(10, rel=0.15)
        # The deviation of the exact score is that of the error, an upper bound: chances near 1 are too low.
        assert 0.6 * np.mean(hits) <= np.mean(expected) <= 1.2 * np.mean(hits)


def test_a_weighted_count_varies_least_with_the_chosen_probabilities() -> None:
    random = np.random.default_rng(0)
    chance_N = random.random(5000) ** 60
    probability_N = find_probabilities(chance_N, 400)
    assert probability_N.sum() == pytest.approx(400, rel=1e-3) and probability_N.max() == 1

    def variance(p: Float64) -> float:
        return float((chance_N * (1 / p - 1)).sum())

    for exponent in (0.3, 0.8, 1.0):
        other_N = chance_N**exponent
        low, high = 0.0, 1e9
        for _ in range(100):
            scale = (low + high) / 2
            low, high = (scale, high) if np.minimum(1, scale * other_N).sum() < 400 else (low, scale)
        assert variance(probability_N) < variance(np.minimum(1, low * other_N))


def test_errors_that_all_rows_share_are_no_noise() -> None:
    random = np.random.default_rng(0)
    exact_QM, deviation_QM = random.normal(size=(4, 3000)) * 5, np.exp(random.normal(size=(4, 3000)) / 3)
    slope_Q, offset_Q, scale_Q = np.array([0.9, 1.0, 1.1, 1.3]), np.array([0, 1, -1, 2]), np.array([0.5, 1, 1, 2])
    errors_QM = scale_Q[:, None] * deviation_QM * random.normal(size=(4, 3000))
    model = NoiseModel.fit(exact_QM, slope_Q[:, None] * exact_QM + offset_Q[:, None] + errors_QM, deviation_QM)
    np.testing.assert_allclose(model.slope_Q, slope_Q, atol=0.02)
    np.testing.assert_allclose(model.offset_Q, offset_Q, atol=0.15)
    np.testing.assert_allclose(model.scale_Q, scale_Q, rtol=0.05)


@pytest.mark.parametrize("noise", [1.0, 0.4])
def test_a_sample_predicts_the_recall_of_all_rows(noise: float) -> None:
    """From a sixth of the rows, and without stored scores; the prediction may be too low, not too high."""
    problems = [Problem(seed, noise) for seed in range(6)]
    for sign in (1, -1):
        for depth, least in ((100, -0.12), (1000, -0.05)):
            errors = []
            for seed, problem in enumerate(problems):
                rows = np.random.default_rng(seed).choice(N, 2000, replace=False)
                deviation_QM = np.repeat(np.sqrt(problem.sqnorm_NC[rows].T), QUERIES, axis=0)
                predicted_Q = predict_recall(sign * problem.exact_QN[:, rows], deviation_QM, N, depth)
                errors.append(predicted_Q.mean() - problem.recall(sign, depth).mean())
            assert least <= np.mean(errors) <= 0.04, (sign, depth)


def test_a_prediction_from_all_rows_needs_no_tail_and_candidates_that_are_all_rows_hold_the_top_ten() -> None:
    problem = Problem(2)
    deviation_QN = np.repeat(np.sqrt(problem.sqnorm_NC.T), QUERIES, axis=0)
    predicted_Q = predict_recall(problem.exact_QN, deviation_QN, N, 100)
    assert predicted_Q.mean() == pytest.approx(problem.recall(1, 100).mean(), abs=0.05)
    assert (predict_recall(problem.exact_QN[:, :500], deviation_QN[:, :500], N, N) == 1).all()


@pytest.mark.parametrize("n_queries", [1, 2, 5, 16])
def test_the_interval_is_that_of_students_t_with_one_more_query(n_queries: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    recall_Q = np.random.default_rng(n_queries).random(n_queries)
    counted = [*recall_Q, 0.5]
    low, high = stats.t.interval(0.95, n_queries, np.mean(counted), stats.sem(counted))
    found = bound_mean(recall_Q)
    assert found.mean == pytest.approx(recall_Q.mean())
    tolerance = 0.15 * (high - low) if n_queries == 1 else 0.02 * (high - low)
    assert found.lower == pytest.approx(max(0, min(low, found.mean)), abs=tolerance)
    assert found.upper == pytest.approx(min(1, max(high, found.mean)), abs=tolerance)
    wider = bound_mean(recall_Q, 1.0)
    assert wider.upper - wider.lower >= found.upper - found.lower
    assert bound_mean(np.ones(n_queries)).lower < 0.95 and true_recall.K == 10


def fidelity(*depths: TrueRecall) -> Fidelity:
    return Fidelity(8, 900, 0.6, 0.3, 0.9, 0.7, 0.9, 1.0, depths)


def test_the_recall_between_depths_is_on_the_chord_and_beyond_them_that_of_the_last() -> None:
    low, high = Estimate(0.4, 0.3, 0.5), Estimate(0.8, 0.6, 0.9)
    found = fidelity(TrueRecall(10, low, low), TrueRecall(100, high, high))
    middle = found.expect(55)
    assert middle.candidates == 55
    for name, value in (("mean", 0.6), ("lower", 0.45), ("upper", 0.7)):
        assert getattr(middle.proponents, name) == pytest.approx(value)
    assert found.expect(5000).opponents == high and found.expect(10).proponents == low


def test_the_fidelity_of_an_earlier_version_is_an_upper_estimate() -> None:
    content = asdict(fidelity())
    del content["true_recall"]
    earlier = read_record(Fidelity, content)
    assert earlier == fidelity()
    assert earlier.expect(10).proponents == Estimate(0.6, 0.0, 0.6)
    assert earlier.expect(1000).opponents == Estimate(0.7, 0.0, 0.7)
    one = TrueRecall(10, Estimate(1, 1, 1), Estimate(1, 1, 1))
    for depths in ((one,), (one, one), (replace(one, candidates=100), one)):
        with pytest.raises(ValueError, match="recall at the depths"):
            fidelity(*depths)


@pytest.mark.parametrize("n_rows", [1, 9, 10, 11, 2000])
def test_cuts_are_the_scores_of_the_last_rows_within_the_depths(n_rows: int) -> None:
    stored = np.random.default_rng(0).standard_normal((3, n_rows))
    for sign in (1, -1):
        ranked = -np.sort(-sign * stored, axis=1)
        expected = [ranked[:, m - 1] if m < n_rows else np.full(3, -np.inf) for m in (10, 100, 1000)]
        assert find_cuts(stored, (10, 100, 1000), sign).tolist() == np.stack(expected, axis=1).tolist()
