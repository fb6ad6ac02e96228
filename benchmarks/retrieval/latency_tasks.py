"""Tasks of the latency benchmark: MLP, MNIST-like CNN and character GPT over clustered synthetic rows of any number.

Rows are drawn in blocks with a seed for each block, so the first N rows do not depend on the number of rows, and the
checkpoints of a model serve all sizes. Rows are files that are memory-mapped: `query.py` does not generate them again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.common.models import GPT, compute_language_loss
from examples import mnist
from tracin_ann import Checkpoint, Task

QUERY_ROWS = 20_000
_EPOCHS = 3
_BLOCK = 10_000
_CLUSTERS, _CLASSES, _FLIPPED = 40, 10, 0.05
_FEATURES = 32
_SHIFT = 3
_VOCABULARY, _LENGTH = 65, 64
_TRAIN_SEED, _QUERY_SEED = 1, 2

Random = np.random.Generator


@dataclass(frozen=True)
class Subject:
    """A model, the loss and the rows of its task, and the settings of plain SGD."""

    make: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Any], torch.Tensor]
    draw: Callable[[Random, int], tuple[np.ndarray, np.ndarray]]
    read: Callable[[np.ndarray, int], tuple[torch.Tensor, Any]]
    training_rows: int
    rate: float


def _make_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(_FEATURES, 64), nn.ReLU(), nn.Linear(64, _CLASSES))


def _compute_loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def _draw_clusters(random: Random, n_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the cluster of each row, and the class of the cluster with 5% of wrong labels."""
    cluster_N = random.integers(0, _CLUSTERS, n_rows)
    label_N = cluster_N % _CLASSES
    flipped_N = random.random(n_rows) < _FLIPPED
    label_N[flipped_N] = random.integers(0, _CLASSES, int(flipped_N.sum()))
    return cluster_N, label_N


def _draw_points(random: Random, n_rows: int) -> tuple[np.ndarray, np.ndarray]:
    cluster_N, label_N = _draw_clusters(random, n_rows)
    center = np.random.default_rng(7).standard_normal((_CLUSTERS, _FEATURES))
    return (center[cluster_N] + 0.7 * random.standard_normal((n_rows, _FEATURES))).astype(np.float32), label_N


def _draw_images(random: Random, n_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Return shifted and scaled images with noise; each cluster has a smooth prototype."""
    cluster_N, label_N = _draw_clusters(random, n_rows)
    shift_N2 = random.integers(0, 2 * _SHIFT + 1, (2, n_rows))
    image_NHW = _shift_prototypes()[cluster_N, shift_N2[0], shift_N2[1]]
    image_NHW = image_NHW * random.uniform(0.6, 1, (n_rows, 1, 1)).astype(np.float32)
    image_NHW += 0.1 * random.standard_normal(image_NHW.shape, dtype=np.float32)
    return (255 * image_NHW.clip(0, 1)).astype(np.uint8), label_N


@cache
def _shift_prototypes() -> np.ndarray:
    coarse = torch.from_numpy(np.random.default_rng(7).random((_CLUSTERS, 1, 7, 7), dtype=np.float32))
    smooth = F.interpolate(coarse, size=(28, 28), mode="bicubic").clamp(0, 1)[:, 0].numpy()
    shifts = range(-_SHIFT, _SHIFT + 1)
    return np.stack([np.stack([np.roll(smooth, (y, x), (1, 2)) for x in shifts], 1) for y in shifts], 1)


def _draw_texts(random: Random, n_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Return texts of Markov chains, one chain per cluster; the labels are not used."""
    cluster_N, label_N = _draw_clusters(random, n_rows)
    logits = 2 * np.random.default_rng(7).standard_normal((_CLUSTERS, _VOCABULARY, _VOCABULARY))
    chance = np.exp(logits)
    below = (chance / chance.sum(axis=2, keepdims=True)).cumsum(axis=2).astype(np.float32)
    text_NT = np.empty((n_rows, _LENGTH + 1), np.uint8)
    text_NT[:, 0] = random.integers(0, _VOCABULARY, n_rows)
    for t in range(_LENGTH):
        drawn_N1 = random.random((n_rows, 1), dtype=np.float32)
        next_N = (below[cluster_N, text_NT[:, t]] < drawn_N1).sum(axis=1)
        text_NT[:, t + 1] = next_N.clip(0, _VOCABULARY - 1)
    return text_NT, label_N


def _read_point(values: np.ndarray, label: int) -> tuple[torch.Tensor, int]:
    return torch.tensor(values), label


def _read_image(values: np.ndarray, label: int) -> tuple[torch.Tensor, int]:
    return torch.tensor(values).float().div(255).unsqueeze(0), label


def _read_text(values: np.ndarray, label: int) -> tuple[torch.Tensor, torch.Tensor]:
    characters = torch.tensor(values).long()
    return characters[:-1], characters[1:]


SUBJECTS = {
    "MLP": Subject(_make_mlp, _compute_loss, _draw_points, _read_point, 20_000, 0.1),
    "CNN": Subject(mnist.model, mnist.loss, _draw_images, _read_image, 6_000, mnist.RATE),
    "GPT": Subject(GPT, compute_language_loss, _draw_texts, _read_text, 2_000, 0.3),
}
DESCRIPTIONS = {"MLP": "MLP 32-64-10", "CNN": "MNIST-like CNN", "GPT": "GPT 4x128"}


class Rows(torch.utils.data.Dataset[tuple[torch.Tensor, Any]]):
    """Rows of a subject in two memory-mapped files: inputs and labels."""

    def __init__(self, subject: Subject, path: Path) -> None:
        self._read = subject.read
        self._inputs = np.load(_name_file(path, "inputs"), mmap_mode="r")
        self._labels = np.load(_name_file(path, "labels"), mmap_mode="r")

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, Any]:
        return self._read(self._inputs[i], int(self._labels[i]))


