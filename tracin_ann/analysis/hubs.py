"""Hubs: training rows that are proponents or opponents of unusually many queries.

N_k of a row is the number of queries that have it among their top k (Radovanović, Nanopoulos & Ivanović 2010). If the
distribution of N_k is skewed to the right, a few rows are hits of most queries, whatever the query is.

Shapes: N rows that may be hits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from tracin_ann.choices import SideName
from tracin_ann.errors import UsageError, problem
from tracin_ann.index import InfluenceIndex
from tracin_ann.results import Answer, Describe, Fields, Id, Record, RowList, counts_figure
from tracin_ann.scoring import QueryOptions
from tracin_ann.types import Int64, ProgressCallback

_LOT = 512
"""Queries answered at once."""

Direction = Literal["proponents", "opponents"]


@dataclass(frozen=True)
class Hub:
    """The number of queries that have a training row among their top k.

    Attributes:
        rank: from 1 for the largest count.
        id: the task's own id of the row, else its position.
        row: position in train_data.
        proponent_of: N_k among proponents.
        opponent_of: N_k among opponents.
    """

    rank: int
    id: Id
    row: int
    proponent_of: int
    opponent_of: int


@dataclass(frozen=True, eq=False)
class Counts:
    """N_k of all rows that may be hits, for proponents or opponents: counts `count_N` of the positions `row_N`."""

    row_N: Int64
    count_N: Int64

    @property
    def expected(self) -> float:
        """Return the mean of N_k: the count of each row if no row were a hub."""
        return float(self.count_N.mean()) if len(self.count_N) else 0.0

    @property
    def largest(self) -> int:
        """Return the largest count."""
        return int(self.count_N.max(initial=0))

    @property
    def histogram(self) -> tuple[tuple[int, int], ...]:
        """Return each count that occurs, in ascending order, with the number of rows that have it."""
        counts, rows = np.unique(self.count_N, return_counts=True)
        return tuple(zip(counts.tolist(), rows.tolist(), strict=True))

    @property
    def skewness(self) -> float:
        """Return E (N_k - μ)³ / σ³ over the rows: 0 if all counts are equal, large if a few rows have high counts."""
        if not len(self.count_N) or self.count_N.min() == self.count_N.max():
            return 0.0
        centred_N = self.count_N - self.count_N.mean()
        return float((centred_N**3).mean() / (centred_N**2).mean() ** 1.5)


@dataclass(frozen=True, eq=False)
class Census:
    """Counts of all rows, and the queries they are based on.

    Attributes:
        k: number of proponents and of opponents per query.
        n_queries: number of queries.
        proponents: how often each row was among the proponents.
        opponents: how often each row was among the opponents.
        how: description of the search.
    """

    k: int
    n_queries: int
    proponents: Counts
    opponents: Counts
    how: str


class Hubs(RowList[Hub]):
    """The rows that are among the top k of any query, by descending count; `census` has the counts of all rows."""

    FIELDS = Fields(
        (
            ("rank", "int"),
            ("id", "id"),
            ("row", "int"),
            ("proponent_of", "int"),
            ("opponent_of", "int"),
            ("text", "text"),
        )
    )

    def __init__(self, rows: Iterable[Hub], describe: Describe, census: Census) -> None:
        super().__init__(rows, describe)
        self.census, self._describe = census, describe

    def ranked(self, by: Direction = "proponents", top: int | None = None) -> Hubs:
        """Return the rows by descending count among proponents or among opponents, the first `top` or all."""
        sign = 1 if by == "proponents" else -1

        def order(hub: Hub) -> tuple[int, ...]:
            return (*(-hub.proponent_of, -hub.opponent_of)[::sign], hub.row)

        rows = [replace(hub, rank=rank) for rank, hub in enumerate(sorted(self, key=order)[:top], start=1)]
        return Hubs(rows, self._describe, self.census)

    def record(self, row: Hub) -> Record:
        """Return a row's record."""
        return {
            "rank": row.rank,
            "id": row.id,
            "row": row.row,
            "proponent_of": row.proponent_of,
            "opponent_of": row.opponent_of,
            "text": self.texts("train", row.row),
        }

    def plot(self) -> Any:
        """Return a matplotlib Figure: the number of rows for each count.

        Raises:
            MissingPackageError: matplotlib is not installed.
        """
        return counts_figure(self.census.proponents.histogram, self.census.opponents.histogram)


def find_hubs(
    index: InfluenceIndex,
    query_ids: Sequence[int] | None = None,
    k: int = 10,
    side: SideName = "query",
    options: QueryOptions | None = None,
    progress: ProgressCallback | None = None,
) -> Hubs:
    """Count for each training row the queries that have it among their top k proponents and their top k opponents.

    Memory does not grow with the number of queries. A training row that is a query does not count for itself. Rows with
    a positive score are proponents and rows with a negative score are opponents, so a query may have fewer than k. With
    inverted lists, hits have the recall of the index; `search="scan"` in the options finds all hits.

    Args:
        index: an open index.
        query_ids: positions in the data set `side`; None: all rows, except removed and skipped training rows.
        k: number of proponents and of opponents per query.
        side: data set of the queries.
        options: query options, including which rows may be hits; its `k` is not used.
        progress: called with ("queries", done, total).

    Raises:
        UsageError: k or an id is out of range, or there is no query.
        IndexMismatchError: the task does not match the index.
        NonFiniteError: a query's loss or gradient is NaN or infinite.
    """
    if query_ids is None:
        query_ids = index.present().tolist() if side == "train" else range(index.runner.n_rows(side))
    ids = tuple(dict.fromkeys(query_ids))
    if not ids:
        raise UsageError(problem("no query", got="no ids", expected="one or more", remedy="name at least one row"))
    index.runner.check_ids(side, ids)
    # A training row is its own proponent: one more hit is requested, and the row itself is dropped.
    query_options = replace(options or QueryOptions(), k=QueryOptions(k=k).k + (side == "train"))
    counts = {1: np.zeros(len(index), np.int64), -1: np.zeros(len(index), np.int64)}
    how = ""
    for start in range(0, len(ids), _LOT):
        lot = ids[start : start + _LOT]
        answers = index.query((), lot, query_options) if side == "train" else index.query(lot, (), query_options)
        # Where shards are missing from an answer, its description says so.
        partial = [answer.how for answer in answers if answer.missing_shards]
        how = partial[0] if partial else how or answers[0].how
        for sign, rows in _top_rows(answers, k):
            np.add.at(counts[sign], rows, 1)
        if progress is not None:
            progress("queries", start + len(lot), len(ids))
    row_N = index.present(query_options.rows)
    census = Census(k, len(ids), Counts(row_N, counts[1][row_N]), Counts(row_N, counts[-1][row_N]), how)
    hubs = [
        Hub(0, index.id_of("train", int(row)), int(row), int(counts[1][row]), int(counts[-1][row]))
        for row in np.flatnonzero(counts[1] + counts[-1])
    ]
    return Hubs(hubs, index.describe, census).ranked()


def _top_rows(answers: Sequence[Answer], k: int) -> Iterable[tuple[int, list[int]]]:
    """Yield (1, rows of the top k proponents) and (-1, rows of the top k opponents) of every answer."""
    for answer in answers:
        own = answer.row if answer.side == "train" else None
        for sign, hits in ((1, answer.proponents), (-1, answer.opponents)):
            yield sign, [hit.row for hit in hits if hit.row != own][:k]
