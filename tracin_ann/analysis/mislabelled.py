"""Training rows whose label looks wrong: by their loss, and by the labels that their neighbours speak for.

A wrong label is learned late: over the checkpoints, its row's loss stays high (Arpit et al. 2017, "A Closer Look at
Memorization in Deep Networks"). The mean of the stored losses finds more of them than self-influence, which is the loss
weighed by how easily the row's prediction is moved: in a deep network that differs more from row to row than the loss.

A row's neighbours are the rows whose gradients are most alike to its own and those most against it, by cosine at each
checkpoint. Both speak, with the size of their cosine, for the label that they have: a row of the same input and another
label has a gradient that points the other way, so an opponent's voice is for its own label. That takes nothing but the
stored features; where the labels' vote goes against a row's own, the row is *outvoted*.

Shapes: N ranked rows, A of them asked, B at once, V rows that vote, L labels, C checkpoints, D sketch dimension,
F = C·D.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tracin_ann.errors import UsageError, problem
from tracin_ann.index import InfluenceIndex
from tracin_ann.scoring import Describe, Fields, Id, RankedRows, Record, RowList
from tracin_ann.search import FlatIndex
from tracin_ann.store import RowFilter
from tracin_ann.types import Float64, Int64, ProgressCallback

NEIGHBOURS = 30
ASKED = 20_000
_LOT = 1024
"""Rows whose neighbours are found in one pass over the features."""
_QUANTILE = 0.05
"""Share of the outvoted rows whose loss may be below that of all rows that are to be looked at."""
_TIMES = 5
"""Times the outvoted rows, the most rows that are to be looked at."""

Label = int | str
By = Literal["loss-and-votes", "loss", "votes", "self-influence"]
RANKINGS: tuple[By, ...] = ("loss-and-votes", "loss", "votes", "self-influence")
_WITHOUT_LABELS: tuple[By, ...] = ("loss", "self-influence")


@dataclass(frozen=True)
class Suspect:
    """A training row, ranked by how likely its label is wrong.

    Attributes:
        rank: from 1, the most suspicious.
        id: the task's own id, else the position.
        row: the position in train_data.
        label: the label that it has; None: none was read.
        score: what it is ranked by.
        loss: its mean over the checkpoints.
        self_influence: Σ_c η_c ‖∇ℓ(w_c, z)‖².
        speaks_for: the label that its neighbours give most voice; None: they were not asked.
        share: that label's share of their voice, 0 to 1.
    """

    rank: int
    id: Id
    row: int
    label: Label | None
    score: float
    loss: float
    self_influence: float
    speaks_for: Label | None = None
    share: float | None = None


@dataclass(frozen=True)
class Suspicion:
    """What was found of all rows.

    Attributes:
        n_rows: rows that were ranked.
        by: what they were ranked by.
        n_asked: those of largest loss, whose neighbours were asked; of largest self-influence where that ranks.
        n_outvoted: those of them whose neighbours speak for another label.
        look_at: how many from the top to look at; None where no labels were read.
    """

    n_rows: int
    by: By
    n_asked: int = 0
    n_outvoted: int = 0
    look_at: int | None = None


class Suspects(RowList[Suspect]):
    """Training rows, the most suspicious first; `suspicion` tells of all of them."""

    FIELDS = Fields(
        (
            ("rank", "int"),
            ("id", "id"),
            ("row", "int"),
            ("label", "id"),
            ("score", "float"),
            ("loss", "float"),
            ("self_influence", "float"),
            ("speaks_for", "id"),
            ("share", "float"),
            ("text", "text"),
        )
    )
    DETAILS = ("self_influence", "loss")

    def __init__(self, rows: Iterable[Suspect], describe: Describe, suspicion: Suspicion) -> None:
        super().__init__(rows, describe)
        self.suspicion = suspicion

    def record(self, row: Suspect) -> Record:
        """Return a row's record."""
        return {
            "rank": row.rank,
            "id": row.id,
            "row": row.row,
            "label": row.label,
            "score": row.score,
            "loss": row.loss,
            "self_influence": row.self_influence,
            "speaks_for": row.speaks_for,
            "share": row.share,
            "text": self.texts("train", row.row),
        }


