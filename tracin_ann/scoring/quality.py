"""Quality of an index, measured on the task's own rows at build time: recall of its lists and fidelity of its sketch.

Fidelity compares the sketch's ranking with true TracInCP for a few queries. The pool of a query holds the rows that the
sketch ranks first and last and a sample from equal strata of the norms; the true ten come from the true scores of this
pool. Rows outside the pool are not scored, so with more rows than the pool holds the measured recall is an upper
estimate; the error bars tell by how much the sketch would have to misjudge a row to change it.

Shapes: Q queries, M rows of the pool, C checkpoints, D sketch dimension, F = C·D.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tracin_ann.choices import SideName
from tracin_ann.errors import NonFiniteError, problem
from tracin_ann.features import FeatureExtractor, FeatureOptions, Passes, find_nonfinite
from tracin_ann.scoring.exact import exact_scores
from tracin_ann.search import Calibration, FlatIndex, IVFIndex, calibrate, scale_to_unit
from tracin_ann.store import FeatureStore, Fidelity
from tracin_ann.types import Float32, Float64, Int64, ProgressCallback, RowSource

K = 10
QUERIES = 8
FIRST = 150
"""Rows of a query's pool that the sketch ranks first, and last."""
CANDIDATES = 100
SAMPLE = 200
_ENTRIES = 2**28
CALIBRATION_QUERIES = 400
FEWEST_QUERIES = 100
"""Under so many rows of query_data, training rows are asked as well."""


@dataclass(frozen=True)
class QualityMeasurement:
    """What is measured, and with what.

    Attributes:
        passes: the task's data and model.
        store: the feature rows.
        features: how queries become features.
        seed: which queries and rows.
        skipped: ids of training rows that are neither asked nor scored, rising.
        progress: told the steps done.
    """

    passes: Passes
    store: FeatureStore
    features: FeatureOptions
    seed: int
    skipped: Int64
    progress: ProgressCallback

    def recall(self, lists: IVFIndex, target: float) -> Calibration:
        """Return the lists' recall on rows of query_data, and on training rows where those are few."""
        view = self.store.view()
        random = np.random.default_rng(self.seed)
        _, asked_QF = self._queries(random.permutation(self.passes.n_rows("query"))[:CALIBRATION_QUERIES])
        rows_N = self._rows()
        n_train = min(len(rows_N), max(0, FEWEST_QUERIES - len(asked_QF)))
        rows = rows_N[np.sort(random.choice(len(rows_N), n_train, replace=False))]
        queries_QF = np.concatenate([asked_QF, view.take(rows)])
        queries_QF = queries_QF[random.permutation(len(queries_QF))]
        exact = FlatIndex(lists.source, self.passes.options.device)
        return calibrate(
            lists, exact, queries_QF, target, n_train, lambda done, total: self.progress("calibration", done, total)
        )

    def fidelity(self) -> Fidelity:
        """Return how well the sketch ranks a sample of the rows for a few queries."""
        self.progress("fidelity", 0, 1)
        n_queries = self.passes.n_rows("query")
        with self.passes.model() as model:
            entries = sum(p.numel() for p in model.parameters.values())
        random = np.random.default_rng(self.seed + 1)
        order, wanted = random.permutation(n_queries), query_count(entries, n_queries)
        ids, query_QF = self._queries(np.sort(order[:wanted]))
        if not len(ids) and wanted < n_queries:
            ids, query_QF = self._queries(order[wanted : wanted + CALIBRATION_QUERIES], wanted)
        if not len(ids):
            tried = min(n_queries, wanted + CALIBRATION_QUERIES)
            raise NonFiniteError(
                problem(
                    "the fidelity cannot be measured",
                    got=f"NaN or infinity for each of {tried} rows of query_data",
                    expected="some that are finite at every checkpoint",
                    remedy="mend query_data or query_loss, or build with --no-yardstick",
                )
            )
        rows_N = self._rows()
        norm_N = np.sqrt(self.store.sqnorms() @ self._rates())[rows_N]
        sample = rows_N[sample_rows(norm_N, self.seed)]
        side: SideName = "query"
        allowed = rows_N if len(self.skipped) else None
        asked = side, ids.tolist()
        found = measure_fidelity(self.passes, asked, query_QF, self.store.view(), sample, allowed)
        self.progress("fidelity", 1, 1)
        return found

    def _rows(self) -> Int64:
        """Return the ids of the training rows that were not skipped, rising."""
        return np.setdiff1d(np.arange(self.store.layout.n_rows, dtype=np.int64), self.skipped, assume_unique=True)

    def _rates(self) -> Float64:
        return np.array([c.learning_rate for c in self.passes.task.checkpoints])

    def _queries(self, ids: Int64, wanted: int | None = None) -> tuple[Int64, Float32]:
        """Return those of these rows of query_data that are finite, the first `wanted` or all, and their features."""
        taken = []
        with self.passes.model() as model:
            for checkpoint in range(len(self.passes.task.checkpoints)):
                model.load(checkpoint)
                taken.append(FeatureExtractor(model, self.features).rows("query", ids.tolist()))
        fine = np.flatnonzero(~np.any([find_nonfinite(rows) for rows in taken], axis=0))[:wanted]
        return ids[fine], np.concatenate([rows.feature_ND[fine] for rows in taken], axis=1)


def sample_rows(norm_N: Float64, seed: int) -> Int64:
    """Return ids, rising: one from each of 200 equal strata of the norms."""
    n_rows = len(norm_N)
    wanted = min(n_rows, SAMPLE)
    random = np.random.Generator(np.random.Philox(seed))
    edges = np.linspace(0, n_rows, wanted + 1).astype(np.int64)
    places = edges[:-1] + (random.random(wanted) * np.diff(edges)).astype(np.int64)
    return np.sort(np.argsort(norm_N, kind="stable")[places])


def measure_fidelity(
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
    sides = FlatIndex(view, passes.options.device).search_both(scale_to_unit(query_QF)[0], FIRST, allowed)
    rows = np.unique(np.concatenate([sample, *sides[0].ids, *sides[1].ids]))
    true_QM = exact_scores(passes, queries, rows.tolist(), checkpoints)
    row_MF = view.take(rows)
    sketch_QM = query_QF.astype(np.float64) @ row_MF.T.astype(np.float64)
    deviation_QM = sketch_deviations(query_QF, row_MF, len(checkpoints))
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


def sketch_deviations(query_QF: Float32, row_MF: Float32, n_checkpoints: int) -> Float64:
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
