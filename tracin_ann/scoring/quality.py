"""Quality of an index, measured by the build on rows of the task: recall of the search index, fidelity of the sketch.

Fidelity compares the sketch's ranking of all rows with exact scores for a few queries: for TracIn, and for the default
score if it has a curvature matrix and its exact scores are not too much work. Some rows are scored exactly:
a sample from equal strata of the norms, and rows drawn by their chance to be in the true top ten of a query. With their
weights, the estimated recall is that of all rows (`scoring.true_recall`). The error bars state how far the sketch's
score of a row may be off.

Shapes: N rows, Q queries, M rows scored exactly, C checkpoints, D sketch dimension, F = C·D.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import median

import numpy as np

from tracin_ann.choices import CURVATURES, SideName
from tracin_ann.errors import NonFiniteError, problem
from tracin_ann.features import FeatureExtractor, FeatureOptions, TaskRunner, find_nonfinite
from tracin_ann.scoring.exact import ExactProgress, Queries, make_exact_scorer
from tracin_ann.scoring.exact_work import ExactWork
from tracin_ann.scoring.scores import Score
from tracin_ann.scoring.true_recall import (
    NoiseModel,
    bound_mean,
    estimate_recall,
    find_chances,
    find_cuts,
    find_probabilities,
)
from tracin_ann.search import CalibratedIndex, Calibration, FirstUseCost, FlatIndex, Subset, calibrate
from tracin_ann.store import (
    Estimate,
    FeatureStore,
    Fidelity,
    ParameterSpec,
    ScoreFidelity,
    TrueRecall,
    measure_row_bytes,
    noise_ratio,
)
from tracin_ann.types import Float32, Float64, Int64, ProgressCallback, RowSource

QUERIES = 16
"""The most queries whose fidelity is measured."""
DEPTHS = (10, 100, 1000)
"""Depths of the sketch's ranking at which the recall is measured."""
SAMPLE = 200
"""Rows from equal strata of the norms that are scored exactly."""
DRAWN = 2300
"""The expected number of further rows that are scored exactly; if there are no more rows than both, all are."""
_BLOCK_ROWS = 8192
_GRADIENT_ENTRIES = 2**28
"""The most gradient entries of all queries in memory."""
CALIBRATION_QUERIES = 400
FEWEST_QUERIES = 100
"""If query_data has fewer rows, training rows complete the calibration queries."""
_TIMED_FILES = 8
_TIMED_BYTES = 2**24
"""Bytes of a file whose verification is timed."""

logger = logging.getLogger(__name__)


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

    def recall(self, index: CalibratedIndex, target: float, score: Score) -> Calibration:
        """Return the recall of an index on rows of query_data, completed by training rows if they are few.

        Args:
            index: the index.
            target: the target recall.
            score: whose vectors are searched for.
        """
        view = self.store.view()
        random = np.random.default_rng(self.seed)
        _, query_data_QF = self._extract_queries(random.permutation(self.runner.n_rows("query"))[:CALIBRATION_QUERIES])
        rows_N = self._list_rows()
        n_train = min(len(rows_N), max(0, FEWEST_QUERIES - len(query_data_QF)))
        rows = rows_N[np.sort(random.choice(len(rows_N), n_train, replace=False))]
        queries_QF = np.concatenate([query_data_QF, view.take(rows)])
        queries_QF = queries_QF[random.permutation(len(queries_QF))]
        queries_QF = score.weigh(queries_QF, range(self.store.layout.n_checkpoints)).vector_QF
        exact = FlatIndex(index.source, self.runner.options.device)
        calibration = calibrate(
            index, exact, queries_QF, target, n_train, lambda done, total: self.progress("calibration", done, total)
        )
        return replace(calibration, first_use=measure_first_use(self.store))

    def fidelity(self, score: Score) -> Fidelity:
        """Return the fidelity of the sketch for a few queries.

        Args:
            score: TracIn, or a score with a curvature matrix.

        Raises:
            NonFiniteError: no row of query_data is finite.
        """
        stage = "fidelity" if score.name == "tracin" else f"fidelity of {score.name}"
        self.progress(stage, 0, 1)
        ids, feature_QF, rate_C = self._queries
        vector_QF = score.weigh(feature_QF, range(len(rate_C))).vector_QF
        rows_N = self._list_rows()
        sqnorm_NC = self.store.sqnorms()[rows_N] * rate_C * noise_ratio(self.store.layout.dtype)
        view = self.store.view()
        stored_QN = score_rows(view if len(rows_N) == len(view) else Subset(view, rows_N), vector_QF)
        ranked = RankedRows(rows_N, stored_QN, sqnorm_NC, vector_QF)
        queries, progress = Queries("query", ids.tolist()), ExactProgress(report=self.progress)
        with make_exact_scorer(self.runner, queries, range(len(rate_C)), progress, score.direction_map) as scorer:
            fidelity = measure_fidelity(ranked, lambda rows: scorer.scores(rows.tolist()), self.seed)
        self.progress(stage, 1, 1)
        return fidelity

    def score_fidelity(self, score: Score, parameters: Sequence[ParameterSpec]) -> ScoreFidelity | None:
        """Return the fidelity for the default score.

        Args:
            score: the default score, with the default damping.
            parameters: whose gradients are used.

        Returns:
            None if the score has no curvature matrix, if its exact scores are too much work, or if they are not finite.

        Raises:
            NonFiniteError: no row of query_data is finite.
        """
        if score.name not in CURVATURES:
            return None
        ids, _, rate_C = self._queries
        n_rows = len(self._list_rows())
        n_scored = min(n_rows, SAMPLE + DRAWN)
        work = ExactWork(parameters, int((rate_C > 0).sum()), n_rows, len(ids), n_scored)
        if not work.is_small:
            logger.info("the fidelity of %s is not measured: exact scores take longer than the features", score.name)
            return None
        try:
            return ScoreFidelity(score.name, score.summary, self.fidelity(score))
        except NonFiniteError as error:
            # The stored scores can be used without exact ones.
            logger.warning("the fidelity of %s is not measured: %s", score.name, error)
            return None

    @cached_property
    def _queries(self) -> tuple[Int64, Float32, Float64]:
        """The ids [Q] and features [Q, F] of the queries whose fidelity is measured, and η_c of all checkpoints [C]."""
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
        return ids, query_QF, rate_C

    def _list_rows(self) -> Int64:
        """Return the ids of the training rows that were not skipped, ascending."""
        return np.setdiff1d(np.arange(self.store.layout.n_rows, dtype=np.int64), self.skipped, assume_unique=True)

    def _extract_queries(self, ids: Int64, at_most: int | None = None) -> tuple[Int64, Float32]:
        """Return the ids and features of the finite rows among these rows of query_data, at most so many."""
        return extract_finite(self.runner, self.features, "query", ids, at_most)


