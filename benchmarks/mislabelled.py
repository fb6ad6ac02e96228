"""Wrong labels found, and how many to look at: digits, MNIST and SST-2 with shares of their labels flipped.

`--data` is a folder with mnist.npz and sst2_train.tsv, sst2_dev.tsv (see examples/mnist.py and examples/sst2.py for
their forms). Models train on the flipped labels; only the figures know which those are. `--vectors` adds SST-2 by a
line through frozen sentence vectors: an npz of arrays `train` and `dev`, a row a line of the files. `--encoder` adds
SST-2 by a pretrained encoder, fine-tuned: a folder that Hugging Face's `AutoModel` loads (needs `transformers`).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks import common, sst2_encoder
from benchmarks.mislabelled_digits import auc
from examples import digits, mnist, sst2
from tracin_ann import BuildConfig, Checkpoint, InfluenceIndex, Task, build
from tracin_ann.analysis import find_mislabelled

CHECKED = (0.1, 0.2)
EPOCHS, KEPT, BATCH = 8, (7, 8), 32
Labels = np.ndarray


@dataclass(frozen=True)
class Recipe:
    """The learning rate at first, and the share of the inputs that are dropped at random."""

    rate: float
    drop: float = 0.0


def of_digits(folder: Path, rate: float, seed: int) -> tuple[Task, float, Labels]:
    digits.FLIPPED = rate
    accuracy = digits.train(folder, seed)
    return digits.task(str(folder), str(seed)), accuracy, digits.data(seed)[2]


def of_mnist(path: Path, rows: int, folder: Path, rate: float, seed: int) -> tuple[Task, float, Labels]:
    mnist.FLIPPED = rate
    accuracy = mnist.train(str(path), str(folder), rows, seed)
    return mnist.task(str(path), str(folder), str(rows), str(seed)), accuracy, mnist.data(str(path), rows, seed)[2]


def flipped_labels(labels: Labels, rate: float, seed: int) -> tuple[Labels, Labels]:
    """Return 0/1 labels with a share of them changed, and which."""
    random = np.random.default_rng(seed)
    flipped = np.sort(random.choice(len(labels), round(rate * len(labels)), replace=False))
    changed = labels.copy()
    changed[flipped] = 1 - changed[flipped]
    return changed, flipped


def of_words(data: Path, folder: Path, rate: float, seed: int) -> tuple[Task, float, Labels]:
    """Train the mean of word vectors, words dropped at random."""
    train_rows, test_rows = (sst2._sentences(str(data), part) for part in ("train", "dev"))
    labels, flipped = flipped_labels(np.array([row[1] for row in train_rows]), rate, seed)
    train_rows = [(text, int(label), name) for (text, _, name), label in zip(train_rows, labels, strict=True)]
    places = sst2.vocabulary(train_rows)

    def collate_rows(rows: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        return sst2.collate_rows(rows, places)

    words, targets = collated(train_rows)
    torch.manual_seed(seed)
    net = sst2.Bag(len(places))
    checkpoints = trained(net, words, targets, folder, Recipe(2.0, drop=0.3))
    task = Task(lambda: sst2.Bag(len(places)), sst2.loss, lambda: train_rows, lambda: test_rows, checkpoints)
    return replace(task, collate=collated), accuracy_on(net, *collated(test_rows)), flipped


def of_vectors(data: Path, vectors: Path, folder: Path, rate: float, seed: int) -> tuple[Task, float, Labels]:
    """Train a line through frozen sentence vectors, each of their dimensions at mean 0 and all at length 1 or so."""
    labels, dev = (np.array([row[1] for row in sst2._sentences(str(data), part)]) for part in ("train", "dev"))
    labels, flipped = flipped_labels(labels, rate, seed)
    with np.load(vectors) as arrays:
        given = [arrays[part].reshape(len(arrays[part]), -1).astype(np.float32) for part in ("train", "dev")]
    mean_E, spread_E = given[0].mean(axis=0), given[0].std(axis=0) + 1e-6
    train_x, dev_x = (torch.from_numpy((part - mean_E) / spread_E / len(mean_E) ** 0.5) for part in given)
    train_y, dev_y = torch.from_numpy(labels), torch.from_numpy(dev)

    def model() -> nn.Module:
        return nn.Linear(len(mean_E), 2)

    torch.manual_seed(seed)
    net = model()
    checkpoints = trained(net, train_x, train_y, folder, Recipe(1.0))
    rows = torch.utils.data.TensorDataset(train_x, train_y), torch.utils.data.TensorDataset(dev_x, dev_y)
    task = Task(model, sst2.loss, lambda: rows[0], lambda: rows[1], checkpoints)
    return task, accuracy_on(net, dev_x, dev_y), flipped


def of_encoder(data: Path, encoder: Path, folder: Path, rate: float, seed: int) -> tuple[Task, float, Labels]:
    """Fine-tune a pretrained encoder, all of it."""
    train_rows, dev_rows = (sst2._sentences(str(data), part) for part in ("train", "dev"))
    train_rows.sort(key=lambda row: len(row[0].split()))
    labels, flipped = flipped_labels(np.array([row[1] for row in train_rows]), rate, seed)
    train_rows = [(text, int(label), name) for (text, _, name), label in zip(train_rows, labels, strict=True)]
    return *sst2_encoder.fine_tuned(str(encoder), train_rows, dev_rows, folder, seed), flipped


def trained(
    net: nn.Module, inputs: torch.Tensor, targets: torch.Tensor, folder: Path, recipe: Recipe
) -> list[Checkpoint]:
    """Train by SGD, the learning rate falling to a twentieth; return checkpoints, each with its last rate."""
    optimiser = torch.optim.SGD(net.parameters(), lr=recipe.rate)
    steps = -(-len(inputs) // BATCH) * EPOCHS
    kept, step = [], 0
    for epoch in range(1, EPOCHS + 1):
        for batch in torch.randperm(len(inputs)).split(BATCH):
            now = optimiser.param_groups[0]["lr"] = recipe.rate * (1 - 0.95 * step / steps)
            seen = inputs[batch]
            if recipe.drop:
                seen = seen * (torch.rand(seen.shape) > recipe.drop)
            optimiser.zero_grad()
            nn.functional.cross_entropy(net(seen), targets[batch]).backward()
            optimiser.step()
            step += 1
        if epoch in KEPT:
            torch.save(net.state_dict(), folder / f"epoch-{epoch}.pt")
            kept.append(Checkpoint(folder / f"epoch-{epoch}.pt", now))
    return kept


def accuracy_on(net: nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> float:
    with torch.no_grad():
        return float((net(inputs).argmax(1) == labels).float().mean())


def figures(task: Task, folder: Path, flipped: Labels, dim: int) -> dict[str, Any]:
    """Build an index and return what each ranking finds, and what the estimate says."""
    labelled = replace(task, columns=lambda row: {"label": int(row[1])})
    build(labelled, folder / "index", BuildConfig(dim=dim, index="flat"))
    index = InfluenceIndex.open(folder / "index", labelled)
    found: dict[str, Any] = {"rows": len(index), "flipped": len(flipped)}
    for by in ("self-influence", "loss", "votes", "loss-and-votes"):
        suspects = find_mislabelled(index, by=by)
        ranking = [suspect.row for suspect in suspects]
        wrong = np.isin(ranking, flipped)
        found[by] = {f"found_at_{share:.0%}": _share(wrong, share * len(wrong)) for share in CHECKED}
        found[by] |= {"auc": auc(ranking, flipped) if len(flipped) else None}
    told = suspects.suspicion
    found |= {"look_at": told.look_at, "outvoted": told.n_outvoted, "found_there": _share(wrong, told.look_at or 0)}
    outvoted = [suspect for suspect in suspects if suspect.speaks_for != suspect.label]
    found["outvoted_wrong"] = float(np.isin([s.row for s in outvoted], flipped).mean()) if outvoted else None
    return found


def _share(wrong_N: np.ndarray, n_checked: float) -> float | None:
    """Return the share of the wrong labels that are among the first."""
    return float(wrong_N[: round(n_checked)].sum() / wrong_N.sum()) if wrong_N.any() else None


def measured(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    def run(name: str, make: Any, rate: float, seed: int) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as made:
            task, accuracy, flipped = make(Path(made), rate, seed)
            row = {"data": name, "rate": rate, "seed": seed, "test_accuracy": accuracy}
            return row | figures(task, Path(made), flipped, options.dim)

    data = options.data
    kinds = {
        "SST-2, word vectors": (lambda *case: of_words(data, *case), options.seeds),
        "digits": (of_digits, options.seeds),
        "MNIST": (lambda *case: of_mnist(data / "mnist.npz", options.rows, *case), 1),
    }
    if options.vectors:
        kinds["SST-2, frozen sentence vectors"] = (
            lambda *case: of_vectors(data, options.vectors, *case),
            options.seeds,
        )
    if options.encoder:
        kinds["SST-2, fine-tuned encoder"] = (lambda *case: of_encoder(data, options.encoder, *case), options.seeds)
    for name, (make, seeds) in kinds.items():
        if not options.only or name in options.only:
            for rate in options.rates:
                for seed in range(seeds):
                    yield run(name, make, rate, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of mnist.npz and sst2_*.tsv")
    parser.add_argument("--vectors", type=Path, help="npz of frozen sentence vectors")
    parser.add_argument("--encoder", type=Path, help="folder of a pretrained encoder of Hugging Face")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.0, 0.05, 0.1, 0.2], help="shares of wrong labels")
    parser.add_argument("--rows", type=int, default=10_000, help="MNIST digits")
    parser.add_argument("--seeds", type=int, default=2, help="of digits and SST-2; MNIST has one")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--only", nargs="+", help="data sets by their names in the results; those of others are kept")
    options = parser.parse_args()
    settings = {k: v for k, v in vars(options).items() if k in ("rows", "dim")}
    results = []
    for result in measured(options):
        print(result, flush=True)
        results.append(result)
    print(common.write("mislabelled", settings, [*_others({result["data"] for result in results}), *results]))


def _others(names: set[str]) -> list[dict[str, Any]]:
    """Return what the result file has of other data sets."""
    path = common.RESULTS / "mislabelled.json"
    kept = json.loads(path.read_text())["results"] if path.exists() else []
    return [result for result in kept if result["data"] not in names]


if __name__ == "__main__":
    main()
