"""Quality of an index, measured by the build on rows of the task: recall of the search index, fidelity of the sketch.

Fidelity compares the sketch's ranking with exact TracInCP for a few queries. The pool of a query holds the rows that
the sketch ranks first and last, and a sample from equal strata of the norms. The exact top ten are those of the pool.
Rows outside the pool are not scored: if there are more rows than the pool holds, the measured recall is an upper
estimate. The error bars state how far the sketch's score of a row may be off.

Shapes: Q queries, M rows of the pool, C checkpoints, D sketch dimension, F = C·D.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

import numpy as np

from tracin_ann.choices import SideName
from tracin_ann.errors import NonFiniteError, problem
from tracin_ann.features import FeatureExtractor, FeatureOptions, TaskRunner, find_nonfinite
from tracin_ann.scoring.exact import exact_scores
from tracin_ann.search import Calibration, FirstUseCost, FlatIndex, RescoredIndex, calibrate, scale_to_unit
from tracin_ann.store import FeatureStore, Fidelity
from tracin_ann.types import Float32, Float64, Int64, ProgressCallback, RowSource

K = 10
"""k of the measured recall."""
QUERIES = 8
"""The most queries whose fidelity is measured."""
FIRST = 150
"""How many rows that the sketch ranks first, and how many that it ranks last, are in a query's pool."""
CANDIDATES = 100
"""Depth of the sketch's ranking for the recall with exact re-scoring."""
SAMPLE = 200
"""Sampled rows in the pool of every query."""
_GRADIENT_ENTRIES = 2**28
"""The most gradient entries of all queries in memory."""
CALIBRATION_QUERIES = 400
FEWEST_QUERIES = 100
"""If query_data has fewer rows, training rows complete the calibration queries."""
_TIMED_FILES = 8
_TIMED_BYTES = 2**24
"""Bytes of a file whose verification is timed."""


@dataclass(frozen=True)
class QualityMeasurement:
    """The measurement of an index's quality.

    Attributes:
        runner: the task's data and model.
        store: the stored features.
        features: options of the queries' features.
        seed: of the draw of queries and rows.
        skipped: ids of training rows that are neither queried nor scored, ascending.
        progress: called with (stage, done, total).
    """

    runner: TaskRunner
    store: FeatureStore
    features: FeatureOptions
    seed: int
    skipped: Int64
    progress: ProgressCallback

    def recall(self, index: RescoredIndex, target: float) -> Calibration:
        """Return the recall of an index on rows of query_data, completed by training rows if they are few."""
        view = self.store.view()
        random = np.random.default_rng(self.seed)
        _, query_data_QF = self._extract_queries(random.permutation(self.runner.n_rows("query"))[:CALIBRATION_QUERIES])
        rows_N = self._list_rows()
        n_train = min(len(rows_N), max(0, FEWEST_QUERIES - len(query_data_QF)))
        rows = rows_N[np.sort(random.choice(len(rows_N), n_train, replace=False))]
        queries_QF = np.concatenate([query_data_QF, view.take(rows)])
        queries_QF = queries_QF[random.permutation(len(queries_QF))]
        exact = FlatIndex(index.source, self.runner.options.device)
        calibration = calibrate(
            index, exact, queries_QF, target, n_train, lambda done, total: self.progress("calibration", done, total)
        )
        return replace(calibration, first_use=measure_first_use(self.store))

    def fidelity(self) -> Fidelity:
        """Return the fidelity of the sketch for a few queries.

        Raises:
            NonFiniteError: no row of query_data is finite.
        """
        self.progress("fidelity", 0, 1)
        n_queries = self.runner.n_rows("query")
        with self.runner.model() as model:
            entries = sum(p.numel() for p in model.parameters.values())
            rate_C = np.array([rates.rate for rates in model.rates])
        random = np.random.default_rng(self.seed + 1)
        order, n_measured = random.permutation(n_queries), count_queries(entries, n_queries)
        ids, query_QF = self._extract_queries(np.sort(order[:n_measured]))
        if not len(ids) and n_measured < n_queries:
            ids, query_QF = self._extract_queries(order[n_measured : n_measured + CALIBRATION_QUERIES], n_measured)
        if not len(ids):
            tried = min(n_queries, n_measured + CALIBRATION_QUERIES)
            raise NonFiniteError(
                problem(
                    "the fidelity cannot be measured",
                    got=f"NaN or infinity for each of {tried} rows of query_data",
                    expected="at least one row that is finite at every checkpoint",
                    remedy="correct query_data or query_loss, or build with --no-yardstick",
                )
            )
        rows_N = self._list_rows()
        norm_N = np.sqrt(self.store.sqnorms() @ rate_C)[rows_N]
        sample = rows_N[sample_rows(norm_N, self.seed)]
        side: SideName = "query"
        allowed = rows_N if len(self.skipped) else None
        queries = side, ids.tolist()
        fidelity = measure_fidelity(self.runner, queries, query_QF, self.store.view(), sample, allowed)
        self.progress("fidelity", 1, 1)
        return fidelity

    def _list_rows(self) -> Int64:
        """Return the ids of the training rows that were not skipped, ascending."""
        return np.setdiff1d(np.arange(self.store.layout.n_rows, dtype=np.int64), self.skipped, assume_unique=True)

    def _extract_queries(self, ids: Int64, at_most: int | None = None) -> tuple[Int64, Float32]:
        """Return the ids and features of the finite rows among these rows of query_data, at most so many."""
        extracted = []
        with self.runner.model() as model:
            for checkpoint in range(len(self.runner.task.checkpoints)):
                model.load(checkpoint)
                extracted.append(FeatureExtractor(model, self.features).rows("query", ids.tolist()))
        finite = np.flatnonzero(~np.any([find_nonfinite(rows) for rows in extracted], axis=0))[:at_most]
        return ids[finite], np.concatenate([rows.feature_ND[finite] for rows in extracted], axis=1)


