"""Hubs: training rows that are among the first proponents or opponents of unusually many queries.

N_k of a row is the number of queries that hold it among their first k (Radovanović, Nanopoulos & Ivanović 2010). Where
it is skewed to the right, a few rows answer most queries, whatever is asked.

Shapes: N rows that may be answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from tracin_ann.choices import SideName
from tracin_ann.errors import UsageError, problem
from tracin_ann.index import InfluenceIndex
from tracin_ann.scoring import Answer, Describe, Fields, Id, QueryOptions, Record, RowList, counts_figure
from tracin_ann.types import Int64, ProgressCallback

_LOT = 512
"""Queries that are answered at once."""

Direction = Literal["proponents", "opponents"]


@dataclass(frozen=True)
class Hub:
    """How many queries hold a training row among their first k.

    Attributes:
        rank: from 1, the largest count.
        id: the task's own id, else the position.
        row: the position in train_data.
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
    """N_k of all rows that may be answers, in one direction, beside their positions: `count_N`, `row_N`."""

    row_N: Int64
    count_N: Int64

    @property
    def expected(self) -> float:
        """Return the mean of N_k: the count of every row, were no row a hub."""
        return float(self.count_N.mean()) if len(self.count_N) else 0.0

    @property
    def largest(self) -> int:
        """Return the largest count."""
        return int(self.count_N.max(initial=0))

    @property
    def skewness(self) -> float:
        """Return E (N_k - μ)³ / σ³ over the rows: 0 where all counts are equal, and the larger the fewer the hubs."""
        if not len(self.count_N) or self.count_N.min() == self.count_N.max():
            return 0.0
        centred_N = self.count_N - self.count_N.mean()
        return float((centred_N**3).mean() / (centred_N**2).mean() ** 1.5)


@dataclass(frozen=True, eq=False)
class Census:
    """What was counted.

    Attributes:
        k: the hits a side that were counted.
        n_queries: the queries asked.
        proponents: how often each row was among the proponents.
        opponents: how often each row was among the opponents.
        how: how the hits were found, in words.
    """

    k: int
    n_queries: int
    proponents: Counts
    opponents: Counts
    how: str


class Hubs(RowList[Hub]):
    """The rows that are among the first k of any query, by falling count; `census` knows the others too."""

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
        """Return these by falling count among proponents or among opponents, the first `top` or all."""
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
        """Return a matplotlib Figure: how many rows have which count.

        Raises:
            MissingPackageError: matplotlib is not installed.
        """
        return counts_figure(self.census.proponents.count_N, self.census.opponents.count_N)


def find_hubs(
    index: InfluenceIndex,
    query_ids: Sequence[int] | None = None,
    k: int = 10,
    side: SideName = "query",
    options: QueryOptions | None = None,
    progress: ProgressCallback | None = None,
) -> Hubs:
    """Return how many queries hold each training row among their first k proponents, and their first k opponents.

    The queries are answered some hundreds at a time, so that memory does not grow with them. A training row that is a
    query is not counted for itself. Only rows of positive score are proponents and of negative score opponents, so a
    query may have fewer than k. Where the index has lists, hits are as sure as its measured recall; `search="scan"` in
    the options finds all.

    Args:
        index: an open index.
        query_ids: positions in the data set `side`; None: all of it, of the training rows those not removed or skipped.
        k: hits a side.
        side: the queries' data set.
        options: how queries are answered, and which rows may be hits; its `k` is not used.
        progress: called with ("queries", done, total).

    Raises:
        UsageError: k or an id is out of range, or there is no query.
        IndexMismatchError: the task does not fit the index.
        NonFiniteError: a query's loss or gradient is NaN or infinite.
    """
    if query_ids is None:
        query_ids = index.present().tolist() if side == "train" else range(index.passes.n_rows(side))
    ids = tuple(dict.fromkeys(query_ids))
    if not ids:
        raise UsageError(problem("no query", got="no ids", expected="one or more", remedy="name at least one row"))
    index.passes.check_ids(side, ids)
    # A training row is a proponent of itself: one more, and itself left out.
    wanted = replace(options or QueryOptions(), k=QueryOptions(k=k).k + (side == "train"))
    counts = {1: np.zeros(len(index), np.int64), -1: np.zeros(len(index), np.int64)}
    how = ""
    for start in range(0, len(ids), _LOT):
        lot = ids[start : start + _LOT]
        answers = index.query((), lot, wanted) if side == "train" else index.query(lot, (), wanted)
        how = answers[0].how
        for sign, rows in _hits(answers, k):
            np.add.at(counts[sign], rows, 1)
        if progress is not None:
            progress("queries", start + len(lot), len(ids))
    row_N = index.present(wanted.rows)
    census = Census(k, len(ids), Counts(row_N, counts[1][row_N]), Counts(row_N, counts[-1][row_N]), how)
    found = [
        Hub(0, index.id_of("train", int(row)), int(row), int(counts[1][row]), int(counts[-1][row]))
        for row in np.flatnonzero(counts[1] + counts[-1])
    ]
    return Hubs(found, index.described, census).ranked()


def _hits(answers: Sequence[Answer], k: int) -> Iterable[tuple[int, list[int]]]:
    """Yield (1, rows of its proponents) and (-1, rows of its opponents) of every answer."""
    for answer in answers:
        own = answer.row if answer.side == "train" else None
        for sign, hits in ((1, answer.proponents), (-1, answer.opponents)):
            yield sign, [hit.row for hit in hits if hit.row != own][:k]
