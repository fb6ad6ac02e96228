"""Linear datamodeling score of exact scores with each preconditioner, on small classifiers that AdamW trained."""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.common.results import report_results
from tracin_ann import BuildConfig, Checkpoint, InfluenceIndex, QueryOptions, Task, build

RESULT = "preconditioners"
PRECONDITIONERS = ("none", "adam", "trackstar")
N_ROWS, N_QUERIES, RATE = 800, 100, 2e-3
EPOCHS, BATCH, SAVED = 12, 40, (2, 6, 12)
Saved = list[tuple[dict[str, Any], dict[str, Any]]]


def make_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))


def make_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.LayerNorm(512),
        nn.Linear(512, 10),
    )


MODELS: dict[str, Callable[[], nn.Module]] = {"MLP": make_mlp, "CNN": make_cnn}


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def load_rows() -> tuple[Tensor, Tensor]:
    """Return images [N + Q, 64] and labels, in a fixed random order."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))[: N_ROWS + N_QUERIES]
    return torch.tensor(images[order] / 16, dtype=torch.float32), torch.tensor(labels[order])


def train(make: Callable[[], nn.Module], rows: tuple[Tensor, Tensor], chosen: Tensor, seed: int) -> Any:
    """Train on some rows; return the model, and its weights and the optimizer's state at the saved epochs."""
    torch.manual_seed(seed)
    model, saved = make(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.99))
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(1, EPOCHS + 1):
        for batch in chosen[torch.randperm(len(chosen), generator=generator)].split(BATCH):
            optimizer.zero_grad()
            cross_entropy(model, (rows[0][batch], rows[1][batch])).mean().backward()
            optimizer.step()
        if epoch in SAVED:
            saved.append((copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())))
    return model, saved


def measure_subsets(
    make: Callable[[], nn.Module], rows: tuple[Tensor, Tensor], n_subsets: int, seeds: int
) -> tuple[np.ndarray, np.ndarray]:
    """Train on random halves of the rows; return which rows they have [M, N], and the queries' mean losses [M, Q]."""
    random = np.random.default_rng(1)
    member_MN, loss_MQ = np.zeros((n_subsets, N_ROWS)), np.zeros((n_subsets, N_QUERIES))
    queries = rows[0][N_ROWS:], rows[1][N_ROWS:]
    for subset in range(n_subsets):
        chosen = random.choice(N_ROWS, N_ROWS // 2, replace=False)
        member_MN[subset, chosen] = 1
        for seed in range(seeds):
            model, _ = train(make, rows, torch.from_numpy(chosen), 100 + seed)
            with torch.no_grad():
                loss_MQ[subset] += cross_entropy(model, queries).numpy() / seeds
    return member_MN, loss_MQ


def make_task(folder: Path, make: Callable[[], nn.Module], rows: tuple[Tensor, Tensor], saved: Saved) -> Task:
    """Return the task of a training run."""
    checkpoints = []
    for i, (weights, optimizer) in enumerate(saved):
        torch.save(weights, folder / f"{i}.pt")
        torch.save(optimizer, folder / f"{i}.optimizer.pt")
        checkpoints.append(Checkpoint(folder / f"{i}.pt", RATE, second_moments=folder / f"{i}.optimizer.pt"))
    pairs = list(zip(rows[0], rows[1].tolist(), strict=True))
    return Task(
        model=make,
        loss=cross_entropy,
        train_data=partial(list, pairs[:N_ROWS]),
        query_data=partial(list, pairs[N_ROWS:]),
        checkpoints=checkpoints,
    )


def compute_scores(task: Task, folder: Path, preconditioner: Any) -> np.ndarray:
    """Return the exact scores [Q, N]."""
    config = BuildConfig(dim=64, device="cpu", index="flat", yardstick=False, preconditioner=preconditioner)
    build(task, folder, config)
    score_QN = np.zeros((N_QUERIES, N_ROWS))
    answers = InfluenceIndex.open(folder, task, device="cpu").query(
        range(N_QUERIES), options=QueryOptions(exact=True, k=N_ROWS)
    )
    for answer in answers:
        for hit in (*answer.proponents, *answer.opponents):
            score_QN[answer.query, hit.row] = hit.score
    return score_QN


def correlate_ranks(one: np.ndarray, other: np.ndarray) -> float:
    """Return Spearman's rank correlation."""
    ranks = (values.argsort().argsort() for values in (one, other))
    return float(np.corrcoef(*ranks)[0, 1])


def measure_models(options: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Yield, for each model, the mean over queries of the score with each preconditioner (Park et al. 2023, eq. 6)."""
    rows = load_rows()
    for name in options.models:
        make = MODELS[name]
        member_MN, loss_MQ = measure_subsets(make, rows, options.subsets, options.seeds)
        total = {kind: np.zeros((N_QUERIES, N_ROWS)) for kind in PRECONDITIONERS}
        for seed in range(options.seeds):
            _, saved = train(make, rows, torch.arange(N_ROWS), 100 + seed)
            with tempfile.TemporaryDirectory() as folder:
                task = make_task(Path(folder), make, rows, saved)
                for kind in PRECONDITIONERS:
                    total[kind] += compute_scores(task, Path(folder) / kind, kind)
        lds = {
            kind: np.array([correlate_ranks(member_MN @ score_QN[q], -loss_MQ[:, q]) for q in range(N_QUERIES)])
            for kind, score_QN in total.items()
        }
        row: dict[str, object] = {"model": name}
        for kind, lds_Q in lds.items():
            row[kind] = float(lds_Q.mean())
            row[f"{kind}_gain_error"] = float((lds_Q - lds["none"]).std(ddof=1) / N_QUERIES**0.5)
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="models to measure")
    parser.add_argument("--subsets", type=int, default=100, help="number of random halves of the training rows")
    parser.add_argument("--seeds", type=int, default=3, help="training runs of each half, and of all rows")
    parser.add_argument("--threads", type=int, default=1, help="number of CPU threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    report_results(RESULT, vars(options), measure_models(options))


if __name__ == "__main__":
    main()
