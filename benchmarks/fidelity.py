"""Recall@10 of true TracInCP by each sketch at equal D, on four models: every parameter, every checkpoint.

`python -m benchmarks.fidelity --data <folder>` trains, measures and writes results/fidelity.json after each model and
seed; `--table` prints that file as a table. The folder holds mnist.npz or torchvision's MNIST, cifar10_jpeg.npz or
cifar-10-batches-py, and tinyshakespeare.txt; the MLP's data comes with scikit-learn.

The true score is Σ_c η_c ⟨∇ℓ(w_c, z), ∇ℓ(w_c, z')⟩ of gradients by vmap(grad). All sketches map the same gradients;
that the library's own agree so with what its pass over the layers gives is checked on a few rows of every run.

Shapes: N train, Q queries, B batch, P parameters, D sketch dim.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import common
from benchmarks.fidelity_models import SUBJECTS, Subject
from benchmarks.fidelity_sketches import (
    CountSketch,
    FoldedSides,
    GaussianSides,
    KeptSigns,
    MaskedSides,
    TensorSketch,
)
from benchmarks.tables import table, where
from tracin_ann import Task
from tracin_ann.features.extractor import FeatureExtractor, FeatureOptions
from tracin_ann.features.passes import LoadedModel, Passes, PassOptions
from tracin_ann.gradients.factors import Dense
from tracin_ann.sketch import ParameterKey, make_sketch

K, CANDIDATES = 10, 100
GROUP_ELEMENTS = 1 << 29
CPU = torch.device("cpu")
Gradients = dict[str, torch.Tensor]

SKETCHES: dict[str, Callable[[int], Any]] = {
    "dense signs": KeptSigns,
    "CountSketch of the whole gradient": CountSketch,
    "TensorSketch": TensorSketch,
    "factored (default)": lambda dim: make_sketch("factored", dim),
    **{f"folded sides, {side}": lambda dim, side=side: FoldedSides(dim, side) for side in (32, 64, 128, 256)},
    **{f"Gaussian sides, {side}": lambda dim, side=side: GaussianSides(dim, side) for side in (64, 128)},
    **{f"masked sides, {side}": lambda dim, side=side: MaskedSides(dim, side) for side in (64, 128)},
    "kronecker": lambda dim: make_sketch("kronecker", dim),
}
CHECKED = {"factored (default)": "factored", "kronecker": "kronecker"}


class _Single(nn.Module):
    """The loss of one example, as a module whose parameters can be swapped."""

    def __init__(self, model: nn.Module, task: Task) -> None:
        super().__init__()
        self.model, self.task = model, task

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.task.loss(self.model, (x[None], y[None]))[0]


@dataclass(frozen=True)
class Source:
    """Brute-force gradients of one checkpoint, by vmap(grad), in chunks gathered into groups."""

    task: Task
    model: nn.Module
    chunk: int

    def rows(self, side: str) -> Iterator[tuple[slice, Gradients]]:
        """Yield (which rows, gradients [n, P] by parameter), as many rows at once as memory allows."""
        data = self.task.train_data() if side == "train" else self.task.query_data()
        size = sum(p.numel() for p in self.model.parameters())
        group = max(self.chunk, GROUP_ELEMENTS // size // self.chunk * self.chunk)
        room = {name: torch.empty(min(group, len(data)), p.numel()) for name, p in self.model.named_parameters()}
        for start in range(0, len(data), group):
            stop = min(start + group, len(data))
            for at in range(start, stop, self.chunk):
                rows = [data[i] for i in range(at, min(at + self.chunk, stop))]
                for name, each in self._each(rows).items():
                    room[name][at - start : at - start + len(rows)] = each.flatten(1)
            yield slice(start, stop), {name: held[: stop - start] for name, held in room.items()}

    def _each(self, rows: list[Any]) -> Gradients:
        single = _Single(self.model, self.task)
        values = {name: p.detach() for name, p in single.named_parameters()}
        x, y = torch.utils.data.default_collate(rows)
        with sdpa_kernel(SDPBackend.MATH):
            each = vmap(grad(lambda v, x, y: functional_call(single, v, (x, y))), in_dims=(None, 0, 0))(values, x, y)
        return {name.removeprefix("model."): g for name, g in each.items()}


class Maps:
    """One sketch of a checkpoint: its map of every parameter."""

    def __init__(self, sketch: Any, seed: int, model: LoadedModel, rank_one: frozenset[str]) -> None:
        self.dim = sketch.dim
        self._maps = {
            name: sketch.parameter(
                ParameterKey(seed, model.checkpoint, name, tuple(p.shape), name in rank_one), CPU, torch.float32
            )
            for name, p in model.parameters.items()
        }

    def features(self, gradients: Gradients) -> torch.Tensor:
        """Return the sketches [n, D], without the learning rate."""
        n_rows = len(next(iter(gradients.values())))
        out_BD = torch.zeros(n_rows, self.dim)
        for name, each in self._maps.items():
            each.add(out_BD, Dense(gradients[name]))
        return out_BD


class Scores:
    """Scores [Q, N] of the truth and of every sketch, added up over checkpoints in float64."""

    def __init__(self, options: argparse.Namespace, seed: int, task: Task, chunk: int) -> None:
        self.options, self.seed, self.task, self.chunk = options, seed, task, chunk
        self.shape = (len(task.query_data()), len(task.train_data()))
        self.true = np.zeros(self.shape)
        self.sketched = {name: np.zeros(self.shape) for name in options.sketches}
        self.train_loss: list[float] = []

    def add(self, model: LoadedModel) -> None:
        """Add the loaded checkpoint's scores."""
        rate = self.task.checkpoints[model.checkpoint].learning_rate
        engine = model.engine("train")
        few = next(model.batches("train", range(min(256, self.shape[1]))))
        with torch.no_grad():
            self.train_loss.append(float(engine.losses(few).mean()))
        rank_one = engine.prove(next(model.batches("train", range(8)))).rank_one
        maps = {
            name: Maps(SKETCHES[name](self.options.dim), self.seed, model, rank_one) for name in self.options.sketches
        }
        source = Source(self.task, model.module, self.chunk)
        _, held = next(source.rows("query"))
        queries = {name: each.clone() for name, each in held.items()}
        sketched = {name: each.features(queries) for name, each in maps.items()}
        for rows, gradients in source.rows("train"):
            for name, query in queries.items():
                self.true[:, rows] += rate * (query @ gradients[name].T).double().numpy()
            for name, each in maps.items():
                feature_BD = each.features(gradients)
                self.sketched[name][:, rows] += rate * (sketched[name] @ feature_BD.T).double().numpy()
                if rows.start == 0 and name in CHECKED:
                    self._check(name, model, rank_one, feature_BD[:8] * rate**0.5)

    def _check(self, name: str, model: LoadedModel, rank_one: frozenset[str], ours: torch.Tensor) -> None:
        """Refuse a sketch of materialised gradients that is not what the library's pass over the layers gives."""
        options = FeatureOptions(make_sketch(CHECKED[name], self.options.dim), self.seed, rank_one)
        theirs = torch.from_numpy(FeatureExtractor(model, options).rows("train", range(len(ours))).feature_ND)
        off = float((ours - theirs).norm() / theirs.norm())
        if off > 1e-3:
            raise SystemExit(f"{name}: features of materialised gradients are off by {off:.2g} of the library's own")

    def results(self) -> Iterator[dict[str, Any]]:
        """Yield each sketch's recall of the true top 10 in its top 10, and in its top 100."""
        for name, scores in self.sketched.items():
            row: dict[str, Any] = {"sketch": name}
            for side, sign in (("proponents", 1), ("opponents", -1)):
                true = common.top(sign * self.true, K)
                found = common.top(sign * scores, CANDIDATES).tolist()
                row[side] = float(common.recalls(true, [ids[:K] for ids in found]).mean())
                row[f"{side}_in_{CANDIDATES}"] = float(common.recalls(true, found).mean())
            yield row


