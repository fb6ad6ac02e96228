"""Wrong labels found by self-influence in scikit-learn's digits, with 10% of the labels changed."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.common.results import write_results
from examples import digits
from tracin_ann import BuildConfig, InfluenceIndex, build

RESULT = "mislabelled_digits"


def compute_auc(ranking: list[int], flipped: np.ndarray) -> float:
    """Return the area under the ROC curve of a ranking, with wrong labels as positives."""
    wrong = np.isin(ranking, flipped)
    ranks = np.flatnonzero(wrong)
    n_wrong, n_right = len(ranks), len(ranking) - len(ranks)
    pairs = (len(ranking) - 1 - ranks - np.arange(n_wrong)[::-1]).sum()
    return float(pairs / (n_wrong * n_right))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds")
    parser.add_argument("--dim", type=int, default=1024, help="sketch dimensions per checkpoint")
    options = parser.parse_args()
    results = []
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as folder:
            accuracy = digits.train(Path(folder), seed)
            task = digits.task(folder, str(seed))
            build(task, f"{folder}/index", BuildConfig(dim=options.dim, seed=seed))
            index = InfluenceIndex.open(f"{folder}/index", task)
            _, _, flipped = digits.data(seed)
            row: dict[str, float] = {"seed": seed, "test_accuracy": accuracy}
            for name, exact in (("sketch", False), ("exact", True)):
                ranking = [int(item.id) for item in index.self_influence(exact=exact)]
                row[f"{name}_auc"] = compute_auc(ranking, flipped)
                for share in (10, 20):
                    row[f"{name}_found_at_{share}"] = digits.find_share(ranking, flipped, share / 100)
            print(row, flush=True)
            results.append(row)
    print(write_results(RESULT, vars(options), results))


if __name__ == "__main__":
    main()
