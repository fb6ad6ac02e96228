"""Models of the speed benchmarks (MNIST CNN, ResNets, GPT), a small MLP, and tasks with synthetic data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples import mnist
from tracin_ann import Checkpoint, Task


@dataclass(frozen=True)
class Model:
    """A model, its per-example loss, a function that draws one example, and the batch size of all measurements."""

    make: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Any], Tensor]
    example: Callable[[torch.Generator], tuple[Tensor, Tensor]]
    batch_size: int


def _make_block(inputs: int, outputs: int, pool: bool = False) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, *([nn.MaxPool2d(2)] if pool else []))


class Residual(nn.Module):
    """Two convolution blocks with a skip connection."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(_make_block(channels, channels), _make_block(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def make_resnet9(width: int = 64, classes: int = 10) -> nn.Module:
    """Return a ResNet-9 for 32×32 images; 2.44 million parameters at the default width."""
    w = width
    return nn.Sequential(
        *(_make_block(3, w), _make_block(w, 2 * w, pool=True), Residual(2 * w), _make_block(2 * w, 4 * w, pool=True)),
        *(_make_block(4 * w, 4 * w, pool=True), Residual(4 * w), nn.AdaptiveMaxPool2d(1), nn.Flatten()),
        nn.Linear(4 * w, classes),
    )


class Bottleneck(nn.Module):
    """A residual block of three convolutions, the second of which is narrow."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.inner = nn.Sequential(
            *(nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)),
            *(nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)),
            *(nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)),
        )
        project = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.shortcut = nn.Identity() if inputs == outputs and stride == 1 else project

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.shortcut(x) + self.inner(x))


def make_resnet50(classes: int = 10) -> nn.Module:
    """Return a ResNet-50 for 224×224 images; 23.5 million parameters with 10 classes."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True)]
    layers.append(nn.MaxPool2d(3, 2, 1))
    inputs = 64
    for stage, n_blocks in enumerate((3, 4, 6, 3)):
        for number in range(n_blocks):
            layers.append(Bottleneck(inputs, 64 << stage, 2 if stage and not number else 1))
            inputs = 4 * 64 << stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


class Block(nn.Module):
    """A transformer block: causal attention, then an MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.qkv(self.before(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape)
        x = x + self.out(attended)
        return x + self.down(F.gelu(self.up(self.after(x))))


class GPT(nn.Module):
    """A causal transformer over characters."""

    def __init__(self, width: int = 128, layers: int = 4, vocabulary: int = 65, length: int = 64) -> None:
        super().__init__()
        # Sketches draw their signs by parameter name: recorded figures hold for these names only.
        self.characters, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, max(1, width // 32)) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, index: Tensor) -> Tensor:
        positions = torch.arange(index.shape[1], device=index.device).expand_as(index)
        return self.head(self.norm(self.blocks(self.characters(index) + self.places(positions))))


def compute_language_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the mean cross-entropy over the characters of each row [B]."""
    return F.cross_entropy(model(batch[0]).transpose(1, 2), batch[1], reduction="none").mean(1)


def _make_image_sampler(*shape: int) -> Callable[[torch.Generator], tuple[Tensor, Tensor]]:
    return lambda g: (torch.rand(*shape, generator=g), torch.randint(0, 10, (), generator=g))


def _draw_text(g: torch.Generator) -> tuple[Tensor, Tensor]:
    characters = torch.randint(0, 65, (65,), generator=g)
    return characters[:-1], characters[1:]


MODELS = {
    "MNIST CNN": Model(mnist.model, mnist.loss, _make_image_sampler(1, 28, 28), 64),
    "ResNet-9": Model(make_resnet9, mnist.loss, _make_image_sampler(3, 32, 32), 32),
    "GPT 4x128": Model(GPT, compute_language_loss, _draw_text, 64),
    "GPT 12x288": Model(lambda: GPT(width=288, layers=12), compute_language_loss, _draw_text, 32),
}
"""The models that a CPU can measure."""
LARGE_MODELS = {
    "GPT 12x768": Model(lambda: GPT(width=768, layers=12), compute_language_loss, _draw_text, 256),
    "ResNet-50": Model(make_resnet50, mnist.loss, _make_image_sampler(3, 224, 224), 128),
}
"""Models for GPUs."""
ALL_MODELS = MODELS | LARGE_MODELS


def save_once(make: Callable[[], nn.Module], folder: str) -> None:
    """Save the weights of a new model as the checkpoint in a folder, unless a process has done so."""
    path = Path(folder) / "0.pt"
    if not path.exists():
        torch.manual_seed(0)
        torch.save(make().state_dict(), path)


def make_task(name: str, folder: str, n_rows: int) -> Task:
    """Return a task with synthetic rows and one checkpoint, which is saved in `folder` unless it is there."""
    model = ALL_MODELS[name]
    save_once(model.make, folder)
    generator = torch.Generator().manual_seed(1)
    distinct = [model.example(generator) for _ in range(min(n_rows, 512))]
    rows = [distinct[i % len(distinct)] for i in range(n_rows)]
    return Task(
        model=model.make,
        loss=model.loss,
        train_data=lambda: rows,
        query_data=lambda: rows[:4],
        checkpoints=[Checkpoint(f"{folder}/0.pt", learning_rate=0.1)],
    )


class Repeated(torch.utils.data.Dataset):
    """A data set that repeats a few rows."""

    def __init__(self, distinct: list, n_rows: int) -> None:
        self.distinct, self.n_rows = distinct, n_rows

    def __len__(self) -> int:
        return self.n_rows

    def __getitem__(self, i: int) -> object:
        return self.distinct[i % len(self.distinct)]


def make_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))


def make_mlp_task(folder: str, n_rows: int) -> Task:
    """Return the task of a small MLP; its checkpoint is saved in `folder` unless it is there."""
    g = torch.Generator().manual_seed(0)
    distinct = [(torch.randn(16, generator=g), i % 4) for i in range(512)]
    save_once(make_mlp, folder)
    return Task(
        model=make_mlp,
        loss=lambda m, batch: F.cross_entropy(m(batch[0]), batch[1], reduction="none"),
        train_data=lambda: Repeated(distinct, n_rows),
        query_data=lambda: distinct[:4],
        checkpoints=[Checkpoint(f"{folder}/0.pt", learning_rate=0.1)],
    )
