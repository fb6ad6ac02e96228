"""Retrieval under scores with a curvature matrix: recall@10 and CPU time of the exact scan and of inverted lists.

Reads the rows and queries that benchmarks.retrieval.rows wrote; a size of N uses the first N rows. Three tables for
each size and score:

- `candidates`: the share of the ten largest scores among the best n by another score: that of TracIn, of a larger
  damping, or of vectors in fewer dimensions. This is the recall after these n are scored again, if no list is missed.
- `lists`: the fewest rows that inverted lists score for a recall of .95, for lists over the stored rows in 256
  dimensions (`rows`), in all dimensions (`full`), over rows in the metric of K⁻¹ (`whitened`), and in the 256
  dimensions that preserve most of the mean square of the scores (`bilinear`).
- `seconds`: CPU time of a query on one thread for both directions, alone and in a batch of 100.

The lists have seconds, too: of one direction with these settings, with the scores of the candidates.

Shapes: N rows, Q queries, F feature dimension, W reduced dimension.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.common.results import read_results, write_results
from benchmarks.retrieval.lists import CPU, SIDES, First
from tracin_ann.scoring import CurvatureSource, ScoreMaker
from tracin_ann.scoring.scores import Damping, PreconditionedScore
from tracin_ann.search import FlatIndex, IVFIndex, IVFParams, search_both
from tracin_ann.search.settings import Setting
from tracin_ann.store import FeatureStore
from tracin_ann.store.manifest import FEATURES, Manifest
from tracin_ann.types import Float32, Int64, RowSource

RESULT = "retrieval_preconditioned"
TARGET = 0.95
DEPTHS = (10, 40, 100, 400, 1000)
DAMPINGS = (3, 10)
RESULTS = (20, 200, 500)
"""Results of a search in lists, which scores twice as many candidates again."""
BUDGETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4)
ALPHAS = (0.0, 0.1)
WIDTH = 256
SAMPLE = 16_384
BATCH, SINGLES = 100, 11


@dataclass(frozen=True)
class Mapped:
    """The products of rows and a matrix [F, W], as a RowSource."""

    rows: First
    matrix_FW: Float32

    @property
    def dim(self) -> int:
        return self.matrix_FW.shape[1]

    def __len__(self) -> int:
        return len(self.rows)

    def blocks(self, block_rows: int, start: int = 0) -> Iterator[tuple[Int64, Float32]]:
        for ids, row_BF in self.rows.blocks(block_rows, start):
            yield ids, row_BF @ self.matrix_FW

    def take(self, ids: Sequence[int] | Int64) -> Float32:
        return self.rows.take(ids) @ self.matrix_FW


@dataclass(frozen=True)
class Subject:
    """Rows, a score of them, and queries.

    Attributes:
        rows: the stored rows.
        score: the score.
        feature_QF: the queries' features.
        vector_QF: their vectors of the score.
    """

    rows: First
    score: PreconditionedScore
    feature_QF: Float32
    vector_QF: Float32

    @property
    def checkpoints(self) -> range:
        return range(len(self.score.rates))

    def damp(self, factor: float) -> Float32:
        """Return the vectors with a damping that is larger by a factor."""
        damping = self.score.damping
        larger = Damping(damping.curvatures, [factor * each for each in damping.damping_C], "")
        return replace(self.score, damping=larger).weigh(self.feature_QF, self.checkpoints).vector_QF

    def sample(self) -> Float32:
        """Return random rows."""
        ids = np.random.default_rng(0).choice(len(self.rows), min(SAMPLE, len(self.rows)), replace=False)
        return self.rows.take(np.sort(ids))

    def whiten(self) -> tuple[Float32, Float32]:
        """Return the maps [F, F] of queries and of rows into the metric of K⁻¹."""
        factors = []
        for c in self.checkpoints:
            solver = self.score.damping.solver(c, 0, self.score.store.layout.dim)
            assert solver.factor_DD is not None
            factors.append(solver.factor_DD)
        factor_FF = torch.block_diag(*factors)
        return factor_FF.float().numpy(), torch.linalg.inv(factor_FF).T.float().numpy()


def fit_svd(row_SF: Float32) -> tuple[Float32, Float32]:
    """Return the map [F, W] that preserves most of the squared norms of rows, for queries and for rows."""
    moment_FF = torch.from_numpy(row_SF.T @ row_SF)
    basis_FW = torch.linalg.eigh(moment_FF).eigenvectors[:, -WIDTH:].contiguous().numpy()
    return basis_FW, basis_FW


def fit_bilinear(vector_SF: Float32, row_SF: Float32) -> tuple[Float32, Float32]:
    """Return the maps A of queries and B of rows [F, W] with the smallest mean square of qᵀz − (Aᵀq)ᵀ(Bᵀz).

    With the second moments L Lᵀ of the queries and M Mᵀ of the rows, and LᵀM = U S Vᵀ: A = L⁻ᵀ U √S, B = M⁻ᵀ V √S.
    """
    query_FF, rows_FF = (_factorise_moment(sample_SF) for sample_SF in (vector_SF, row_SF))
    product_FF = query_FF.T @ rows_FF
    square_F, vector_FF = torch.linalg.eigh(product_FF.T @ product_FF)
    right_FW, singular_W = vector_FF[:, -WIDTH:], square_F[-WIDTH:].clamp(min=1e-30).sqrt()
    left_FW = product_FF @ right_FW / singular_W
    root_W = singular_W.sqrt()
    maps = (
        torch.linalg.solve_triangular(factor_FF.T, each_FW * root_W, upper=True)
        for factor_FF, each_FW in ((query_FF, left_FW), (rows_FF, right_FW))
    )
    query_FW, rows_FW = (each_FW.float().contiguous().numpy() for each_FW in maps)
    return query_FW, rows_FW


def _factorise_moment(sample_SF: Float32) -> torch.Tensor:
    """Return the Cholesky factor of the second moment, with a small multiple of the identity."""
    moment_FF = torch.from_numpy(sample_SF.T @ sample_SF).double() / len(sample_SF)
    moment_FF.diagonal().add_(1e-6 * moment_FF.trace() / len(moment_FF))
    return torch.linalg.cholesky(moment_FF)


def measure_share(found: Sequence[Int64], truth_QK: Int64) -> float:
    """Return the share of the true ids that was found."""
    return float(np.mean([np.isin(true_K, ids).mean() for ids, true_K in zip(found, truth_QK, strict=True)]))


def measure_candidates(
    subject: Subject, maps: dict[str, tuple[Float32, Float32]], truth: dict[str, Int64]
) -> dict[str, dict[str, list[float]]]:
    """Return the share of the true ten among the best n of other scores, by score and direction."""
    queries: dict[str, tuple[RowSource, Float32]] = {"tracin": (subject.rows, subject.feature_QF)}
    queries |= {f"damping x {factor}": (subject.rows, subject.damp(factor)) for factor in DAMPINGS}
    for name, (query_map, row_map) in maps.items():
        queries[name] = Mapped(subject.rows, row_map), subject.vector_QF @ query_map
    shares: dict[str, dict[str, list[float]]] = {}
    for name, (source, vector_QF) in queries.items():
        tops = search_both(FlatIndex(source, CPU), vector_QF, max(DEPTHS))
        shares[name] = {
            side: [measure_share([ids[:depth] for ids in top.ids], truth[side]) for depth in DEPTHS]
            for (side, _), top in zip(SIDES, tops, strict=True)
        }
        print(name, shares[name], flush=True)
    return shares


def find_settings(index: IVFIndex, vector_QW: Float32, sign: int, truth_QK: Int64) -> list[dict[str, Any]]:
    """Return the settings that reach the target with the fewest scored rows; otherwise, the one of the best recall."""
    points = []
    for share in BUDGETS:
        for k in RESULTS:
            for alpha in ALPHAS:
                codes = round(share * len(index))
                at = index.with_settings(Setting(codes, codes // 2, alpha))
                top = at.search(np.ascontiguousarray(sign * vector_QW), k)
                point = {"codes": codes, "alpha": alpha, "results": k, "recall": measure_share(top.ids, truth_QK)}
                points.append(point | {"scored": float(top.rows_scored.mean()) / len(index)})
        if max(point["recall"] for point in points) >= TARGET + 0.01:
            break
    sufficient = [point for point in points if point["recall"] >= TARGET]
    if sufficient:
        return sorted(sufficient, key=lambda point: (point["scored"], point["results"]))[:1]
    return [max(points, key=lambda point: point["recall"])]


def time_search(search: Callable[[Float32], Any], vector_QW: Float32) -> dict[str, float]:
    """Return CPU seconds per query: the median of queries alone, and of a batch."""

    def time_call(queries: Float32) -> float:
        start_s = time.process_time()
        search(queries)
        return time.process_time() - start_s

    time_call(vector_QW[:1])
    single = median(time_call(vector_QW[q : q + 1]) for q in range(SINGLES))
    return {"single": single, "batch": time_call(vector_QW[:BATCH]) / BATCH}


def measure_lists(
    subject: Subject, maps: dict[str, tuple[Float32, Float32]], names: Sequence[str], truth: dict[str, Int64]
) -> dict[str, Any]:
    """Return the settings of inverted lists over several forms of the rows, and their times."""
    results: dict[str, Any] = {}
    for name in names:
        query_map, row_map = maps.get(name, (None, None))
        source = subject.rows if row_map is None else Mapped(subject.rows, row_map)
        vector_QW = subject.vector_QF if query_map is None else subject.vector_QF @ query_map
        width = WIDTH if name == "rows" else source.dim
        start_s = time.process_time()
        index = IVFIndex.build(source, IVFParams(width=width), CPU)
        figures: dict[str, Any] = {"build_seconds": time.process_time() - start_s, "width": width}
        for side, sign in SIDES:
            (point,) = find_settings(index, vector_QW, sign, truth[side])
            at = index.with_settings(Setting(point["codes"], point["codes"] // 2, point["alpha"]))

            def search(queries: Float32, at: IVFIndex = at, sign: int = sign, k: int = point["results"]) -> None:
                at.search(np.ascontiguousarray(sign * queries), k)

            # Mapped rows are computed when they are read, which an index of such rows would not do.
            figures[side] = point | (time_search(search, vector_QW) if row_map is None else {})
        results[name] = figures
        print(name, figures, flush=True)
    return results


def measure_size(maker: ScoreMaker, rows: First, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of one number of rows under one score."""
    start_s = time.process_time()
    damping = None if name == "trak" else 1 / (max(maker.source.rates) * options.steps)
    score = maker.make(name, damping)  # type: ignore[arg-type]
    assert isinstance(score, PreconditionedScore)
    seconds = time.process_time() - start_s
    pairs = zip(score.damping.curvatures, score.damping.damping_C, strict=True)
    dims = [curvature.effective_dimension(each) for curvature, each in pairs]
    features_QF = np.load(Path(options.folder) / "queries.npy").astype(np.float32)
    chosen = np.random.default_rng(1).choice(len(features_QF), options.queries, replace=False)
    vector_QF = score.weigh(features_QF[chosen], range(len(score.rates))).vector_QF
    subject = Subject(rows, score, features_QF[chosen], vector_QF)
    flat = FlatIndex(rows, CPU)
    tops = flat.search_both(vector_QF, 10)
    truth = {side: np.stack(top.ids) for (side, _), top in zip(SIDES, tops, strict=True)}
    scan = time_search(lambda queries: flat.search_both(queries, 10), vector_QF)
    weigh = time_search(lambda queries: score.weigh(queries, subject.checkpoints, estimates=True), subject.feature_QF)
    print(len(rows), name, "scan", scan, "weigh", weigh, "K", seconds, dims, flush=True)
    row_SF = subject.sample()
    vector_SF = score.weigh(row_SF[:8192], subject.checkpoints).vector_QF
    maps = {"svd": fit_svd(row_SF), "bilinear": fit_bilinear(vector_SF, row_SF)}
    result: dict[str, Any] = {"rows": len(rows), "score": name, "curvature_seconds": seconds}
    result |= {"effective_dimension": dims, "scan": scan, "weigh": weigh}
    result["depths"], result["candidates"] = DEPTHS, measure_candidates(subject, maps, truth)
    if "whitened" in options.lists:
        maps["whitened"] = subject.whiten()
    result["lists"] = measure_lists(subject, maps, options.lists, truth)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", required=True, help="folder that benchmarks.retrieval.rows wrote")
    parser.add_argument("--index", default="index-1000000", help="index in the folder")
    parser.add_argument("--sizes", nargs="+", type=int, default=[20_000, 100_000, 1_000_000], help="numbers of rows")
    parser.add_argument("--scores", nargs="+", default=["gauss-newton", "fisher"], help="scores")
    parser.add_argument(
        "--lists", nargs="*", default=["rows", "bilinear"], choices=["rows", "full", "whitened", "bilinear"]
    )
    parser.add_argument("--steps", type=float, default=5625, help="optimizer updates T of the run; λ is 1/(ηT)")
    parser.add_argument("--queries", type=int, default=150, help="number of queries")
    parser.add_argument("--add", action="store_true", help="add to the figures of the result file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    directory = Path(options.folder) / options.index
    spec = Manifest.read(directory).build
    store = FeatureStore(directory / FEATURES, spec.layout)
    rates = [checkpoint.learning_rate for checkpoint in spec.spec.checkpoints]
    results = read_results(RESULT)["results"] if options.add else []
    settings = {key: value for key, value in vars(options).items() if key in ("queries", "steps")}
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as folder:
            source = CurvatureSource(store, np.arange(size), rates, True, Path(folder))
            maker = ScoreMaker(source, [None] * len(rates))
            for name in options.scores:
                figures = measure_size(maker, First(store.view(), size), name, options)
                results.append({"dim": spec.layout.dim} | figures)
                path = write_results(RESULT, settings | {"threads": 1}, json.loads(json.dumps(results)))
    print(path)


if __name__ == "__main__":
    main()
