"""Models trained on real data: MNIST CNN, ResNet-9, character GPT, digits MLP.

Training is plain SGD for a few epochs, so that the loss still falls at the checkpoints. The rows that are scored are
the training rows. The seed determines the rows, the weights, the training order and the queries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.common import models
from benchmarks.common.cifar import read_cifar
from examples import digits, mnist
from tracin_ann import Checkpoint, Task

Rows = Sequence[tuple[torch.Tensor, Any]]
LENGTH = 64


@dataclass(frozen=True)
class Training:
    """Settings of plain SGD, and the epochs (counted from 1) after which a checkpoint is saved."""

    rate: float
    batch: int
    epochs: tuple[int, ...]


@dataclass(frozen=True)
class Subject:
    """A model and its data: `queries` queries, `rows` training rows, and the number of gradients per chunk."""

    make: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Any], torch.Tensor]
    data: Callable[[Path, int, int, int], tuple[Rows, Rows]]
    training: Training
    rows: int
    queries: int
    chunk: int

    def train_task(self, data: Path, runs: str, seed: int) -> Task:
        """Train with this seed, save checkpoints under `runs`, and return the task."""
        train_rows, query_rows = self.data(data, self.rows, self.queries, seed)
        self.train(train_rows, runs, seed)
        return self.make_task(train_rows, query_rows, runs)

    def make_task(self, train_rows: Rows, query_rows: Rows, runs: str) -> Task:
        """Return the task with these rows and the checkpoints under `runs`."""
        return Task(
            model=self.make,
            loss=self.loss,
            train_data=lambda: train_rows,
            query_data=lambda: query_rows,
            checkpoints=[Checkpoint(f"{runs}/{e}.pt", learning_rate=self.training.rate) for e in self.training.epochs],
        )

    def train(self, rows: Rows, runs: str, seed: int) -> None:
        """Train on these rows and save checkpoints under `runs`."""
        torch.manual_seed(seed)
        net = self.make()
        order = torch.Generator().manual_seed(seed)
        optimiser = torch.optim.SGD(net.parameters(), lr=self.training.rate)
        for epoch in range(1, max(self.training.epochs) + 1):
            for batch in torch.utils.data.DataLoader(rows, self.training.batch, shuffle=True, generator=order):
                optimiser.zero_grad()
                self.loss(net, batch).mean().backward()
                optimiser.step()
            if epoch in self.training.epochs:
                torch.save(net.state_dict(), f"{runs}/{epoch}.pt")


def _sample(rows: Rows, count: int, seed: int) -> Rows:
    chosen = np.random.default_rng([seed, 1]).choice(len(rows), count, replace=False)
    return [rows[i] for i in sorted(chosen.tolist())]


def _load_mnist(data: Path, rows: int, queries: int, seed: int) -> tuple[Rows, Rows]:
    """Return the first training digits with 10% of the labels changed, and a sample of test digits."""
    path = data / "mnist.npz"
    train_rows, test_rows, _ = mnist.data(str(path if path.is_file() else data), rows, seed)
    return train_rows, _sample(test_rows, queries, seed)


def _load_digits(data: Path, rows: int, queries: int, seed: int) -> tuple[Rows, Rows]:
    """Return scikit-learn's digits with 10% of the training labels changed, and a sample of test digits."""
    train_rows, test_rows, _ = digits.data(seed)
    return train_rows[:rows], _sample(test_rows, queries, seed)


def _load_cifar(data: Path, rows: int, queries: int, seed: int) -> tuple[Rows, Rows]:
    """Return samples of the training and test images of CIFAR-10."""
    random = np.random.default_rng([seed, 2])
    sides = []
    for side, count in (("train", rows), ("test", queries)):
        read_image, labels = read_cifar(data, side)
        chosen = random.choice(len(labels), count, replace=False)
        pixels = torch.from_numpy(np.stack([read_image(int(i)) for i in chosen])).permute(0, 3, 1, 2).float()
        sides.append(list(zip(pixels.div(255).sub(0.5).div(0.25), labels[chosen].tolist(), strict=True)))
    return sides[0], sides[1]


def _load_text(data: Path, rows: int, queries: int, seed: int) -> tuple[Rows, Rows]:
    """Return random windows of tinyshakespeare: training rows from its first 90%, queries from the rest."""
    text = (data / "tinyshakespeare.txt").read_text()
    number = {character: i for i, character in enumerate(sorted(set(text)))}
    characters = torch.tensor([number[c] for c in text])
    border = len(characters) * 9 // 10
    random = np.random.default_rng([seed, 3])

    def sample_windows(first: int, last: int, count: int) -> Rows:
        starts = random.choice(last - first - LENGTH, count, replace=False) + first
        return [(characters[s : s + LENGTH], characters[s + 1 : s + LENGTH + 1]) for s in starts.tolist()]

    return sample_windows(0, border, rows), sample_windows(border, len(characters), queries)


def make_mlp() -> nn.Module:
    """Return an MLP 64-128-64-10."""
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))


SUBJECTS = {
    "CNN": Subject(mnist.model, mnist.loss, _load_mnist, Training(mnist.RATE, 32, (1, 2, 3)), 4000, 50, 64),
    "ResNet-9": Subject(models.make_resnet9, mnist.loss, _load_cifar, Training(0.005, 25, (1, 3)), 1000, 32, 32),
    "GPT": Subject(
        lambda: models.GPT(width=96, layers=3),
        models.compute_language_loss,
        _load_text,
        Training(0.3, 16, (2, 4)),
        1400,
        50,
        64,
    ),
    "MLP": Subject(make_mlp, mnist.loss, _load_digits, Training(0.05, 16, (1, 2, 3, 4, 5)), digits.N_TRAIN, 50, 256),
}