def find_mislabelled(  # noqa: PLR0913
    index: InfluenceIndex,
    labels: str | None = "label",
    k: int | None = None,
    neighbours: int = NEIGHBOURS,
    *,
    by: By | None = None,
    asked: int = ASKED,
    checkpoints: Sequence[int] | None = None,
    exact: bool = False,
    rows: RowFilter | None = None,
    progress: ProgressCallback | None = None,
) -> Suspects:
    """Return training rows by how likely their label is wrong, the k first or all.

    By default (`loss-and-votes`) a row's score is its loss, the mean over the checkpoints and counted from the lowest
    of all rows, times the share of its neighbours' voice that is not for its own label: measured with five models of
    three data sets, that finds as many wrong labels as either alone, or nearly, and more than self-influence but where
    that finds all but a few. The losses are those that the build stored. Without labels it is the loss.

    How many to look at is told by the outvoted rows: as many as have a loss that 19 in 20 of those reach, and at most
    five times as many as those. Where the model predicts well, nearly all outvoted rows are wrong ones, but only some
    of the wrong are outvoted. Where it predicts poorly, right ones are outvoted too, and the number is far too large:
    `n_outvoted` then is a large share of the rows.

    Neighbours are found by an exact scan of the stored features, in time that grows with `asked` times the rows. Rows
    that were not asked rank after all that were. Needs no task, unless `exact`.

    Args:
        index: an open index.
        labels: the column (`Task.columns`) that has the labels; None: there are none, and no votes.
        k: rows wanted; None: all.
        neighbours: rows on either side, helpers and opponents, that speak for each.
        by: `loss-and-votes`, `loss`, `votes`, the share alone, or `self-influence`; None: the first, or without labels
            `loss`.
        asked: the rows of largest loss (by `self-influence`: of largest self-influence) whose neighbours are asked.
        checkpoints: positions of those to take; None: all.
        exact: true self-influence of every row, computed now, instead of the stored estimate; losses and votes are
            those stored.
        rows: which rows are ranked; None: all. All rows of the index speak, but removed and skipped ones.
        progress: called with (stage, done, total).

    Raises:
        UsageError: there is no such column, it holds no labels, or another argument is bad.
        IndexMismatchError: with `exact`, the task does not fit the index.
    """
    for option, value in (("-k", k), ("--neighbours", neighbours), ("--asked", asked)):
        if value is not None and value < 1:
            raise UsageError(problem(f"bad {option}", got=value, expected="1 or more", remedy=f"change {option}"))
    possible = _WITHOUT_LABELS if labels is None else RANKINGS
    by = by or possible[0]
    if by not in possible:
        remedy = "change --by, or name the labels"
        raise UsageError(problem("bad --by", got=by, expected=" or ".join(possible), remedy=remedy))
    column = None if labels is None else _column(index, labels)
    ranked = index.self_influence(checkpoints=checkpoints, exact=exact, rows=rows, progress=progress)
    known = _Known.of(index, ranked, checkpoints, by)
    if column is None:
        return Suspects(_suspects(index, known, by, k), index.described, Suspicion(len(known), by))
    names_L, label_V = np.unique(column, return_inverse=True)
    asked_N = known.row_N[:asked]
    electorate = _Electorate(index, checkpoints, label_V, len(names_L))
    voices = _Voices(electorate.shares(asked_N, neighbours, progress), label_V[known.row_N], names_L)
    n_outvoted = int(voices.outvoted_A.sum())
    suspicion = Suspicion(len(known), by, len(asked_N), n_outvoted, _look_at(known.first_N[: len(asked_N)], voices))
    return Suspects(_suspects(index, known, by, k, voices), index.described, suspicion)


