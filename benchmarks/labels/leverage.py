"""Wrong labels found by scores with a curvature matrix, beside the default ranking, in digits, MNIST and SST-2.

`--data` is a folder as for `benchmarks.labels.mislabelled`. *Leverage* is the self-influence by `--score fisher`. *Loss
without the row* is the loss plus its estimated change when the row is left out of the training data, by `gauss-newton`:
a φᵀ(K + λI)⁻¹φ / N, mean over the checkpoints, where φ is the gradient of the row.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.results import write_results
from benchmarks.labels.digits import compute_auc
from benchmarks.labels.mislabelled import train_digits, train_mnist, train_words
from tracin_ann import BuildConfig, InfluenceIndex, QueryOptions, Task, build
from tracin_ann.analysis import find_mislabelled
from tracin_ann.types import Float64

RESULT = "leverage"
RATES = (0.05, 0.1, 0.2)
ROWS_AT_ONCE = 2048


def estimate_changes(index: InfluenceIndex) -> Float64:
    """Return the estimated change of the loss of each row when it is left out, [N]."""
    score, view = index.make_score(QueryOptions(score="gauss-newton")), index.view()
    change_N = np.zeros(len(index))
    for ids, row_BF in view.blocks(ROWS_AT_ONCE):
        amount_BF = score.weigh(row_BF, view.checkpoints, estimates=True).amount_QF
        assert amount_BF is not None
        change_N[ids] = np.einsum("bf,bf->b", amount_BF.astype(np.float64), row_BF)
    return change_N


def measure_rankings(task: Task, folder: Path, flipped: np.ndarray, dim: int) -> dict[str, float]:
    """Return the area under the curve of each ranking."""
    labelled = replace(task, columns=lambda row: {"label": int(row[1])}, loss_is_nll=True)
    build(labelled, folder / "index", BuildConfig(dim=dim, index="flat", yardstick=False))
    index = InfluenceIndex.open(folder / "index", labelled)
    loss_N = index.view().store.losses().astype(np.float64).mean(axis=1)
    rankings = {
        "loss-and-votes": [suspect.row for suspect in find_mislabelled(index)],
        "loss": np.argsort(-loss_N, kind="stable").tolist(),
        "self-influence": [found.row for found in index.self_influence()],
        "leverage": [found.row for found in index.self_influence(score="fisher")],
        "loss without the row": np.argsort(-loss_N - estimate_changes(index), kind="stable").tolist(),
    }
    return {name: compute_auc(ranking, flipped) for name, ranking in rankings.items()}


def measure_all(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the figures of every data set, share of wrong labels and seed."""
    kinds: dict[str, tuple[Any, int]] = {
        "digits": (train_digits, options.seeds),
        "SST-2, word vectors": (lambda *case: train_words(options.data, *case), 1),
        "MNIST": (lambda *case: train_mnist(options.data / "mnist.npz", options.rows, *case), 1),
    }
    for name, (train, seeds) in kinds.items():
        for rate in RATES:
            for seed in range(seeds):
                with tempfile.TemporaryDirectory() as folder:
                    task, _, flipped = train(Path(folder), rate, seed)
                    found = measure_rankings(task, Path(folder), flipped, options.dim)
                    yield {"data": name, "rate": rate, "seed": seed, "rows": len(task.train_data())} | found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of mnist.npz and sst2_*.tsv")
    parser.add_argument("--rows", type=int, default=20_000, help="MNIST digits to train on")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of digits")
    parser.add_argument("--dim", type=int, default=512)
    options = parser.parse_args()
    settings = {"dim": options.dim, "seeds": options.seeds}
    write_results(RESULT, settings, list(measure_all(options)))


if __name__ == "__main__":
    main()
