"""The options of a query."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from tracin_ann.choices import SCORES, SEARCHES, ScoreName, Search
from tracin_ann.errors import UsageError, problem
from tracin_ann.store import RowFilter

Rerank = Literal["none", "stored", "exact"]


@dataclass(frozen=True)
class QueryOptions:
    """The options of a query.

    Attributes:
        k: how many proponents, and how many opponents, to return.
        candidates: how many rows of each side are re-scored with `rerank="exact"`; at least k.
        rerank: `none` (scores of the search index), `stored` (scores from the stored features), `exact` (scores of the
            candidates over all parameters, without a sketch).
        exact: score every training row exactly, without the search index.
        checkpoints: positions of the checkpoints to sum over; None: all.
        search: how candidates are found: `index` (also `lists`), `scan` (an exact scan of the stored rows), or `auto`
            (the faster one, by the times that the build measured).
        recall: recall@10 of the stored features' ranking that the search index has to reach; None: the build's target.
        rows: which training rows may be hits.
        cosine: the same as the score `cosine`.
        tokens: split the exact score of each hit over its target positions (`Hit.tokens`).
        score: `tracin`; `cosine` at each checkpoint, averaged with weights η_c; `fisher`, `gauss-newton` or `trak`,
            with the inverse of a curvature matrix; `trackstar`, the cosine in its metric (`scoring.scores`). None: the
            index's default.
        damping: λ of the scores with a curvature matrix, in units of squared gradients; None: 1 / (η_c · steps), or a
            fraction of the trace (`Curvature.choose_damping`).
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
    tokens: bool = False
    score: ScoreName | None = None
    damping: float | None = None

    @property
    def n_candidates(self) -> int:
        """Return how many candidates the search finds in each direction."""
        return max(self.k, self.candidates) if self.rerank == "exact" else self.k

    def __post_init__(self) -> None:
        """Reject values out of range and options that exclude each other.

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
                problem(
                    "bad --recall", got=self.recall, expected="more than 0 and less than 1", remedy="change --recall"
                )
            )
        self._resolve_score()
        if self.cosine and self.tokens:
            raise UsageError(
                problem("--tokens splits inner products", got="--cosine", expected="no cosine", remedy="remove one")
            )
        if self.cosine and (self.exact or self.rerank == "exact"):
            raise UsageError(
                problem(
                    "--cosine is computed from the stored features",
                    got="--exact" if self.exact else "--rerank exact",
                    expected="--rerank stored or none",
                    remedy="remove one of the two",
                )
            )

    def _resolve_score(self) -> None:
        """Make `cosine` and `score` agree, and check both and the damping.

        Raises:
            UsageError: naming the option.
        """
        if self.score is not None and self.score not in SCORES:
            expected = " or ".join(SCORES)
            raise UsageError(problem("bad --score", got=self.score, expected=expected, remedy="change --score"))
        if self.cosine and self.score not in (None, "cosine"):
            raise UsageError(
                problem("two scores", got=f"--cosine and --score {self.score}", expected="one", remedy="remove one")
            )
        if self.cosine or self.score == "cosine":
            object.__setattr__(self, "score", "cosine")
            object.__setattr__(self, "cosine", True)
        if self.damping is not None and not 0 < self.damping < math.inf:
            expected, remedy = "a finite number above 0", "change --damping"
            raise UsageError(problem("bad --damping", got=self.damping, expected=expected, remedy=remedy))
