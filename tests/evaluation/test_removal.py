"""Removal of rows compared with retraining by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tasks import retrained
from tasks.retrained import N, make_task, train
from tracin_ann.errors import UsageError
from tracin_ann.evaluation import Removal, Retraining, draw_random_rows, find_top_rows, measure_removal
from tracin_ann.features import RunOptions, TaskRunner

IDS, SEEDS, K = [4, 0, 9], [1, 2], 3
ROWS = np.setdiff1d(np.arange(N), [5, 6])


@pytest.fixture
def retraining(tmp_path: Path) -> Retraining:
    return Retraining.open(TaskRunner(make_task(tmp_path), RunOptions(torch.device("cpu"))), tmp_path / "truth", IDS)


def loss_by_hand(query: int, rows: Sequence[int], folder: Path) -> float:
    found, (x, label) = [], retrained.make_rows(retrained.QUERIES, 2)[query]
    for seed in SEEDS:
        train(rows, seed, folder / "own.pt")
        state = torch.load(folder / "own.pt", weights_only=True)
        found.append(float(F.cross_entropy((state["weight"] @ x + state["bias"])[None], torch.tensor([label]))))
    return sum(found) / len(found)


def test_losses_are_those_without_the_rows_of_each_query(retraining: Retraining, tmp_path: Path) -> None:
    top = np.array([[1, 2, 3], [7, 8, 9], [1, 20, 59]])
    found = measure_removal(retraining, ROWS, top, SEEDS)
    for place, query in enumerate(IDS):
        rows = ROWS.tolist()
        assert found.before_Q[place] == pytest.approx(loss_by_hand(query, rows, tmp_path), rel=1e-5)
        left = [row for row in rows if row not in top[place]]
        assert found.after_Q[place] == pytest.approx(loss_by_hand(query, left, tmp_path), rel=1e-5)
    assert found.rise.mean == pytest.approx(np.mean(found.after_Q - found.before_Q))


def test_queries_with_the_same_rows_share_a_model(retraining: Retraining) -> None:
    random = draw_random_rows(ROWS, K, len(IDS), seed=3)
    assert random.shape == (3, K)
    assert set(random[0].tolist()) <= set(ROWS.tolist())
    assert len(set(random[0].tolist())) == K
    assert (random == random[0]).all()
    assert (draw_random_rows(ROWS, K, 1, seed=4) != random[0]).any()
    measure_removal(retraining, ROWS, random, SEEDS)
    assert len(list(retraining.folder.glob("*.npy"))) == 2 * len(SEEDS)


def test_overturned_queries_lose_the_majority() -> None:
    half = math.log(2)
    found = Removal(np.array([half - 0.1, half, half + 0.1, 0.1]), np.array([half + 0.1, half + 1, half + 2, half]))
    assert found.n_overturned == 2


def test_top_rows_are_among_the_given_and_ties_are_in_order() -> None:
    score = np.array([[0, 5, 5, 9, -1], [3, -2, -3, 9, -4]], dtype=np.float32)
    assert find_top_rows(score, np.array([0, 1, 2, 4]), 3).tolist() == [[1, 2, 0], [0, 1, 2]]
    assert find_top_rows(score, np.array([1, 4]), 3).tolist() == [[1, 4], [1, 4]]


@pytest.mark.parametrize("top", [np.zeros((2, 1), np.int64), np.tile(ROWS, (3, 1))])
def test_rows_that_cannot_be_removed_are_rejected(retraining: Retraining, top: np.ndarray) -> None:
    with pytest.raises(UsageError, match="these rows cannot be removed"):
        measure_removal(retraining, ROWS, top, SEEDS)
