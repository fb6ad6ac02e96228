"""CIFAR-10: train a narrow ResNet-9 on a subset of the images, and find the training images behind its mistakes.

`python examples/cifar10.py --data DIR` takes two minutes; DIR holds the cifar-10-batches-py of the public download, or
cifar10_jpeg.npz (concatenated JPEG files, their offsets, y_train and y_test). To query the index afterwards:
`python query.py runs/cifar10/2000-rows/index --ids 0-4`; to build an index: `python build_index.py --task
examples/cifar10.py:task --task-arg data=DIR --task-arg out=runs/cifar10/2000-rows --out runs/cifar10/2000-rows/index`.
"""

from __future__ import annotations

import argparse
import io
import pickle
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from tracin_ann import Checkpoint, Description, InfluenceIndex, QueryOptions, Task, build
from tracin_ann.report import write_report

Row = tuple[torch.Tensor, int, int]  # image [3, 32, 32] in 0..1, label, position in the data set

# The task: the definition that an index is built from.

EPOCHS, ROWS, WIDTH = (2, 5, 8), 2000, 16
RATES = [0.03 * min(1, (9 - epoch) / 6) for epoch in range(1, max(EPOCHS) + 1)]  # decreasing from epoch 3
NAMES = "airplane automobile bird cat deer dog frog horse ship truck".split()


def block(inputs: int, outputs: int, *more: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(), *more)


class Residual(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + super().forward(x)


def model(w: int = WIDTH) -> nn.Module:
    return nn.Sequential(
        *(block(3, w, nn.MaxPool2d(2)), block(w, 2 * w), Residual(block(2 * w, 2 * w), block(2 * w, 2 * w))),
        *(block(2 * w, 4 * w, nn.MaxPool2d(2)), block(4 * w, 4 * w, nn.MaxPool2d(2))),
        *(Residual(block(4 * w, 4 * w), block(4 * w, 4 * w)), nn.AdaptiveMaxPool2d(1), nn.Flatten()),
        nn.Linear(4 * w, 10),
    )


def loss(net: nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return F.cross_entropy(net(batch[0] - 0.5), batch[1], reduction="none")


def task(data: str, out: str = "runs/cifar10/2000-rows", rows: str = str(ROWS)) -> Task:
    return Task(
        model=model,
        loss=loss,
        train_data=lambda: read(data, "train", int(rows)),
        query_data=lambda: read(data, "test", 500),
        checkpoints=[Checkpoint(f"{out}/epoch-{e}.pt", learning_rate=RATES[e - 1]) for e in EPOCHS],
        describe=lambda row: Description(text=NAMES[row[1]], image=row[0]),
        columns=lambda row: {"label": NAMES[row[1]], "brightness": float(row[0].mean())},
        ids=lambda row: row[2],
    )


# Its data, training, building the index, queries.


def read(data: str, part: str, rows: int) -> list[Row]:
    """Return the first rows of a part, `train` or `test`."""
    npz, folder = Path(data) / "cifar10_jpeg.npz", Path(data) / "cifar-10-batches-py"
    if npz.is_file():
        from PIL import Image  # noqa: PLC0415 - only this form of the data requires it

        with np.load(npz) as arrays:
            offsets, jpeg = arrays[f"offsets_{part}"], arrays[f"jpeg_{part}"]
            labels = arrays[f"y_{part}"][:rows].tolist()
        packed = [jpeg[offsets[i] : offsets[i + 1]].tobytes() for i in range(len(labels))]
        images = [np.asarray(Image.open(io.BytesIO(file))).transpose(2, 0, 1) for file in packed]
    elif folder.is_dir():
        files = [folder / f"data_batch_{n}" for n in range(1, 6)] if part == "train" else [folder / "test_batch"]
        batches = [pickle.loads(file.read_bytes(), encoding="latin1") for file in files]
        images = list(np.concatenate([batch["data"] for batch in batches])[:rows].reshape(-1, 3, 32, 32))
        labels = [label for batch in batches for label in batch["labels"]][:rows]
    else:
        raise SystemExit(f"no cifar-10-batches-py and no cifar10_jpeg.npz in {data}")
    scaled = torch.from_numpy(np.stack(images)).float() / 255
    return [(scaled[n], label, n) for n, label in enumerate(labels)]


def train(rows: list[Row], out: str) -> nn.Module:
    """Train and save checkpoints."""
    torch.manual_seed(0)
    net = model()
    optimiser = torch.optim.SGD(net.parameters(), lr=RATES[0], momentum=0.9)
    order = torch.utils.data.DataLoader(rows, 25, shuffle=True)
    Path(out).mkdir(parents=True, exist_ok=True)
    for epoch, rate in enumerate(RATES, 1):
        optimiser.param_groups[0]["lr"] = rate
        for images, labels, _ in order:
            flipped = torch.where(torch.rand(len(labels), 1, 1, 1) < 0.5, images.flip(3), images)
            optimiser.zero_grad()
            loss(net, (flipped, labels)).mean().backward()
            optimiser.step()
        if epoch in EPOCHS:
            torch.save(net.state_dict(), f"{out}/epoch-{epoch}.pt")
    return net.eval()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True, help="folder of the images")
    parser.add_argument("--out", default="runs/cifar10", help="directory for checkpoints, index and report")
    parser.add_argument("--rows", type=int, default=ROWS, help="images to train on")
    options = parser.parse_args(arguments)
    out = f"{options.out}/{options.rows}-rows"

    net = train(read(options.data, "train", options.rows), out)
    images, labels, _ = torch.utils.data.default_collate(read(options.data, "test", 500))
    with torch.no_grad():
        predicted = torch.cat([net(some - 0.5).argmax(1) for some in images.split(100)])
    print(f"trained on {options.rows:,} images; test accuracy {(predicted == labels).float().mean():.1%}")

    named = {"data": str(Path(options.data).resolve()), "out": out, "rows": str(options.rows)}
    build(f"{Path(__file__)}:task", f"{out}/index", arguments=named)
    index = InfluenceIndex.open(f"{out}/index")
    mistakes = (predicted != labels).nonzero().flatten().tolist()[:4]
    answers = index.query(mistakes, options=QueryOptions(k=5, rerank="exact", candidates=50))
    for answer, query in zip(answers, mistakes, strict=True):
        print(f"\ntest image {answer.query}: {NAMES[labels[query]]}, classified as {NAMES[predicted[query]]}")
        for side, hits in (("proponents", answer.proponents), ("opponents", answer.opponents)):
            shown = [f"{hit.id} {index.describe('train', hit.row).text} {hit.score:+.2f}" for hit in hits]
            print(f"  {side}: {', '.join(shown)}")
    report = write_report(answers, f"{out}/report.html", index, "Training images behind the mistakes of a ResNet-9")
    print(f"\nreport: {report}")


if __name__ == "__main__":
    main()
