"""The results of queries: hits, answers, self-influence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from tracin_ann.choices import ScoreName, SideName

Id = int | str


class Hit(NamedTuple):
    """A training row in an answer.

    Attributes:
        id: its id from the task (`Task.ids`), else its position.
        row: its position in train_data.
        score: the exact score if the options request it, else the score from the stored features.
        stored_score: the score from the stored features, if `score` is exact.
        error: standard deviation of the stored features' score around the exact score: as the build measured it, or
            with a curvature matrix from two halves of the sketch; None for cosine and TrackStar, and if the build did
            not measure it.
        by_checkpoint: each checkpoint's part of the stored features' score, in the order of the options; the parts sum
            to that score.
        of_means: for a contrast, the scores for the mean of the first set and for that of the second; `score` is their
            difference.
        tokens: the exact score split over the row's target positions, if the options request it; the parts sum
            to the exact score, whichever score `score` is.
        amount: for a score with a curvature matrix, the estimated change of the query's loss if the row is removed from
            the training data and the model is trained again: (1/N) qᵀ(K + λI)⁻¹φ, mean over the checkpoints.
    """

    id: Id
    row: int
    score: float
    stored_score: float | None = None
    error: float | None = None
    by_checkpoint: tuple[float, ...] = ()
    of_means: tuple[float, ...] = ()
    tokens: tuple[float, ...] | None = None
    amount: float | None = None

    @property
    def is_exact(self) -> bool:
        """Return whether `score` is exact; then it has no error."""
        return self.stored_score is not None


@dataclass(frozen=True)
class Answer:
    """The result of a query: proponents by descending score, all > 0; opponents by ascending score, all < 0.

    Attributes:
        query: the query's id from the task (`Task.ids`), else its position; for several rows together, a caption.
        side: the data set of the query, `query` or `train`, or `input` for an example that is in neither.
        members: positions of its rows in that data set; for a contrast, those of the first set.
        proponents: training rows that reduced the query's loss.
        opponents: training rows that increased it.
        rows_scored: stored rows and centroids that the search compared, both directions together.
        how: the search strategy, the reason for it, and the expected recall.
        strange: whether the query is unlike the calibration queries, on which the recall was measured.
        against: for a contrast, positions of the rows of the second set.
        score: the name of the score.
        shards: the shards of the index that answered; empty if no workers searched them.
        missing_shards: the shards that did not answer: rows in them may be missing.
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
    score: ScoreName = "tracin"
    shards: tuple[int, ...] = ()
    missing_shards: tuple[int, ...] = ()

    @property
    def hits(self) -> tuple[Hit, ...]:
        """Return the proponents, then the opponents."""
        return (*self.proponents, *self.opponents)

    @property
    def row(self) -> int | None:
        """Return the query's position, or None for several rows together."""
        return self.members[0] if len(self.members) == 1 and not self.against else None


@dataclass(frozen=True)
class SelfInfluence:
    """A training row's self-influence Σ_c η_c ‖∇ℓ(w_c, z)‖² and its rank: 1 is the largest; ids as in Hit."""

    id: Id
    row: int
    score: float
    rank: int