def extract_finite(
    runner: TaskRunner, features: FeatureOptions, side: SideName, ids: Int64, at_most: int | None = None
) -> tuple[Int64, Float32]:
    """Return the ids and features of the finite rows among these rows of a side, at most so many."""
    extracted = []
    with runner.model() as model:
        for checkpoint in range(len(runner.task.checkpoints)):
            model.load(checkpoint)
            extracted.append(FeatureExtractor(model, features).rows(side, ids.tolist()))
    finite = np.flatnonzero(~np.any([find_nonfinite(rows) for rows in extracted], axis=0))[:at_most]
    return ids[finite], np.concatenate([rows.feature_ND[finite] for rows in extracted], axis=1)


def measure_first_use(store: FeatureStore) -> FirstUseCost:
    """Return the times of opening a file and of verifying a byte: medians of a few files of a finished store.

    The build has just read these files, so the system has them in its page cache. A first use that reads from a disk
    takes longer.
    """
    layout, fresh = store.layout, FeatureStore(store.directory, store.layout)
    row_bytes = measure_row_bytes(layout.dim, layout.dtype)
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


@dataclass(frozen=True, eq=False)
class RankedRows:
    """All rows with their stored scores for some queries.

    Attributes:
        rows_N: ids of the rows.
        stored_QN: stored scores.
        sqnorm_NC: squared norms of the rows' features at each checkpoint, as estimated by the sketch, times the
            `noise_ratio` of the stored numbers: their rounding is a part of the errors of scores.
        query_QF: the queries' features.
    """

    rows_N: Int64
    stored_QN: Float64
    sqnorm_NC: Float64
    query_QF: Float32

    def deviations(self, places: Int64 | slice, queries: slice = slice(None)) -> Float64:
        """Return the standard deviations of the scores of some rows for some queries."""
        n_checkpoints = self.sqnorm_NC.shape[1]
        query_QC = _square_norms(self.query_QF[queries], n_checkpoints)
        return sketch_deviations(query_QC, self.sqnorm_NC[places], self.query_QF.shape[1] // n_checkpoints)


def score_rows(rows: RowSource, query_QF: Float32) -> Float64:
    """Return the scores [Q, N] of all rows of a source; in float64, in which no product overflows."""
    score_QN = np.empty((len(query_QF), len(rows)))
    wide_QF = query_QF.astype(np.float64)
    done = 0
    for _, row_BF in rows.blocks(_BLOCK_ROWS):
        np.matmul(wide_QF, row_BF.T.astype(np.float64), out=score_QN[:, done : done + len(row_BF)])
        done += len(row_BF)
    return score_QN


def measure_fidelity(ranked: RankedRows, score_exactly: Callable[[Int64], Float64], seed: int) -> Fidelity:
    """Return how well the sketch ranks all rows for some queries.

    Args:
        ranked: all rows.
        score_exactly: returns the exact scores [Q, M] of rows.
        seed: of the draw of the rows.
    """
    n_rows = len(ranked.rows_N)
    n_queries = len(ranked.query_QF)
    sample = sample_rows(np.sqrt(ranked.sqnorm_NC.sum(1)), seed)
    exact_QS, stored_QS = score_exactly(ranked.rows_N[sample]), ranked.stored_QN[:, sample]
    noise = NoiseModel.fit(exact_QS, stored_QS, ranked.deviations(sample))
    probability_N = _find_probabilities(ranked, noise.scale_Q)
    random = np.random.Generator(np.random.Philox(seed + 1))
    drawn = np.setdiff1d(np.flatnonzero(random.random(n_rows) < probability_N), sample)
    places = np.concatenate([sample, drawn])
    exact_QM = np.concatenate([exact_QS, score_exactly(ranked.rows_N[drawn])], axis=1)
    stored_QM = ranked.stored_QN[:, places]
    deviation_QM = ranked.deviations(places)
    # A row is scored if it is in the sample, or drawn, or both.
    weight_M = 1 / (1 - (1 - len(sample) / n_rows) * (1 - probability_N[places]))
    estimates = []
    for sign in (1, -1):
        recall_QR, observed = estimate_recall(
            sign * noise.expect(exact_QM),
            sign * stored_QM,
            noise.scale_Q[:, None] * deviation_QM,
            weight_M,
            find_cuts(ranked.stored_QN, DEPTHS, sign),
        )
        # All rows are within the deepest ranking of a small index.
        estimates.append(
            [
                bound_mean(recall_Q, 1 - observed) if depth < n_rows else Estimate(1.0, 1.0, 1.0)
                for recall_Q, depth in zip(recall_QR.T, DEPTHS, strict=True)
            ]
        )
    recalls = tuple(TrueRecall(m, *sides) for m, *sides in zip(DEPTHS, *estimates, strict=True))
    first, second = recalls[:2]
    return Fidelity(
        n_queries,
        len(places),
        first.proponents.mean,
        first.opponents.mean,
        second.proponents.mean,
        second.opponents.mean,
        float(np.mean([_correlation(t, s) for t, s in zip(exact_QS, stored_QS, strict=True)])),
        _measure_error_scale(exact_QM, stored_QM, deviation_QM),
        recalls,
    )


def _find_probabilities(ranked: RankedRows, scale_Q: Float64) -> Float64:
    """Return the probabilities [N] of drawing rows, by their chances to be in the true top ten of some query."""
    n_rows = len(ranked.rows_N)
    if n_rows <= SAMPLE + DRAWN:
        return np.ones(n_rows)
    chance_N = np.zeros(n_rows)
    for query, scale in enumerate(scale_Q):
        stored_N = ranked.stored_QN[query]
        deviation_N = scale * ranked.deviations(slice(None), slice(query, query + 1))[0]
        chance_N += find_chances(stored_N, deviation_N) + find_chances(-stored_N, deviation_N)
    return find_probabilities(chance_N, DRAWN)


def _measure_error_scale(exact_QM: Float64, stored_QM: Float64, deviation_QM: Float64) -> float:
    """Return the root mean square of the scores' errors in standard deviations of the sketch."""
    is_positive = deviation_QM > 0
    error = (stored_QM - exact_QM)[is_positive] / deviation_QM[is_positive]
    return float(np.sqrt(np.mean(error**2))) if error.size else 0.0


def count_queries(entries: int, available: int) -> int:
    """Return for how many queries to measure fidelity: all their gradients, `entries` numbers each, are in memory."""
    return max(1, min(QUERIES, available, _GRADIENT_ENTRIES // max(1, entries)))


def sketch_deviations(query_QC: Float64, row_MC: Float64, dim: int) -> Float64:
    """Return the sketch's standard deviation of each score, [Q, M]: √(Σ_c ‖z_c‖²‖q_c‖² / D).

    With the norms of decoded rows x̂, it includes the rounding of codes: x̂ - x is orthogonal to x and has a random
    direction, so that ‖x̂‖² = ‖x‖² + ‖x̂ - x‖², and the two variances add up.

    Args:
        query_QC: squared norms of the queries' features at each checkpoint.
        row_MC: squared norms of the rows' features at each checkpoint.
        dim: D.
    """
    deviation_QM: Float64 = np.sqrt(np.einsum("qc,mc->qm", query_QC, row_MC) / dim)
    return deviation_QM


def measure_deviations(query_QF: Float32, row_MF: Float32, n_checkpoints: int) -> Float64:
    """Return the sketch's standard deviations of the scores of rows for queries, [Q, M], from their features."""
    query_QC, row_MC = (_square_norms(feature_NF, n_checkpoints) for feature_NF in (query_QF, row_MF))
    return sketch_deviations(query_QC, row_MC, query_QF.shape[1] // n_checkpoints)


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


def _correlation(one: Float64, other: Float64) -> float:
    if one.std() == 0 or other.std() == 0:
        return 1.0 if np.allclose(one, other) else 0.0
    return float(np.corrcoef(one, other)[0, 1])
