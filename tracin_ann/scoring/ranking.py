"""Ranking: candidates of the search index are re-scored and cut to the best k for each direction of each query.

Shapes: N training rows of one query, Q queries, G weighted sums of queries, C checkpoints, D sketch dimension, F = C·D.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from tracin_ann.choices import CURVATURES, SideName
from tracin_ann.features import TaskRunner
from tracin_ann.results import Answer, Hit, Id
from tracin_ann.scoring.exact import ExactProgress, Queries, RowScorer, make_exact_scorer
from tracin_ann.scoring.options import QueryOptions
from tracin_ann.scoring.quality import compute_pair_deviations
from tracin_ann.scoring.scores import QueryVectors, Score
from tracin_ann.scoring.strategy import Strategy, choose_strategy
from tracin_ann.scoring.tokens import split_scores
from tracin_ann.scoring.true_recall import K
from tracin_ann.scoring.workers import Coverage, SearchWorkers
from tracin_ann.search import (
    CalibratedIndex,
    FlatIndex,
    GpuScan,
    PlacedIndex,
    SearchIndex,
    scale_to_unit,
    search_both,
)
from tracin_ann.store import FeatureStore, Fidelity, IndexRecord, ScoreFidelity
from tracin_ann.types import Float32, Float64, Int64, TopK

_FIRST = 3
"""Candidates a side that the first round of exact scores covers, in multiples of k."""
_NUMBERS_AT_ONCE = 1 << 23
"""Numbers of the stored features of candidates that are in memory at a time, in float64: 64 MiB."""
_ROWS_OF_ERRORS = 10
"""Candidates a side, at least, from whose two half scores the error bar of a query is computed."""
_ERROR_BARS = 4.0
"""A candidate's exact score is assumed to lie within this many error bars of its stored score."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class QueryRequest:
    """A query: examples, checkpoints, training rows that may be hits, and options.

    Attributes:
        side: the data set of the examples.
        ids: their positions.
        checkpoints: positions of the checkpoints to sum over.
        options: see QueryOptions.
        score: the score of the stored rows.
        allowed: the training rows that may be hits; None: all.
        together: one answer for the mean of the examples' gradients, instead of one answer for each example.
        n_against: this many examples at the end form the second set of a contrast, whose mean is subtracted; needs
            `together`.
    """

    side: SideName
    ids: tuple[int, ...]
    checkpoints: tuple[int, ...]
    options: QueryOptions
    score: Score
    allowed: Int64 | None = None
    together: bool = False
    n_against: int = 0

    @property
    def members(self) -> tuple[tuple[int, ...], ...]:
        """Return the examples of each answer, without the second set of a contrast."""
        return (self.ids[: len(self.ids) - self.n_against],) if self.together else tuple((i,) for i in self.ids)

    @property
    def against(self) -> tuple[int, ...]:
        """Return the examples of the second set, whose mean is subtracted."""
        return self.ids[len(self.ids) - self.n_against :]

    @property
    def means_GQ(self) -> Float64:
        """Return the weights of the examples' gradients in the mean of each set."""
        n_for = len(self.ids) - self.n_against
        means_GQ = np.zeros((2 if self.n_against else 1, len(self.ids)))
        means_GQ[0, :n_for] = 1 / n_for
        means_GQ[-1, n_for:] = 1 / max(1, self.n_against)
        return means_GQ

    @property
    def mixture_GQ(self) -> Float64 | None:
        """Return the weights of the examples' gradients in each scored direction; None: each example is one."""
        means_GQ = self.means_GQ if self.together else None
        return means_GQ if means_GQ is None or not self.n_against else means_GQ[:1] - means_GQ[1:]

    def queries(self, *, sets_apart: bool = False) -> Queries:
        """Return the directions to score rows against; `sets_apart`: the mean of each set of a contrast."""
        return Queries(self.side, self.ids, self.means_GQ if sets_apart else self.mixture_GQ)


