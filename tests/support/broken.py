"""Tasks that violate the contract, each in one way: `broken.py:task` with kind and folder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tracin_ann import Checkpoint, Task

Batch = tuple[Tensor, Tensor]


def model(bias: bool = True) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6, bias=bias), nn.Tanh(), nn.Linear(6, 3))


def right(net: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(net(batch[0]), batch[1], reduction="none")


def rows(n: int = 12) -> list[tuple[Tensor, int]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(5, generator=generator), i % 3) for i in range(n)]


class Augmented(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return torch.randn(5), i % 3


def batch_statistics(net: nn.Module, batch: Batch) -> Tensor:
    return right(net, (F.batch_norm(batch[0], None, None, training=True), batch[1]))


def negatives(net: nn.Module, batch: Batch) -> Tensor:
    out = F.normalize(net(batch[0]), dim=1)
    return F.cross_entropy(out @ out.T, torch.arange(len(out)), reduction="none")


def not_a_number(net: nn.Module, batch: Batch) -> Tensor:
    return right(net, batch) + torch.where(batch[1] == 2, float("nan"), 0.0)


LOSSES: dict[str, Callable[[nn.Module, Any], Any]] = {
    "reduced": lambda net, batch: right(net, batch).mean(),
    "batch norm": batch_statistics,
    "in-batch negatives": negatives,
    "no gradient": lambda net, batch: right(net, batch).detach(),
    "nan": not_a_number,
    "dropout": lambda net, batch: right(net, (F.dropout(batch[0], 0.5, training=True), batch[1])),
}


def task(kind: str, folder: str) -> Task:
    net = model(bias=kind != "checkpoint")
    torch.save(net.state_dict(), f"{folder}/0.pt")
    train: Any = Augmented() if kind == "random rows" else [] if kind == "empty" else rows()
    return Task(
        model=model,
        loss=LOSSES.get(kind, right),
        train_data=lambda: train,
        query_data=rows,
        checkpoints=[Checkpoint(f"{folder}/0.pt", learning_rate=-1 if kind == "learning rate" else 0.1)],
    )
