"""A subset of the training rows for a set of queries: those that help them most, each query in turn or all together.

`round-robin`: the queries, in order, again and again, each take the row of highest score that is not yet taken (Ivison
et al. 2025, arXiv 2503.01807). `mean`: the rows of highest mean score. Equal scores go by rising row.

Shapes: N rows that may be taken, Q queries, F feature dimension, K candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tracin_ann.errors import UsageError, problem
from tracin_ann.index import InfluenceIndex
from tracin_ann.scoring import Fields, Id, Record, RowList
from tracin_ann.search import FlatIndex, scale_to_unit
from tracin_ann.store import RowFilter
from tracin_ann.types import Float32, Int64, ProgressCallback

Method = Literal["round-robin", "mean"]
METHODS: tuple[Method, ...] = ("round-robin", "mean")
_CANDIDATES = 1 << 23
"""Candidates of all queries that are held at once."""


@dataclass(frozen=True)
class Chosen:
    """A training row of the subset.

    Attributes:
        rank: from 1, the order in which rows were taken.
        id: the task's own id, else the position.
        row: the position in train_data.
        score: for the query that took it; by `mean`, the mean over all queries.
        query: the id of the query that took it; None by `mean`.
        query_row: that query's position in query_data.
    """

    rank: int
    id: Id
    row: int
    score: float
    query: Id | None = None
    query_row: int | None = None


class Subset(RowList[Chosen]):
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

    def record(self, row: Chosen) -> Record:
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
    progress: ProgressCallback | None = None,
) -> Subset:
    """Return n training rows for the queries: fewer only where fewer may be taken.

    Scores are the stored features', over all rows (an exact scan): what is taken is what the full matrix of scores
    would give. By `round-robin` a query keeps some candidates, and gets more by another pass over the features once
    others have taken them.

    Args:
        index: an open index.
        n: rows wanted.
        query_ids: positions in query_data, in the order of their turns; None: all.
        method: `round-robin` or `mean`.
        checkpoints: positions of those to sum over; None: all.
        rows: which rows may be taken; None: all. Removed and skipped ones never are.
        progress: called with ("rows", taken, n).

    Raises:
        UsageError: n, the method or an id is bad, or there is no query.
        IndexMismatchError: the task does not fit the index.
        NonFiniteError: a query's loss or gradient is NaN or infinite.
    """
    if n < 1:
        raise UsageError(problem("bad --n", got=n, expected="1 or more", remedy="change --n"))
    if method not in METHODS:
        raise UsageError(problem("bad --method", got=method, expected=" or ".join(METHODS), remedy="change --method"))
    ids = tuple(dict.fromkeys(range(index.passes.n_rows("query")) if query_ids is None else query_ids))
    if not ids:
        raise UsageError(problem("no query", got="no ids", expected="one or more", remedy="name at least one row"))
    index.passes.check_ids("query", ids)
    allowed = index.present(rows)
    wanted = min(n, len(allowed))
    queries_QF = index.features("query", ids, checkpoints)
    scan = FlatIndex(index.view(checkpoints), index.device)
    if method == "mean":
        mean_QF = queries_QF.astype(np.float64).mean(axis=0, keepdims=True).astype(np.float32)
        turns = [(0, *taken) for taken in _best(scan, mean_QF, wanted, allowed)[0]] if wanted else []
    else:
        turns = _in_turn(scan, queries_QF, wanted, allowed, progress)
    return Subset(
        [
            Chosen(
                rank=rank,
                id=index.rows.id_at(row),
                row=row,
                score=score,
                query=None if method == "mean" else index.id_of("query", ids[query]),
                query_row=None if method == "mean" else ids[query],
            )
            for rank, (query, row, score) in enumerate(turns, start=1)
        ],
        index.described,
    )


def _in_turn(
    scan: FlatIndex, queries_QF: Float32, n: int, allowed: Int64, progress: ProgressCallback | None
) -> list[tuple[int, int, float]]:
    """Return (place of the query, row, score) of n rows, each query in turn taking its best that is not yet taken."""
    taken = np.zeros(len(scan), dtype=bool)
    turns: list[tuple[int, int, float]] = []
    # The best that a query may still take is the first of its candidates that is not taken; none: new ones are found.
    n_candidates = min(n, 2 * -(-n // len(queries_QF)) + 8)
    held: list[list[tuple[int, float]]] = [[] for _ in queries_QF]
    while len(turns) < n:
        query = len(turns) % len(queries_QF)
        while held[query] and taken[held[query][-1][0]]:
            held[query].pop()
        if not held[query]:
            # One pass serves all that have none left, this one first: more than are served at once wait for theirs.
            left = allowed[~taken[allowed]]
            empty = [q for q, rows in enumerate(held) if q != query and all(taken[row] for row, _ in rows)]
            lot = [query, *empty][: max(1, _CANDIDATES // n_candidates)]
            for q, found in zip(lot, _best(scan, queries_QF[lot], n_candidates, left), strict=True):
                held[q] = found[::-1]
            n_candidates = min(n, 2 * n_candidates)
        row, score = held[query].pop()
        taken[row] = True
        turns.append((query, row, score))
        if progress is not None:
            progress("rows", len(turns), n)
    return turns


def _best(scan: FlatIndex, queries_QF: Float32, k: int, allowed: Int64) -> list[list[tuple[int, float]]]:
    """Return of each query the k allowed rows of highest score, best first, equal ones by rising row, with scores."""
    scaled_QF, exponent_Q = scale_to_unit(queries_QF)
    top = scan.search(scaled_QF, min(k, len(allowed)), allowed)
    return [
        list(zip(ids.tolist(), np.ldexp(scores.astype(np.float64), exponent).tolist(), strict=True))
        for ids, scores, exponent in zip(top.ids, top.scores, exponent_Q, strict=True)
    ]
