"""The linear datamodeling score compared with SciPy's Spearman correlation, query by query."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from scipy import stats

from tracin_ann.errors import MissingPackageError, UsageError
from tracin_ann.evaluation import compute_ceiling, compute_lds, correlate, draw_subsets

N, Q, M, S = 40, 6, 25, 3


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(5)


def test_it_is_the_mean_of_the_spearman_correlations_of_the_queries(random: np.random.Generator) -> None:
    subsets = draw_subsets(np.arange(N), M)
    score_QN = random.normal(size=(Q, N)).astype(np.float32)
    loss_MSQ = random.normal(size=(M, S, Q))
    found = compute_lds(score_QN, subsets, loss_MSQ)
    expected = []
    for q in range(Q):
        predicted = [sum(float(score_QN[q, row]) for row in rows) for rows in subsets]
        expected.append(stats.spearmanr(predicted, [-np.mean(loss_MSQ[m, :, q]) for m in range(M)]).statistic)
    np.testing.assert_allclose(found.value_Q, expected, atol=1e-12)
    assert found.mean == pytest.approx(np.mean(expected))
    assert found.interval[0] < found.mean < found.interval[1]


def test_scores_that_add_up_to_the_loss_are_perfect_and_their_negatives_the_worst(random: np.random.Generator) -> None:
    subsets, score_QN = draw_subsets(np.arange(N), M), random.normal(size=(Q, N))
    loss_MQ = 3 - np.stack([score_QN[:, rows].sum(axis=1) for rows in subsets])
    assert compute_lds(score_QN, subsets, loss_MQ).mean == pytest.approx(1)
    assert compute_lds(-score_QN, subsets, loss_MQ).interval == pytest.approx((-1, -1))


def test_ties_have_their_mean_rank_and_constants_correlate_with_nothing(random: np.random.Generator) -> None:
    predicted = np.stack([random.integers(0, 4, M), np.full(M, 2)], axis=1).astype(float)
    loss = random.integers(0, 3, (M, 2)).astype(float)
    found = correlate(predicted, -loss)
    np.testing.assert_allclose(found.value_Q, [stats.spearmanr(predicted[:, 0], -loss[:, 0]).statistic, 0])


def test_the_interval_covers_the_expectation(random: np.random.Generator) -> None:
    """Gaussian pairs of Pearson correlation ρ have Spearman correlation 6/π·asin(ρ/2) in expectation."""
    rho, covered, runs = 0.6, 0, 30
    for _ in range(runs):
        one, other = random.normal(size=(2, 60, 8))
        found = correlate(one, rho * one + np.sqrt(1 - rho**2) * other, resamples=100)
        low, high = found.interval
        covered += low <= 6 / np.pi * np.arcsin(rho / 2) <= high
        assert found.resampled_R.mean() == pytest.approx(found.mean)
    assert covered >= 0.8 * runs


def test_differences_of_scores_on_the_same_losses_are_paired(random: np.random.Generator) -> None:
    loss_MQ = random.normal(size=(M, Q))
    good = correlate(-loss_MQ + random.normal(size=(M, Q)), -loss_MQ)
    same = correlate(5 - 2 * loss_MQ, -loss_MQ)
    assert good.compare(good) == (0, 0)
    low, high = same.compare(good)
    assert 0 < low < same.mean - good.mean < high
    assert good.compare(same) == pytest.approx((-high, -low))


def test_the_interval_is_in_the_range_of_a_correlation() -> None:
    predicted_MQ = np.tile(np.arange(4.0)[:, None], (1, 5))
    found = correlate(predicted_MQ, predicted_MQ[[1, 0, 2, 3]])
    assert found.mean == pytest.approx(0.8)
    # A resample with the right order is above 1 after the shift.
    assert np.quantile(found.resampled_R, 0.975) > 1
    assert found.interval[1] == 1.0
    assert correlate(predicted_MQ, -predicted_MQ[[1, 0, 2, 3]]).interval[0] == -1.0


def test_one_query_has_an_interval_over_subsets(random: np.random.Generator) -> None:
    found = correlate(random.normal(size=(M, 1)), random.normal(size=(M, 1)))
    assert found.interval[0] < found.mean < found.interval[1]


def test_the_ceiling_is_the_lds_of_the_expected_losses(random: np.random.Generator) -> None:
    expected_MQ = random.normal(size=(200, 40))
    loss_MSQ = expected_MQ[:, None] + 1.5 * random.normal(size=(200, 4, 40))
    true = correlate(expected_MQ, loss_MSQ.mean(axis=1), resamples=10).mean
    assert compute_ceiling(loss_MSQ) == pytest.approx(true, abs=0.02)


def test_the_ceiling_needs_two_seeds_and_is_zero_for_noise(random: np.random.Generator) -> None:
    noise = random.normal(size=(M, 2, Q))
    assert compute_ceiling(noise[:, :1]) is None
    opposed = np.stack([noise[:, 0], -noise[:, 0]], axis=1)
    assert compute_ceiling(opposed) == 0


@pytest.mark.parametrize("shape", [(M, Q + 1), (M - 1, Q)])
def test_other_shapes_are_rejected(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="no rank correlation"):
        correlate(np.zeros((M, Q)), np.zeros(shape))


def test_without_scipy_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(
        MissingPackageError, match=r"SciPy is not installed: .*; pip install 'tracin-ann\[evaluation\]'"
    ):
        correlate(np.ones((M, Q)), np.ones((M, Q)))


def test_too_few_subsets_and_non_finite_values_are_rejected() -> None:
    with pytest.raises(UsageError, match="at least 3 values"):
        correlate(np.zeros((2, Q)), np.zeros((2, Q)))
    with pytest.raises(UsageError, match="values cannot be ranked: got NaN"):
        correlate(np.full((M, Q), np.nan), np.zeros((M, Q)))
