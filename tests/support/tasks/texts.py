"""Sequences of different lengths, padded by collate: `texts.py:task`, and variants that end a worker or are slow."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tracin_ann import Checkpoint, Task

N_TRAIN = 150
RATES = (0.3, 0.05, 0.2)


class Reader(nn.Module):
    """Embedding, a layer over positions, a masked mean, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.inner, self.head = nn.Embedding(11, 6), nn.Linear(6, 7), nn.Linear(7, 3)

    def forward(self, index: Tensor) -> Tensor:
        inside = (index > 0).unsqueeze(2)
        return self.head((torch.tanh(self.inner(self.words(index))) * inside).sum(1) / inside.sum(1))


def make_rows(n: int, seed: int) -> list[tuple[Tensor, int]]:
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 40, (n,), generator=g)
    return [(torch.randint(1, 11, (int(length),), generator=g), i % 3) for i, length in enumerate(lengths)]


def pad(examples: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    texts = nn.utils.rnn.pad_sequence([e[0] for e in examples], batch_first=True)
    return texts, torch.tensor([e[1] for e in examples])


def loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def model() -> nn.Module:
    torch.manual_seed(0)
    return Reader()


def train_data() -> list[tuple[Tensor, int]]:
    return make_rows(N_TRAIN, 1)


def query_data() -> list[tuple[Tensor, int]]:
    return make_rows(4, 2)


class LethalRows(list[Any]):
    """Rows that end the process that reads row 100, except the process that created them."""

    def __init__(self, given: list[Any]) -> None:
        super().__init__(given)
        self.maker = os.environ.setdefault("TEXTS_MAKER", str(os.getpid()))

    def __getitem__(self, place: Any) -> Any:
        if place == 100 and str(os.getpid()) != self.maker:
            os._exit(9)
        return super().__getitem__(place)


def deadly_data() -> list[tuple[Tensor, int]]:
    return LethalRows(train_data())


class SlowRows(list[Any]):
    """Rows that take time to read, so that a test can act while a build runs."""

    def __getitem__(self, place: Any) -> Any:
        time.sleep(0.01)
        return super().__getitem__(place)


def slow_data() -> list[tuple[Tensor, int]]:
    return SlowRows(train_data())


def task(folder: str, deadly: str = "", slow: str = "") -> Task:
    for i in range(len(RATES)):
        path = Path(folder) / f"{i}.pt"
        if not path.exists():
            torch.manual_seed(i)
            torch.save(Reader().state_dict(), path)
    return Task(
        model=model,
        loss=loss,
        train_data=deadly_data if deadly else slow_data if slow else train_data,
        query_data=query_data,
        checkpoints=[Checkpoint(f"{folder}/{i}.pt", learning_rate=rate) for i, rate in enumerate(RATES)],
        collate=pad,
    )
