"""MNIST: train a small CNN with 10% wrong labels, find the training digits behind predictions, and find wrong labels.

`python examples/mnist.py --data DIR` takes a minute; `--data` is an npz with x_train, y_train, x_test, y_test, a folder
with such a mnist.npz, or the folder that torchvision.datasets.MNIST downloads to. To build an index:
`python build_index.py --task examples/mnist.py:task --task-arg data_path=DIR --task-arg runs=runs/mnist/10000-rows
--task-arg rows=10000 --out runs/mine`.
"""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from tracin_ann import Checkpoint, Description, InfluenceIndex, QueryOptions, Task, build
from tracin_ann.analysis import find_mislabelled
from tracin_ann.report import write_report

EPOCHS, RATE, FLIPPED = 3, 0.05, 0.10
Row = tuple[torch.Tensor, int]

# The task: the definition that an index is built from.


def model() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(32 * 7 * 7, 128), nn.ReLU(), nn.Linear(128, 10)),
    )


def loss(net: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(net(batch[0]), batch[1], reduction="none")


class Digits(torch.utils.data.Dataset[Row]):
    """Images as float32 [1, 28, 28] in 0..1, and labels."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray) -> None:
        self.pixels, self.labels = pixels, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> Row:
        return torch.from_numpy(self.pixels[i]).float().div(255).unsqueeze(0), int(self.labels[i])


def describe(row: Row) -> Description:
    return Description(text=f"labelled {row[1]}", image=row[0])


def task(data_path: str, runs: str = "runs/mnist", rows: str = "60000", seed: str = "0") -> Task:
    train_rows, test_rows, _ = data(data_path, int(rows), int(seed))
    return Task(
        model=model,
        loss=loss,
        train_data=lambda: train_rows,
        query_data=lambda: test_rows,
        checkpoints=[Checkpoint(f"{runs}/epoch-{e}.pt", learning_rate=RATE) for e in range(EPOCHS)],
        describe=describe,
        columns=lambda row: {"label": row[1]},
    )


# Its data, training, building the index, queries.


def read(path: str) -> dict[str, np.ndarray]:
    """Return x_train, y_train, x_test, y_test from an npz, its folder, or torchvision's."""
    npz = Path(path) if Path(path).is_file() else Path(path) / "mnist.npz"
    if npz.is_file():
        with np.load(npz) as arrays:
            return {name: arrays[name] for name in ("x_train", "y_train", "x_test", "y_test")}
    return {
        f"{letter}_{'train' if part == 'train' else 'test'}": _read_idx(Path(path), f"{part}-{kind}")
        for part in ("train", "t10k")
        for letter, kind in (("x", "images-idx3-ubyte"), ("y", "labels-idx1-ubyte"))
    }


def _read_idx(folder: Path, name: str) -> np.ndarray:
    """Return the array of a file in MNIST's format (big-endian sizes, then bytes), compressed or not."""
    for path in [p / f"{name}{end}" for p in (folder, folder / "MNIST" / "raw", folder / "raw") for end in ("", ".gz")]:
        if path.is_file():
            raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            dims = raw[3]
            shape = np.frombuffer(raw, ">i4", dims, 4)
            return np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(shape)
    raise SystemExit(
        f"no {name} in {folder}: give --data an npz or the folder that torchvision.datasets.MNIST downloads to"
    )


def data(path: str, rows: int, seed: int) -> tuple[Digits, Digits, np.ndarray]:
    """Return the first `rows` training digits with 10% of their labels changed, the test digits and the changed ids."""
    arrays = read(path)
    labels = arrays["y_train"][:rows].astype(np.int64)
    random = np.random.default_rng(seed)
    flipped = np.sort(random.choice(len(labels), round(FLIPPED * len(labels)), replace=False))
    labels[flipped] = (labels[flipped] + random.integers(1, 10, len(flipped))) % 10
    return Digits(arrays["x_train"][:rows], labels), Digits(arrays["x_test"], arrays["y_test"]), flipped


def train(path: str, runs: str, rows: int, seed: int) -> float:
    """Train, save a checkpoint per epoch, and return the accuracy on the test digits."""
    train_rows, test_rows, _ = data(path, rows, seed)
    random = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    net = model()
    optimiser = torch.optim.SGD(net.parameters(), lr=RATE)
    Path(runs).mkdir(parents=True, exist_ok=True)
    for epoch in range(EPOCHS):
        for batch in torch.utils.data.DataLoader(train_rows, 32, shuffle=True, generator=random):
            optimiser.zero_grad()
            loss(net, batch).mean().backward()
            optimiser.step()
        torch.save(net.state_dict(), f"{runs}/epoch-{epoch}.pt")
    with torch.no_grad():
        right = [net(x).argmax(1) == y for x, y in torch.utils.data.DataLoader(test_rows, 500)]
    return float(torch.cat(right).float().mean())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True, help="mnist.npz, its folder, or torchvision's")
    parser.add_argument("--out", default="runs/mnist", help="directory for checkpoints, index and report")
    parser.add_argument("--rows", type=int, default=10_000, help="training digits to use")
    options = parser.parse_args(arguments)
    out, path = f"{options.out}/{options.rows}-rows", str(Path(options.data).resolve())

    accuracy = train(path, out, options.rows, 0)
    print(f"trained on {options.rows:,} digits, 10% with a wrong label; test accuracy {accuracy:.1%}")

    named = {"data_path": path, "runs": out, "rows": str(options.rows)}
    build(f"{Path(__file__)}:task", f"{out}/index", arguments=named)
    index = InfluenceIndex.open(f"{out}/index")
    answers = index.query(range(4), options=QueryOptions(k=5, rerank="exact"))
    for answer in answers:
        print(f"\ntest digit {answer.query}, {index.describe('query', answer.members[0]).text}")
        for side, hits in (("proponents", answer.proponents), ("opponents", answer.opponents)):
            print(f"  {side}:", ", ".join(f"{hit.id} ({index.columns['label'][hit.row]})" for hit in hits))

    _, _, flipped = data(path, options.rows, 0)
    suspects = find_mislabelled(index, labels="label", k=options.rows // 10)
    found = np.isin([row.row for row in suspects], flipped).sum() / len(flipped)
    print(f"\nthe 10% most suspicious labels contain {found:.0%} of the wrong ones (random order: 10%)")
    report = write_report(answers, f"{out}/report.html", index, "MNIST: training digits behind four predictions")
    print(f"report: {report}")


if __name__ == "__main__":
    main()
