"""From the queries' feature rows to answers: candidates of the index, scored again, cut to k a side."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from tracin_ann.choices import SideName
from tracin_ann.features import Passes
from tracin_ann.scoring.answers import Answer, Hit, Id, QueryOptions
from tracin_ann.scoring.exact import ExactScorer, Queries, make_exact_scorer
from tracin_ann.scoring.quality import sketch_deviations
from tracin_ann.scoring.strategy import Strategy, choose_strategy
from tracin_ann.search import FlatIndex, IVFIndex, SearchIndex, scale_to_unit, search_both
from tracin_ann.store import FeatureStore, IndexRecord
from tracin_ann.types import Float32, Float64, Int64, TopK

_FIRST = 3
"""Candidates a side that are scored exactly at once, in k."""
_SURE = 4.0
"""Error bars within which a candidate's true score is taken to lie."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Question:
    """Which examples are asked about, over which checkpoints and training rows, and how.

    Attributes:
        side: the data set of the examples.
        ids: their positions.
        checkpoints: positions of the checkpoints to sum over.
        options: how.
        allowed: the training rows that may be hits; None: all.
        together: one answer, to the mean of the examples' gradients, instead of one each.
        n_against: so many examples at the end are a set of their own, whose mean is subtracted; needs `together`.
    """

    side: SideName
    ids: tuple[int, ...]
    checkpoints: tuple[int, ...]
    options: QueryOptions
    allowed: Int64 | None = None
    together: bool = False
    n_against: int = 0

    @property
    def asked(self) -> tuple[tuple[int, ...], ...]:
        """Return each answer's examples, those of the set against left out."""
        return (self.ids[: len(self.ids) - self.n_against],) if self.together else tuple((i,) for i in self.ids)

    @property
    def against(self) -> tuple[int, ...]:
        """Return the examples of the set whose mean is subtracted."""
        return self.ids[len(self.ids) - self.n_against :]

    @property
    def means_GQ(self) -> Float64:
        """Return the weights by which the examples' gradients make their set's mean, and that of the set against."""
        n_for = len(self.ids) - self.n_against
        means_GQ = np.zeros((2 if self.n_against else 1, len(self.ids)))
        means_GQ[0, :n_for] = 1 / n_for
        means_GQ[-1, n_for:] = 1 / max(1, self.n_against)
        return means_GQ

    @property
    def mixture_GQ(self) -> Float64 | None:
        """Return the weights by which the examples' gradients make what is asked; None: each by itself."""
        means_GQ = self.means_GQ if self.together else None
        return means_GQ if means_GQ is None or not self.n_against else means_GQ[:1] - means_GQ[1:]

    def queries(self, *, apart: bool = False) -> Queries:
        """Return what rows are scored against; `apart`: of a contrast, both sets by themselves."""
        return Queries(self.side, self.ids, self.means_GQ if apart else self.mixture_GQ)


@dataclass(frozen=True)
class Scored:
    """Training rows of one query with their scores [n], the stored features' where those are exact, and error bars."""

    rows_N: Int64
    score_N: Float64
    stored_N: Float64 | None = None
    error_N: Float64 | None = None


