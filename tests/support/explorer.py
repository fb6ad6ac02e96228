"""An explorer of a small index: 40 training rows with ids, labels and texts; queries can be typed."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import uvicorn
from fastapi import FastAPI
from starlette.testclient import TestClient

from tasks.toy import CONFIG, Toy, cross_entropy, save_checkpoints
from tracin_ann import InfluenceIndex, Task, build
from tracin_ann.serve import IndexLocation, Settings, create_app

N_TRAIN, N_QUERIES = 40, 12
LOCAL = "http://127.0.0.1:8321"


def make_row(place: int, side: str) -> dict:
    generator = torch.Generator().manual_seed(place + (1000 if side == "query" else 0))
    return {
        "x": torch.randn(5, generator=generator),
        "y": place % 3,
        "id": f"{side}/{place}",
        "text": f"{side} {place}",
    }


def read_query(record: dict) -> dict:
    if "image" in record:
        return make_row(record["image"].size[0], "picture")
    if record["text"].startswith("refused"):
        raise KeyError(record["text"])
    return make_row(len(record["text"]), record["text"])


def collate(rows: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.stack([row["x"] for row in rows]), torch.tensor([row["y"] for row in rows])


def make_task(folder: Path, sizes: list[int]) -> Task:
    """Return the task; `sizes[0]` is the number of training rows when the data are read."""
    torch.manual_seed(0)
    return Task(
        model=Toy,
        loss=cross_entropy,
        train_data=lambda: [make_row(place, "train") for place in range(sizes[0])],
        query_data=lambda: [make_row(place, "query") for place in range(N_QUERIES)],
        checkpoints=save_checkpoints(Toy(), folder),
        collate=collate,
        describe=lambda row: row["text"],
        ids=lambda row: row["id"],
        columns=lambda row: {"label": row["y"], "nan": float("nan"), "name": row["text"]},
        read_query=read_query,
    )


@dataclass
class Place:
    """A built index and its task; `sizes[0]` is the number of training rows."""

    task: Task
    directory: Path
    sizes: list[int]

    def open(self) -> InfluenceIndex:
        return InfluenceIndex.open(self.directory, self.task, device="cpu")

    def append(self, n_rows: int) -> None:
        self.sizes[0] += n_rows
        build(self.task, self.directory, replace(CONFIG, append=True))

    @property
    def location(self) -> IndexLocation:
        return IndexLocation(self.directory, self.task, device="cpu")


def build_place(folder: Path) -> Place:
    sizes = [N_TRAIN]
    task = make_task(folder, sizes)
    build(task, folder / "index", CONFIG)
    return Place(task, folder / "index", sizes)


@contextmanager
def serve(location: IndexLocation, settings: Settings | None = None) -> Iterator[TestClient]:
    with TestClient(create_app(location, settings), base_url=LOCAL, follow_redirects=False) as client:
        yield client


@contextmanager
def listen(app: FastAPI) -> Iterator[str]:
    """Yield the address of an application that listens on a free port of this machine."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, ws="none"))
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
