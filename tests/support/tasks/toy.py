"""A small classifier with two checkpoints; a test can replace any part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tracin_ann import BuildConfig, Checkpoint, Task

RATES = (0.5, 0.125)
CONFIG = BuildConfig(dim=32, batch_size=4, device="cpu", dtype="float32", index="flat")


class Toy(nn.Module):
    """Two linear layers with an activation between them that is not a module."""

    def __init__(self, activation: Any = torch.tanh) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 3)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.activation(self.first(x)))


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def make_rows(n: int, seed: int = 1) -> list[tuple[Tensor, int]]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(5, generator=generator, dtype=torch.float32), i % 3) for i in range(n)]


def save_checkpoints(model: nn.Module, folder: Path, seed: int = 0) -> list[Checkpoint]:
    """Write one checkpoint of the model per rate, each with slightly changed weights."""
    generator = torch.Generator().manual_seed(seed)
    checkpoints = []
    for i, rate in enumerate(RATES):
        state = {
            key: value + 0.3 * torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.dtype)
            if value.is_floating_point() and "running_var" not in key
            else value
            for key, value in model.state_dict().items()
        }
        path = folder / f"checkpoint{i}.pt"
        torch.save(state, path)
        checkpoints.append(Checkpoint(path, learning_rate=rate))
    return checkpoints


def make_toy_task(folder: Path, model: nn.Module | None = None, /, **changes: Any) -> Task:
    """Return a task of the model (a Toy if None) with two checkpoints in the folder, with changed fields."""
    model = model if model is not None else Toy()
    fields: dict[str, Any] = {
        "model": lambda: model,
        "loss": cross_entropy,
        "train_data": lambda: make_rows(10),
        "query_data": lambda: make_rows(5, seed=2),
    }
    fields.update(changes)
    if "checkpoints" not in fields:
        fields["checkpoints"] = save_checkpoints(model, folder)
    return Task(**fields)
