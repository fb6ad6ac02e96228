"""Tasks over the models of models.py, importable by the commands: `zoo.py:task` with case, folder, seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

import models
from tracin_ann import Checkpoint, Task

RATES = (0.3, 0.05)
N_TRAIN, N_QUERY = 14, 3


def make_examples(case: str, seed: int) -> tuple[list[Any], list[Any]]:
    _, _, rows = models.make_case(case, seed, N_TRAIN + N_QUERY)
    return rows[:N_TRAIN], rows[N_TRAIN:]


def save_checkpoints(case: str, seed: int, folder: Path) -> list[nn.Module]:
    """Save two checkpoints of a case's model and return the two models."""
    trained = []
    for i in range(len(RATES)):
        model, _, _ = models.make_case(case, seed)
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(100 + i)
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape))
        torch.save(model.state_dict(), folder / f"{i}.pt")
        trained.append(model)
    return trained


def task(case: str, folder: str, seed: str = "0") -> Task:
    train_rows, query_rows = make_examples(case, int(seed))
    model, chosen, _ = models.make_case(case, int(seed))
    return Task(
        model=lambda: model,
        loss=chosen.loss,
        train_data=lambda: train_rows,
        query_data=lambda: query_rows,
        checkpoints=[Checkpoint(f"{folder}/{i}.pt", learning_rate=rate) for i, rate in enumerate(RATES)],
        describe=lambda row: f"class {row[1].tolist()}",
    )


def task_with_another_loss(folder: str) -> Task:
    """Return a task with another loss than `task`, which must be rejected."""
    return task("conv1d", folder)
