"""Recall@10 of true TracInCP with each sketch at equal D, on four models.

`--data` is a folder with mnist.npz or torchvision's MNIST, cifar10_jpeg.npz or cifar-10-batches-py, and
tinyshakespeare.txt; scikit-learn contains the data of the MLP. The result file is written after each model and seed;
`python -m benchmarks.tables --table fidelity` prints it.

The true score is Σ_c η_c ⟨∇ℓ(w_c, z), ∇ℓ(w_c, z')⟩ over all parameters and checkpoints, with gradients by vmap(grad).
All sketches map the same gradients. Every run compares features of the library's sketches with those of its
feature extractor on a few rows.

Shapes: N train, Q queries, B batch, P parameters, D sketch dim.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.common.brute_force import compute_recalls, find_top
from benchmarks.common.results import write_results
from benchmarks.common.trained_models import SUBJECTS, Subject
from benchmarks.fidelity.sketches import (
    CountSketch,
    FoldedSides,
    GaussianSides,
    MaskedSides,
    StoredSigns,
    TensorSketch,
)
from tracin_ann import Task
from tracin_ann.features import LoadedModel, RunOptions, TaskRunner
from tracin_ann.features.extractor import FeatureExtractor, FeatureOptions
from tracin_ann.gradients.factors import Dense
from tracin_ann.sketch import ParameterKey, make_sketch

RESULT = "fidelity"
K, CANDIDATES = 10, 100
GROUP_ELEMENTS = 1 << 29
CPU = torch.device("cpu")
Gradients = dict[str, torch.Tensor]

SKETCHES: dict[str, Callable[[int], Any]] = {
    "dense signs": StoredSigns,
    "CountSketch of the whole gradient": CountSketch,
    "TensorSketch": TensorSketch,
    "factored (default)": lambda dim: make_sketch("factored", dim),
    **{f"folded sides, {side}": lambda dim, side=side: FoldedSides(dim, side) for side in (32, 64, 128, 256)},
    **{f"Gaussian sides, {side}": lambda dim, side=side: GaussianSides(dim, side) for side in (64, 128)},
    **{f"masked sides, {side}": lambda dim, side=side: MaskedSides(dim, side) for side in (64, 128)},
    "kronecker": lambda dim: make_sketch("kronecker", dim),
}
COMPARED = {"factored (default)": "factored", "kronecker": "kronecker"}


class _Single(nn.Module):
    """The loss of one example, as a module for `functional_call`."""

    def __init__(self, model: nn.Module, task: Task) -> None:
        super().__init__()
        self.model, self.task = model, task

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.task.loss(self.model, (x[None], y[None]))[0]


@dataclass(frozen=True)
class GradientSource:
    """Gradients of one checkpoint by vmap(grad), computed in chunks and yielded in groups."""

    task: Task
    model: nn.Module
    chunk: int

    def rows(self, side: str) -> Iterator[tuple[slice, Gradients]]:
        """Yield (slice of the rows, gradients [n, P] by parameter), as many rows at once as memory allows."""
        data = self.task.train_data() if side == "train" else self.task.query_data()
        size = sum(p.numel() for p in self.model.parameters())
        group = max(self.chunk, GROUP_ELEMENTS // size // self.chunk * self.chunk)
        buffer = {name: torch.empty(min(group, len(data)), p.numel()) for name, p in self.model.named_parameters()}
        for start in range(0, len(data), group):
            stop = min(start + group, len(data))
            for at in range(start, stop, self.chunk):
                rows = [data[i] for i in range(at, min(at + self.chunk, stop))]
                for name, each in self._compute_chunk(rows).items():
                    buffer[name][at - start : at - start + len(rows)] = each.flatten(1)
            yield slice(start, stop), {name: held[: stop - start] for name, held in buffer.items()}

    def _compute_chunk(self, rows: list[Any]) -> Gradients:
        single = _Single(self.model, self.task)
        values = {name: p.detach() for name, p in single.named_parameters()}
        x, y = torch.utils.data.default_collate(rows)
        with sdpa_kernel(SDPBackend.MATH):
            each = vmap(grad(lambda v, x, y: functional_call(single, v, (x, y))), in_dims=(None, 0, 0))(values, x, y)
        return {name.removeprefix("model."): g for name, g in each.items()}


class ParameterMaps:
    """The maps of one sketch for all parameters of a checkpoint."""

    def __init__(self, sketch: Any, seed: int, model: LoadedModel, rank_one: frozenset[str]) -> None:
        self.dim = sketch.dim
        self._maps = {
            name: sketch.parameter(
                ParameterKey(seed, model.checkpoint, name, tuple(p.shape), name in rank_one), CPU, torch.float32
            )
            for name, p in model.parameters.items()
        }

    def map(self, gradients: Gradients) -> torch.Tensor:
        """Return the sketches [n, D], without the learning rate."""
        n_rows = len(next(iter(gradients.values())))
        out_BD = torch.zeros(n_rows, self.dim)
        for name, each in self._maps.items():
            each.add(out_BD, Dense(gradients[name]))
        return out_BD


class Scores:
    """True scores and scores of every sketch [Q, N], summed over checkpoints in float64."""

    def __init__(self, options: argparse.Namespace, seed: int, task: Task, chunk: int) -> None:
        self.options, self.seed, self.task, self.chunk = options, seed, task, chunk
        self.shape = (len(task.query_data()), len(task.train_data()))
        self.true = np.zeros(self.shape)
        self.sketched = {name: np.zeros(self.shape) for name in options.sketches}
        self.train_loss: list[float] = []

    def add(self, model: LoadedModel) -> None:
        """Add the scores of the loaded checkpoint."""
        rate = self.task.checkpoints[model.checkpoint].learning_rate
        engine = model.engine("train")
        sample = next(model.batches("train", range(min(256, self.shape[1]))))
        with torch.no_grad():
            self.train_loss.append(float(engine.losses(sample).mean()))
        rank_one = engine.choose_methods(next(model.batches("train", range(8)))).rank_one
        maps = {
            name: ParameterMaps(SKETCHES[name](self.options.dim), self.seed, model, rank_one)
            for name in self.options.sketches
        }
        source = GradientSource(self.task, model.module, self.chunk)
        _, query_gradients = next(source.rows("query"))
        queries = {name: each.clone() for name, each in query_gradients.items()}
        sketched = {name: each.map(queries) for name, each in maps.items()}
        for rows, gradients in source.rows("train"):
            for name, query in queries.items():
                self.true[:, rows] += rate * (query @ gradients[name].T).double().numpy()
            for name, each in maps.items():
                feature_BD = each.map(gradients)
                self.sketched[name][:, rows] += rate * (sketched[name] @ feature_BD.T).double().numpy()
                if rows.start == 0 and name in COMPARED:
                    self._check(name, model, rank_one, feature_BD[:8] * rate**0.5)

    def _check(self, name: str, model: LoadedModel, rank_one: frozenset[str], mapped: torch.Tensor) -> None:
        """End the run if features of materialised gradients differ from those of the library's extractor."""
        options = FeatureOptions(make_sketch(COMPARED[name], self.options.dim), self.seed, rank_one)
        extracted = torch.from_numpy(FeatureExtractor(model, options).rows("train", range(len(mapped))).feature_ND)
        error = float((mapped - extracted).norm() / extracted.norm())
        if error > 1e-3:
            raise SystemExit(
                f"{name}: features of materialised gradients differ from the extractor's by {error:.2g}; expected 1e-3"
            )

    def compute_results(self) -> Iterator[dict[str, Any]]:
        """Yield, for each sketch, the recall of the true top 10 in its top 10 and in its top 100."""
        for name, scores in self.sketched.items():
            row: dict[str, Any] = {"sketch": name}
            for side, sign in (("proponents", 1), ("opponents", -1)):
                true = find_top(sign * self.true, K)
                found = find_top(sign * scores, CANDIDATES).tolist()
                row[side] = float(compute_recalls(true, [ids[:K] for ids in found]).mean())
                row[f"{side}_in_{CANDIDATES}"] = float(compute_recalls(true, found).mean())
            yield row