@dataclass(frozen=True)
class Ranking:
    """What rows are ranked with.

    Attributes:
        store: the feature rows.
        index: the search index over all checkpoints.
        record: what the manifest says of it.
        error_scale: how far sketch scores were seen from true ones, in their standard deviations; None: not measured.
        rates: η_c of all checkpoints.
        passes: the task's data and model, for exact scores.
        id_of: an example's id, of a side and position.
        progress: told the rows done while exact scores are computed.
    """

    store: FeatureStore
    index: SearchIndex
    record: IndexRecord
    error_scale: float | None
    rates: Sequence[float]
    passes: Passes
    id_of: Callable[[SideName, int], Id]
    progress: Callable[[int], None] | None = None

    def answers(self, question: Question, queries_QF: Float32) -> list[Answer]:
        """Return the answer of every query, in order."""
        each_QF = self._weighted(question, queries_QF)
        weighted_QF = _mixed(question.mixture_GQ, each_QF)
        n_queries = len(question.asked)
        if question.options.exact:
            n_rows = self.store.layout.n_rows
            rows = np.arange(n_rows, dtype=np.int64) if question.allowed is None else question.allowed
            with self._scorer(question) as scorer:
                found = _exact(scorer, [rows] * n_queries)
            counts = np.full(n_queries, 2 * len(rows))
            way = Strategy(self.index, "true scores of all rows")
        else:
            wanted = question.options.k
            if question.options.rerank == "exact":
                wanted = max(wanted, question.options.candidates)
            way = self._way(question, weighted_QF)
            if isinstance(way.index, IVFIndex) and way.index.scans(wanted, question.allowed):
                n_rows = len(way.index) if question.allowed is None else len(question.allowed)
                way = replace(way, how=f"exact scan of {n_rows:,} rows: lists would score as many", strange_Q=None)
            logger.info("%d queries: %s", n_queries, way.how)
            scaled_QF, exponent_Q = scale_to_unit(weighted_QF)
            proponents, opponents = search_both(way.index, scaled_QF, wanted, question.allowed)
            found = self._rescored(question, weighted_QF, _pooled(proponents, opponents, exponent_Q))
            counts = proponents.rows_scored + opponents.rows_scored
        strange = way.strange_Q if way.strange_Q is not None else np.zeros(n_queries, bool)
        each = zip(question.asked, found, weighted_QF, counts, strange, strict=True)
        return [
            Answer(
                query=self._caption(question, members),
                side=question.side,
                members=members,
                proponents=self._hits(question, each_QF, query_F, scored, 1),
                opponents=self._hits(question, each_QF, query_F, scored, -1),
                rows_scored=int(count),
                how=way.how,
                strange=bool(odd),
                against=question.against,
            )
            for members, scored, query_F, count, odd in each
        ]

    def _caption(self, question: Question, members: tuple[int, ...]) -> Id:
        if not question.together:
            return self.id_of(question.side, members[0])
        against = f" against {len(question.against)}" if question.against else ""
        return f"mean of {len(members)}{against}"

    def _hits(
        self, question: Question, each_QF: Float32, query_F: Float32, scored: Scored, sign: int
    ) -> tuple[Hit, ...]:
        """Return the k best rows of a direction, 1 or -1, with what the stored features say of each."""
        order = np.lexsort((scored.rows_N, -sign * scored.score_N))[: question.options.k]
        hits = [
            _hit(self.id_of("train", int(scored.rows_N[i])), scored, i) for i in order if sign * scored.score_N[i] > 0
        ]
        if not hits or (question.options.rerank == "none" and not question.options.exact):
            return tuple(hits)
        rows_N = np.array([hit.row for hit in hits], dtype=np.int64)
        row_NF = self.store.view(question.checkpoints, cosine=question.options.cosine).take(rows_N)
        parts_NC = (row_NF.astype(np.float64) * query_F).reshape(len(hits), len(question.checkpoints), -1).sum(axis=2)
        means_GN = self._means(question, each_QF, row_NF, rows_N)
        return tuple(
            replace(
                hit,
                stored_score=float(parts_C.sum()) if question.options.exact else hit.stored_score,
                by_checkpoint=tuple(parts_C.tolist()),
                of_means=tuple(means_G.tolist()),
            )
            for hit, parts_C, means_G in zip(hits, parts_NC, means_GN.T, strict=True)
        )

    def _means(self, question: Question, each_QF: Float32, row_NF: Float32, rows_N: Int64) -> Float64:
        """Return of a contrast the scores [2, N] of both sets' means, as exact as the answer's; else none, [0, N]."""
        if not question.n_against or not len(rows_N):
            return np.zeros((0, len(rows_N)))
        if question.options.exact or question.options.rerank == "exact":
            with make_exact_scorer(self.passes, question.queries(apart=True), question.checkpoints) as scorer:
                return scorer.scores(rows_N.tolist())
        means_GN: Float64 = question.means_GQ @ each_QF.astype(np.float64) @ row_NF.T.astype(np.float64)
        return means_GN

    def _weighted(self, question: Question, queries_QF: Float32) -> Float32:
        """Return the queries as they are, or for cosine each checkpoint's part at norm η_c / Σ η."""
        if not question.options.cosine:
            return queries_QF
        rates = np.array([self.rates[c] for c in question.checkpoints])
        part_QCD = queries_QF.reshape(len(queries_QF), len(rates), -1)
        norms = np.linalg.norm(part_QCD.astype(np.float64), axis=2, keepdims=True)
        unit_QCD = np.divide(part_QCD, norms, out=np.zeros_like(part_QCD), where=norms > 0, casting="same_kind")
        weighted_QCD: Float32 = unit_QCD * (rates / rates.sum()).astype(np.float32)[:, None]
        return weighted_QCD.reshape(queries_QF.shape)

    def _way(self, question: Question, weighted_QF: Float32) -> Strategy:
        """Return the way to candidates: the index serves all checkpoints, an exact scan any choice of them."""
        options = question.options
        if options.cosine or question.checkpoints != tuple(range(len(self.rates))):
            view = self.store.view(question.checkpoints, cosine=options.cosine)
            why = "cosine" if options.cosine else "a choice of checkpoints"
            scan = FlatIndex(view, self.passes.options.device)
            return choose_strategy(self.record, scan, scan, weighted_QF, options, why)
        scan = FlatIndex(self.store.view(), self.passes.options.device)
        return choose_strategy(self.record, self.index, scan, weighted_QF, options)

    def _rescored(self, question: Question, weighted_QF: Float32, pooled: list[Scored]) -> list[Scored]:
        if question.options.rerank == "none":
            return pooled
        view = self.store.view(question.checkpoints, cosine=question.options.cosine)
        stored = [
            self._stored(question, view.take(scored.rows_N), scored.rows_N, query_F)
            for scored, query_F in zip(pooled, weighted_QF, strict=True)
        ]
        if question.options.rerank == "stored":
            return stored
        with self._scorer(question) as scorer:
            return self._settled(question, stored, scorer)

    def _stored(self, question: Question, row_NF: Float32, rows_N: Int64, query_F: Float32) -> Scored:
        score_N = row_NF.astype(np.float64) @ query_F.astype(np.float64)
        if self.error_scale is None or question.options.cosine:
            return Scored(rows_N, score_N)
        deviation_N = sketch_deviations(query_F[None], row_NF, len(question.checkpoints))[0]
        return Scored(rows_N, score_N, None, self.error_scale * deviation_N)

    def _settled(self, question: Question, stored: list[Scored], scorer: ExactScorer) -> list[Scored]:
        """Return exact scores of the candidates that could be among the answers.

        First of the likeliest; then of those whose stored score, error bar added, reaches the k-th found. Without
        error bars, of all.
        """
        k = question.options.k
        first = [_likeliest(scored, _FIRST * k) for scored in stored]
        exact = _exact(scorer, [scored.rows_N[chosen] for scored, chosen in zip(stored, first, strict=True)])
        more = [
            _still_open(scored, chosen, sure.score_N, k)
            for scored, chosen, sure in zip(stored, first, exact, strict=True)
        ]
        if not any(chosen.any() for chosen in more):
            return [_with(s, sure, chosen) for s, sure, chosen in zip(stored, exact, first, strict=True)]
        rest = _exact(scorer, [scored.rows_N[chosen] for scored, chosen in zip(stored, more, strict=True)])
        return [
            _with(
                scored,
                Scored(np.concatenate([a.rows_N, b.rows_N]), np.concatenate([a.score_N, b.score_N])),
                np.concatenate([np.flatnonzero(one), np.flatnonzero(other)]),
            )
            for scored, a, b, one, other in zip(stored, exact, rest, first, more, strict=True)
        ]

    def _scorer(self, question: Question) -> AbstractContextManager[ExactScorer]:
        return make_exact_scorer(self.passes, question.queries(), question.checkpoints, self.progress)


