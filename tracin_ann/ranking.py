"""From the queries' feature rows to answers: candidates of the index, scored again, cut to k a side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tracin_ann.answers import Answer, Hit, QueryOptions
from tracin_ann.exact import exact_scores
from tracin_ann.loading import SideName
from tracin_ann.passes import Passes
from tracin_ann.search import FlatIndex, SearchIndex, search_both
from tracin_ann.store import FeatureStore
from tracin_ann.types import Float32, Float64, Int64, TopK


@dataclass(frozen=True)
class Question:
    """Which examples are asked about, over which checkpoints, and how."""

    side: SideName
    ids: tuple[int, ...]
    checkpoints: tuple[int, ...]
    options: QueryOptions


@dataclass(frozen=True)
class Scored:
    """Training rows of one query with their scores [n], and the stored-feature scores where those are exact."""

    rows_N: Int64
    score_N: Float64
    stored_N: Float64 | None = None


@dataclass(frozen=True)
class Ranking:
    """What rows are ranked with.

    Attributes:
        store: the feature rows.
        index: the search index over all checkpoints.
        rates: η_c of all checkpoints.
        passes: the task's data and model, for exact scores.
        progress: told the rows done while exact scores are computed.
    """

    store: FeatureStore
    index: SearchIndex
    rates: Sequence[float]
    passes: Passes
    progress: Callable[[int], None] | None = None

    def answers(self, question: Question, queries_QF: Float32) -> list[Answer]:
        """Return the answer of every query, in order."""
        weighted_QF = self._weighted(question, queries_QF)
        if question.options.exact:
            n_rows = self.store.layout.n_rows
            found = self._exact(question, [np.arange(n_rows, dtype=np.int64)] * len(question.ids))
            counts = np.full(len(question.ids), 2 * n_rows)
        else:
            proponents, opponents = self._candidates(question, weighted_QF)
            found = self._rescored(question, weighted_QF, proponents, opponents)
            counts = proponents.rows_scored + opponents.rows_scored
        return [
            _answer(question, query, scored, int(count))
            for query, scored, count in zip(question.ids, found, counts, strict=True)
        ]

    def _weighted(self, question: Question, queries_QF: Float32) -> Float32:
        """Return the queries as they are, or for cosine each checkpoint's part at norm η_c / Σ η."""
        if not question.options.cosine:
            return queries_QF
        rates = np.array([self.rates[c] for c in question.checkpoints])
        part_QCD = queries_QF.reshape(len(queries_QF), len(rates), -1)
        norms = np.linalg.norm(part_QCD, axis=2, keepdims=True)
        unit_QCD = np.divide(part_QCD, norms, out=np.zeros_like(part_QCD), where=norms > 0)
        weighted_QCD: Float32 = unit_QCD * (rates / rates.sum()).astype(np.float32)[:, None]
        return weighted_QCD.reshape(queries_QF.shape)

    def _candidates(self, question: Question, weighted_QF: Float32) -> tuple[TopK, TopK]:
        """Return candidates of both sides: the index serves all checkpoints, an exact scan any choice of them."""
        options = question.options
        wanted = options.k if options.rerank == "none" else max(options.k, options.candidates)
        index = self.index
        if options.cosine or question.checkpoints != tuple(range(len(self.rates))):
            view = self.store.view(question.checkpoints, cosine=options.cosine)
            index = FlatIndex(view, self.passes.options.device)
        return search_both(index, weighted_QF, wanted)

    def _rescored(self, question: Question, weighted_QF: Float32, proponents: TopK, opponents: TopK) -> list[Scored]:
        sides = zip(proponents.ids, proponents.scores, opponents.ids, opponents.scores, strict=True)
        pooled = [_pooled(np.concatenate([p, o]), np.concatenate([ps, os])) for p, ps, o, os in sides]
        if question.options.rerank == "none":
            return pooled
        view = self.store.view(question.checkpoints, cosine=question.options.cosine)
        stored = [
            Scored(scored.rows_N, view.take(scored.rows_N).astype(np.float64) @ query_F.astype(np.float64))
            for scored, query_F in zip(pooled, weighted_QF, strict=True)
        ]
        if question.options.rerank == "stored":
            return stored
        exact = self._exact(question, [scored.rows_N for scored in stored])
        return [Scored(e.rows_N, e.score_N, s.score_N) for e, s in zip(exact, stored, strict=True)]

    def _exact(self, question: Question, rows: Sequence[Int64]) -> list[Scored]:
        """Return true TracInCP of each query's rows; a row that several queries want is run once."""
        union = np.unique(np.concatenate(rows))
        queries = question.side, question.ids
        score_QN = exact_scores(self.passes, queries, union.tolist(), question.checkpoints, self.progress)
        return [Scored(r, score_N[np.searchsorted(union, r)]) for r, score_N in zip(rows, score_QN, strict=True)]


def _pooled(rows: Int64, scores: Float32) -> Scored:
    """Return both sides' candidates, each row once."""
    unique, first = np.unique(rows, return_index=True)
    return Scored(unique, scores[first].astype(np.float64))


def _answer(question: Question, query: int, scored: Scored, rows_scored: int) -> Answer:
    falling = np.lexsort((scored.rows_N, -scored.score_N))
    rising = np.lexsort((scored.rows_N, scored.score_N))
    k = question.options.k
    return Answer(
        query=str(query),
        side=question.side,
        proponents=tuple(_hit(scored, i) for i in falling[:k] if scored.score_N[i] > 0),
        opponents=tuple(_hit(scored, i) for i in rising[:k] if scored.score_N[i] < 0),
        rows_scored=rows_scored,
    )


def _hit(scored: Scored, i: int) -> Hit:
    stored = None if scored.stored_N is None else float(scored.stored_N[i])
    return Hit(str(scored.rows_N[i]), float(scored.score_N[i]), stored)
