"""Feature rows for the retrieval benchmarks: augmented MNIST of any size, or windows of text with a GPT.

The first 60,000 images are the original ones; the others are shifted, rotated and scaled. N rows are the first half of
2N rows. The queries are the test digits; for the language model, windows of the last tenth of the text.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from benchmarks.common.results import describe_environment
from benchmarks.common.trained_models import SUBJECTS, Training
from examples import mnist
from tracin_ann import BuildConfig, Checkpoint, InfluenceIndex, Task, build

OUTPUT = "the folder of --folder"
ORIGINAL = 60_000
LANGUAGE_TRAINING_ROWS = 16_000
_BLOCK = 10_000


def augment(pixels: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Return images [B, 28, 28] rotated by up to 15 degrees, scaled by up to 15% and shifted by up to 3 pixels."""
    angle, scale, *shift = torch.rand(4, len(pixels), generator=random) * 2 - 1
    angle, scale = angle * np.pi / 12, 1 + 0.15 * scale
    rows = [torch.stack([scale * angle.cos(), -scale * angle.sin(), shift[0] * 3 / 14], 1)]
    rows += [torch.stack([scale * angle.sin(), scale * angle.cos(), shift[1] * 3 / 14], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), [len(pixels), 1, 28, 28], align_corners=False)
    moved = F.grid_sample(pixels[:, None].float(), grid, align_corners=False)
    return moved[:, 0].round().clamp(0, 255).to(torch.uint8)


def make_images(data: mnist.Digits, n_rows: int, path: Path) -> mnist.Digits:
    """Return n_rows digits whose images are in a file, which is written if it does not exist."""
    labels = np.resize(data.labels, n_rows)
    if not path.exists():
        image_N = np.lib.format.open_memmap(path.with_suffix(".part"), "w+", np.uint8, (n_rows, 28, 28))
        random = torch.Generator().manual_seed(0)
        for start in range(0, n_rows, _BLOCK):
            ids = np.arange(start, min(start + _BLOCK, n_rows)) % ORIGINAL
            block = torch.from_numpy(data.pixels[ids])
            image_N[start : start + len(ids)] = block if start < ORIGINAL else augment(block, random)
        image_N.flush()
        path.with_suffix(".part").rename(path)
    return mnist.Digits(np.load(path, mmap_mode="r"), labels)


def make_task(data: str, folder: str, rows: int) -> Task:
    """Return the task over MNIST and augmented images."""
    original, queries, _ = mnist.data(data, ORIGINAL, 0)
    train = make_images(original, rows, Path(folder) / f"pictures-{rows}.npy")
    return Task(
        model=mnist.model,
        loss=mnist.loss,
        train_data=lambda: train,
        query_data=lambda: queries,
        checkpoints=[Checkpoint(f"{folder}/runs/epoch-{e}.pt", learning_rate=mnist.RATE) for e in range(mnist.EPOCHS)],
    )


def make_language_task(data: str, folder: str, rows: int) -> Task:
    """Return the task of a character GPT over windows of tinyshakespeare; the first of them train it."""
    subject = replace(SUBJECTS["GPT"], rows=rows, queries=1000, training=Training(0.3, 16, (1, 2, 3)))
    text, queries = subject.data(Path(data), rows, subject.queries, 0)
    runs = Path(folder) / "runs"
    if not runs.exists():
        runs.mkdir(parents=True)
        subject.train(text[:LANGUAGE_TRAINING_ROWS], str(runs), 0)
    return subject.make_task(text, queries, str(runs))


def make_digits_task(data: str, folder: str, rows: int) -> Task:
    """Train the CNN on MNIST if necessary, and return the task over MNIST and augmented images."""
    if not (Path(folder) / "runs").exists():
        mnist.train(data, f"{folder}/runs", ORIGINAL, 0)
    return make_task(data, folder, rows)


TASKS = {"mnist": make_digits_task, "language": make_language_task}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--data", required=True, help="path of mnist.npz; for --model language, the folder of tinyshakespeare.txt"
    )
    parser.add_argument("--folder", required=True, help="folder to write, which benchmarks.retrieval.lists reads")
    parser.add_argument("--model", default="mnist", choices=list(TASKS), help="data and model")
    parser.add_argument("--rows", type=int, default=1_000_000, help="number of rows")
    parser.add_argument("--dim", type=int, default=256, help="sketch dimensions per checkpoint")
    options = parser.parse_args()
    folder = Path(options.folder)
    folder.mkdir(parents=True, exist_ok=True)
    task = TASKS[options.model](options.data, options.folder, options.rows)
    start_s = time.perf_counter()
    config = BuildConfig(dim=options.dim, index="flat", allow_random_data=True, yardstick=False)
    report = build(task, folder / f"index-{options.rows}", config)
    seconds = time.perf_counter() - start_s
    index = InfluenceIndex.open(folder / f"index-{options.rows}", task)
    np.save(folder / "queries.npy", index.features("query", range(len(task.query_data()))))
    summary = {"rows": options.rows, "dim": options.dim, "seconds": seconds}
    summary |= {"rows_extracted": report.rows_extracted, "environment": describe_environment()}
    (folder / f"made-{options.rows}.json").write_text(json.dumps(summary))
    print(summary)


if __name__ == "__main__":
    main()