def _exact(scorer: ExactScorer, rows: Sequence[Int64]) -> list[Scored]:
    """Return true TracInCP of each query's rows; a row that several queries want is run once."""
    union = np.unique(np.concatenate(rows))
    places = [np.searchsorted(union, r) for r in rows]
    wanted_QN = np.zeros((len(rows), len(union)), dtype=bool)
    for wanted_N, place in zip(wanted_QN, places, strict=True):
        wanted_N[place] = True
    logger.info("true scores of %s rows for %d queries", f"{len(union):,}", len(rows))
    score_QN = scorer.scores(union.tolist(), wanted_QN)
    return [Scored(r, score_N[place]) for r, place, score_N in zip(rows, places, score_QN, strict=True)]


def _likeliest(scored: Scored, n: int) -> npt.NDArray[np.bool_]:
    """Return which candidates are the n of largest, or the n of most negative, stored score."""
    chosen_N = np.zeros(len(scored.rows_N), dtype=bool)
    order = np.argsort(scored.score_N, kind="stable")
    chosen_N[order[:n]] = chosen_N[order[-n:]] = True
    return chosen_N if scored.error_N is not None else np.ones_like(chosen_N)


def _still_open(scored: Scored, done_N: npt.NDArray[np.bool_], sure_M: Float64, k: int) -> npt.NDArray[np.bool_]:
    """Return which other candidates' true scores could enter the best or the worst k, by their error bars."""
    if scored.error_N is None or done_N.all():
        return np.zeros_like(done_N)
    ranked = np.sort(sure_M)
    high, low = (ranked[-k], ranked[k - 1]) if len(ranked) >= k else (-np.inf, np.inf)
    reach_N = _SURE * scored.error_N
    return ~done_N & ((scored.score_N + reach_N >= max(high, 0)) | (scored.score_N - reach_N <= min(low, 0)))


