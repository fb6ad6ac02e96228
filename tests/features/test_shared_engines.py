"""Queries verify the gradients of a checkpoint once for both sides, unless these need different methods."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import oracle
from tasks.toy import CONFIG, RATES, Toy, cross_entropy, make_toy_task, save_checkpoints
from tracin_ann import InfluenceIndex, QueryOptions, Task, build
from tracin_ann.gradients import GradientEngine


class Places(nn.Module):
    """A linear layer over places: rows first, or places first where a batch says so."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        x, _, is_turned = batch
        hidden = self.inner(x.transpose(0, 1)).transpose(0, 1) if bool(is_turned[0]) else self.inner(x)
        return self.outer(torch.tanh(hidden).mean(1))


def compute_loss(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch), batch[1], reduction="none")


def make_places(n: int, seed: int, *, is_turned: bool) -> list[tuple[Tensor, Tensor, Tensor]]:
    random = torch.Generator().manual_seed(seed)
    return [(torch.randn(5, 3, generator=random), torch.tensor(i % 2), torch.tensor(is_turned)) for i in range(n)]


@pytest.fixture
def verified(monkeypatch: pytest.MonkeyPatch) -> list[GradientEngine]:
    """Return the list to which every verification adds its engine."""
    found: list[GradientEngine] = []
    choose = GradientEngine.choose_methods

    def record(self: GradientEngine, *arguments: Any) -> Any:
        found.append(self)
        return choose(self, *arguments)

    monkeypatch.setattr(GradientEngine, "choose_methods", record)
    return found


@pytest.mark.parametrize(("losses", "expected"), [(1, 1), (2, 2)])
def test_a_query_verifies_once_for_every_checkpoint_and_loss(
    tmp_path: Path, verified: list[GradientEngine], losses: int, expected: int
) -> None:
    changes: dict[str, Any] = {"query_loss": cross_entropy} if losses == 2 else {}
    task = make_toy_task(tmp_path, checkpoints=save_checkpoints(Toy(), tmp_path), **changes)
    build(task, tmp_path / "out", CONFIG)
    verified.clear()
    index = InfluenceIndex.open(tmp_path / "out", task, device="cpu")
    index.query([0, 1])
    assert len(verified) == expected * len(task.checkpoints)
    index.query([2])
    assert len(verified) == expected * len(task.checkpoints)


def test_sides_that_need_different_methods_have_their_own_engines(
    tmp_path: Path, verified: list[GradientEngine]
) -> None:
    torch.manual_seed(0)
    model = Places()
    train, queries = make_places(20, 0, is_turned=False), make_places(6, 1, is_turned=True)
    task = Task(
        model=lambda: model,
        loss=compute_loss,
        train_data=lambda: train,
        query_data=lambda: queries,
        checkpoints=save_checkpoints(model, tmp_path),
    )
    build(task, tmp_path / "out", CONFIG)
    index = InfluenceIndex.open(tmp_path / "out", task, device="cpu")
    exact = QueryOptions(rerank="exact", candidates=20)
    answers = index.query(range(6), options=exact)
    n_verified = len(verified)
    again = index.query(range(6), options=exact)
    assert len(verified) == n_verified
    models = [Places() for _ in RATES]
    for each, checkpoint in zip(models, task.checkpoints, strict=True):
        each.load_state_dict(torch.load(checkpoint.path, weights_only=True))
    sides = [torch.stack([oracle.gradients(m, compute_loss, rows) for m in models], 1) for rows in (queries, train)]
    score_QN = oracle.tracin(*sides, RATES)
    for found in (answers, again):
        for answer, score_N in zip(found, score_QN, strict=True):
            assert answer.proponents[0].id == int(score_N.argmax())
            np.testing.assert_allclose(answer.proponents[0].score, score_N.max(), rtol=1e-4)
