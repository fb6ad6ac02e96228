"""Settings of the attribution benchmarks: real data, models, and training, the same for full runs and for subsets."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.common.cifar import read_cifar
from benchmarks.common.models import GPT, compute_language_loss, make_resnet9
from examples import mnist
from tracin_ann import Checkpoint, Task

Rows = tuple[Tensor, Tensor]
N_ROWS, N_QUERIES = 5000, 500
LENGTH = 32
"""Characters of a window of text."""
CAT, DOG = 3, 5
"""Labels of CIFAR-10."""


@dataclass(frozen=True)
class Training:
    """An optimizer, its schedule, and the epochs (counted from 1) after which a checkpoint is saved.

    Attributes:
        rate: the learning rate, or the first one of a cosine schedule.
        batch: the number of rows of a batch.
        saved: the epochs of the checkpoints; training ends with the last of them.
        optimizer: `sgd` or `adamw`.
        momentum: of SGD.
        weight_decay: of the optimizer.
        schedule: `constant`, or `cosine` down to 0 after the last step.
        drop_last: leave out the rows of an epoch that do not fill a batch. With 2,500 rows in batches of 64, the last
            step of training would otherwise follow the gradient of four rows.
    """

    rate: float
    batch: int
    saved: tuple[int, ...]
    optimizer: str = "sgd"
    momentum: float = 0.0
    weight_decay: float = 0.0
    schedule: str = "constant"
    drop_last: bool = True

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return the optimizer of a model."""
        if self.optimizer == "adamw":
            return torch.optim.AdamW(model.parameters(), self.rate, (0.9, 0.99), weight_decay=self.weight_decay)
        return torch.optim.SGD(model.parameters(), self.rate, self.momentum, weight_decay=self.weight_decay)

    def list_rates(self, n_rows: int) -> list[float]:
        """Return the learning rate of each step of a run on `n_rows` rows."""
        n_steps = self.saved[-1] * self.steps_of_epoch(n_rows)
        if self.schedule == "constant":
            return [self.rate] * n_steps
        return [self.rate * (1 + math.cos(math.pi * step / n_steps)) / 2 for step in range(n_steps)]

    def steps_of_epoch(self, n_rows: int) -> int:
        """Return the number of steps of an epoch."""
        return n_rows // self.batch if self.drop_last else math.ceil(n_rows / self.batch)

    def describe_checkpoint(self, epoch: int, n_rows: int) -> tuple[float, float]:
        """Return a checkpoint's learning rate η_c and its steps Σ_t η_t / (η_c (1 − momentum))."""
        rates = self.list_rates(n_rows)
        rate = rates[epoch * self.steps_of_epoch(n_rows) - 1]
        return rate, sum(rates) / rate / (1 - self.momentum)

    def compute_damping(self, n_rows: int) -> float:
        """Return λ = 1/(ηT) with T steps, which is the same at all checkpoints of a run."""
        rate, n_steps = self.describe_checkpoint(self.saved[0], n_rows)
        return 1 / (rate * n_steps)


