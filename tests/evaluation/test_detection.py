"""Curves of wrong labels compared with scikit-learn's area and with counting."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tasks.retrained import CLASSES, N, make_task
from tracin_ann import BuildConfig, InfluenceIndex, build
from tracin_ann.analysis import RANKINGS, find_mislabelled
from tracin_ann.errors import UsageError
from tracin_ann.evaluation import compare_rankings, compute_detection

WRONG = [row for row in range(N) if row % 9 == 4]


def test_the_curve_counts_wrong_rows_and_its_area_is_that_of_the_roc_curve() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(2)
    rows, wrong = random.permutation(40).tolist(), set(random.choice(40, 7, replace=False).tolist())
    found = compute_detection(rows, wrong)
    assert found.found_N.tolist() == [len(wrong & set(rows[: n + 1])) / 7 for n in range(40)]
    truth = [row in wrong for row in rows]
    assert found.auc == pytest.approx(metrics.roc_auc_score(truth, -np.arange(40)))
    assert (found.found(0.25), found.found(0), found.found(1)) == (found.found_N[9], 0, 1)
    assert compute_detection([3, 1, 0, 2], [3, 99]).auc == 1


@pytest.mark.parametrize("wrong", [[], [9], [0, 1, 2]])
def test_a_ranking_with_one_kind_of_row_has_no_curve(wrong: list[int]) -> None:
    with pytest.raises(UsageError, match="expected some of both"):
        compute_detection([0, 1, 2], wrong)


def test_every_ranking_is_compared(tmp_path: Path) -> None:
    task = make_task(tmp_path)
    build(task, tmp_path / "index", BuildConfig(dim=16, device="cpu", index="flat"))
    index = InfluenceIndex.open(tmp_path / "index", task, device="cpu")
    found = compare_rankings(index, WRONG)
    assert tuple(found) == RANKINGS
    for by, curve in found.items():
        rows = [suspect.row for suspect in find_mislabelled(index, by=by)]
        assert curve.found_N.tolist() == compute_detection(rows, WRONG).found_N.tolist()
        assert len(curve.found_N) == N
    assert found["loss-and-votes"].auc > 0.8
    assert CLASSES == len(set(index.columns["label"].tolist()))
