"""A classifier of short texts whose queries may be typed, read from files, or taken from pictures: `typed.py:task`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tasks.toy import Toy, cross_entropy, save_checkpoints
from tracin_ann import Checkpoint, Task
from tracin_ann.errors import TaskError

WORDS = ("red", "green", "blue", "grey", "white")
TEXTS = [f"{WORDS[i % 5]} {WORDS[i * i % 5]} {WORDS[i // 7 % 5]}" for i in range(30)]
QUERIES = ["red red blue", "white grey", "green", "blue white white"]


def encode(text: str, label: int = 0) -> dict[str, Any]:
    """Return an example: counts of the words [5], the label, and the text."""
    words = str(text).split()
    return {"x": torch.tensor([float(words.count(word)) for word in WORDS]), "y": label, "text": str(text)}


def read_query(record: dict[str, Any]) -> dict[str, Any]:
    """Return the example of a text, or of a picture by its mean grey."""
    if "image" in record:
        mean = float(np.asarray(record["image"].convert("L"), dtype=np.float64).mean())
        return {"x": torch.full((5,), mean / 256), "y": 0, "text": f"a picture of {record['image'].size}"}
    if record["text"] == "refused":
        raise TaskError("this text is refused")
    return encode(record["text"], record.get("label", 0))


def collate(rows: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    return torch.stack([row["x"] for row in rows]), torch.tensor([row["y"] for row in rows])


def task(folder: str, typed: str = "yes") -> Task:
    """Return the task; with `typed=no`, one without `read_query`."""
    path = Path(folder)
    if not (path / "checkpoint1.pt").exists():
        torch.manual_seed(0)
        save_checkpoints(Toy(), path)
    return Task(
        model=Toy,
        loss=cross_entropy,
        train_data=lambda: [encode(text, i % 3) for i, text in enumerate(TEXTS)],
        query_data=lambda: [encode(text, i % 3) for i, text in enumerate(QUERIES)],
        checkpoints=[Checkpoint(path / f"checkpoint{i}.pt", learning_rate=rate) for i, rate in enumerate((0.5, 0.125))],
        collate=collate,
        describe=lambda row: row["text"],
        read_query=read_query if typed == "yes" else None,
    )