def _name_file(path: Path, part: str) -> Path:
    return path.with_name(f"{path.name}-{part}.npy")


def _write_rows(subject: Subject, path: Path, n_rows: int, seed: int) -> None:
    """Write rows, unless they exist."""
    if _name_file(path, "labels").exists():
        return
    inputs = labels = None
    for start in range(0, n_rows, _BLOCK):
        # A block is drawn completely: its rows do not depend on the number of rows.
        values, marks = subject.draw(np.random.default_rng([seed, start]), _BLOCK)
        if inputs is None:
            shape = (n_rows, *values.shape[1:])
            inputs = np.lib.format.open_memmap(_name_file(path, "inputs"), "w+", values.dtype, shape)
            labels = np.empty(n_rows, np.int64)
        stop = min(start + _BLOCK, n_rows)
        inputs[start:stop], labels[start:stop] = values[: stop - start], marks[: stop - start]
    np.save(_name_file(path, "labels"), labels)


def _name_checkpoint(folder: Path, epoch: int) -> Path:
    return folder / f"epoch-{epoch}.pt"


def prepare(model: str, rows: int, folder: Path) -> None:
    """Write the rows of a task and train its checkpoints, unless they exist."""
    subject = SUBJECTS[model]
    folder.mkdir(parents=True, exist_ok=True)
    _write_rows(subject, folder / f"train-{rows}", rows, _TRAIN_SEED)
    _write_rows(subject, folder / "query", QUERY_ROWS, _QUERY_SEED)
    if _name_checkpoint(folder, _EPOCHS - 1).exists():
        return
    _write_rows(subject, folder / f"train-{subject.training_rows}", subject.training_rows, _TRAIN_SEED)
    data = Rows(subject, folder / f"train-{subject.training_rows}")
    torch.manual_seed(0)
    net, order = subject.make(), torch.Generator().manual_seed(0)
    optimiser = torch.optim.SGD(net.parameters(), lr=subject.rate)
    for epoch in range(_EPOCHS):
        for batch in torch.utils.data.DataLoader(data, 32, shuffle=True, generator=order):
            optimiser.zero_grad()
            subject.loss(net, batch).mean().backward()
            optimiser.step()
        torch.save(net.state_dict(), _name_checkpoint(folder, epoch))


def task(model: str, rows: str, folder: str) -> Task:
    """Return the task of a model, whose files `prepare` wrote."""
    subject, place = SUBJECTS[model], Path(folder)
    train_rows, query_rows = Rows(subject, place / f"train-{rows}"), Rows(subject, place / "query")
    return Task(
        model=subject.make,
        loss=subject.loss,
        train_data=lambda: train_rows,
        query_data=lambda: query_rows,
        checkpoints=[Checkpoint(_name_checkpoint(place, e), learning_rate=subject.rate) for e in range(_EPOCHS)],
    )
