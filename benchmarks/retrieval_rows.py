"""Feature rows to retrieve from: MNIST shifted, turned and scaled to any number of rows; windows of text by a GPT.

The first 60,000 pictures are MNIST's own, so that N rows are the beginning of 2N rows; the queries are the test digits.
The queries of the language model are windows of the text's last tenth.
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

from benchmarks import common
from benchmarks.fidelity_models import SUBJECTS, Training
from examples import mnist
from tracin_ann import BuildConfig, Checkpoint, InfluenceIndex, Task, build

ORIGINAL = 60_000
LANGUAGE_TRAINED_ON = 16_000
_AT_ONCE = 10_000


def augmented(pixels: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Return pictures [B, 28, 28] turned by up to 15 degrees, scaled by up to 15% and shifted by up to 3 pixels."""
    angle, scale, *shift = torch.rand(4, len(pixels), generator=random) * 2 - 1
    angle, scale = angle * np.pi / 12, 1 + 0.15 * scale
    rows = [torch.stack([scale * angle.cos(), -scale * angle.sin(), shift[0] * 3 / 14], 1)]
    rows += [torch.stack([scale * angle.sin(), scale * angle.cos(), shift[1] * 3 / 14], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), [len(pixels), 1, 28, 28], align_corners=False)
    moved = F.grid_sample(pixels[:, None].float(), grid, align_corners=False)
    return moved[:, 0].round().clamp(0, 255).to(torch.uint8)


def pictures(data: mnist.Digits, n_rows: int, path: Path) -> mnist.Digits:
    """Return n_rows digits whose pictures lie in a file, made if it is not there."""
    labels = np.resize(data.labels, n_rows)
    if not path.exists():
        made = np.lib.format.open_memmap(path.with_suffix(".part"), "w+", np.uint8, (n_rows, 28, 28))
        random = torch.Generator().manual_seed(0)
        for start in range(0, n_rows, _AT_ONCE):
            ids = np.arange(start, min(start + _AT_ONCE, n_rows)) % ORIGINAL
            chosen = torch.from_numpy(data.pixels[ids])
            made[start : start + len(ids)] = chosen if start < ORIGINAL else augmented(chosen, random)
        made.flush()
        path.with_suffix(".part").rename(path)
    return mnist.Digits(np.load(path, mmap_mode="r"), labels)


def task(data: str, folder: str, rows: int) -> Task:
    original, queries, _ = mnist.data(data, ORIGINAL, 0)
    train = pictures(original, rows, Path(folder) / f"pictures-{rows}.npy")
    return Task(
        model=mnist.model,
        loss=mnist.loss,
        train_data=lambda: train,
        query_data=lambda: queries,
        checkpoints=[Checkpoint(f"{folder}/runs/epoch-{e}.pt", learning_rate=mnist.RATE) for e in range(mnist.EPOCHS)],
    )


def language(data: str, folder: str, rows: int) -> Task:
    """Return a character GPT over windows of tinyshakespeare, trained on the first of them."""
    subject = replace(SUBJECTS["GPT"], rows=rows, queries=1000, training=Training(0.3, 16, (1, 2, 3)))
    text, queries = subject.data(Path(data), rows, subject.queries, 0)
    runs = Path(folder) / "runs"
    if not runs.exists():
        runs.mkdir(parents=True)
        subject.trained(text[:LANGUAGE_TRAINED_ON], str(runs), 0)
    return subject.over(text, queries, str(runs))


def digits(data: str, folder: str, rows: int) -> Task:
    """Return the CNN over MNIST moved about, trained on MNIST itself."""
    if not (Path(folder) / "runs").exists():
        mnist.train(data, f"{folder}/runs", ORIGINAL, 0)
    return task(data, folder, rows)


MODELS = {"mnist": digits, "language": language}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True, help="mnist.npz, or for language the folder of tinyshakespeare.txt")
    parser.add_argument("--folder", required=True, help="kept: benchmarks.retrieval reads the rows from it")
    parser.add_argument("--model", default="mnist", choices=list(MODELS))
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=256)
    options = parser.parse_args()
    folder = Path(options.folder)
    folder.mkdir(parents=True, exist_ok=True)
    chosen = MODELS[options.model](options.data, options.folder, options.rows)
    began = time.perf_counter()
    config = BuildConfig(dim=options.dim, index="flat", partition_rows=65_536, allow_random_data=True, yardstick=False)
    report = build(chosen, folder / f"index-{options.rows}", config)
    seconds = time.perf_counter() - began
    index = InfluenceIndex.open(folder / f"index-{options.rows}", chosen)
    np.save(folder / "queries.npy", index.features("query", range(len(chosen.query_data()))))
    made = {"rows": options.rows, "dim": options.dim, "seconds": seconds}
    made |= {"rows_extracted": report.rows_extracted, "environment": common.environment()}
    (folder / f"made-{options.rows}.json").write_text(json.dumps(made))
    print(made)


if __name__ == "__main__":
    main()