def measure_first_use(store: FeatureStore) -> FirstUseCost:
    """Return the times of opening a file and of verifying a byte: medians of a few files of a finished store.

    The build has just read these files, so the system has them in its page cache. A first use that reads from a disk
    takes longer.
    """
    layout, fresh = store.layout, FeatureStore(store.directory, store.layout)
    row_bytes = layout.dim * np.dtype(layout.dtype).itemsize
    keys = itertools.product(range(layout.n_partitions), range(layout.n_checkpoints))
    per_file, per_byte = [], []
    for partition, checkpoint in itertools.islice(keys, _TIMED_FILES):
        began = time.perf_counter()
        file = fresh.file(partition, checkpoint)
        opened = time.perf_counter()
        n_rows = min(file.header.n_rows, max(1, _TIMED_BYTES // row_bytes))
        file.read_stored(0, n_rows)
        per_file.append(max(0.0, opened - began))
        per_byte.append(max(0.0, time.perf_counter() - opened) / (n_rows * row_bytes))
    return FirstUseCost(median(per_file), median(per_byte))


def sample_rows(norm_N: Float64, seed: int) -> Int64:
    """Return ascending positions: one row from each of 200 equal strata of the norms."""
    n_rows = len(norm_N)
    n_sampled = min(n_rows, SAMPLE)
    random = np.random.Generator(np.random.Philox(seed))
    edges = np.linspace(0, n_rows, n_sampled + 1).astype(np.int64)
    places = edges[:-1] + (random.random(n_sampled) * np.diff(edges)).astype(np.int64)
    return np.sort(np.argsort(norm_N, kind="stable")[places])


def measure_fidelity(
    runner: TaskRunner,
    queries: tuple[SideName, Sequence[int]],
    query_QF: Float32,
    view: RowSource,
    sample: Int64,
    allowed: Int64 | None = None,
) -> Fidelity:
    """Return how well the sketch ranks all rows for these queries.

    Args:
        runner: the task's data and model.
        queries: side and ids of the queries.
        query_QF: their features.
        view: the stored features.
        sample: ascending ids of rows in the pool of every query.
        allowed: ascending ids of the rows that may be scored; None: all.
    """
    checkpoints = range(len(runner.task.checkpoints))
    sides = FlatIndex(view, runner.options.device).search_both(scale_to_unit(query_QF)[0], FIRST, allowed)
    rows = np.unique(np.concatenate([sample, *sides[0].ids, *sides[1].ids]))
    exact_QM = exact_scores(runner, queries, rows.tolist(), checkpoints)
    row_MF = view.take(rows)
    sketch_QM = query_QF.astype(np.float64) @ row_MF.T.astype(np.float64)
    query_QC, row_MC = (_square_norms(features, len(checkpoints)) for features in (query_QF, row_MF))
    deviation_QM = sketch_deviations(query_QC, row_MC, query_QF.shape[1] // len(checkpoints))
    is_positive = deviation_QM > 0
    error = (sketch_QM - exact_QM)[is_positive] / deviation_QM[is_positive]
    sampled = np.searchsorted(rows, sample)
    return Fidelity(
        len(query_QF),
        len(rows),
        _mean_recall(exact_QM, sketch_QM, K),
        _mean_recall(-exact_QM, -sketch_QM, K),
        _mean_recall(exact_QM, sketch_QM, CANDIDATES),
        _mean_recall(-exact_QM, -sketch_QM, CANDIDATES),
        float(np.mean([_correlation(t, s) for t, s in zip(exact_QM[:, sampled], sketch_QM[:, sampled], strict=True)])),
        float(np.sqrt(np.mean(error**2))) if error.size else 0.0,
    )


def count_queries(entries: int, available: int) -> int:
    """Return for how many queries to measure fidelity: all their gradients, `entries` numbers each, are in memory."""
    return max(1, min(QUERIES, available, _GRADIENT_ENTRIES // max(1, entries)))


def sketch_deviations(query_QC: Float64, row_MC: Float64, dim: int) -> Float64:
    """Return the sketch's standard deviation of each score, [Q, M]: √(Σ_c ‖z_c‖²‖q_c‖² / D).

    Args:
        query_QC: squared norms of the queries' features at each checkpoint.
        row_MC: squared norms of the rows' features at each checkpoint.
        dim: D.
    """
    deviation_QM: Float64 = np.sqrt(np.einsum("qc,mc->qm", query_QC, row_MC) / dim)
    return deviation_QM


def compute_pair_deviations(query_NC: Float64, row_NC: Float64, dim: int) -> Float64:
    """Return the sketch's standard deviation of the score of each pair of a query and a row, [N].

    Args as of `sketch_deviations`, for the query and the row of each pair.
    """
    deviation_N: Float64 = np.sqrt(np.einsum("nc,nc->n", query_NC, row_NC) / dim)
    return deviation_N


def _square_norms(feature_NF: Float32, n_checkpoints: int) -> Float64:
    """Return squared norms of feature rows at each checkpoint, [N, C]."""
    squares = np.square(feature_NF.astype(np.float64)).reshape(len(feature_NF), n_checkpoints, -1)
    return squares.sum(axis=2)  # type: ignore[no-any-return]


def _mean_recall(exact_QM: Float64, sketch_QM: Float64, depth: int) -> float:
    """Return the share of the exact top ten among the sketch's first `depth` rows, mean over queries."""
    k = min(K, exact_QM.shape[1])
    exact_QK = np.argsort(-exact_QM, axis=1, kind="stable")[:, :k]
    sketch_QK = np.argsort(-sketch_QM, axis=1, kind="stable")[:, :depth]
    return float(np.mean([len(np.intersect1d(t, s)) / k for t, s in zip(exact_QK, sketch_QK, strict=True)]))


def _correlation(one: Float64, other: Float64) -> float:
    if one.std() == 0 or other.std() == 0:
        return 1.0 if np.allclose(one, other) else 0.0
    return float(np.corrcoef(one, other)[0, 1])
