"""What rows that are no batch cost: a graph network of ragged graphs, beside its plain step and beside a loop.

Whole builds by the difference of two sizes, so that starting up, probing and proving do not count; rounds of all that
is compared are interleaved in one process, and medians are reported. Plain is batched forward and backward. The loop is
the ladder's last step, one graph at a time, which such layers would otherwise fall to; the plain loop is forward and
backward of one graph at a time without any sketch.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import common
from tracin_ann import BuildConfig, Checkpoint, Task, build

WIDTH, LAYERS, ATOMS, CLASSES = 64, 3, 16, 2
# Nodes of a graph: small molecules (QM9's have 4 to 9 heavy atoms), and such as drugs are.
SIZES = {"4 to 9 nodes": (4, 9), "8 to 40 nodes": (8, 40)}


class GraphNet(nn.Module):
    """Three rounds of messages along bonds, and the mean over each graph's nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(ATOMS, WIDTH)
        self.own = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.sent = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, nodes: Tensor, bonds: Tensor, graph: Tensor, sizes: Tensor) -> Tensor:
        hidden = torch.relu(self.enter(nodes))
        for own, sent in zip(self.own, self.sent, strict=True):
            message = torch.zeros_like(hidden).index_add(0, bonds[1], hidden[bonds[0]])
            hidden = torch.relu(own(hidden) + sent(message))
        pooled = hidden.new_zeros(len(sizes), WIDTH).index_add(0, graph, hidden)
        return self.head(pooled / sizes.unsqueeze(1))


def molecules(n: int, nodes: tuple[int, int], seed: int = 0) -> list[tuple[Tensor, Tensor, int]]:
    """Return graphs with so many nodes: a random tree, and a few bonds that close rings."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(n):
        size = int(torch.randint(nodes[0], nodes[1] + 1, (), generator=generator))
        parents = (torch.rand(size - 1, generator=generator) * torch.arange(1, size)).long()
        tree = torch.stack([parents, torch.arange(1, size)])
        bonds = torch.cat([tree, torch.randint(0, size, (2, size // 8), generator=generator)], 1)
        atoms = F.one_hot(torch.randint(0, ATOMS, (size,), generator=generator), ATOMS).float()
        made.append((atoms, torch.cat([bonds, bonds.flip(0)], 1), size % CLASSES))
    return made


def collate(graphs: Sequence[Any]) -> list[Tensor]:
    sizes = torch.tensor([len(atoms) for atoms, _, _ in graphs])
    starts = (sizes.cumsum(0) - sizes).tolist()
    return [
        torch.cat([atoms for atoms, _, _ in graphs]),
        torch.cat([bonds + start for (_, bonds, _), start in zip(graphs, starts, strict=True)], 1),
        torch.repeat_interleave(torch.arange(len(graphs)), sizes),
        sizes.float(),
        torch.tensor([label for *_, label in graphs]),
    ]


def loss(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    return F.cross_entropy(model(*batch[:4]), batch[4], reduction="none")


def plain(rows: list, size: int) -> float:
    """Return the seconds a graph of forward and backward in batches of this size, collating included."""
    torch.manual_seed(0)
    model = GraphNet()
    began = time.perf_counter()
    for start in range(0, len(rows), size):
        model.zero_grad()
        loss(model, collate(rows[start : start + size])).sum().backward()
    return (time.perf_counter() - began) / len(rows)


def built(rows: list, size: int, dim: int) -> float:
    """Return the seconds of a whole build."""
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        torch.save(GraphNet().state_dict(), f"{folder}/model.pt")
        task = Task(
            model=GraphNet,
            loss=loss,
            train_data=lambda: rows,
            query_data=lambda: rows[:16],
            checkpoints=[Checkpoint(f"{folder}/model.pt", 0.1)],
            collate=collate,
        )
        began = time.perf_counter()
        build(task, Path(folder) / "index", BuildConfig(dim=dim, batch_size=size))
        return time.perf_counter() - began


def difference(few: list, many: list, options: argparse.Namespace) -> float:
    """Return the seconds that a graph more takes a build."""
    seconds = built(many, options.batch_size, options.dim) - built(few, options.batch_size, options.dim)
    return seconds / (len(many) - len(few))


def looped(few: list, many: list, options: argparse.Namespace) -> float:
    """Return the same where no layer has a rule."""
    with mock.patch("tracin_ann.gradients.engine.covered_layers", return_value={}):
        return difference(few, many, options)


def measured(name: str, options: argparse.Namespace) -> dict[str, Any]:
    few, many = molecules(options.rows, SIZES[name]), molecules(options.rows * 5, SIZES[name])
    ours, theirs, loop, plain_loop = [], [], [], []
    for round_ in range(options.rounds + 1):
        times = (
            difference(few, many, options),
            plain(many, options.batch_size),
            looped(few[: options.rows // 4], few, options),
            plain(few[:200], 1),
        )
        if round_:  # the first warms up
            for kept, seconds in zip((ours, theirs, loop, plain_loop), times, strict=True):
                kept.append(seconds)
    return {
        "model": f"graph network, 3 layers of 64, graphs of {name}",
        "parameters": sum(p.numel() for p in GraphNet().parameters()),
        "row_us": median(ours) * 1e6,
        "plain_us": median(theirs) * 1e6,
        "loop_us": median(loop) * 1e6,
        "plain_loop_us": median(plain_loop) * 1e6,
        "ratio": median(p / o for p, o in zip(theirs, ours, strict=True)),
        "rounds_ratio": [p / o for p, o in zip(theirs, ours, strict=True)],
        "times_the_loop": median(slow / o for slow, o in zip(loop, ours, strict=True)),
        "times_the_plain_loop": median(slow / o for slow, o in zip(plain_loop, ours, strict=True)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    common.reported("attribution", vars(options), (measured(name, options) for name in SIZES))


if __name__ == "__main__":
    main()
