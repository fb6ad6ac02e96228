"""Feature rows and true scores of four models for the retrieval benchmarks.

mnist: a CNN; the first 60,000 images are the original ones, the others are shifted, rotated and scaled, and the queries
are the test digits. language: a GPT over text without repeated windows. sentiment: a transformer over spans of
sentences. cifar: a ResNet over images. N rows are the first half of 2N rows.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from benchmarks.common.results import describe_environment
from benchmarks.retrieval import cifar, language, sentiment
from examples import mnist
from tracin_ann import BuildConfig, Checkpoint, InfluenceIndex, Task, build
from tracin_ann.features import RunOptions, TaskRunner
from tracin_ann.scoring.exact import exact_scores
from tracin_ann.task import TaskReference
from tracin_ann.types import Float64

OUTPUT = "the folder of --folder"
ORIGINAL = 60_000
_BLOCK = 10_000
_ROWS_AT_ONCE = 4096


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


def make_digits_task(data: str, folder: str, rows: int) -> Task:
    """Train the CNN on MNIST if necessary, and return the task over MNIST and augmented images."""
    if not (Path(folder) / "runs").exists():
        mnist.train(data, f"{folder}/runs", ORIGINAL, 0)
    return make_task(data, folder, rows)


TASKS = {
    "mnist": make_digits_task,
    "language": language.make_task,
    "sentiment": sentiment.make_task,
    "cifar": cifar.make_task,
}


def compute_true_scores(task: Task, n_queries: int, n_rows: int) -> Float64:
    """Return TracIn scores [Q, N] of the first queries and rows over all parameters, without a sketch."""
    runner = TaskRunner(task, RunOptions(torch.device("cpu"), 256, False), TaskReference())
    checkpoints, queries = range(len(task.checkpoints)), range(n_queries)
    parts = [
        exact_scores(runner, ("query", queries), range(start, min(start + _ROWS_AT_ONCE, n_rows)), checkpoints)
        for start in range(0, n_rows, _ROWS_AT_ONCE)
    ]
    return np.concatenate(parts, axis=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True, help="path of mnist.npz; for other models, the folder of their data")
    parser.add_argument("--folder", required=True, help="folder to write, which the other benchmarks read")
    parser.add_argument("--model", default="mnist", choices=list(TASKS), help="data and model")
    parser.add_argument("--rows", type=int, default=1_000_000, help="number of rows")
    parser.add_argument("--dim", type=int, default=256, help="sketch dimensions per checkpoint")
    parser.add_argument("--true-queries", type=int, default=0, help="number of queries with true scores")
    parser.add_argument("--true-rows", type=int, help="rows with true scores; default: all rows")
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
    print(summary, flush=True)
    if options.true_queries:
        n_rows = options.true_rows or options.rows
        true_QN = compute_true_scores(task, options.true_queries, n_rows)
        np.save(folder / f"true-{n_rows}.npy", true_QN.astype(np.float32))


if __name__ == "__main__":
    main()