def _with(stored: Scored, exact: Scored, chosen: npt.NDArray[Any]) -> Scored:
    """Return exact scores with the stored ones and error bars of the same rows."""
    error_N = None if stored.error_N is None else stored.error_N[chosen]
    return Scored(exact.rows_N, exact.score_N, stored.score_N[chosen], error_N)


def _pooled(proponents: TopK, opponents: TopK, exponent_Q: Int64) -> list[Scored]:
    """Return both sides' candidates of each query, each row once, their scores times two to the query's exponent."""
    pooled = []
    for at, exponent in enumerate(exponent_Q):
        rows, first = np.unique(np.concatenate([proponents.ids[at], opponents.ids[at]]), return_index=True)
        scores = np.concatenate([proponents.scores[at], opponents.scores[at]])[first]
        pooled.append(Scored(rows, np.ldexp(scores.astype(np.float64), exponent)))
    return pooled


def _hit(own: Id, scored: Scored, i: int) -> Hit:
    stored = None if scored.stored_N is None else float(scored.stored_N[i])
    error = None if scored.error_N is None else float(scored.error_N[i])
    return Hit(own, int(scored.rows_N[i]), float(scored.score_N[i]), stored, error)


def _mixed(mixture_GQ: Float64 | None, each_QF: Float32) -> Float32:
    """Return the feature rows of what is asked: features are linear in the gradients."""
    if mixture_GQ is None:
        return each_QF
    mixed_GF: Float32 = (mixture_GQ @ each_QF.astype(np.float64)).astype(np.float32)
    return mixed_GF