@dataclass(frozen=True, eq=False)
class _Known:
    """What is known of N rows before any is asked, the most suspicious first.

    Attributes:
        row_N: their positions.
        loss_N: mean losses over the checkpoints.
        own_N: self-influence.
        first_N: what they are put in order by: the loss above the lowest of all rows, or self-influence.
    """

    row_N: Int64
    loss_N: Float64
    own_N: Float64
    first_N: Float64

    def __len__(self) -> int:
        """Return N."""
        return len(self.row_N)

    @classmethod
    def of(cls, index: InfluenceIndex, ranked: RankedRows, checkpoints: Sequence[int] | None, by: By) -> _Known:
        """Return what an index says of rows whose self-influence is given."""
        view = index.view(checkpoints)
        loss_VC = view.store.losses(view.checkpoints).astype(np.float64)
        lowest = float(loss_VC[index.present()].min(axis=0, initial=np.inf).mean())
        row_N = np.array([found.row for found in ranked], dtype=np.int64)
        own_N, loss_N = np.array([found.score for found in ranked]), loss_VC[row_N].mean(axis=1)
        first_N = own_N if by == "self-influence" else loss_N - lowest
        order_N = np.lexsort((row_N, -first_N))
        return cls(row_N[order_N], loss_N[order_N], own_N[order_N], first_N[order_N])


@dataclass(frozen=True, eq=False)
class _Voices:
    """What was said of the first A of N rows: shares [A, L] of the voice; rows' labels [N], places among names [L]."""

    share_AL: Float64
    label_N: Int64
    names_L: npt.NDArray[Any]

    def __len__(self) -> int:
        """Return A."""
        return len(self.share_AL)

    @property
    def own_A(self) -> Float64:
        """Return the share for each row's own label."""
        own_A: Float64 = self.share_AL[np.arange(len(self)), self.label_N[: len(self)]]
        return own_A

    @property
    def winner_A(self) -> Int64:
        """Return the label with the largest share; of equal ones the row's own, then the first."""
        unbeaten_A = self.own_A >= self.share_AL.max(axis=1)
        winner_A: Int64 = np.where(unbeaten_A, self.label_N[: len(self)], self.share_AL.argmax(axis=1))
        return winner_A

    @property
    def outvoted_A(self) -> npt.NDArray[np.bool_]:
        """Return which rows another label has won."""
        outvoted_A: npt.NDArray[np.bool_] = self.winner_A != self.label_N[: len(self)]
        return outvoted_A


def _suspects(
    index: InfluenceIndex, known: _Known, by: By, k: int | None, voices: _Voices | None = None
) -> list[Suspect]:
    """Return the k first: those that were asked by their score, then the others as they are."""
    score_N = _scores(by, known, voices)
    n_asked = len(known) if voices is None else len(voices)
    order = np.lexsort((known.row_N, -score_N, np.arange(len(known)) >= n_asked))[:k].tolist()
    found = [
        Suspect(
            rank=rank,
            id=index.rows.id_at(int(known.row_N[i])),
            row=int(known.row_N[i]),
            label=None,
            score=float(score_N[i]),
            loss=float(known.loss_N[i]),
            self_influence=float(known.own_N[i]),
        )
        for rank, i in enumerate(order, start=1)
    ]
    return found if voices is None else _labelled(found, order, voices)


def _labelled(found: Sequence[Suspect], order: Sequence[int], voices: _Voices) -> list[Suspect]:
    """Return suspects, the i-th of `order` each, with their labels, and of those asked what was said."""
    winner_A, labelled = voices.winner_A, []
    for suspect, i in zip(found, order, strict=True):
        told: dict[str, Any] = {"label": _label(voices.names_L[voices.label_N[i]])}
        if i < len(voices):
            told["speaks_for"] = _label(voices.names_L[winner_A[i]])
            told["share"] = float(voices.share_AL[i, winner_A[i]])
        labelled.append(replace(suspect, **told))
    return labelled