@dataclass(frozen=True)
class Setting:
    """A model, its data and its training.

    Attributes:
        make: returns the untrained model.
        loss: the loss of each row of a batch [B].
        load: folder of the data -> training rows, queries.
        training: how it is trained.
        truth_seeds: training runs of each subset, whose losses are averaged.
        loss_is_nll: whether the loss of a row is −log p of one label.
    """

    make: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Any], Tensor]
    load: Callable[[Path], tuple[Rows, Rows]]
    training: Training
    truth_seeds: int
    loss_is_nll: bool = True

    def train(self, data: Path, chosen: Sequence[int], seed: int) -> Iterator[tuple[int, nn.Module, Any]]:
        """Train on the chosen rows, and yield the epoch, the model and the optimizer after each saved epoch."""
        torch.manual_seed(seed)
        model, (rows, _) = self.make().train(), self.load(data)
        images = rows[0].dim() == 4  # noqa: PLR2004 - [N, channels, height, width]
        if images:
            model = model.to(memory_format=torch.channels_last)
        optimizer, index = self.training.make_optimizer(model), torch.as_tensor(chosen)
        rates, n_steps = iter(self.training.list_rates(len(index))), self.training.steps_of_epoch(len(index))
        for epoch in range(1, self.training.saved[-1] + 1):
            for batch in index[torch.randperm(len(index))].split(self.training.batch)[:n_steps]:
                optimizer.param_groups[0]["lr"] = next(rates)
                optimizer.zero_grad()
                self.loss(model, (rows[0][batch], rows[1][batch])).mean().backward()
                optimizer.step()
            if epoch in self.training.saved:
                yield epoch, model, optimizer

    def retrain(self, data: Path, chosen: Sequence[int], seed: int, out: Path) -> None:
        """Train on the chosen rows, and save the last checkpoint."""
        for _, model, _ in self.train(data, chosen, seed):
            torch.save(model.state_dict(), out)

    def train_runs(self, data: Path, folder: Path, seeds: Sequence[int]) -> None:
        """Train on all rows with each seed, and save the checkpoints `SEED-EPOCH.pt` that are missing."""
        folder.mkdir(parents=True, exist_ok=True)
        n_rows = len(self.load(data)[0][0])
        for seed in seeds:
            if all(self.find_checkpoint(folder, seed, epoch).is_file() for epoch in self.training.saved):
                continue
            for epoch, model, optimizer in self.train(data, range(n_rows), seed):
                if self.training.optimizer == "adamw":
                    torch.save(optimizer.state_dict(), folder / f"{seed}-{epoch}.optimizer.pt")
                torch.save(model.state_dict(), self.find_checkpoint(folder, seed, epoch))

    @staticmethod
    def find_checkpoint(folder: Path, seed: int, epoch: int) -> Path:
        """Return the path of a checkpoint of a full run."""
        return folder / f"{seed}-{epoch}.pt"

    def make_task(
        self, data: Path, folder: Path, seeds: Sequence[int], epochs: Sequence[int] | None = None, steps: bool = True
    ) -> Task:
        """Return the task whose checkpoints are those of the runs with these seeds.

        Args:
            data: the folder of the data.
            folder: the folder of `train_runs`.
            seeds: the seeds of the runs.
            epochs: the epochs of the checkpoints; None: all that are saved.
            steps: whether the checkpoints have the number of steps.
        """
        train_rows, query_rows = (_Pairs(*rows) for rows in self.load(data))
        checkpoints = []
        for seed in seeds:
            for epoch in epochs or self.training.saved:
                rate, n_steps = self.training.describe_checkpoint(epoch, len(train_rows))
                moments = folder / f"{seed}-{epoch}.optimizer.pt" if self.training.optimizer == "adamw" else None
                path = self.find_checkpoint(folder, seed, epoch)
                run = Checkpoint(path, rate, moments, steps=n_steps if steps else None, run=str(seed))
                checkpoints.append(run)
        return Task(
            model=self.make,
            loss=self.loss,
            train_data=lambda: train_rows,
            query_data=lambda: query_rows,
            checkpoints=checkpoints,
            retrain=partial(self.retrain, data),
            loss_is_nll=self.loss_is_nll,
        )


class _Pairs(torch.utils.data.Dataset[Rows]):
    """Inputs and targets, row by row."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self.inputs, self.targets = inputs, targets

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.inputs[i], self.targets[i]


@cache
def load_digits(
    data: Path, shape: tuple[int, ...], mean: float = 0.0, deviation: float = 1.0, n_rows: int = N_ROWS
) -> tuple[Rows, Rows]:
    """Return the first MNIST digits of each side: pixels in 0..1, then normalized, [N, *shape], and labels."""
    arrays = mnist.read(str(data))
    sides = []
    for side, count in (("train", n_rows), ("test", N_QUERIES)):
        pixels = torch.from_numpy(arrays[f"x_{side}"][:count]).float().div(255).sub(mean).div(deviation)
        labels = torch.from_numpy(arrays[f"y_{side}"][:count]).long()
        sides.append((pixels.reshape(-1, *shape), labels))
    return sides[0], sides[1]


@cache
def load_text(data: Path, n_rows: int, n_queries: int) -> tuple[Rows, Rows]:
    """Return disjoint windows of tinyshakespeare: training rows from its first 90%, queries from the rest."""
    text = (data / "tinyshakespeare.txt").read_text()
    number = {character: i for i, character in enumerate(sorted(set(text)))}
    characters = torch.tensor([number[character] for character in text])
    border, generator = len(characters) * 9 // 10, torch.Generator().manual_seed(0)
    sides = []
    for part, count in ((characters[:border], n_rows), (characters[border:], n_queries)):
        windows = part.unfold(0, LENGTH + 1, LENGTH)
        drawn = windows[torch.randperm(len(windows), generator=generator)[:count]]
        sides.append((drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()))
    return sides[0], sides[1]


@cache
def load_cats_and_dogs(data: Path, n_rows: int, n_queries: int) -> tuple[Rows, Rows]:
    """Return the first cats (label 0) and dogs (1) of each side of CIFAR-10: images [N, 3, 32, 32], and labels."""
    sides = []
    for side, count in (("train", n_rows), ("test", n_queries)):
        read_image, labels = read_cifar(data, side)
        chosen = np.flatnonzero((labels == CAT) | (labels == DOG))[:count]
        pixels = torch.from_numpy(np.stack([read_image(int(i)) for i in chosen])).permute(0, 3, 1, 2).float()
        sides.append((pixels.div(255).sub(0.5).div(0.25).contiguous(), torch.from_numpy(labels[chosen] == DOG).long()))
    return sides[0], sides[1]


def make_linear() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 10))


def make_mlp(dropout: float = 0.0) -> nn.Module:
    """Return an MLP 784-128-64-10, the size of dattri's benchmark."""
    first, second = ([nn.ReLU(), *([nn.Dropout(dropout)] if dropout else [])] for _ in range(2))
    return nn.Sequential(nn.Linear(784, 128), *first, nn.Linear(128, 64), *second, nn.Linear(64, 10))


