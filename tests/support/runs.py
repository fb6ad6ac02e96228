"""Small training runs, and the exact scores of their tasks beside brute-force autograd."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import oracle
from tracin_ann import BuildConfig, InfluenceIndex, QueryOptions, Task, build

CONFIG = BuildConfig(dim=32, batch_size=8, device="cpu", dtype="float32", index="flat", yardstick=False)


class Small(nn.Module):
    """A convolution, a norm and a linear head; the scale of the head is a parameter of size 1."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, width, 3), nn.GroupNorm(2, width), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(width * 16, 3)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)) * self.scale


def make_images(n: int, seed: int = 1) -> list[tuple[Tensor, int]]:
    """Return images [1, 6, 6] whose class is the row of their bright band."""
    random = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(n):
        image = torch.randn(1, 6, 6, generator=random)
        image[0, 2 * (i % 3) : 2 * (i % 3) + 2] += 1.0
        rows.append((image, i % 3))
    return rows


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def batches(rows: Sequence[tuple[Tensor, int]], size: int) -> list[tuple[Tensor, Tensor]]:
    return [
        (torch.stack([x for x, _ in rows[i : i + size]]), torch.tensor([y for _, y in rows[i : i + size]]))
        for i in range(0, len(rows), size)
    ]


def exact_scores(task: Task, out: Path, **options: Any) -> np.ndarray:
    """Return the exact scores [Q, N] of an index of the task, built with these options."""
    build(task, out, replace(CONFIG, **options))
    index = InfluenceIndex.open(out, task, device="cpu")
    return collect_scores(index, len(task.query_data()), len(task.train_data()))


def collect_scores(index: InfluenceIndex, n_queries: int, n_train: int, **options: Any) -> np.ndarray:
    """Return the exact scores [Q, N] of the first queries and all rows of an index, with these query options."""
    scores = np.full((n_queries, n_train), np.nan)
    answers = index.query(range(n_queries), options=QueryOptions(k=n_train, exact=True, **options))
    for row, answer in zip(scores, answers, strict=True):
        for hit in (*answer.proponents, *answer.opponents):
            row[hit.row] = hit.score
    return scores


def brute_force_scores(
    models: Sequence[nn.Module], rates: Sequence[Mapping[str, float]], loss: Any, queries: Any, rows: Any
) -> np.ndarray:
    """Return TracInCP scores [Q, N] with a rate of each parameter, by a loop of autograd in float64.

    Args:
        models: the model at each checkpoint.
        rates: the rates of its parameters at each checkpoint, by name.
        loss: the loss per example.
        queries: the queries.
        rows: the training rows.
    """
    total = np.zeros((len(queries), len(rows)))
    for trained, rate_of in zip(models, rates, strict=True):
        model = copy.deepcopy(trained)
        rate_P = torch.cat(
            [torch.full((p.numel(),), rate_of[name]) for name, p in model.named_parameters() if p.requires_grad]
        )
        query_QP, row_NP = (oracle.gradients(model, loss, examples) for examples in (queries, rows))
        total += (query_QP * rate_P.double() @ row_NP.T).numpy()
    return total


def assert_close(scores: np.ndarray, expected: np.ndarray, tolerance: float = 1e-4) -> None:
    """Assert that all scores are within a part of the largest one."""
    assert not np.isnan(scores).any()
    assert np.abs(scores - expected).max() <= tolerance * np.abs(expected).max()
