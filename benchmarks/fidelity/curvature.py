"""Agreement with retraining of scores with a curvature matrix: of sketches, and over all parameters by each inverse."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.common.results import report_results
from examples import mnist
from tracin_ann import BuildConfig, Checkpoint, InfluenceIndex, QueryOptions, Task, build
from tracin_ann.choices import CurvatureName
from tracin_ann.features import LoadedModel
from tracin_ann.scoring.computation import Computation
from tracin_ann.scoring.ekfac import fit_ekfac
from tracin_ann.scoring.exact import Queries, make_exact_scorer
from tracin_ann.scoring.exact_preconditioning import ExactPreconditioner, FullCurvature
from tracin_ann.scoring.gram import compute_gram
from tracin_ann.types import ProgressCallback

RESULT = "curvature"
N_ROWS, N_QUERIES, RATE, BATCH = 2000, 100, 0.1, 64
CANDIDATES, REMOVED, N_REMOVALS = 200, 50, 24
SCORES: tuple[CurvatureName, ...] = ("fisher", "gauss-newton")
Rows = tuple[Tensor, Tensor]


def make_mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 10))


def make_cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 5, stride=2), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(16 * 25, 32), nn.ReLU(), nn.Linear(32, 10)),
    )


@dataclass(frozen=True)
class Setting:
    """A model, and the epochs after which a checkpoint is saved; training ends with the last."""

    make: Callable[[], nn.Module]
    saved: tuple[int, ...]

    @property
    def damping(self) -> float:
        """Return λ = 1/(ηT) with T updates."""
        return 1 / (RATE * self.saved[-1] * -(-N_ROWS // BATCH))


SETTINGS = {"MLP": Setting(make_mlp, (5, 10, 15, 20)), "CNN": Setting(make_cnn, (3, 5, 7, 10))}


def compute_loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def load_rows(data: str) -> tuple[Rows, Rows]:
    """Return the first digits of MNIST: training rows and queries."""
    arrays = mnist.read(data)
    sides = []
    for side, count in (("train", N_ROWS), ("test", N_QUERIES)):
        pixels = torch.from_numpy(arrays[f"x_{side}"][:count]).float().div(255).sub(0.1307).div(0.3081)
        sides.append((pixels.unsqueeze(1), torch.from_numpy(arrays[f"y_{side}"][:count]).long()))
    return sides[0], sides[1]


def train(setting: Setting, rows: Rows, chosen: np.ndarray, seed: int) -> Iterator[tuple[int, nn.Module]]:
    """Train on the chosen rows, and yield the epoch and the model after each saved epoch."""
    torch.manual_seed(seed)
    model, index = setting.make(), torch.from_numpy(chosen)
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    for epoch in range(1, setting.saved[-1] + 1):
        for batch in index[torch.randperm(len(index))].split(BATCH):
            optimizer.zero_grad()
            compute_loss(model, (rows[0][batch], rows[1][batch])).mean().backward()
            optimizer.step()
        if epoch in setting.saved:
            yield epoch, model


@dataclass(frozen=True)
class Retraining:
    """Trains models again, and computes the losses of the queries."""

    setting: Setting
    rows: Rows
    queries: Rows
    seeds: int

    def measure(self, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the mean losses [Q], and the share of the models that are wrong [Q], after training on these rows."""
        loss_Q, wrong_Q = np.zeros(N_QUERIES), np.zeros(N_QUERIES)
        for seed in range(100, 100 + self.seeds):
            *_, (_, model) = train(self.setting, self.rows, chosen, seed)
            with torch.no_grad():
                loss_Q += compute_loss(model, self.queries).numpy() / self.seeds
                wrong_Q += (model(self.queries[0]).argmax(1) != self.queries[1]).numpy() / self.seeds
        return loss_Q, wrong_Q


def open_index(setting: Setting, rows: Rows, queries: Rows, folder: Path) -> InfluenceIndex:
    checkpoints = []
    for epoch, model in train(setting, rows, np.arange(N_ROWS), 0):
        torch.save(model.state_dict(), folder / f"{epoch}.pt")
        checkpoints.append(Checkpoint(folder / f"{epoch}.pt", RATE))
    train_rows, query_rows = (list(zip(images, labels.tolist(), strict=True)) for images, labels in (rows, queries))
    task = Task(setting.make, compute_loss, lambda: train_rows, lambda: query_rows, checkpoints, loss_is_nll=True)
    build(task, folder / "index", BuildConfig(dim=1024, device="cpu", index="flat", yardstick=False))
    return InfluenceIndex.open(folder / "index", task, device="cpu")


@dataclass
class Curvatures:
    """Curvatures by a given method, each computed once."""

    index: InfluenceIndex
    fit: Callable[[LoadedModel, Sequence[int], np.ndarray], Computation[Any]]
    rows: Sequence[int]

    def __post_init__(self) -> None:
        self.kept: dict[int, FullCurvature] = {}

    def find(self, name: CurvatureName, model: LoadedModel, progress: ProgressCallback) -> FullCurvature:
        if model.checkpoint not in self.kept:
            weights = self.index.score_maker.source.weigh_rows(name, model.checkpoint, np.array(self.rows))
            self.kept[model.checkpoint] = self.fit(model, self.rows, weights).finish()
        return self.kept[model.checkpoint]


