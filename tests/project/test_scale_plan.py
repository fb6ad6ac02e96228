"""The simulation of large builds: its arithmetic, failures, and predictions that agree with measurements."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks.common.paths import ROOT
from benchmarks.common.results import read_results
from benchmarks.scale_plan import (
    Factors,
    Job,
    Machines,
    check_search,
    choose_machines,
    count_comparisons,
    fit_lists,
    simulate,
    simulate_features,
)
from tracin_ann.search import IVFParams

FACTORS = Factors(5.0, 1e-3, (10.0, 1e-6), (1.0, 1e-5, 1e-8), (264.0, 1000.0), (1e-3, 1e-6), 1e-8)
JOB = Job(65_536 * 64, 3, 256)
RELIABLE = Machines(1, disk=math.inf, network=math.inf, failures=0.0)


@pytest.mark.parametrize(("count", "rounds"), [(1, 192), (8, 24), (100, 2), (192, 1), (500, 1)])
def test_units_are_spread_over_machines(count: int, rounds: int) -> None:
    features_s, repeated = simulate_features(JOB, FACTORS, replace(RELIABLE, count=count), 0)
    assert features_s == pytest.approx(5 + rounds * 65_536 * 1e-3)
    assert repeated == 0


def test_a_slow_file_system_limits_the_rate() -> None:
    slow = replace(RELIABLE, count=8, disk=8 * 1e6)
    features_s, _ = simulate_features(JOB, FACTORS, slow, 0)
    assert features_s == pytest.approx(5 + 24 * 65_536 * (3000 + 522) / 1e6)


def test_failed_units_are_computed_again() -> None:
    failing = replace(RELIABLE, count=8, failures=5.0, restart=60.0)
    times = [simulate_features(JOB, FACTORS, failing, seed) for seed in range(20)]
    plain, _ = simulate_features(JOB, FACTORS, replace(RELIABLE, count=8), 0)
    mean_failures = 8 * 5 * sum(seconds for seconds, _ in times) / 20 / 3600
    assert sum(repeated for _, repeated in times) / 20 == pytest.approx(mean_failures, rel=0.15)
    assert all(seconds >= plain for seconds, _ in times)
    assert simulate_features(JOB, FACTORS, failing, 3) == simulate_features(JOB, FACTORS, failing, 3)


def test_a_plan_adds_up() -> None:
    plan = simulate(JOB, FACTORS, replace(RELIABLE, count=8, price=2.0))
    n_lists = IVFParams().count_lists(JOB.rows)
    assert plan.lists_s == pytest.approx(1 + 1e-5 * JOB.rows + 1e-8 * count_comparisons(JOB.rows, n_lists))
    assert plan.finish_s == pytest.approx(10 + 1e-6 * JOB.rows)
    assert plan.wall_s == pytest.approx(plan.features_s + plan.lists_s + plan.finish_s)
    assert plan.cost == pytest.approx(2 * (8 * plan.features_s + plan.lists_s + plan.finish_s) / 3600)
    assert plan.disk - plan.memory == JOB.rows * 3 * (2 * 256 + 10)


def test_the_fewest_machines_are_chosen() -> None:
    fewest = choose_machines(JOB, FACTORS, 3600.0)
    assert fewest.features_s <= 3600
    assert simulate(JOB, FACTORS, Machines(fewest.machines // 2)).features_s > 3600
    with pytest.raises(ValueError, match="longer than"):
        choose_machines(JOB, FACTORS, 10.0)


def test_factors_are_those_of_exact_costs() -> None:
    def cost(n: int) -> float:
        return 2 + 3e-6 * n + 5e-9 * count_comparisons(n, IVFParams().count_lists(n))

    fitted = fit_lists([(n, cost(n)) for n in (10**5, 3 * 10**5, 10**6)])
    assert fitted == pytest.approx((2, 3e-6, 5e-9), rel=1e-3)


def test_predictions_of_searches_agree_with_measurements() -> None:
    for check in check_search():
        assert 0.8 < check.predicted / check.measured < 1.25, check


def test_recorded_predictions_agree_with_measurements() -> None:
    for check in read_results("scale_plan")["results"]["checks"]:
        assert 0.6 < check["predicted"] / check["measured"] < 1.6, check


@pytest.mark.slow
def test_the_gpu_script_fails_in_one_line_without_a_gpu() -> None:
    if torch.accelerator.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run(
        ["scripts/gpu"], cwd=ROOT, env={**os.environ, "PY": sys.executable}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("no GPU: PyTorch")