def measured(options: argparse.Namespace, name: str, subject: Subject, seed: int) -> list[dict[str, Any]]:
    """Return the results of one model and seed, a row a sketch."""
    start = perf_counter()
    with tempfile.TemporaryDirectory() as runs:
        task = subject.task(options.data, runs, seed)
        scores = Scores(options, seed, task, subject.chunk)
        with Passes(task, PassOptions(CPU, 256)).model() as model:
            for checkpoint in range(len(task.checkpoints)):
                model.load(checkpoint)
                scores.add(model)
            parameters = sum(p.numel() for p in model.parameters.values())
    losses = [round(x, 3) for x in scores.train_loss]
    print(f"{name}, seed {seed}: {perf_counter() - start:.0f} s, train loss {losses}", flush=True)
    run = {"model": name, "parameters": parameters, "seed": seed, "train_loss": losses}
    return [run | row for row in scores.results()]


def settings(options: argparse.Namespace, subjects: dict[str, Subject]) -> dict[str, Any]:
    """Return what a reader needs to run the same again."""
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


def fidelity(name: str = "fidelity") -> str:
    """Return the result file as a table: recall@10 of proponents / opponents, mean over seeds ± standard deviation."""
    content = json.loads((common.RESULTS / f"{name}.json").read_text())
    cells: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in content["results"]:
        cells[row["sketch"], row["model"]].append(row)
    sketches, models = (list(dict.fromkeys(pair[i] for pair in cells)) for i in (0, 1))
    rows = [("sketch", *models)]
    for sketch in sketches:
        rows.append((sketch, *(_cell(cells[sketch, model]) for model in models)))
    return f"{table(*rows)}\n\n{where(content)}"


def _cell(seeds: list[dict[str, Any]]) -> str:
    if not seeds:
        return "–"
    sides = [[row[side] for row in seeds] for side in ("proponents", "opponents")]
    spread = [f" ± {stdev(x):.3f}" if len(x) > 1 else "" for x in sides]
    return " / ".join(f"{mean(x):.3f}{s}" for x, s in zip(sides, spread, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="the folder with the data sets")
    parser.add_argument("--models", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--sketches", nargs="+", choices=SKETCHES, default=list(SKETCHES))
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rows", type=int, help="at most so many train rows a model")
    parser.add_argument("--queries", type=int, help="at most so many queries a model")
    parser.add_argument("--name", default="fidelity", help="of the result file")
    parser.add_argument("--table", action="store_true", help="print the result file as a table and end")
    options = parser.parse_args()
    if options.table:
        print(fidelity(options.name))
        return
    if options.data is None:
        parser.error("--data is required")
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
            results += measured(options, name, subject, seed)
            common.write(options.name, settings(options, subjects), results)
    print(fidelity(options.name))


if __name__ == "__main__":
    main()
