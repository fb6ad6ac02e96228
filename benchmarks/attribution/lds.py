"""Linear datamodeling scores of an index's scores on real data, by runs, checkpoints, damping and preconditioner."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

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
WITH_DAMPING_RULE = ("trackstar", "fisher", "gauss-newton")
DampingRule = Literal["default", "1/(ηT)", "5e-4 tr K"]


@dataclass(frozen=True)
class Variant:
    """An index of a setting.

    Attributes:
        runs: the number of training runs whose checkpoints it contains.
        last: only the last checkpoint of each run.
        damping: the rule of λ. By default, runs of SGD have the larger of the two others, and runs of AdamW 5e-4 tr K.
        preconditioner: of the gradients, from the second moments of Adam.
    """

    runs: int = 1
    last: bool = False
    damping: DampingRule = "default"
    preconditioner: Preconditioner = "none"


ALL = (Variant(), Variant(damping="1/(ηT)"), Variant(damping="5e-4 tr K"), Variant(last=True))
OF_ADAM = (Variant(), Variant(damping="1/(ηT)"), Variant(last=True))
WITH_MOMENTS = (Variant(preconditioner="adam"), Variant(damping="1/(ηT)", preconditioner="adam"))
VARIANTS = {
    "MLP": (*ALL, Variant(runs=2), Variant(runs=5)),
    "CIFAR-2": (*ALL, Variant(runs=5)),
    "dattri LR": (Variant(), Variant(runs=10)),
    "dattri MLP": (Variant(), Variant(last=True), Variant(runs=10, last=True), Variant(runs=10)),
    "GPT": (*OF_ADAM, *WITH_MOMENTS),
    "LR, 3 epochs": ALL[:3],
    "MLP, cosine": ALL[:3],
    "MLP, momentum": ALL[:3],
    "MLP, weight decay": ALL[:3],
    "MLP, AdamW": (*OF_ADAM[:2], *WITH_MOMENTS),
}


def open_index(setting: Setting, data: Path, work: Path, folder: Path, variant: Variant, dim: int) -> InfluenceIndex:
    """Build the index of a variant in `folder`; missing runs are trained in `work`."""
    seeds = range(variant.runs)
    setting.train_runs(data, work / "runs", seeds)
    epochs = setting.training.saved[-1:] if variant.last else None
    steps = variant.damping == "default" and setting.training.optimizer == "sgd"
    task = setting.make_task(data, work / "runs", seeds, epochs, steps)
    preconditioner = variant.preconditioner
    config = BuildConfig(dim=dim, index="flat", yardstick=False, device="cpu", preconditioner=preconditioner)
    build(task, folder, config)
    return InfluenceIndex.open(folder, task, device="cpu")


def list_effective_dimensions(index: InfluenceIndex, score: ScoreName, damping: float | None) -> list[float] | None:
    """Return d_λ at each checkpoint, as `tracin-info` does; None for a score without a curvature matrix."""
    curvature = find_curvature(score)
    if curvature is None:
        return None
    damped = index.score_maker.damp(curvature, damping)
    return [at.effective_dimension(damping) for at, damping in zip(damped.curvatures, damped.damping_C, strict=True)]


def measure_variants(name: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a result for each variant of a setting, or for those with some numbers."""
    setting, data, work, dim = SETTINGS[name], options.data, options.work / name, options.dim
    truth = measure_truth(setting, data, work)
    n_queries, given = truth.loss_MSQ.shape[2], setting.training.compute_damping(len(setting.load(data)[0][0]))
    variants = VARIANTS.get(name, ALL)
    for variant in variants if options.variants is None else [variants[number] for number in options.variants]:
        row = {"setting": name, **asdict(variant), "dim": dim, "truth_seeds": setting.truth_seeds}
        row["ceiling"] = compute_ceiling(truth.loss_MSQ)
        with tempfile.TemporaryDirectory() as folder:
            index = open_index(setting, data, work, Path(folder), variant, dim)
            row["effective_dimension"] = {}
            for score in options.scores:
                can_score = setting.loss_is_nll or score not in NEED_PROBABILITIES
                if not can_score or (variant.damping != "default" and score not in WITH_DAMPING_RULE):
                    continue
                damping = given if variant.damping == "1/(ηT)" else None
                chosen = QueryOptions(score=score, damping=damping)
                row[score] = summarise(index.score_matrix("query", range(n_queries), chosen), truth)
                dims = list_effective_dimensions(index, score, damping)
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
