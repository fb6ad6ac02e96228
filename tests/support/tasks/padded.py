"""Rows with three positions, one with nine, padded by collate; a small model over their mean."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tasks.toy import Toy

# Not a canary, and not in the sample that decides whether rows are sorted by length.
LONG = 143


class Pooled(Toy):
    """A Toy over the mean of a row's positions, without the padding."""

    def forward(self, x: Tensor, inside: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x)) * inside.unsqueeze(2)
        return self.second(hidden.sum(1) / inside.sum(1, keepdim=True))


def make_ragged_rows(n: int, long: int = LONG) -> list[tuple[Tensor, int]]:
    """Return rows with three positions, and one with nine."""
    generator = torch.Generator().manual_seed(4)
    return [(torch.randn(9 if i == long else 3, 5, generator=generator), i % 3) for i in range(n)]


def pad(examples: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor, Tensor]:
    x = nn.utils.rnn.pad_sequence([e[0] for e in examples], batch_first=True)
    inside = torch.tensor([[float(t < len(e[0])) for t in range(x.shape[1])] for e in examples])
    return x, inside, torch.tensor([e[1] for e in examples])


def pooled_loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0], batch[1]), batch[2], reduction="none")
