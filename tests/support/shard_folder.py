"""A folder with indexes in two shards of a named task, and indexes of the same rows without shards."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from tracin_ann import BuildConfig, build

ROWS, QUERIES, SHARDS = 600, 40, 2
TASK = f"""
import torch
from pathlib import Path
from torch import nn
from torch.nn import functional as F
from tracin_ann import Checkpoint, Task

FOLDER = Path(__file__).parent


def make_rows(n, seed):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(8, generator=generator), i % 3) for i in range(n)]


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def task(rows="{ROWS}"):
    return Task(
        model=lambda: nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)),
        loss=loss,
        train_data=lambda: make_rows(int(rows), 1),
        query_data=lambda: make_rows({QUERIES}, 2),
        checkpoints=[Checkpoint(FOLDER / "0.pt", learning_rate=0.5), Checkpoint(FOLDER / "1.pt", learning_rate=0.25)],
    )
"""


def make_config(kind: str, shards: int = 1, *, append: bool = False) -> BuildConfig:
    """Return how an index of a kind is built."""
    return BuildConfig(
        dim=32,
        batch_size=32,
        device="cpu",
        index=kind,  # type: ignore[arg-type]
        index_shards=shards,
        partition_rows=256,
        yardstick=False,
        append=append,
    )


def make_shard_folder(path: Path, name: str = "shard_task") -> Path:
    """Write the task and the indexes `sharded`, `single`, `flat`, `codes` and `sharded-codes`; return the folder.

    A process can import one task of a name.
    """
    (path / f"{name}.py").write_text(TASK, encoding="utf-8")
    torch.manual_seed(5)
    for number in range(2):
        model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
        torch.save(model.state_dict(), path / f"{number}.pt")
    for index, kind, shards in (
        ("single", "ivf", 1),
        ("sharded", "ivf", SHARDS),
        ("flat", "flat", 1),
        ("codes", "codes", 1),
        ("sharded-codes", "codes", SHARDS),
    ):
        build(f"{path}/{name}.py:task", path / index, make_config(kind, shards))
    return path
