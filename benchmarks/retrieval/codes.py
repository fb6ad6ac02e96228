"""True scores found by features of several D that are stored as numbers or as codes of 8 to 1 bits.

The rows, queries and true scores are those of `benchmarks.retrieval.rows`; the true scores are computed once and kept
in `--folder`. The features of each D are computed once, encoded and decoded. The bars are the standard deviations that
follow from the norms of the decoded rows. The curvature is that of the last checkpoint, without weights: its scores for
all rows are compared with those of the same sketch in float32.

Shapes: N rows, Q queries, D sketch dimension of a checkpoint.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

from benchmarks.common.results import write_results
from benchmarks.retrieval.rows import TASKS, compute_true_scores
from tracin_ann import Task
from tracin_ann.choices import SideName
from tracin_ann.features import FeatureExtractor, FeatureOptions, LoadedModel, RunOptions, TaskRunner
from tracin_ann.scoring import Curvature
from tracin_ann.sketch import make_sketch
from tracin_ann.store import Dtype, measure_row_bytes, noise_ratio
from tracin_ann.store.codec import decode_rows, encode_rows
from tracin_ann.types import Float32, Float64

RESULT = "codes"
DEPTHS = (10, 100, 1000)
DTYPES: tuple[Dtype, ...] = ("float16", "int8", "int4", "int2", "int1")
_K, _BATCH = 10, 100
_DAMPED_DIMS = (256, 1024)
_SIDES = (("proponents", 1), ("opponents", -1))


@dataclass
class Stored:
    """The scores [Q, N] of decoded rows, their squared error bars, sums of squared norms, nanoseconds a number."""

    score_QN: Float64
    variance_QN: Float64
    squares: list[float] = field(default_factory=lambda: [0.0, 0.0])
    seconds: float = 0.0
    damped: dict[str, float] = field(default_factory=dict)

    def add(self, query_QD: Float32, row_ND: Float32, decoded_ND: Float32) -> None:
        """Add a checkpoint."""
        dim = query_QD.shape[1]
        wide_QD = query_QD.astype(np.float64)
        self.score_QN += wide_QD @ decoded_ND.T.astype(np.float64)
        square_N = np.square(decoded_ND, dtype=np.float64).sum(1)
        self.variance_QN += np.square(wide_QD).sum(1)[:, None] * square_N / dim
        self.squares[0] += float(square_N.sum())
        self.squares[1] += float(np.square(row_ND, dtype=np.float64).sum())


def measure(stored: Stored, true_QN: Float64) -> dict[str, Any]:
    """Return the share of the true top ten in the first rows, the errors of scores and of norms."""
    error_QN = stored.score_QN - true_QN
    found: dict[str, Any] = {
        "error": float(np.sqrt(np.mean(error_QN**2) / np.mean(true_QN**2))),
        "error_in_bars": float(np.sqrt(np.mean(error_QN**2 / stored.variance_QN))),
        "slope": float((stored.score_QN * true_QN).sum() / (true_QN**2).sum()),
        "norm_ratio": stored.squares[0] / stored.squares[1],
        "decode_ns": stored.seconds,
    }
    for side, sign in _SIDES:
        shares_QR = []
        for true_N, score_N in zip(sign * true_QN, sign * stored.score_QN, strict=True):
            top_K = np.argpartition(-true_N, _K)[:_K]
            place_K = (score_N[None, :] > score_N[top_K, None]).sum(1)
            shares_QR.append([float((place_K < depth).mean()) for depth in DEPTHS])
        found[side] = [float(share) for share in np.mean(shares_QR, axis=0)]
    return found | stored.damped


def make_curvature(row_ND: Float32, ratio: float) -> Curvature:
    """Return the mean of the outer products of rows."""
    scale = float(np.linalg.norm(row_ND, axis=1).max())
    matrix_DD = (row_ND.T @ row_ND) / np.float32(len(row_ND) * scale**2)
    return Curvature(matrix_DD, scale, len(row_ND), 0.0, ratio)


def score_damped(curvature: Curvature, query_QD: Float32, row_ND: Float32) -> Float64:
    """Return scores [Q, N] with the inverse of a curvature matrix."""
    solver = curvature.factorise(curvature.choose_damping(1.0, None))
    return solver.solve(query_QD.astype(np.float64)) @ row_ND.T.astype(np.float64) / curvature.scale**2


def compare_curvatures(query_QD: Float32, row_ND: Float32, decoded_ND: Float32, dtype: Dtype) -> dict[str, float]:
    """Return how a curvature matrix of decoded rows and its scores differ from those of the rows in float32."""
    plain, coded = make_curvature(row_ND, 1.0), make_curvature(decoded_ND, noise_ratio(dtype))
    own, other = (each.matrix_DD.astype(np.float64) * each.scale**2 for each in (plain, coded))
    norm = np.linalg.norm(own)
    scores = [score_damped(plain, query_QD, row_ND), score_damped(coded, query_QD, decoded_ND)]
    correlations = [np.corrcoef(one, two)[0, 1] for one, two in zip(*scores, strict=True)]
    return {
        "curvature_error": float(np.linalg.norm(other - own) / norm),
        "curvature_error_without_rounding": float(
            np.linalg.norm(other - coded.rounding * np.eye(len(own)) - own) / norm
        ),
        "damped_correlation": float(np.mean(correlations)),
    }


def extract(model: LoadedModel, dim: int, rank_one: frozenset[str], side: SideName, n_rows: int) -> Float32:
    """Return features [N, D] of the loaded checkpoint, rotated as those that are stored as codes."""
    options = FeatureOptions(make_sketch("factored", dim), 0, rank_one, rotates=True)
    return FeatureExtractor(model, options).rows(side, range(n_rows)).feature_ND


def measure_dim(model: LoadedModel, dim: int, rank_one: frozenset[str], true_QN: Float64) -> Iterator[dict[str, Any]]:
    """Yield the results of one D, for each dtype."""
    n_queries, n_rows = true_QN.shape
    stored = {dtype: Stored(np.zeros_like(true_QN), np.zeros_like(true_QN)) for dtype in DTYPES}
    checkpoints = range(len(model.runner.task.checkpoints))
    for checkpoint in checkpoints:
        model.load(checkpoint)
        query_QD = extract(model, dim, rank_one, "query", n_queries)
        row_ND = extract(model, dim, rank_one, "train", n_rows)
        decoded_ND = np.empty_like(row_ND)
        for dtype, each in stored.items():
            coded = encode_rows(row_ND, dtype)
            began = perf_counter()
            decode_rows(*coded, decoded_ND, dtype)
            each.seconds += (perf_counter() - began) / decoded_ND.size / len(checkpoints) * 1e9
            each.add(query_QD, row_ND, decoded_ND)
            if checkpoint == checkpoints[-1] and dim in _DAMPED_DIMS:
                each.damped = compare_curvatures(query_QD, row_ND, decoded_ND, dtype)
    for dtype, each in stored.items():
        yield {"dim": dim, "dtype": dtype, "bytes": measure_row_bytes(dim, dtype)} | measure(each, true_QN)


def read_true_scores(task: Task, folder: Path, n_queries: int, n_rows: int) -> Float64:
    """Return the true scores [Q, N], which are computed if they are not in the folder."""
    path = folder / f"true-{n_rows}.npy"
    if not path.exists():
        np.save(path, compute_true_scores(task, n_queries, n_rows).astype(np.float32))
    return np.load(path)[:n_queries].astype(np.float64)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--folder", type=Path, required=True, help="folder for checkpoints and true scores")
    parser.add_argument("--models", nargs="+", choices=list(TASKS), default=["language", "mnist"], help="models")
    parser.add_argument("--rows", type=int, default=10_000, help="number of rows")
    parser.add_argument("--queries", type=int, default=64, help="number of queries")
    parser.add_argument("--dims", nargs="+", type=int, default=[256, 512, 1024, 2048, 4096], help="values of D")
    options = parser.parse_args()
    results: list[dict[str, Any]] = []
    settings = {"rows": options.rows, "queries": options.queries, "threads": torch.get_num_threads()}
    for name in options.models:
        folder = options.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        data = options.data / "mnist.npz" if name == "mnist" else options.data
        task = TASKS[name](str(data), str(folder), options.rows)
        true_QN = read_true_scores(task, folder, options.queries, options.rows)
        with TaskRunner(task, RunOptions(torch.device("cpu"), _BATCH)).model() as model:
            model.load(0)
            model.probe("train")
            rank_one = model.engine("train").plan.rank_one
            for dim in options.dims:
                for result in measure_dim(model, dim, rank_one, true_QN):
                    results.append({"model": name} | result)
                    print(results[-1], flush=True)
                path = write_results(RESULT, settings, results)
    print(path)


if __name__ == "__main__":
    main()