@dataclass(frozen=True)
class ScoredRows:
    """Training rows of one query, or of several, one query after the other.

    Attributes:
        rows_N: their positions.
        score_N: their scores.
        stored_N: where `score_N` is exact, the scores from the stored features.
        error_N: error bars of the scores from the stored features; None: unknown.
        part_NC: the parts of the scores from the stored features, by checkpoint; None: not computed.
    """

    rows_N: Int64
    score_N: Float64
    stored_N: Float64 | None = None
    error_N: Float64 | None = None
    part_NC: Float64 | None = None

    def __getitem__(self, chosen: npt.NDArray[Any] | slice) -> ScoredRows:
        """Return the rows at these positions, of this mask or of this slice."""
        return ScoredRows(*(None if values is None else values[chosen] for values in vars(self).values()))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Ranker:
    """The data and models that rank training rows.

    Attributes:
        store: the stored features.
        index: the search index over all checkpoints.
        scan: the exact scan of the stored rows of all checkpoints.
        record: the manifest's record of the index.
        fidelity: how well the stored scores of TracIn agree with exact ones; None: not measured.
        rates: η_c of all checkpoints.
        runner: the task's data and model, for exact scores.
        ids_of: returns the ids of examples for a side and their positions.
        progress: what is called while exact scores are computed.
        workers: processes that search and scan the shards of the index, and compute exact scores; None: this one does.
        score_fidelity: as `fidelity`, for the default score, if it has a curvature matrix.
    """

    store: FeatureStore
    index: SearchIndex
    scan: FlatIndex | GpuScan
    record: IndexRecord
    fidelity: Fidelity | None
    rates: Sequence[float]
    runner: TaskRunner
    ids_of: Callable[[SideName, npt.ArrayLike], list[Id]]
    progress: ExactProgress = ExactProgress()
    workers: SearchWorkers | None = None
    score_fidelity: ScoreFidelity | None = None

    def answers(self, request: QueryRequest, queries_QF: Float32) -> list[Answer]:
        """Return the answer of every query, in order."""
        watch = nullcontext(Coverage(0)) if self.workers is None else self.workers.watch()
        with self.store.remember_taken(), watch as coverage:
            return self._answer(request, queries_QF, coverage)

    def _answer(self, request: QueryRequest, queries_QF: Float32, coverage: Coverage) -> list[Answer]:
        each = request.score.weigh(queries_QF, request.checkpoints, estimates=True)
        vectors = each.mix(request.mixture_GQ)
        n_queries = len(request.members)
        if request.options.exact:
            n_rows = self.store.layout.n_rows
            rows = np.arange(n_rows, dtype=np.int64) if request.allowed is None else request.allowed
            with self._open_scorer(request, self.progress) as scorer:
                ranked, starts = _join(_score_exactly(scorer, [rows] * n_queries))
            counts = np.full(n_queries, 2 * len(rows))
            strategy = Strategy(self.index, "exact scores of all rows")
        else:
            k = request.options.n_candidates
            if vectors.half_QF is not None and request.options.rerank == "stored":
                k = max(k, _ROWS_OF_ERRORS)
            strategy = self._choose_strategy(request, vectors.vector_QF)
            if isinstance(strategy.index, CalibratedIndex) and strategy.index.will_scan(k, request.allowed):
                n_rows = len(strategy.index) if request.allowed is None else len(request.allowed)
                how = f"exact scan of {n_rows:,} rows: {strategy.index.name} would score as many"
                strategy = replace(strategy, how=how, unlike_Q=None, recall=(1.0, 1.0))
            logger.info("%d queries: %s", n_queries, strategy.how)
            scaled_QF, exponent_Q = scale_to_unit(vectors.vector_QF)
            proponents, opponents = search_both(strategy.index, scaled_QF, k, request.allowed)
            place = exactness = ""
            if isinstance(strategy.index, PlacedIndex):
                place = strategy.index.describe_place(k, request.allowed)
            if isinstance(strategy.index, CalibratedIndex):
                exactness = strategy.index.describe_exactness(proponents, opponents)
            how = "; ".join(filter(None, (strategy.how, place, coverage.summary, exactness)))
            strategy = replace(strategy, how=how)
            ranked, starts = self._rescore(request, vectors, *_pool_candidates(proponents, opponents, exponent_Q))
            counts = proponents.rows_scored + opponents.rows_scored
        is_exact = request.options.exact or request.options.rerank == "exact"
        direction_map = request.score.direction_map if is_exact else None
        full = "" if direction_map is None else f"exact scores with the {direction_map.summary}"
        expected = self._describe_true_recall(request, strategy)
        how = "; ".join(text for text in (request.score.summary, strategy.how, full, expected) if text)
        unlike_Q = strategy.unlike_Q if strategy.unlike_Q is not None else np.zeros(n_queries, bool)
        hits = self._make_hits(request, each, vectors, *_select_best(ranked, starts, request.options.k))
        hits = self._split_hits(request, hits) if request.options.tokens else hits
        return [
            Answer(
                query=name,
                side=request.side,
                members=members,
                proponents=best,
                opponents=worst,
                rows_scored=count,
                how=how,
                strange=is_unlike,
                against=request.against,
                score=request.score.name,
                shards=coverage.answered,
                missing_shards=tuple(sorted(coverage.missing)),
            )
            for name, members, (best, worst), count, is_unlike in zip(
                self._name_queries(request), request.members, hits, counts.tolist(), unlike_Q.tolist(), strict=True
            )
        ]

    def _describe_true_recall(self, request: QueryRequest, strategy: Strategy) -> str:
        """Return the expected recall of the true top ten as text for users; "" if it was not measured or is 1.

        It was not measured for other scores, for parts of the checkpoints, and for filters that few rows pass.
        """
        options, fidelity = request.options, self._find_fidelity(request)
        is_small = request.allowed is not None and 2 * len(request.allowed) < self.store.layout.n_rows
        if fidelity is None or options.exact or is_small:
            return ""
        is_exact = options.rerank == "exact"
        true = fidelity.expect(max(K, options.n_candidates) if is_exact else K)
        proponents, opponents = true.proponents.times(strategy.recall[0]), true.opponents.times(strategy.recall[1])
        among = f", re-scored exactly from {true.candidates:,} candidates" if is_exact else ""
        return (
            f"expected true recall@{K}{among}: {proponents.summary} for proponents, {opponents.summary} for opponents"
        )

    def _find_fidelity(self, request: QueryRequest) -> Fidelity | None:
        """Return how well the stored scores of a request agree with exact ones; None if it was not measured."""
        if request.checkpoints != tuple(range(len(self.rates))):
            return None
        if request.score.name == "tracin":
            return self.fidelity
        measured = self.score_fidelity
        return measured.fidelity if measured is not None and measured.summary == request.score.summary else None

    def _name_queries(self, request: QueryRequest) -> list[Id]:
        if not request.together:
            return self.ids_of(request.side, request.ids)
        against = f" against {len(request.against)}" if request.against else ""
        return [f"mean of {len(request.ids) - request.n_against}{against}"]

    def _make_hits(
        self,
        request: QueryRequest,
        each: QueryVectors,
        vectors: QueryVectors,
        best: ScoredRows,
        starts: Sequence[int],
    ) -> list[tuple[tuple[Hit, ...], tuple[Hit, ...]]]:
        """Return the best rows of both directions of each query, with their scores by checkpoint and by set."""
        if best.part_NC is None and (request.options.rerank != "none" or request.options.exact):
            best = self._complete_parts(request, vectors, best, starts[::2])
        set_GN = self._score_sets(request, each, best.rows_N)
        columns = (
            self.ids_of("train", best.rows_N),
            best.rows_N.tolist(),
            best.score_N.tolist(),
            itertools.repeat(None) if best.stored_N is None else best.stored_N.tolist(),
            itertools.repeat(None) if best.error_N is None else best.error_N.tolist(),
            itertools.repeat(()) if best.part_NC is None else zip(*best.part_NC.T.tolist(), strict=True),
            zip(*set_GN.tolist(), strict=True) if len(set_GN) else itertools.repeat(()),
            itertools.repeat(None),
            itertools.repeat(None)
            if vectors.amount_QF is None
            else self._estimate_amounts(request, vectors, best, starts),
        )
        # As Hit._make, without a call of Python for each hit.
        hits = tuple(map(tuple.__new__, itertools.repeat(Hit), zip(*columns, strict=False)))
        lists = [hits[start:end] for start, end in itertools.pairwise(starts)]
        return list(zip(lists[::2], lists[1::2], strict=True))

    def _split_hits(
        self, request: QueryRequest, hits: Sequence[tuple[tuple[Hit, ...], tuple[Hit, ...]]]
    ) -> list[tuple[tuple[Hit, ...], tuple[Hit, ...]]]:
        """Return the hits with their exact scores by token."""
        direction_map = request.score.direction_map
        rows = [[hit.row for hit in (*best, *worst)] for best, worst in hits]
        progress = self.progress.uncounted
        with make_exact_scorer(self.runner, request.queries(), request.checkpoints, progress, direction_map) as scorer:
            parts = [iter(of_query) for of_query in split_scores(scorer, rows)]
        return [
            tuple(tuple(hit._replace(tokens=tuple(next(own).tolist())) for hit in side) for side in sides)  # type: ignore[misc]
            for sides, own in zip(hits, parts, strict=True)
        ]

    def _estimate_amounts(
        self, request: QueryRequest, vectors: QueryVectors, best: ScoredRows, starts: Sequence[int]
    ) -> list[float]:
        """Return `Hit.amount` of rows, of which those of query q are from `starts[2 q]` to `starts[2 q + 2]`."""
        assert vectors.amount_QF is not None
        row_MF, place_N = request.score.rows(request.checkpoints).locate(best.rows_N)
        amounts: list[float] = []
        for amount_F, (start, end) in zip(vectors.amount_QF, itertools.pairwise(starts[::2]), strict=True):
            row_NF = row_MF[place_N[start:end]].astype(np.float64)
            amounts += np.einsum("nf,f->n", row_NF, amount_F.astype(np.float64)).tolist()
        return amounts

    def _complete_parts(
        self, request: QueryRequest, vectors: QueryVectors, best: ScoredRows, starts: Sequence[int]
    ) -> ScoredRows:
        """Return rows with the parts of their scores from the stored features, and with these scores.

        `starts` are the places where the rows of each query begin, and the number of all.
        """
        stored = self._score_stored(request, vectors, best.rows_N, starts)
        return replace(best, part_NC=stored.part_NC, stored_N=stored.score_N)

    def _score_sets(self, request: QueryRequest, each: QueryVectors, rows_N: Int64) -> Float64:
        """Return a contrast's scores [2, N] for the mean of each set, exact if the answer's are; else [0, N]."""
        if not request.n_against or not len(rows_N) or not (request.options.exact or request.options.rerank != "none"):
            return np.zeros((0, len(rows_N)))
        if request.options.exact or request.options.rerank == "exact":
            with self._open_scorer(request, self.progress.uncounted, sets_apart=True) as scorer:
                return scorer.scores(rows_N.tolist())
        row_NF = request.score.rows(request.checkpoints).take(rows_N)
        # Not matrix products, after which NumPy's threads delay the next operations.
        means_GF = np.einsum("gq,qf->gf", request.means_GQ, each.vector_QF.astype(np.float64))
        means_GN: Float64 = np.einsum("gf,nf->gn", means_GF, row_NF.astype(np.float64))
        return means_GN

    def _choose_strategy(self, request: QueryRequest, weighted_QF: Float32) -> Strategy:
        """Return the search strategy: the index needs all checkpoints, an exact scan accepts any subset of them."""
        options = request.options
        score = request.score
        unsupported, all_checkpoints = "", request.checkpoints == tuple(range(len(self.rates)))
        if (
            isinstance(self.index, CalibratedIndex)
            and self.index.is_exact
            and score.name in ("tracin", *CURVATURES)
            and all_checkpoints
        ):
            # Exact results are so for any vectors that are multiplied with the rows.
            pass
        elif score.name != self.record.score:
            unsupported = f"the score {score.name}"
        elif options.damping is not None:
            unsupported = "another damping"
        elif not all_checkpoints:
            unsupported = "a subset of the checkpoints"
        if unsupported:
            rows, device = score.rows(request.checkpoints), self.runner.options.device
            scan = FlatIndex(rows, device) if self.workers is None else self.workers.open_scan(rows, device)
            return choose_strategy(self.record, self.index, scan, weighted_QF, options, unsupported)
        return choose_strategy(self.record, self.index, self.scan, weighted_QF, options)

    def _rescore(
        self, request: QueryRequest, vectors: QueryVectors, rows: ScoredRows, starts: list[int]
    ) -> tuple[ScoredRows, list[int]]:
        """Return candidates with the scores that the options request; `starts` as of `_join`."""
        if request.options.rerank == "none":
            return rows, starts
        stored = self._score_stored(request, vectors, rows.rows_N, starts)
        if request.options.rerank == "stored":
            return stored, starts
        with self._open_scorer(request, self.progress) as scorer:
            return _join(self._score_in_rounds(request, _split(stored, starts), scorer))

    def _score_stored(
        self, request: QueryRequest, vectors: QueryVectors, rows_N: Int64, starts: Sequence[int]
    ) -> ScoredRows:
        """Return rows with their scores from the stored features; each is read once. `starts` are as of `_join`."""
        view = request.score.rows(request.checkpoints)
        scored: list[ScoredRows] = []
        for queries in _split_queries(starts, _NUMBERS_AT_ONCE // view.dim):
            first, last = starts[queries.start], starts[queries.stop]
            row_MF, place_N = view.locate(rows_N[first:last])
            ends = itertools.pairwise(starts[queries.start : queries.stop + 1])
            places = [place_N[start - first : end - first] for start, end in ends]
            part_NC, deviation_N = _score_row_parts(
                row_MF, places, vectors.vector_QF[queries], len(request.checkpoints)
            )
            error_N = None
            if vectors.half_QF is not None:
                error_N = _compare_halves(row_MF, places, vectors[queries])
            elif self.fidelity is not None and request.score.name == "tracin":
                error_N = self.fidelity.error_scale * deviation_N
            scored.append(ScoredRows(rows_N[first:last], part_NC.sum(axis=1), None, error_N, part_NC))
        return _concatenate(scored)

    def _score_in_rounds(self, request: QueryRequest, stored: list[ScoredRows], scorer: RowScorer) -> list[ScoredRows]:
        """Return exact scores of the candidates that could be among the hits.

        The first round covers the candidates of the largest stored scores. The second covers those whose stored score
        plus its error bar reaches the k-th exact score. Without error bars, and for scores with a curvature matrix over
        all parameters, which differs from that of the sketches, the first round covers all.
        """
        k = request.options.k
        is_same = request.score.direction_map is None
        first = [_select_largest(scored, _FIRST * k if is_same else len(scored.rows_N)) for scored in stored]
        exact = _score_exactly(scorer, [scored.rows_N[chosen] for scored, chosen in zip(stored, first, strict=True)])
        second = [
            _select_uncertain(scored, chosen, done.score_N, k)
            for scored, chosen, done in zip(stored, first, exact, strict=True)
        ]
        if not any(chosen.any() for chosen in second):
            return [_join_stored(s, done, chosen) for s, done, chosen in zip(stored, exact, first, strict=True)]
        rest = _score_exactly(scorer, [scored.rows_N[chosen] for scored, chosen in zip(stored, second, strict=True)])
        return [
            _join_stored(
                scored,
                ScoredRows(np.concatenate([a.rows_N, b.rows_N]), np.concatenate([a.score_N, b.score_N])),
                np.concatenate([np.flatnonzero(one), np.flatnonzero(other)]),
            )
            for scored, a, b, one, other in zip(stored, exact, rest, first, second, strict=True)
        ]

    def _open_scorer(
        self, request: QueryRequest, progress: ExactProgress, *, sets_apart: bool = False
    ) -> AbstractContextManager[RowScorer]:
        """Return exact scores: by the workers, unless there is a map of directions or they cannot import the task."""
        queries = request.queries(sets_apart=sets_apart)
        if self.workers is not None and request.score.direction_map is None:
            examples = self.runner.data("input") if request.side == "input" else None
            scorer = self.workers.open_scorer(queries, request.checkpoints, examples, progress.add_rows)
            if scorer is not None:
                return nullcontext(scorer)
        return make_exact_scorer(self.runner, queries, request.checkpoints, progress, request.score.direction_map)


def _score_exactly(scorer: RowScorer, rows: Sequence[Int64]) -> list[ScoredRows]:
    """Return exact scores of each query's rows; a row of several queries is run once."""
    union = np.unique(np.concatenate(rows))
    places = [np.searchsorted(union, r) for r in rows]
    requested_QN = np.zeros((len(rows), len(union)), dtype=bool)
    for requested_N, place in zip(requested_QN, places, strict=True):
        requested_N[place] = True
    logger.info("exact scores of %s rows for %d queries", f"{len(union):,}", len(rows))
    score_QN = scorer.scores(union.tolist(), requested_QN)
    return [ScoredRows(r, score_N[place]) for r, place, score_N in zip(rows, places, score_QN, strict=True)]


def _select_largest(scored: ScoredRows, n: int) -> npt.NDArray[np.bool_]:
    """Return which candidates [N] have the n largest or the n most negative stored scores; without error bars, all."""
    chosen_N = np.zeros(len(scored.rows_N), dtype=bool)
    order = np.argsort(scored.score_N, kind="stable")
    chosen_N[order[:n]] = chosen_N[order[-n:]] = True
    return chosen_N if scored.error_N is not None else np.ones_like(chosen_N)


def _select_uncertain(
    scored: ScoredRows, done_N: npt.NDArray[np.bool_], exact_M: Float64, k: int
) -> npt.NDArray[np.bool_]:
    """Return which other candidates [N] could have exact scores among the best or the worst k, by their error bars."""
    if scored.error_N is None or done_N.all():
        return np.zeros_like(done_N)
    ranked = np.sort(exact_M)
    high, low = (ranked[-k], ranked[k - 1]) if len(ranked) >= k else (-np.inf, np.inf)
    margin_N = _ERROR_BARS * scored.error_N
    return ~done_N & ((scored.score_N + margin_N >= max(high, 0)) | (scored.score_N - margin_N <= min(low, 0)))


def _join_stored(stored: ScoredRows, exact: ScoredRows, chosen: npt.NDArray[Any]) -> ScoredRows:
    """Return exact scores with the stored scores, their parts and error bars of the same rows."""
    same = stored[chosen]
    return replace(same, score_N=exact.score_N, stored_N=same.score_N)


def _split_queries(starts: Sequence[int], n_rows: int) -> Iterator[range]:
    """Yield ranges of queries that have at most n_rows rows together, or of one query; `starts` as of `_join`."""
    first = 0
    for query, end in enumerate(starts[1:]):
        if query > first and end - starts[first] > n_rows:
            yield range(first, query)
            first = query
    yield range(first, len(starts) - 1)


def _score_row_parts(
    row_MF: Float32, places: Sequence[Int64], queries_QF: Float32, n_checkpoints: int
) -> tuple[Float64, Float64]:
    """Return scores by checkpoint, and the sketch's standard deviations of their sums.

    Args:
        row_MF: rows.
        places: where in `row_MF` the rows of each query are.
        queries_QF: the queries.
        n_checkpoints: C.

    Returns:
        The parts of the scores [N, C] of the rows of all queries, one query after the other; the deviations [N].
    """
    query_QCD = queries_QF.reshape(len(queries_QF), n_checkpoints, -1).astype(np.float64)
    counts = [len(place) for place in places]
    part_NC = np.empty((sum(counts), n_checkpoints))
    square_NC = np.empty_like(part_NC)
    end = 0
    for place, query_CD in zip(places, query_QCD, strict=True):
        part = slice(end, end := end + len(place))
        row_NCD = row_MF[place].reshape(-1, *query_CD.shape).astype(np.float64)
        np.vecdot(row_NCD, query_CD, out=part_NC[part])
        np.vecdot(row_NCD, row_NCD, out=square_NC[part])
    square_QC = np.einsum("qcd,qcd->qc", query_QCD, query_QCD)
    return part_NC, compute_pair_deviations(np.repeat(square_QC, counts, axis=0), square_NC, query_QCD.shape[2])


def _compare_halves(row_MF: Float32, places: Sequence[Int64], vectors: QueryVectors) -> Float64:
    """Return the standard errors [N] of scores, one for all rows of a query.

    Each half of the numbers of a sketch gives an independent estimate of the score. Half the root mean square of their
    difference over the rows is the standard error of their mean, from which the score by all numbers differs little.

    Args:
        row_MF: rows.
        places: where in `row_MF` the rows of each query are.
        vectors: of the queries, with those of both halves.
    """
    assert vectors.half_QF is not None
    first_QF, second_QF = vectors.half_QF
    errors = []
    for place, one_F, other_F in zip(places, first_QF, second_QF, strict=True):
        difference_N = row_MF[place].astype(np.float64) @ (one_F.astype(np.float64) - other_F)
        errors.append(np.full(len(place), np.sqrt(np.mean(difference_N**2)) / 2 if len(place) else 0.0))
    return np.concatenate(errors)


def _pool_candidates(proponents: TopK, opponents: TopK, exponent_Q: Int64) -> tuple[ScoredRows, list[int]]:
    """Return both sides' candidates of each query, each row once, and where they begin, as `_join` does.

    Scores are multiplied by two to the power of the query's exponent.
    """
    sides = [side for of_query in zip(proponents.ids, opponents.ids, strict=True) for side in of_query]
    scores = [side for of_query in zip(proponents.scores, opponents.scores, strict=True) for side in of_query]
    query_M = np.repeat(np.arange(len(sides)) // 2, [len(side) for side in sides])
    rows_M, score_M = np.concatenate(sides), np.concatenate(scores).astype(np.float64)
    # One sort of pairs of a query and a row as one number each.
    _, first_N = np.unique(query_M * (rows_M.max(initial=0) + 1) + rows_M, return_index=True)
    query_N = query_M[first_N]
    rows = ScoredRows(rows_M[first_N], np.ldexp(score_M[first_N], exponent_Q[query_N]))
    return rows, np.searchsorted(query_N, np.arange(len(exponent_Q) + 1)).tolist()


def _select_best(rows: ScoredRows, starts: Sequence[int], k: int) -> tuple[ScoredRows, list[int]]:
    """Return the k best proponents, then the k best opponents of each query, one query after the other.

    Also returns where the rows of each of these 2 Q lists begin, and the number of all: 2 Q + 1 positions. `starts` are
    as of `_join`.
    """
    query_N = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    list_N = 2 * query_N + (rows.score_N < 0)
    order = np.lexsort((rows.rows_N, -np.abs(rows.score_N), list_N))
    order = order[rows.score_N[order] != 0]
    list_N = list_N[order]
    is_best_N = np.arange(len(order)) - np.searchsorted(list_N, list_N) < k
    best_starts = np.searchsorted(list_N[is_best_N], np.arange(2 * len(starts) - 1))
    return rows[order[is_best_N]], best_starts.tolist()


def _join(ranked: Sequence[ScoredRows]) -> tuple[ScoredRows, list[int]]:
    """Return the rows of all queries, one query after the other; where each query's begin; and the number of all."""
    return _concatenate(ranked), [0, *itertools.accumulate(len(scored.rows_N) for scored in ranked)]


def _split(rows: ScoredRows, starts: Sequence[int]) -> list[ScoredRows]:
    """Return the rows of each query: the inverse of `_join`."""
    return [rows[start:end] for start, end in itertools.pairwise(starts)]


def _concatenate(parts: Sequence[ScoredRows]) -> ScoredRows:
    """Return all rows, one part after the other."""
    columns = zip(*(vars(part).values() for part in parts), strict=True)
    joined: list[Any] = [None if any(v is None for v in values) else np.concatenate(values) for values in columns]
    return ScoredRows(*joined)