def compute_scores(index: InfluenceIndex, name: CurvatureName, damping: float) -> dict[str, np.ndarray]:
    """Return the scores [Q, N] by each method."""
    found = {"sketch": index.score_matrix("query", range(N_QUERIES), QueryOptions(score=name, damping=damping))}
    damping_C = index.score_maker.damp(name, damping).damping_C
    methods = {"exact": (compute_gram, 1), "exact, half": (compute_gram, 2), "EK-FAC": (fit_ekfac, 1)}
    for method, (fit, step) in methods.items():
        curvatures: Any = Curvatures(index, fit, range(0, N_ROWS, step))
        direction_map = ExactPreconditioner(name, damping_C, curvatures)
        queries, checkpoints = Queries("query", range(N_QUERIES)), range(len(damping_C))
        with make_exact_scorer(index.runner, queries, checkpoints, None, direction_map) as scorer:
            found[method] = scorer.scores(range(N_ROWS))
    return found


def measure_subsets(retraining: Retraining, n_subsets: int) -> tuple[np.ndarray, np.ndarray]:
    """Return which rows random halves have [M, N], and the losses [M, Q] after training on them."""
    random = np.random.default_rng(1)
    member_MN, losses = np.zeros((n_subsets, N_ROWS)), []
    for member_N in member_MN:
        member_N[random.choice(N_ROWS, N_ROWS // 2, replace=False)] = 1
        losses.append(retraining.measure(np.flatnonzero(member_N))[0])
    return member_MN, np.stack(losses)


def select_best(score_QN: np.ndarray, candidate_QK: np.ndarray) -> np.ndarray:
    """Return the candidates of the largest scores [Q, 50]."""
    order = np.argsort(-np.take_along_axis(score_QN, candidate_QK, axis=1), axis=1)[:, :REMOVED]
    return np.take_along_axis(candidate_QK, order, axis=1)


def measure_setting(name: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the figures of each score by each method."""
    setting, (rows, queries) = SETTINGS[name], load_rows(options.data)
    retraining = Retraining(setting, rows, queries, options.seeds)
    member_MN, loss_MQ = measure_subsets(retraining, options.subsets)
    loss_Q, wrong_Q = retraining.measure(np.arange(N_ROWS))
    chosen = np.flatnonzero(wrong_Q == 0)[:N_REMOVALS]
    with tempfile.TemporaryDirectory() as folder:
        index = open_index(setting, rows, queries, Path(folder))
        tracin = {"sketch": index.score_matrix("query", range(N_QUERIES), QueryOptions(score="tracin"))}
        scores = {score: compute_scores(index, score, setting.damping) for score in SCORES}
        for score, found in {"tracin": tracin, **scores}.items():
            of_sketch_Q = np.zeros(len(chosen))
            candidate_QK = np.argsort(-found["sketch"], axis=1)[:, :CANDIDATES]
            for method, score_QN in found.items():
                predicted_MQ = -member_MN @ score_QN.T
                lds_Q = [spearmanr(predicted_MQ[:, q], loss_MQ[:, q]).statistic for q in range(N_QUERIES)]
                row = {"model": name, "score": score, "method": method, "lds": float(np.mean(lds_Q))}
                row["lds_error"] = float(np.std(lds_Q, ddof=1) / N_QUERIES**0.5)
                if score != "fisher" and method != "exact, half":
                    rise_Q, wrong = np.zeros(len(chosen)), 0
                    for i, (query, removed) in enumerate(
                        zip(chosen, select_best(score_QN, candidate_QK)[chosen], strict=True)
                    ):
                        after_Q, after_wrong_Q = retraining.measure(np.setdiff1d(np.arange(N_ROWS), removed))
                        rise_Q[i] = after_Q[query] - loss_Q[query]
                        wrong += after_wrong_Q[query] > 1 / 2
                    of_sketch_Q = rise_Q if method == "sketch" else of_sketch_Q
                    gain_Q = rise_Q - of_sketch_Q
                    row |= {"queries": len(chosen), "rise": float(rise_Q.mean()), "wrong": int(wrong)}
                    row |= {"gain": float(gain_Q.mean())}
                    row |= {"gain_error": float(gain_Q.std(ddof=1) / len(chosen) ** 0.5)}
                yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True, help="mnist.npz, or a folder that contains it")
    parser.add_argument("--models", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="models to measure")
    parser.add_argument("--subsets", type=int, default=30, help="number of random halves of the training rows")
    parser.add_argument("--seeds", type=int, default=2, help="training runs of each half")
    parser.add_argument("--threads", type=int, default=1, help="number of CPU threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settings = {name: value for name, value in vars(options).items() if name != "data"}
    report_results(RESULT, settings, (row for name in options.models for row in measure_setting(name, options)))


if __name__ == "__main__":
    main()
