"""What a query may ask and what it is answered: options, hits, answers, self-influence."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tracin_ann.choices import SEARCHES, Search, SideName
from tracin_ann.errors import UsageError, problem
from tracin_ann.store import RowFilter

Rerank = Literal["none", "stored", "exact"]
Id = int | str


@dataclass(frozen=True)
class QueryOptions:
    """How a query is answered.

    Attributes:
        k: proponents and opponents wanted, each.
        candidates: rows that the index hands on for re-scoring, each side; at least k are taken.
        rerank: `none` (the index's own scores), `stored` (from the stored features), `exact` (true
            TracInCP of the candidates).
        exact: score every training row exactly; no index is asked.
        checkpoints: positions of the checkpoints to sum over; None: all.
        search: which way candidates are found where the index has lists: by them, by an exact scan of the stored
            rows, or whichever costs less by the times measured at the build.
        recall: recall@10 of the stored rows' own ranking that lists are to reach; None: the build's target.
        rows: which training rows may be among the hits.
        cosine: cosine instead of inner product at each checkpoint, averaged with weights η_c.
    """

    k: int = 10
    candidates: int = 200
    rerank: Rerank = "stored"
    exact: bool = False
    checkpoints: tuple[int, ...] | None = None
    cosine: bool = False
    search: Search = "auto"
    recall: float | None = None
    rows: RowFilter = field(default_factory=RowFilter)

    def __post_init__(self) -> None:
        """Refuse values that fit no query.

        Raises:
            UsageError: naming the option.
        """
        for option, value in (("-k", self.k), ("--candidates", self.candidates)):
            if value < 1:
                raise UsageError(problem(f"bad {option}", got=value, expected="1 or more", remedy=f"change {option}"))
        if self.rerank not in ("none", "stored", "exact"):
            raise UsageError(
                problem("bad --rerank", got=self.rerank, expected="none, stored or exact", remedy="change --rerank")
            )
        if self.search not in SEARCHES:
            expected = " or ".join(SEARCHES)
            raise UsageError(problem("bad --search", got=self.search, expected=expected, remedy="change --search"))
        if self.recall is not None and not 0 < self.recall < 1:
            raise UsageError(
                problem("bad --recall", got=self.recall, expected="over 0, under 1", remedy="change --recall")
            )
        if self.cosine and (self.exact or self.rerank == "exact"):
            raise UsageError(
                problem(
                    "--cosine is computed from the stored features",
                    got="--exact" if self.exact else "--rerank exact",
                    expected="--rerank stored or none",
                    remedy="drop one of the two",
                )
            )


@dataclass(frozen=True)
class Hit:
    """A training row among the answers.

    Attributes:
        id: the task's own id of it (`Task.ids`), else its position.
        row: its position in train_data.
        score: true where it was computed exactly, else from the stored features.
        stored_score: the score from the stored features, where `score` is exact.
        by_checkpoint: the stored features' score by checkpoint, in the order that was asked; sums to it.
        of_means: of a contrast, the scores for the mean of the one set and for that of the other; `score` is their
            difference.
        error: one standard deviation of the stored features' score around the true one, as far as the build's
            measurement tells; None where the build measured none, or for cosine.
    """

    id: Id
    row: int
    score: float
    stored_score: float | None = None
    error: float | None = None
    by_checkpoint: tuple[float, ...] = ()
    of_means: tuple[float, ...] = ()

    @property
    def is_exact(self) -> bool:
        """Return whether `score` is true TracInCP; then it has no error."""
        return self.stored_score is not None


@dataclass(frozen=True)
class Answer:
    """A query's rows: proponents by falling score, all > 0; opponents by rising score, all < 0.

    Attributes:
        query: the query's own id (`Task.ids`), else its position; of several rows as one question, a caption.
        side: which data set the query is of, `query` or `train`.
        members: the positions of its rows in that data set; of a contrast, of those whose helpers are asked for.
        against: of a contrast, the positions of those to be hurt.
        proponents: training rows that lowered the query's loss.
        opponents: training rows that raised it.
        rows_scored: stored rows and centroids that the index compared, both directions together.
        how: how candidates were found, and what recall was measured for that way.
        strange: whether the query looks unlike all queries that the recall was measured on.
    """

    query: Id
    side: SideName
    members: tuple[int, ...]
    proponents: tuple[Hit, ...]
    opponents: tuple[Hit, ...]
    rows_scored: int
    how: str = ""
    strange: bool = False
    against: tuple[int, ...] = ()

    @property
    def hits(self) -> tuple[Hit, ...]:
        """Return the proponents, then the opponents."""
        return (*self.proponents, *self.opponents)

    @property
    def row(self) -> int | None:
        """Return the query's position, or None of several rows as one question."""
        return self.members[0] if len(self.members) == 1 and not self.against else None


@dataclass(frozen=True)
class SelfInfluence:
    """A training row's own score Σ_c η_c ‖∇ℓ(w_c, z)‖², and its rank from 1, the largest; ids as in Hit."""

    id: Id
    row: int
    score: float
    rank: int
