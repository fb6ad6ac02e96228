"""What a query may ask and what it is answered: options, hits, answers, self-influence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tracin_ann.errors import UsageError, problem
from tracin_ann.loading import SideName

Rerank = Literal["none", "stored", "exact"]


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
        cosine: cosine instead of inner product at each checkpoint, averaged with weights η_c.
    """

    k: int = 10
    candidates: int = 200
    rerank: Rerank = "stored"
    exact: bool = False
    checkpoints: tuple[int, ...] | None = None
    cosine: bool = False

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
    """A training row: its id, its score, and the score from the stored features where `score` is exact."""

    id: str
    score: float
    stored_score: float | None = None


@dataclass(frozen=True)
class Answer:
    """A query's rows: proponents by falling score, all > 0; opponents by rising score, all < 0.

    Attributes:
        query: the query's id.
        side: which data set the id counts in, `query` or `train`.
        proponents: training rows that lowered the query's loss.
        opponents: training rows that raised it.
        rows_scored: stored rows and centroids that the index compared, both directions together.
    """

    query: str
    side: SideName
    proponents: tuple[Hit, ...]
    opponents: tuple[Hit, ...]
    rows_scored: int


@dataclass(frozen=True)
class SelfInfluence:
    """A training row's own score Σ_c η_c ‖∇ℓ(w_c, z)‖², and its rank from 1, the largest."""

    id: str
    score: float
    rank: int
