"""Subsets of the training rows with high scores for a set of queries.

`round-robin`: the queries take turns; each takes the row with its highest score that is not yet taken (Ivison et al.
2025, arXiv 2503.01807). `mean`: the rows with the highest mean score. Ties are broken by ascending row.

Shapes: N rows that may be taken, Q queries, F feature dimension, K candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tracin_ann.choices import ScoreName
from tracin_ann.errors import UsageError, problem
from tracin_ann.index import InfluenceIndex
from tracin_ann.results import Fields, Id, Record, RowList
from tracin_ann.scoring import QueryOptions
from tracin_ann.search import FlatIndex, scale_to_unit
from tracin_ann.store import RowFilter
from tracin_ann.types import Float32, Int64, ProgressCallback

Method = Literal["round-robin", "mean"]
METHODS: tuple[Method, ...] = ("round-robin", "mean")
_CANDIDATES = 1 << 23
"""Candidates of all queries in memory at once."""


@dataclass(frozen=True)
class SelectedRow:
    """A training row of the subset.

    Attributes:
        rank: from 1, in the order in which rows were taken.
        id: the task's own id of the row, else its position.
        row: position in train_data.
        score: score for the query that took the row; with `mean`, the mean score over all queries.
        query: id of the query that took the row; None with `mean`.
        query_row: position of that query in query_data; None with `mean`.
    """

    rank: int
    id: Id
    row: int
    score: float
    query: Id | None = None
    query_row: int | None = None


class Subset(RowList[SelectedRow]):
    """The rows of a subset in the order in which they were taken."""

    FIELDS = Fields(
        (
            ("rank", "int"),
            ("id", "id"),
            ("row", "int"),
            ("score", "float"),
            ("query", "id"),
            ("query_row", "int"),
            ("text", "text"),
        )
    )

    @property
    def rows(self) -> list[int]:
        """Return the positions in train_data."""
        return [chosen.row for chosen in self]

    def record(self, row: SelectedRow) -> Record:
        """Return a row's record."""
        return {
            "rank": row.rank,
            "id": row.id,
            "row": row.row,
            "score": row.score,
            "query": row.query,
            "query_row": row.query_row,
            "text": self.texts("train", row.row),
        }


def select(  # noqa: PLR0913
    index: InfluenceIndex,
    n: int,
    query_ids: Sequence[int] | None = None,
    method: Method = "round-robin",
    *,
    checkpoints: Sequence[int] | None = None,
    rows: RowFilter | None = None,
    score: ScoreName | None = None,
    damping: float | None = None,
    progress: ProgressCallback | None = None,
) -> Subset:
    """Select n training rows for the queries, or all rows that pass the filter if they are fewer.

    Scores come from the stored features of all rows (an exact scan): the selection is the same as from the full matrix
    of scores. With `round-robin`, each query has a list of candidates; once they are taken, another pass over the
    features finds more.

    Args:
        index: an open index.
        n: number of rows to select.
        query_ids: positions in query_data, in the order of their turns; None: all.
        method: `round-robin` or `mean`.
        checkpoints: positions of the checkpoints to sum over; None: all.
        rows: which rows may be selected; None: all. Removed and skipped rows are never selected.
        score: see QueryOptions; None: the index's default.
        damping: of scores with a curvature matrix; None: by the automatic rule.
        progress: called with ("rows", taken, n).

    Raises:
        UsageError: n, the method or an id is invalid, or there is no query.
        IndexMismatchError: the task does not match the index.
        NonFiniteError: a query's loss or gradient is NaN or infinite.
    """
    if n < 1:
        raise UsageError(problem("bad --n", got=n, expected="1 or more", remedy="change --n"))
    if method not in METHODS:
        raise UsageError(problem("bad --method", got=method, expected=" or ".join(METHODS), remedy="change --method"))
    ids = tuple(dict.fromkeys(range(index.runner.n_rows("query")) if query_ids is None else query_ids))
    if not ids:
        raise UsageError(problem("no query", got="no ids", expected="one or more", remedy="name at least one row"))
    index.runner.check_ids("query", ids)
    allowed = index.present(rows)
    n_rows = min(n, len(allowed))
    chosen = index.view(checkpoints).checkpoints
    scored = index.make_score(QueryOptions(score=score, damping=damping))
    queries_QF = scored.weigh(index.features("query", ids, chosen), chosen).vector_QF
    scan = FlatIndex(scored.rows(chosen), index.device)
    if method == "mean":
        mean_QF = queries_QF.astype(np.float64).mean(axis=0, keepdims=True).astype(np.float32)
        turns = [(0, *taken) for taken in _find_best(scan, mean_QF, n_rows, allowed)[0]] if n_rows else []
    else:
        turns = _take_in_turns(scan, queries_QF, n_rows, allowed, progress)
    return Subset(
        [
            SelectedRow(
                rank=rank,
                id=index.rows.id_at(row),
                row=row,
                score=score,
                query=None if method == "mean" else index.id_of("query", ids[query]),
                query_row=None if method == "mean" else ids[query],
            )
            for rank, (query, row, score) in enumerate(turns, start=1)
        ],
        index.describe,
    )


def _take_in_turns(
    scan: FlatIndex, queries_QF: Float32, n: int, allowed: Int64, progress: ProgressCallback | None
) -> list[tuple[int, int, float]]:
    """Return (place of the query, row, score) of n rows; each query in turn takes its best row not yet taken."""
    taken = np.zeros(len(scan), dtype=bool)
    turns: list[tuple[int, int, float]] = []
    # Candidates of a query are sorted from worst to best; a query without candidates that are not taken gets new ones.
    n_candidates = min(n, 2 * -(-n // len(queries_QF)) + 8)
    candidates: list[list[tuple[int, float]]] = [[] for _ in queries_QF]
    while len(turns) < n:
        query = len(turns) % len(queries_QF)
        while candidates[query] and taken[candidates[query][-1][0]]:
            candidates[query].pop()
        if not candidates[query]:
            # One pass finds candidates for all queries that have none left, this query first, within the memory limit.
            left = allowed[~taken[allowed]]
            empty = [q for q, rows in enumerate(candidates) if q != query and all(taken[row] for row, _ in rows)]
            lot = [query, *empty][: max(1, _CANDIDATES // n_candidates)]
            for q, best in zip(lot, _find_best(scan, queries_QF[lot], n_candidates, left), strict=True):
                candidates[q] = best[::-1]
            n_candidates = min(n, 2 * n_candidates)
        row, score = candidates[query].pop()
        taken[row] = True
        turns.append((query, row, score))
        if progress is not None:
            progress("rows", len(turns), n)
    return turns


def _find_best(scan: FlatIndex, queries_QF: Float32, k: int, allowed: Int64) -> list[list[tuple[int, float]]]:
    """Return for each query the k allowed rows with the highest scores, best first, ties by ascending row."""
    scaled_QF, exponent_Q = scale_to_unit(queries_QF)
    top = scan.search(scaled_QF, min(k, len(allowed)), allowed)
    return [
        list(zip(ids.tolist(), np.ldexp(scores.astype(np.float64), exponent).tolist(), strict=True))
        for ids, scores, exponent in zip(top.ids, top.scores, exponent_Q, strict=True)
    ]
