"""Wrong labels found by each ranking in digits, MNIST and SST-2, the estimate of their number, and suggested labels.

`--data` is a folder with mnist.npz, sst2_train.tsv and sst2_dev.tsv (examples/mnist.py and examples/sst2.py describe
the formats). A share of the training labels is changed; models train on the changed labels. `--vectors` adds SST-2 with
a linear model of frozen sentence vectors: an npz with arrays `train` and `dev`, one row per line of the files.
`--encoder` adds SST-2 with a pretrained encoder that is fine-tuned: a folder that `AutoModel` of Hugging Face loads
(needs `transformers`).
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.common.paths import RESULTS
from benchmarks.common.results import read_results, write_results
from benchmarks.labels import sst2_encoder
from benchmarks.labels.digits import compute_auc
from examples import digits, mnist, sst2
from tracin_ann import BuildConfig, Checkpoint, InfluenceIndex, Task, build
from tracin_ann.analysis import Suspect, find_mislabelled

RESULT = "mislabelled"
CHECKED = (0.1, 0.2)
CERTAIN = 0.5
EPOCHS, SAVED, BATCH = 8, (7, 8), 32
Labels = np.ndarray


@dataclass(frozen=True)
class Recipe:
    """The initial learning rate, and the probability that an input is dropped."""

    rate: float
    drop: float = 0.0


def train_digits(folder: Path, rate: float, seed: int) -> tuple[Task, float, Labels]:
    """Train on digits; return the task, the test accuracy and the rows with changed labels."""
    digits.FLIPPED = rate
    accuracy = digits.train(folder, seed)
    return digits.task(str(folder), str(seed)), accuracy, digits.data(seed)[2]


def train_mnist(path: Path, rows: int, folder: Path, rate: float, seed: int) -> tuple[Task, float, Labels]:
    """Train on MNIST; return the task, the test accuracy and the rows with changed labels."""
    mnist.FLIPPED = rate
    accuracy = mnist.train(str(path), str(folder), rows, seed)
    return mnist.task(str(path), str(folder), str(rows), str(seed)), accuracy, mnist.data(str(path), rows, seed)[2]


def read_digits(seed: int) -> Labels:
    """Return the labels of the digits before any is changed."""
    digits.FLIPPED = 0.0
    return np.array([label for _, label in digits.data(seed)[0]])


def read_mnist(path: Path, rows: int, seed: int) -> Labels:
    """Return the labels of MNIST before any is changed."""
    mnist.FLIPPED = 0.0
    return mnist.data(str(path), rows, seed)[0].labels


def flip_labels(labels: Labels, rate: float, seed: int) -> tuple[Labels, Labels]:
    """Return 0/1 labels with a share of them changed, and the changed rows."""
    random = np.random.default_rng(seed)
    flipped = np.sort(random.choice(len(labels), round(rate * len(labels)), replace=False))
    changed = labels.copy()
    changed[flipped] = 1 - changed[flipped]
    return changed, flipped


def train_words(data: Path, folder: Path, rate: float, seed: int) -> tuple[Task, float, Labels]:
    """Train a linear model of the mean word vector, with random word dropout."""
    train_rows, test_rows = (sst2._read_sentences(str(data), part) for part in ("train", "dev"))
    labels, flipped = flip_labels(np.array([row[1] for row in train_rows]), rate, seed)
    train_rows = [(text, int(label), name) for (text, _, name), label in zip(train_rows, labels, strict=True)]
    word_ids = sst2.vocabulary(train_rows)

    def collate(rows: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        return sst2.collate(rows, word_ids)

    words, targets = collate(train_rows)
    torch.manual_seed(seed)
    net = sst2.Bag(len(word_ids))
    checkpoints = train_sgd(net, words, targets, folder, Recipe(2.0, drop=0.3))
    task = Task(lambda: sst2.Bag(len(word_ids)), sst2.loss, lambda: train_rows, lambda: test_rows, checkpoints)
    return replace(task, collate=collate), measure_accuracy(net, *collate(test_rows)), flipped


def train_vectors(data: Path, vectors: Path, folder: Path, rate: float, seed: int) -> tuple[Task, float, Labels]:
    """Train a linear model of frozen sentence vectors, standardised and scaled to a length near 1."""
    labels, dev = (np.array([row[1] for row in sst2._read_sentences(str(data), part)]) for part in ("train", "dev"))
    labels, flipped = flip_labels(labels, rate, seed)
    with np.load(vectors) as arrays:
        vectors_NE = [arrays[part].reshape(len(arrays[part]), -1).astype(np.float32) for part in ("train", "dev")]
    mean_E, spread_E = vectors_NE[0].mean(axis=0), vectors_NE[0].std(axis=0) + 1e-6
    train_x, dev_x = (torch.from_numpy((part - mean_E) / spread_E / len(mean_E) ** 0.5) for part in vectors_NE)
    train_y, dev_y = torch.from_numpy(labels), torch.from_numpy(dev)

    def make_model() -> nn.Module:
        return nn.Linear(len(mean_E), 2)

    torch.manual_seed(seed)
    net = make_model()
    checkpoints = train_sgd(net, train_x, train_y, folder, Recipe(1.0))
    rows = torch.utils.data.TensorDataset(train_x, train_y), torch.utils.data.TensorDataset(dev_x, dev_y)
    task = Task(make_model, sst2.loss, lambda: rows[0], lambda: rows[1], checkpoints)
    return task, measure_accuracy(net, dev_x, dev_y), flipped


def train_encoder(data: Path, encoder: Path, folder: Path, rate: float, seed: int) -> tuple[Task, float, Labels]:
    """Fine-tune all parameters of a pretrained encoder."""
    train_rows, dev_rows = (sst2._read_sentences(str(data), part) for part in ("train", "dev"))
    train_rows.sort(key=lambda row: len(row[0].split()))
    labels, flipped = flip_labels(np.array([row[1] for row in train_rows]), rate, seed)
    train_rows = [(text, int(label), name) for (text, _, name), label in zip(train_rows, labels, strict=True)]
    return *sst2_encoder.fine_tune(str(encoder), train_rows, dev_rows, folder, seed), flipped


def train_sgd(
    net: nn.Module, inputs: torch.Tensor, targets: torch.Tensor, folder: Path, recipe: Recipe
) -> list[Checkpoint]:
    """Train by SGD with a learning rate that decays to 5%; return checkpoints, each with its last learning rate."""
    optimiser = torch.optim.SGD(net.parameters(), lr=recipe.rate)
    steps = -(-len(inputs) // BATCH) * EPOCHS
    checkpoints, step = [], 0
    for epoch in range(1, EPOCHS + 1):
        for batch in torch.randperm(len(inputs)).split(BATCH):
            now = optimiser.param_groups[0]["lr"] = recipe.rate * (1 - 0.95 * step / steps)
            batch_inputs = inputs[batch]
            if recipe.drop:
                batch_inputs = batch_inputs * (torch.rand(batch_inputs.shape) > recipe.drop)
            optimiser.zero_grad()
            nn.functional.cross_entropy(net(batch_inputs), targets[batch]).backward()
            optimiser.step()
            step += 1
        if epoch in SAVED:
            torch.save(net.state_dict(), folder / f"epoch-{epoch}.pt")
            checkpoints.append(Checkpoint(folder / f"epoch-{epoch}.pt", now))
    return checkpoints


def measure_accuracy(net: nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> float:
    with torch.no_grad():
        return float((net(inputs).argmax(1) == labels).float().mean())


def measure_rankings(task: Task, folder: Path, flipped: Labels, true: Labels | None, dim: int) -> dict[str, Any]:
    """Build an index; return the wrong labels found by each ranking, and the estimate of their number."""
    labelled = replace(task, columns=lambda row: {"label": int(row[1])})
    build(labelled, folder / "index", BuildConfig(dim=dim, index="flat"))
    index = InfluenceIndex.open(folder / "index", labelled)
    found: dict[str, Any] = {"rows": len(index), "flipped": len(flipped)}
    for by in ("self-influence", "loss", "votes", "loss-and-votes"):
        suspects = find_mislabelled(index, by=by)
        ranking = [suspect.row for suspect in suspects]
        wrong = np.isin(ranking, flipped)
        found[by] = {f"found_at_{share:.0%}": _compute_share(wrong, share * len(wrong)) for share in CHECKED}
        found[by] |= {"auc": compute_auc(ranking, flipped) if len(flipped) else None}
    estimate = suspects.suspicion
    found |= {
        "look_at": estimate.look_at,
        "outvoted": estimate.n_outvoted,
        "found_there": _compute_share(wrong, estimate.look_at or 0),
    }
    outvoted = [suspect for suspect in suspects if suspect.speaks_for != suspect.label]
    found["outvoted_wrong"] = float(np.isin([s.row for s in outvoted], flipped).mean()) if outvoted else None
    if true is not None:
        found |= measure_suggestions(suspects[: round(CHECKED[0] * len(suspects))], flipped, true)
    return found


def measure_suggestions(first: Sequence[Suspect], flipped: Labels, true: Labels) -> dict[str, float | None]:
    """Return the share of changed labels among the first rows whose suggestion is the true label.

    Also returned: the share among those with a support of 1/2 or more, and the share of changed labels that these are.
    """
    changed = [suspect for suspect in first if suspect.row in set(flipped.tolist())]
    correct_K = np.array([suspect.suggested_label == true[suspect.row] for suspect in changed])
    certain_K = np.array([(suspect.support or 0) >= CERTAIN for suspect in changed])
    return {
        "suggested_correct": float(correct_K.mean()) if changed else None,
        "certain": float(certain_K.mean()) if changed else None,
        "certain_correct": float(correct_K[certain_K].mean()) if certain_K.any() else None,
    }


def _compute_share(wrong_N: np.ndarray, n_checked: float) -> float | None:
    """Return the share of the wrong labels among the first rows of the ranking."""
    return float(wrong_N[: round(n_checked)].sum() / wrong_N.sum()) if wrong_N.any() else None


def measure_all(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the figures of every data set, rate and seed."""

    def run(name: str, train: Any, rate: float, seed: int) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            task, accuracy, flipped = train(Path(folder), rate, seed)
            row = {"data": name, "rate": rate, "seed": seed, "test_accuracy": accuracy}
            true = read_true[name](seed) if name in read_true else None
            return row | measure_rankings(task, Path(folder), flipped, true, options.dim)

    data = options.data
    # Of two labels, the other one is always correct: suggestions are measured only where there are more.
    read_true = {"digits": read_digits, "MNIST": lambda seed: read_mnist(data / "mnist.npz", options.rows, seed)}
    kinds = {
        "SST-2, word vectors": (lambda *case: train_words(data, *case), options.seeds),
        "digits": (train_digits, options.seeds),
        "MNIST": (lambda *case: train_mnist(data / "mnist.npz", options.rows, *case), 1),
    }
    if options.vectors:
        kinds["SST-2, frozen sentence vectors"] = (
            lambda *case: train_vectors(data, options.vectors, *case),
            options.seeds,
        )
    if options.encoder:
        kinds["SST-2, fine-tuned encoder"] = (lambda *case: train_encoder(data, options.encoder, *case), options.seeds)
    for name, (train, seeds) in kinds.items():
        if not options.only or name in options.only:
            for rate in options.rates:
                for seed in range(seeds):
                    yield run(name, train, rate, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of mnist.npz and sst2_*.tsv")
    parser.add_argument("--vectors", type=Path, help="npz of frozen sentence vectors")
    parser.add_argument("--encoder", type=Path, help="folder of a pretrained Hugging Face encoder")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.0, 0.05, 0.1, 0.2], help="shares of wrong labels")
    parser.add_argument("--rows", type=int, default=60_000, help="MNIST digits to train on")
    parser.add_argument("--seeds", type=int, default=2, help="seeds of digits and SST-2; MNIST has one")
    parser.add_argument("--dim", type=int, default=512, help="sketch dimensions per checkpoint")
    parser.add_argument(
        "--only", nargs="+", help="data sets to measure; the result file keeps other data sets and rates"
    )
    options = parser.parse_args()
    settings = {k: v for k, v in vars(options).items() if k in ("rows", "dim")}
    results = []
    for result in measure_all(options):
        print(result, flush=True)
        results.append(result)
    print(
        write_results(
            RESULT, settings, [*_read_others({(result["data"], result["rate"]) for result in results}), *results]
        )
    )


def _read_others(cases: set[tuple[str, float]]) -> list[dict[str, Any]]:
    """Return the results of other data sets and rates in the result file."""
    stored = read_results(RESULT)["results"] if (RESULTS / f"{RESULT}.json").exists() else []
    return [result for result in stored if (result["data"], result["rate"]) not in cases]


if __name__ == "__main__":
    main()
