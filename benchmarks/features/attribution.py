"""Time per graph of a build for a graph network whose batches concatenate graphs of different sizes.

The time per graph is the difference between builds of two sizes, which excludes the fixed costs. It is compared with
three others: the plain step (batched forward and backward), the loop (the library's method for layers that it cannot
batch, one graph at a time) and the plain loop (forward and backward of one graph at a time, without a sketch). Rounds
are interleaved in one process; the medians are reported.
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

from benchmarks.common.results import report_results
from tracin_ann import BuildConfig, Checkpoint, Task, build

RESULT = "attribution"
WIDTH, LAYERS, ATOMS, CLASSES = 64, 3, 16, 2
# Nodes per graph: small molecules (those of QM9 have up to 9 heavy atoms), and molecules of the size of drugs.
SIZES = {"4 to 9 nodes": (4, 9), "8 to 40 nodes": (8, 40)}


class GraphNet(nn.Module):
    """Three rounds of message passing along bonds, then the mean over the nodes of each graph."""

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


def make_molecules(n: int, nodes: tuple[int, int], seed: int = 0) -> list[tuple[Tensor, Tensor, int]]:
    """Return random trees with a few more bonds, which close rings; `nodes` is the range of sizes."""
    generator = torch.Generator().manual_seed(seed)
    graphs = []
    for _ in range(n):
        size = int(torch.randint(nodes[0], nodes[1] + 1, (), generator=generator))
        parents = (torch.rand(size - 1, generator=generator) * torch.arange(1, size)).long()
        tree = torch.stack([parents, torch.arange(1, size)])
        bonds = torch.cat([tree, torch.randint(0, size, (2, size // 8), generator=generator)], 1)
        atoms = F.one_hot(torch.randint(0, ATOMS, (size,), generator=generator), ATOMS).float()
        graphs.append((atoms, torch.cat([bonds, bonds.flip(0)], 1), size % CLASSES))
    return graphs


def collate(graphs: Sequence[Any]) -> list[Tensor]:
    """Concatenate graphs into nodes, bonds, the graph of each node, sizes and labels."""
    sizes = torch.tensor([len(atoms) for atoms, _, _ in graphs])
    starts = (sizes.cumsum(0) - sizes).tolist()
    return [
        torch.cat([atoms for atoms, _, _ in graphs]),
        torch.cat([bonds + start for (_, bonds, _), start in zip(graphs, starts, strict=True)], 1),
        torch.repeat_interleave(torch.arange(len(graphs)), sizes),
        sizes.float(),
        torch.tensor([label for *_, label in graphs]),
    ]


def compute_loss(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    return F.cross_entropy(model(*batch[:4]), batch[4], reduction="none")


def time_plain_step(rows: list, size: int) -> float:
    """Return the seconds per graph of batched forward and backward, with collating."""
    torch.manual_seed(0)
    model = GraphNet()
    start_s = time.perf_counter()
    for start in range(0, len(rows), size):
        model.zero_grad()
        compute_loss(model, collate(rows[start : start + size])).sum().backward()
    return (time.perf_counter() - start_s) / len(rows)


def time_build(rows: list, size: int, dim: int) -> float:
    """Return the seconds of a complete build."""
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        torch.save(GraphNet().state_dict(), f"{folder}/model.pt")
        task = Task(
            model=GraphNet,
            loss=compute_loss,
            train_data=lambda: rows,
            query_data=lambda: rows[:16],
            checkpoints=[Checkpoint(f"{folder}/model.pt", 0.1)],
            collate=collate,
        )
        start_s = time.perf_counter()
        build(task, Path(folder) / "index", BuildConfig(dim=dim, batch_size=size))
        return time.perf_counter() - start_s


def time_graph(few: list, many: list, options: argparse.Namespace) -> float:
    """Return the seconds that a build needs for one more graph."""
    seconds = time_build(many, options.batch_size, options.dim) - time_build(few, options.batch_size, options.dim)
    return seconds / (len(many) - len(few))


def time_graph_by_loop(few: list, many: list, options: argparse.Namespace) -> float:
    """Return the same for a build that processes one graph at a time, because no layer is covered."""
    with mock.patch("tracin_ann.gradients.engine.find_covered_layers", return_value={}):
        return time_graph(few, many, options)


def measure_sizes(name: str, options: argparse.Namespace) -> dict[str, Any]:
    few, many = make_molecules(options.rows, SIZES[name]), make_molecules(options.rows * 5, SIZES[name])
    build_s, plain_s, loop_s, plain_loop_s = [], [], [], []
    for round_ in range(options.rounds + 1):
        times = (
            time_graph(few, many, options),
            time_plain_step(many, options.batch_size),
            time_graph_by_loop(few[: options.rows // 4], few, options),
            time_plain_step(few[:200], 1),
        )
        if round_:  # the first round is a warm-up
            for measured, seconds in zip((build_s, plain_s, loop_s, plain_loop_s), times, strict=True):
                measured.append(seconds)
    return {
        "model": f"graph network, 3 layers of 64, graphs of {name}",
        "parameters": sum(p.numel() for p in GraphNet().parameters()),
        "row_us": median(build_s) * 1e6,
        "plain_us": median(plain_s) * 1e6,
        "loop_us": median(loop_s) * 1e6,
        "plain_loop_us": median(plain_loop_s) * 1e6,
        "ratio": median(p / o for p, o in zip(plain_s, build_s, strict=True)),
        "rounds_ratio": [p / o for p, o in zip(plain_s, build_s, strict=True)],
        "times_the_loop": median(slow / o for slow, o in zip(loop_s, build_s, strict=True)),
        "times_the_plain_loop": median(slow / o for slow, o in zip(plain_loop_s, build_s, strict=True)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--rows", type=int, default=1000, help="graphs of the smaller build; the larger has 5 times as many"
    )
    parser.add_argument("--batch-size", type=int, default=64, help="graphs per batch")
    parser.add_argument("--dim", type=int, default=1024, help="sketch dimensions per checkpoint")
    parser.add_argument("--rounds", type=int, default=5, help="number of measured rounds")
    parser.add_argument("--threads", type=int, default=2, help="number of CPU threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    report_results(RESULT, vars(options), (measure_sizes(name, options) for name in SIZES))


if __name__ == "__main__":
    main()