class _Electorate:
    """All rows of an index that are present, with their labels."""

    def __init__(self, index: InfluenceIndex, checkpoints: Sequence[int] | None, label_V: Int64, n_labels: int) -> None:
        self._label_V, self._n_labels = label_V, n_labels
        self._view = replace(index.view(checkpoints), cosine=True)
        rates = [index.manifest.build.spec.checkpoints[c].learning_rate for c in self._view.checkpoints]
        self._weight_C = (np.array(rates) / np.sum(rates)).astype(np.float32)
        self._scan, self._allowed = FlatIndex(self._view, index.device), index.present()

    def shares(self, row_N: Int64, neighbours: int, progress: ProgressCallback | None) -> Float64:
        """Return the share of their neighbours' voice [N, L] for each label; of rows without any, of their own all."""
        voice_NL = np.zeros((len(row_N), self._n_labels))
        for start in range(0, len(row_N), _LOT):
            row_B = row_N[start : start + _LOT]
            unit_BF = self._view.take(row_B)
            query_BF = (unit_BF.reshape(len(row_B), len(self._weight_C), -1) * self._weight_C[:, None]).reshape(
                unit_BF.shape
            )
            for sign, top in zip((1, -1), self._scan.search_both(query_BF, neighbours + 1, self._allowed), strict=True):
                for at, (row, ids, scores) in enumerate(zip(row_B, top.ids, top.scores, strict=True)):
                    heard = (ids != row) & (sign * scores > 0)
                    heard_K, loud_K = ids[heard][:neighbours], np.abs(scores[heard][:neighbours])
                    np.add.at(voice_NL[start + at], self._label_V[heard_K], loud_K)
            if progress is not None:
                progress("neighbours", start + len(row_B), len(row_N))
        silent_N = voice_NL.sum(axis=1) == 0
        voice_NL[silent_N, self._label_V[row_N[silent_N]]] = 1
        share_NL: Float64 = voice_NL / voice_NL.sum(axis=1, keepdims=True)
        return share_NL


def _scores(by: By, known: _Known, voices: _Voices | None) -> Float64:
    """Return what rows [N] are ranked by; those that were not asked keep the order of what is known."""
    if voices is None or by in _WITHOUT_LABELS:
        return known.own_N if by == "self-influence" else known.loss_N
    score_N, against_A = known.first_N.copy(), 1 - voices.own_A
    score_N[: len(voices)] = against_A if by == "votes" else score_N[: len(voices)] * against_A
    return score_N


def _look_at(known_A: Float64, voices: _Voices) -> int:
    """Return how many of the rows asked reach what 19 in 20 of the outvoted reach, or 5 times the outvoted."""
    outvoted_A = voices.outvoted_A
    if not outvoted_A.any():
        return 0
    least = np.quantile(known_A[outvoted_A], _QUANTILE, method="lower")
    return int(min((known_A >= least).sum(), _TIMES * outvoted_A.sum()))


def _column(index: InfluenceIndex, labels: str) -> npt.NDArray[Any]:
    columns = index.columns
    if labels not in columns:
        raise UsageError(
            problem(
                f"no column {labels!r} in this index",
                got=f"--labels {labels}",
                expected=f"one of {', '.join(columns)}" if columns else "an index with columns",
                remedy="change --labels, or --no-labels to rank by self-influence alone"
                if columns
                else "give Task.columns and build again, or --no-labels to rank by self-influence alone",
            )
        )
    column: npt.NDArray[Any] = columns[labels]
    if column.dtype.kind == "f":
        raise UsageError(
            problem(
                f"column {labels!r} holds no labels",
                got="numbers with fractions",
                expected="whole numbers, bools or texts",
                remedy="name another column, or --no-labels",
            )
        )
    return column


def _label(value: Any) -> Label:
    plain = value.item() if isinstance(value, np.generic) else value
    return str(plain).lower() if isinstance(plain, bool) else plain
