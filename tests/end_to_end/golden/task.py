"""The task of the golden indexes; rows are exact fractions, the same on every machine."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tracin_ann import Checkpoint, Task

HERE = Path(__file__).resolve().parent


def rows(n: int, shift: int) -> list[tuple[Tensor, int]]:
    return [(torch.tensor([((7 * i + 3 * j + shift) % 11 - 5) / 4 for j in range(5)]), i % 3) for i in range(n)]


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))


def loss(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(net(batch[0]), batch[1], reduction="none")


def task() -> Task:
    return Task(
        model=model,
        loss=loss,
        train_data=lambda: rows(24, 0),
        query_data=lambda: rows(6, 1),
        checkpoints=[Checkpoint(HERE / f"checkpoint{i}.pt", rate) for i, rate in enumerate((0.5, 0.125))],
        columns=lambda row: {"label": row[1]},
    )
