"""How well the sketch stands for true TracInCP, measured when an index is built, for a few queries over all rows.

Each query's pool is what the sketch ranks first and last, and a sample from equal strata of the norms; the pool's true
scores give the true ten. A row that the sketch ranks beyond the pool is not seen, so that with more rows than the
pool recall is an upper estimate; error bars say by how much a row would have to be misjudged for that.

Shapes: Q queries, M rows of the pool, C checkpoints, D sketch dimension, F = C·D.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tracin_ann.exact import exact_scores
from tracin_ann.loading import SideName
from tracin_ann.passes import Passes
from tracin_ann.search import FlatIndex, at_unit_scale
from tracin_ann.types import Float32, Float64, Int64, RowSource

K = 10
QUERIES = 8
FIRST = 150
"""Rows of a query's pool that the sketch ranks first, and last."""
CANDIDATES = 100
SAMPLE = 200
_ENTRIES = 2**28


@dataclass(frozen=True)
class Fidelity:
    """What was measured.

    Attributes:
        queries: Q.
        rows: M, over all queries.
        proponents: recall@10 of the sketch's ranking against the true one.
        opponents: the same of the most negative scores.
        deep_proponents: share of the true ten among the sketch's first 100: what re-scoring those can reach.
        deep_opponents: the same of opponents.
        correlation: Pearson's, of scores of the sample within a query, mean over queries.
        error_scale: root mean square of (sketch score - true score) / the sketch's standard deviation,
            √(Σ_c ‖z_c‖²‖q_c‖² / D).
    """

    queries: int
    rows: int
    proponents: float
    opponents: float
    deep_proponents: float
    deep_opponents: float
    correlation: float
    error_scale: float


def sample_rows(norm_N: Float64, seed: int) -> Int64:
    """Return ids, rising: one from each of 200 equal strata of the norms."""
    n_rows = len(norm_N)
    wanted = min(n_rows, SAMPLE)
    random = np.random.Generator(np.random.Philox(seed))
    edges = np.linspace(0, n_rows, wanted + 1).astype(np.int64)
    places = edges[:-1] + (random.random(wanted) * np.diff(edges)).astype(np.int64)
    return np.sort(np.argsort(norm_N, kind="stable")[places])


def measured(
    passes: Passes,
    queries: tuple[SideName, Sequence[int]],
    query_QF: Float32,
    view: RowSource,
    sample: Int64,
    allowed: Int64 | None = None,
) -> Fidelity:
    """Return how the sketch ranks all rows for these queries.

    Args:
        passes: the task's data and model.
        queries: side and ids of the queries.
        query_QF: their features.
        view: the stored features.
        sample: ids that are scored for every query, rising.
        allowed: ids of all rows that may be run, rising; None: all.
    """
    checkpoints = range(len(passes.task.checkpoints))
    sides = FlatIndex(view, passes.options.device).search_both(at_unit_scale(query_QF)[0], FIRST, allowed)
    rows = np.unique(np.concatenate([sample, *sides[0].ids, *sides[1].ids]))
    true_QM = exact_scores(passes, queries, rows.tolist(), checkpoints)
    row_MF = view.take(rows)
    sketch_QM = query_QF.astype(np.float64) @ row_MF.T.astype(np.float64)
    deviation_QM = deviations(query_QF, row_MF, len(checkpoints))
    fine = deviation_QM > 0
    off = (sketch_QM - true_QM)[fine] / deviation_QM[fine]
    drawn = np.searchsorted(rows, sample)
    return Fidelity(
        len(query_QF),
        len(rows),
        _recall(true_QM, sketch_QM, K),
        _recall(-true_QM, -sketch_QM, K),
        _recall(true_QM, sketch_QM, CANDIDATES),
        _recall(-true_QM, -sketch_QM, CANDIDATES),
        float(np.mean([_correlation(t, s) for t, s in zip(true_QM[:, drawn], sketch_QM[:, drawn], strict=True)])),
        float(np.sqrt(np.mean(off**2))) if off.size else 0.0,
    )


def query_count(entries: int, available: int) -> int:
    """Return how many queries the yardstick takes of a model with so many parameters: their gradients are held."""
    return max(1, min(QUERIES, available, _ENTRIES // max(1, entries)))


def deviations(query_QF: Float32, row_MF: Float32, n_checkpoints: int) -> Float64:
    """Return the sketch's standard deviation of each score, [Q, M]: √(Σ_c ‖z_c‖²‖q_c‖² / D)."""
    dim = query_QF.shape[1] // n_checkpoints
    query_QC, row_MC = (
        np.square(f.astype(np.float64)).reshape(len(f), n_checkpoints, dim).sum(axis=2) for f in (query_QF, row_MF)
    )
    deviation_QM: Float64 = np.sqrt(query_QC @ row_MC.T / dim)
    return deviation_QM


def _recall(true_QM: Float64, sketch_QM: Float64, depth: int) -> float:
    """Return the share of the true best ten among the sketch's first `depth`, mean over queries."""
    k = min(K, true_QM.shape[1])
    wanted = np.argsort(-true_QM, axis=1, kind="stable")[:, :k]
    found = np.argsort(-sketch_QM, axis=1, kind="stable")[:, :depth]
    return float(np.mean([len(np.intersect1d(w, f)) / k for w, f in zip(wanted, found, strict=True)]))


def _correlation(one: Float64, other: Float64) -> float:
    if one.std() == 0 or other.std() == 0:
        return 1.0 if np.allclose(one, other) else 0.0
    return float(np.corrcoef(one, other)[0, 1])
