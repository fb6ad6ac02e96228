"""A small logistic regression that is retrained within milliseconds, with its run's checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tasks.toy import cross_entropy
from tracin_ann import Checkpoint, Task

N, QUERIES, WIDTH, CLASSES = 60, 12, 5, 3
STEPS, RATE = 30, 0.5
AT = (10, 30)
"""Steps at which the run of the task saves checkpoints."""
Row = tuple[torch.Tensor, int]


def make_rows(n: int, seed: int) -> list[Row]:
    """Return rows of overlapping classes, some with a wrong label."""
    generator = torch.Generator().manual_seed(seed)
    centres = 1.5 * torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(7))
    rows = []
    for i in range(n):
        x = centres[i % CLASSES] + torch.randn(WIDTH, generator=generator)
        rows.append((x, (i % CLASSES + (i % 9 == 4)) % CLASSES))
    return rows


TRAIN = make_rows(N, 1)


def make_model() -> nn.Module:
    model = nn.Linear(WIDTH, CLASSES)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    return model


def train(rows: Sequence[int], seed: int, out: Path | dict[int, Path]) -> None:
    """Train by full-batch gradient descent from a small random start, and save the last step or the given steps."""
    generator = torch.Generator().manual_seed(seed)
    model = make_model()
    with torch.no_grad():
        model.weight += 0.1 * torch.randn(model.weight.shape, generator=generator)
    batch = torch.stack([TRAIN[i][0] for i in rows]), torch.tensor([TRAIN[i][1] for i in rows])
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        cross_entropy(model, batch).mean().backward()
        optimizer.step()
        if isinstance(out, dict) and step in out:
            torch.save(model.state_dict(), out[step])
    if not isinstance(out, dict):
        torch.save(model.state_dict(), out)


def make_task(folder: Path, **changes: Any) -> Task:
    """Return the task, with changed fields; the first call trains its run."""
    paths = {step: Path(folder) / f"step{step}.pt" for step in AT}
    if not all(path.exists() for path in paths.values()):
        train(range(N), 0, paths)
    fields: dict[str, Any] = {
        "model": make_model,
        "loss": cross_entropy,
        "train_data": lambda: TRAIN,
        "query_data": lambda: make_rows(QUERIES, 2),
        "checkpoints": [Checkpoint(path, RATE, steps=STEPS) for path in paths.values()],
        "columns": lambda row: {"label": row[1]},
        "retrain": train,
        "loss_is_nll": True,
    }
    return Task(**(fields | changes))