def make_cnn() -> nn.Module:
    """Return a CNN with 26,698 parameters."""
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(16 * 7 * 7, 32), nn.ReLU(), nn.Linear(32, 10)),
    )


def make_gpt() -> nn.Module:
    return GPT(width=64, layers=2, length=LENGTH)


def compute_loss(model: nn.Module, batch: Any) -> Tensor:
    """Return the cross-entropy of each row [B]."""
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


_FLAT = partial(load_digits, shape=(784,))
_NORMALIZED = partial(load_digits, shape=(784,), mean=0.1307, deviation=0.3081)
_EIGHT = (1, 2, 4, 6, 9, 12, 16, 20)
_MLP = Setting(make_mlp, compute_loss, _FLAT, Training(0.1, 64, _EIGHT), truth_seeds=5)

SETTINGS = {
    "LR": Setting(make_linear, compute_loss, _FLAT, Training(0.1, 64, _EIGHT), truth_seeds=3),
    "MLP": _MLP,
    "CNN": Setting(
        make_cnn,
        compute_loss,
        partial(load_digits, shape=(1, 28, 28)),
        Training(0.1, 64, (1, 2, 4, 6, 8, 10)),
        truth_seeds=2,
    ),
    "GPT": Setting(
        make_gpt,
        compute_language_loss,
        partial(load_text, n_rows=2000, n_queries=150),
        Training(2e-3, 32, (1, 2, 3, 4, 5, 6, 8, 10), optimizer="adamw", weight_decay=0.01),
        truth_seeds=2,
        loss_is_nll=False,
    ),
    # Cats and dogs, the data set CIFAR-2 of Park et al. 2023, with fewer rows and a narrower model.
    "CIFAR-2": Setting(
        partial(make_resnet9, width=8, classes=2),
        compute_loss,
        partial(load_cats_and_dogs, n_rows=4000, n_queries=N_QUERIES),
        Training(0.005, 50, (1, 2, 4, 6, 8), momentum=0.9, weight_decay=5e-4, schedule="cosine"),
        truth_seeds=2,
    ),
    # The models, optimizers, epochs and batch sizes of dattri's benchmark, with one run of each subset.
    "dattri LR": Setting(
        make_linear, compute_loss, _NORMALIZED, Training(0.01, 32, _EIGHT, drop_last=False), truth_seeds=1
    ),
    "dattri MLP": Setting(
        partial(make_mlp, dropout=0.1),
        compute_loss,
        _NORMALIZED,
        Training(0.01, 64, (2, 5, 10, 15, 20, 30, 40, 50), momentum=0.9, drop_last=False),
        truth_seeds=1,
    ),
    # A short run, and other optimizers and schedules of the MLP.
    "LR, 3 epochs": Setting(make_linear, compute_loss, _FLAT, Training(0.1, 64, (1, 2, 3)), truth_seeds=3),
    "MLP, cosine": replace(_MLP, training=Training(0.2, 64, _EIGHT, schedule="cosine"), truth_seeds=3),
    "MLP, momentum": replace(_MLP, training=Training(0.01, 64, _EIGHT, momentum=0.9), truth_seeds=3),
    "MLP, weight decay": replace(_MLP, training=Training(0.1, 64, _EIGHT, weight_decay=5e-3), truth_seeds=3),
    "MLP, AdamW": replace(
        _MLP, training=Training(1e-3, 64, _EIGHT, optimizer="adamw", weight_decay=0.01), truth_seeds=3
    ),
}
