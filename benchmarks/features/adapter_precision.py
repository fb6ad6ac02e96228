"""Error of exact scores of LoRA adapters over a base model in bfloat16 and in int8, compared with one in float32.

The base model and the adapter are those of examples/lora_run.py, trained in float32. Exact scores are those of all
pairs of test and training passages over all parameters of the adapter, without a sketch.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common.brute_force import compute_recalls, find_top
from benchmarks.common.results import report_results
from examples import lora_run
from tracin_ann import Task
from tracin_ann.features import RunOptions, TaskRunner
from tracin_ann.scoring.exact import exact_scores

RESULT = "adapter_precision"
K = 10
BASES: dict[str, dict[str, Any]] = {
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"quantization": "int8"},
    "int8, bfloat16": {"dtype": "bfloat16", "quantization": "int8"},
}


def compute_scores(options: argparse.Namespace, folder: str, **base: Any) -> np.ndarray:
    """Return the exact scores [Q, N] of an adapter over a base model in some precision."""
    _, train_rows, test_rows = lora_run.read(str(options.data), options.rows)
    task = Task.from_transformers(f"{folder}/run", train_rows, test_rows, base=f"{folder}/base", **base)
    runner = TaskRunner(task, RunOptions(torch.device("cpu"), 64))
    sides = ("query", range(len(test_rows))), range(len(train_rows))
    return exact_scores(runner, *sides, range(len(task.checkpoints)))


def compare_bases(options: argparse.Namespace, folder: str) -> Iterator[dict[str, Any]]:
    """Train, and yield the errors for each base model."""
    lora_run.train(str(options.data), folder, options.rows)
    true = compute_scores(options, folder)
    for name, base in BASES.items():
        scores = compute_scores(options, folder, **base)
        error, row = scores - true, {"base": name}
        for side, sign in (("proponents", 1), ("opponents", -1)):
            found = find_top(sign * scores, K).tolist()
            row[side] = float(compute_recalls(find_top(sign * true, K), found).mean())
        yield row | {
            "score_error": float(np.sqrt((error**2).mean() / (true**2).mean())),
            "largest_error": float(np.abs(error).max() / np.abs(true).max()),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of tinyshakespeare.txt")
    parser.add_argument("--rows", type=int, default=1000, help="training passages of the adapter")
    parser.add_argument("--threads", type=int, default=2, help="number of CPU threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settings = {key: value for key, value in vars(options).items() if key != "data"}
    with tempfile.TemporaryDirectory() as folder:
        report_results(RESULT, settings, compare_bases(options, folder))


if __name__ == "__main__":
    main()
