"""A task with rows whose loss or gradient is not finite, at both checkpoints or at the second only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tracin_ann import Checkpoint, InfluenceIndex, QueryOptions, Task

RATES = (0.5, 0.125)
FINE, NAN_LOSS, LATE_INFINITE_LOSS, NAN_GRADIENT, LATE_NAN_GRADIENT = range(5)
LATE = (LATE_INFINITE_LOSS, LATE_NAN_GRADIENT)
Row = tuple[Tensor, int, int, float]


class Staged(nn.Module):
    """A small classifier with the number of its checkpoint in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 3)
        self.register_buffer("stage", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def loss(model: Any, batch: Any) -> Tensor:
    x, labels, marks, scales = batch
    late = model.stage == 1
    logits = model(x)
    values = F.cross_entropy(logits, labels, reduction="none") * scales
    values = values + torch.where(marks == NAN_LOSS, torch.nan, 0.0)
    values = values + torch.where((marks == LATE_INFINITE_LOSS) & late, torch.inf, 0.0)
    cornered = (marks == NAN_GRADIENT) | ((marks == LATE_NAN_GRADIENT) & late)
    # The gradient of the square root at zero is NaN.
    return values + (0.01 * logits.square().sum(1) * ~cornered).sqrt() * scales


def collate(examples: list[Row]) -> tuple[Tensor, ...]:
    x, labels, marks, scales = zip(*examples, strict=True)
    return torch.stack(x), torch.tensor(labels), torch.tensor(marks), torch.tensor(scales)


def make_rows(
    n: int, seed: int = 1, marks: Mapping[int, int] | None = None, scales: Mapping[int, float] | None = None
) -> list[Row]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, generator=generator)
    return [(x[i], i % 3, (marks or {}).get(i, FINE), (scales or {}).get(i, 1.0)) for i in range(n)]


def save_checkpoints(folder: Path, n: int = 2) -> list[Checkpoint]:
    """Write checkpoints with different weights."""
    checkpoints = []
    for i in range(n):
        path = folder / f"{i}.pt"
        if not path.exists():
            with torch.random.fork_rng():
                torch.manual_seed(i)
                model = Staged()
            model.stage.fill_(i)
            torch.save(model.state_dict(), path)
        checkpoints.append(Checkpoint(path, learning_rate=RATES[i % 2]))
    return checkpoints


def make_task(folder: Path, train: list[Row], query: list[Row] | None = None, **changes: Any) -> Task:
    """Return the task of these rows, with changed fields."""
    fields: dict[str, Any] = {
        "model": Staged,
        "loss": loss,
        "train_data": lambda: train,
        "query_data": lambda: make_rows(7, 2) if query is None else query,
        "checkpoints": save_checkpoints(folder),
        "collate": collate,
    }
    return Task(**(fields | changes))


def read_scores(index: InfluenceIndex, options: QueryOptions, ids: Sequence[int] = range(7)) -> list[dict[int, float]]:
    """Return the scores of each query's hits, by row."""
    found = index.query(list(ids), options=options)
    return [{int(hit.id): hit.score for hit in (*a.proponents, *a.opponents)} for a in found]