def measure_model(options: argparse.Namespace, name: str, subject: Subject, seed: int) -> list[dict[str, Any]]:
    """Return the results of one model and seed, one row per sketch."""
    start = perf_counter()
    with tempfile.TemporaryDirectory() as runs:
        task = subject.train_task(options.data, runs, seed)
        scores = Scores(options, seed, task, subject.chunk)
        with TaskRunner(task, RunOptions(CPU, 256)).model() as model:
            for checkpoint in range(len(task.checkpoints)):
                model.load(checkpoint)
                scores.add(model)
            parameters = sum(p.numel() for p in model.parameters.values())
    losses = [round(x, 3) for x in scores.train_loss]
    print(f"{name}, seed {seed}: {perf_counter() - start:.0f} s, train loss {losses}", flush=True)
    run = {"model": name, "parameters": parameters, "seed": seed, "train_loss": losses}
    return [run | row for row in scores.compute_results()]


def describe_settings(options: argparse.Namespace, subjects: dict[str, Subject]) -> dict[str, Any]:
    """Return the settings that reproduce the run."""
    described = {
        name: {
            "rows": subject.rows,
            "queries": subject.queries,
            "learning_rate": subject.training.rate,
            "batch": subject.training.batch,
            "checkpoints_after_epochs": subject.training.epochs,
        }
        for name, subject in subjects.items()
    }
    return {"dim": options.dim, "seeds": options.seeds, "threads": torch.get_num_threads(), "models": described}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--models", nargs="+", choices=SUBJECTS, default=list(SUBJECTS), help="models to measure")
    parser.add_argument("--sketches", nargs="+", choices=SKETCHES, default=list(SKETCHES), help="sketches to measure")
    parser.add_argument("--dim", type=int, default=1024, help="sketch dimensions per checkpoint")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds")
    parser.add_argument("--rows", type=int, help="largest number of training rows per model")
    parser.add_argument("--queries", type=int, help="largest number of queries per model")
    parser.add_argument("--name", default=RESULT, help="name of the result file")
    options = parser.parse_args()
    subjects = {
        name: replace(
            SUBJECTS[name],
            rows=min(SUBJECTS[name].rows, options.rows or SUBJECTS[name].rows),
            queries=min(SUBJECTS[name].queries, options.queries or SUBJECTS[name].queries),
        )
        for name in options.models
    }
    results: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        for name, subject in subjects.items():
            results += measure_model(options, name, subject, seed)
            path = write_results(options.name, describe_settings(options, subjects), results)
    print(path)


if __name__ == "__main__":
    main()
