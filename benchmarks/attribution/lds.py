"""Linear datamodeling scores of an index's scores on real data, by runs, checkpoints, damping and preconditioner."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.attribution.settings import SETTINGS, Setting
from benchmarks.attribution.truth import measure_truth, merge_results, summarise
from benchmarks.common.results import write_results
from tracin_ann import BuildConfig, InfluenceIndex, QueryOptions, build
from tracin_ann.choices import Preconditioner, ScoreName
from tracin_ann.evaluation import compute_ceiling
from tracin_ann.scoring import find_curvature

RESULT = "lds"
SCORES: tuple[ScoreName, ...] = ("tracin", "cosine", "trackstar", "fisher", "gauss-newton", "trak")
NEED_PROBABILITIES = ("gauss-newton", "trak")
DEPEND_ON_STEPS = ("trackstar", "fisher", "gauss-newton")


@dataclass(frozen=True)
class Variant:
    """An index of a setting.

    Attributes:
        runs: the number of training runs whose checkpoints it contains.
        last: only the last checkpoint of each run.
        steps: the checkpoints have the number of steps, from which the damping follows.
        preconditioner: of the gradients, from the second moments of Adam.
    """

    runs: int = 1
    last: bool = False
    steps: bool = True
    preconditioner: Preconditioner = "none"


ALL = (Variant(), Variant(steps=False), Variant(last=True))
ADAM = (Variant(preconditioner="adam"), Variant(steps=False, preconditioner="adam"))
VARIANTS = {
    "MLP": (*ALL, Variant(runs=2), Variant(runs=5)),
    "CIFAR-2": (*ALL, Variant(runs=5)),
    "dattri LR": (Variant(), Variant(runs=10)),
    "dattri MLP": (Variant(), Variant(last=True), Variant(runs=10, last=True), Variant(runs=10)),
    "GPT": (*ALL, *ADAM),
    "LR, 3 epochs": ALL[:2],
    "MLP, cosine": ALL[:2],
    "MLP, momentum": ALL[:2],
    "MLP, weight decay": ALL[:2],
    "MLP, AdamW": (*ALL[:2], *ADAM),
}


def open_index(setting: Setting, data: Path, work: Path, folder: Path, variant: Variant, dim: int) -> InfluenceIndex:
    """Build the index of a variant in `folder`; missing runs are trained in `work`."""
    seeds = range(variant.runs)
    setting.train_runs(data, work / "runs", seeds)
    epochs = setting.training.saved[-1:] if variant.last else None
    task = setting.make_task(data, work / "runs", seeds, epochs, variant.steps)
    preconditioner = variant.preconditioner
    config = BuildConfig(dim=dim, index="flat", yardstick=False, device="cpu", preconditioner=preconditioner)
    build(task, folder, config)
    return InfluenceIndex.open(folder, task, device="cpu")


def list_effective_dimensions(index: InfluenceIndex, score: ScoreName) -> list[float] | None:
    """Return d_λ at each checkpoint, as `tracin-info` does; None for a score without a curvature matrix."""
    curvature = find_curvature(score)
    if curvature is None:
        return None
    damped = index.score_maker.damp(curvature)
    return [at.effective_dimension(damping) for at, damping in zip(damped.curvatures, damped.damping_C, strict=True)]


def measure_variants(name: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a result for each variant of a setting, or for those with some numbers."""
    setting, data, work, dim = SETTINGS[name], options.data, options.work / name, options.dim
    truth = measure_truth(setting, data, work)
    variants = VARIANTS.get(name, ALL)
    for variant in variants if options.variants is None else [variants[number] for number in options.variants]:
        row = {"setting": name, **asdict(variant), "dim": dim, "truth_seeds": setting.truth_seeds}
        row["ceiling"] = compute_ceiling(truth.loss_MSQ)
        with tempfile.TemporaryDirectory() as folder:
            index = open_index(setting, data, work, Path(folder), variant, dim)
            n_queries = truth.loss_MSQ.shape[2]
            row["effective_dimension"] = {}
            for score in options.scores:
                can_score = setting.loss_is_nll or score not in NEED_PROBABILITIES
                if can_score and (variant.steps or score in DEPEND_ON_STEPS):
                    score_QN = index.score_matrix("query", range(n_queries), QueryOptions(score=score))
                    row[score] = summarise(score_QN, truth)
                    dims = list_effective_dimensions(index, score)
                    if dims is not None:
                        row["effective_dimension"][score] = dims
        print(row, flush=True)
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True, type=Path, help="folder of the data sets")
    parser.add_argument("--work", type=Path, default=Path("runs/attribution"), help="folder of models and their losses")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="settings to measure")
    parser.add_argument("--variants", type=int, nargs="+", help="numbers of the variants of a setting; none: all")
    parser.add_argument("--scores", nargs="+", choices=SCORES, default=list(SCORES), help="scores to measure")
    parser.add_argument("--dim", type=int, default=1024, help="sketch dimensions per checkpoint")
    parser.add_argument("--threads", type=int, default=1, help="number of CPU threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.settings:
        for row in measure_variants(name, options):
            results = merge_results(RESULT, [row], ("setting", "dim", *Variant.__dataclass_fields__))
            print(write_results(RESULT, {"threads": options.threads}, results), flush=True)


if __name__ == "__main__":
    main()
