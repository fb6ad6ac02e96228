"""Training rows whose label is probably wrong, found by loss and by a vote of their neighbours.

A model learns a wrong label late, so the loss of its row stays high over the checkpoints (Arpit et al. 2017, "A Closer
Look at Memorization in Deep Networks"). The mean of the stored losses finds more wrong labels than self-influence.
Self-influence also depends on how easily a step changes the prediction for the row, and in a deep network that varies
more from row to row than the loss.

The neighbours of a row are the rows with the most similar and the most opposed gradients, by cosine at each checkpoint.
Each neighbour votes for its own label, with the size of its cosine as weight. Opposed rows also vote for their own
label: two rows with similar inputs and different labels have opposed gradients. A row is *outvoted* if another label
gets more of the vote than the label of the row.

The *suggested label* of a row is the best-supported label other than its own. Rows with the same wrong label have
similar gradients, so among the neighbours of a mislabelled row they often win the vote. The support of another label is
therefore computed from all rows with that label: it is the squared cosine between the gradient of the row and the mean
gradient of the label, where these are opposed. For cross-entropy, the gradient of a row with label g is opposed to a
label l to the extent that the model predicts l for the row.

Shapes: N ranked rows, the first A of them with neighbours, K listed rows, B rows at once, V rows of the index,
L labels, C checkpoints, D sketch dimension, F = C·D.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tracin_ann.choices import ScoreName
from tracin_ann.errors import UsageError, problem
from tracin_ann.index import InfluenceIndex
from tracin_ann.results import Describe, Fields, Id, RankedRows, Record, RowList
from tracin_ann.search import FlatIndex, Subset
from tracin_ann.store import RowFilter
from tracin_ann.types import Float32, Float64, Int64, ProgressCallback, ignore_progress

NEIGHBOURS = 30
ASKED = 20_000
_LOT = 1024
"""Rows whose neighbours are found in one pass over the features."""
_BLOCK = 8192
"""Rows that are read at once to compute the mean gradients of the labels."""
_SUPPORT_LOT = 128
"""Rows whose support is computed at once, in float64."""
_LEAST_LOSS = 1e-3
"""Least median loss of a checkpoint, as a share of the largest: it limits the weight of a checkpoint in the support."""
_QUANTILE = 0.05
"""Share of the outvoted rows whose loss may be below that of all rows to check."""
_TIMES = 5
"""The most rows to check, as a multiple of the outvoted rows."""

Label = int | str
By = Literal["loss-and-votes", "loss", "votes", "self-influence"]
RANKINGS: tuple[By, ...] = ("loss-and-votes", "loss", "votes", "self-influence")
_WITHOUT_LABELS: tuple[By, ...] = ("loss", "self-influence")


@dataclass(frozen=True)
class Suspect:
    """A training row, ranked by how likely its label is wrong.

    Attributes:
        rank: from 1, the most suspicious.
        id: the id given by the task, otherwise the position.
        row: the position in train_data.
        label: the label of the row; None: no labels were read.
        score: the value that rows are ranked by.
        loss: its mean over the checkpoints.
        self_influence: Σ_c η_c ‖∇ℓ(w_c, z)‖², or by another score (`InfluenceIndex.self_influence`).
        speaks_for: the label with the most votes of the neighbours, which can be the label of the row; None: the
            neighbours were not searched. Use `suggested_label` to correct a label.
        share: the share of the vote for `speaks_for`, 0 to 1.
        suggested_label: the best-supported label other than `label`; None: no labels were read, or no other label has
            any support.
        support: the share of the support of all labels that `suggested_label` has, 0 to 1.
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
    suggested_label: Label | None = None
    support: float | None = None


@dataclass(frozen=True)
class Suspicion:
    """Figures of all ranked rows.

    Attributes:
        n_rows: rows that were ranked.
        by: the value that they were ranked by.
        n_asked: rows whose neighbours were searched: those of largest loss, or of largest self-influence if rows are
            ranked by it.
        n_outvoted: rows among them whose neighbours vote for another label.
        look_at: the number of rows to check, from the top; None if no labels were read.
    """

    n_rows: int
    by: By
    n_asked: int = 0
    n_outvoted: int = 0
    look_at: int | None = None


class Suspects(RowList[Suspect]):
    """Training rows, the most suspicious first; `suspicion` holds the figures of all ranked rows."""

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
            ("suggested_label", "id"),
            ("support", "float"),
            ("text", "text"),
        )
    )
    DETAILS = ("self_influence", "loss", "row")
    DATA_ONLY = ("speaks_for", "share")

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
            "suggested_label": row.suggested_label,
            "support": row.support,
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
    score: ScoreName = "tracin",
    damping: float | None = None,
    progress: ProgressCallback | None = None,
) -> Suspects:
    """Return the k training rows whose labels are most likely wrong, or all rows by rank.

    The default score (`loss-and-votes`) is the loss of the row times the share of the neighbours' vote that is not for
    its label. The loss is the mean over the checkpoints, counted from the lowest loss of all rows. Measured with five
    models of three data sets, this score finds as many wrong labels as the loss or the vote alone, or nearly as many.
    It also finds more than self-influence, unless self-influence finds nearly all. The losses are those that the build
    stored. Without labels, the score is the loss.

    `Suspicion.look_at` estimates how many rows to check: the number of rows whose loss reaches the loss of 19 in 20
    outvoted rows, at most five times the number of outvoted rows. If the model predicts well, nearly all outvoted rows
    have wrong labels, but only some of the wrong labels are outvoted. If it predicts poorly, correct rows are outvoted
    too, and the estimate is far too large: `n_outvoted` is then a large share of the rows.

    The suggested label comes from the gradients, so it is about as accurate as the predictions of the model for rows
    that it did not train on.

    Neighbours are found by an exact scan of the stored features. Its time is proportional to `asked` times the number
    of rows. Rows beyond `asked` rank after all others. Only `exact` requires a task.

    Args:
        index: an open index.
        labels: the column of `Task.columns` with the labels; None: there are no labels and no votes.
        k: number of rows to return; None: all.
        neighbours: number of neighbours on each side, similar and opposed, that vote on each row.
        by: `loss-and-votes`, `loss`, `votes` (the share of the vote alone) or `self-influence`; None: the first, or
            `loss` without labels.
        asked: number of rows whose neighbours are searched: those of largest loss, or of largest self-influence with
            `by="self-influence"`.
        checkpoints: positions of the checkpoints to use; None: all.
        exact: compute the true self-influence of every row now instead of reading the stored estimate; losses and votes
            are still the stored ones.
        rows: the rows to rank; None: all. All rows of the index vote, except removed and skipped rows.
        score: the score of self-influence: `tracin`, or one with a curvature matrix, by which it is a leverage.
        damping: of a score with a curvature matrix; None: by the automatic rule.
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
    column = None if labels is None else _find_label_column(index, labels)
    ranked = index.self_influence(
        checkpoints=checkpoints, exact=exact, rows=rows, score=score, damping=damping, progress=progress
    )
    known = _StoredFigures.read(index, ranked, checkpoints, by)
    if column is None:
        return Suspects(_make_suspects(index, known, by, k), index.describe, Suspicion(len(known), by))
    names_L, label_V = np.unique(column, return_inverse=True)
    searched_N = known.row_N[:asked]
    voters = _Voters(index, checkpoints, label_V, len(names_L))
    votes = _Votes(voters.count(searched_N, neighbours, progress), label_V[known.row_N], names_L)
    n_outvoted = int(votes.outvoted_A.sum())
    look_at = _estimate_wrong_labels(known.first_N[: len(searched_N)], votes)
    suspicion = Suspicion(len(known), by, len(searched_N), n_outvoted, look_at)
    suspects = _make_suspects(index, known, by, k, votes)
    suggested = _add_suggestions(suspects, voters, names_L, progress or ignore_progress)
    return Suspects(suggested, index.describe, suspicion)


@dataclass(frozen=True, eq=False)
class _StoredFigures:
    """Stored figures of N rows, the most suspicious first.

    Attributes:
        row_N: their positions.
        loss_N: mean losses over the checkpoints.
        own_N: self-influence.
        first_N: the value that orders them: the loss above the lowest loss of all rows, or self-influence.
    """

    row_N: Int64
    loss_N: Float64
    own_N: Float64
    first_N: Float64

    def __len__(self) -> int:
        """Return N."""
        return len(self.row_N)

    @classmethod
    def read(
        cls, index: InfluenceIndex, ranked: RankedRows, checkpoints: Sequence[int] | None, by: By
    ) -> _StoredFigures:
        """Return the figures of rows whose self-influence is given."""
        view = index.view(checkpoints)
        loss_VC = view.store.losses(view.checkpoints).astype(np.float64)
        lowest = float(loss_VC[index.present()].min(axis=0, initial=np.inf).mean())
        row_N = np.array([found.row for found in ranked], dtype=np.int64)
        own_N, loss_N = np.array([found.score for found in ranked]), loss_VC[row_N].mean(axis=1)
        first_N = own_N if by == "self-influence" else loss_N - lowest
        order_N = np.lexsort((row_N, -first_N))
        return cls(row_N[order_N], loss_N[order_N], own_N[order_N], first_N[order_N])


@dataclass(frozen=True, eq=False)
class _Votes:
    """The vote on the first A of N rows: shares [A, L] of labels; the rows' labels [N] as positions in names [L]."""

    share_AL: Float64
    label_N: Int64
    names_L: npt.NDArray[Any]

    def __len__(self) -> int:
        """Return A."""
        return len(self.share_AL)

    @property
    def own_A(self) -> Float64:
        """Return the share of the vote for each row's own label."""
        own_A: Float64 = self.share_AL[np.arange(len(self)), self.label_N[: len(self)]]
        return own_A

    @property
    def winner_A(self) -> Int64:
        """Return the label with the largest share; among equal shares, the row's own label, then the first."""
        unbeaten_A = self.own_A >= self.share_AL.max(axis=1)
        winner_A: Int64 = np.where(unbeaten_A, self.label_N[: len(self)], self.share_AL.argmax(axis=1))
        return winner_A

    @property
    def outvoted_A(self) -> npt.NDArray[np.bool_]:
        """Return which rows have fewer votes for their own label than for another."""
        outvoted_A: npt.NDArray[np.bool_] = self.winner_A != self.label_N[: len(self)]
        return outvoted_A


def _make_suspects(
    index: InfluenceIndex, known: _StoredFigures, by: By, k: int | None, votes: _Votes | None = None
) -> list[Suspect]:
    """Return the first k rows: rows with a vote by score, then the others in their order."""
    score_N = _scores(by, known, votes)
    n_voted = len(known) if votes is None else len(votes)
    order = np.lexsort((known.row_N, -score_N, np.arange(len(known)) >= n_voted))[:k].tolist()
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
    return found if votes is None else _add_labels(found, order, votes)


def _add_labels(found: Sequence[Suspect], order: Sequence[int], votes: _Votes) -> list[Suspect]:
    """Return suspects, each at its position in `order`, with their labels and, where there was a vote, its result."""
    winner_A, labelled = votes.winner_A, []
    for suspect, i in zip(found, order, strict=True):
        fields: dict[str, Any] = {"label": _to_label(votes.names_L[votes.label_N[i]])}
        if i < len(votes):
            fields["speaks_for"] = _to_label(votes.names_L[winner_A[i]])
            fields["share"] = float(votes.share_AL[i, winner_A[i]])
        labelled.append(replace(suspect, **fields))
    return labelled


class _Voters:
    """All rows of an index that are present, with their labels."""

    def __init__(self, index: InfluenceIndex, checkpoints: Sequence[int] | None, label_V: Int64, n_labels: int) -> None:
        self.label_V, self._n_labels = label_V, n_labels
        self._view = replace(index.view(checkpoints), cosine=True)
        rates = [index.manifest.build.spec.checkpoints[c].learning_rate for c in self._view.checkpoints]
        self._weight_C = (np.array(rates) / np.sum(rates)).astype(np.float32)
        self._scan, self._present_V = FlatIndex(self._view, index.device), index.present()

    def count(self, row_N: Int64, neighbours: int, progress: ProgressCallback | None) -> Float64:
        """Return each label's share of the vote [N, L]; if nobody votes, the share of the row's own label is 1."""
        vote_NL = np.zeros((len(row_N), self._n_labels))
        for start in range(0, len(row_N), _LOT):
            row_B = row_N[start : start + _LOT]
            query_BCD = self._unit_rows(row_B) * self._weight_C[:, None]
            query_BF = query_BCD.reshape(len(row_B), -1)
            for sign, top in zip(
                (1, -1), self._scan.search_both(query_BF, neighbours + 1, self._present_V), strict=True
            ):
                for at, (row, ids, scores) in enumerate(zip(row_B, top.ids, top.scores, strict=True)):
                    votes = (ids != row) & (sign * scores > 0)
                    voter_K, weight_K = ids[votes][:neighbours], np.abs(scores[votes][:neighbours])
                    np.add.at(vote_NL[start + at], self.label_V[voter_K], weight_K)
            if progress is not None:
                progress("neighbours", start + len(row_B), len(row_N))
        without_N = vote_NL.sum(axis=1) == 0
        vote_NL[without_N, self.label_V[row_N[without_N]]] = 1
        share_NL: Float64 = vote_NL / vote_NL.sum(axis=1, keepdims=True)
        return share_NL

    def support(self, row_K: Int64, progress: ProgressCallback) -> Float64:
        """Return the support [K, L] of each label for each row; a row without any support has zeros.

        Σ_c max(0, -cos(g_c, m_c))² / loss_c, divided by the sum over labels: g_c is the gradient of the row at
        checkpoint c, m_c the sum over the rows with the label of their gradients divided by their norms, and loss_c the
        median loss, counted from the lowest. For the row's own label it is max(0, cos)², and the row itself is left out
        of m_c. A checkpoint with a lower loss has a larger weight, because its predictions are better.
        """
        sum_LCD, weight_C = self._sum_by_label(progress), self._checkpoint_weights()
        mean_LCD = _scale_to_unit(sum_LCD)
        support_KL = np.zeros((len(row_K), self._n_labels))
        for start in range(0, len(row_K), _SUPPORT_LOT):
            row_B = row_K[start : start + _SUPPORT_LOT]
            unit_BCD, label_B = self._unit_rows(row_B).astype(np.float64), self.label_V[row_B]
            own_BCD = _scale_to_unit(sum_LCD[label_B] - unit_BCD)
            for c, weight in enumerate(weight_C):
                opposed_BL = -(unit_BCD[:, c] @ mean_LCD[:, c].T)
                opposed_BL[np.arange(len(row_B)), label_B] = (unit_BCD[:, c] * own_BCD[:, c]).sum(axis=1)
                support_KL[start : start + len(row_B)] += weight * np.maximum(opposed_BL, 0) ** 2
        total_K = support_KL.sum(axis=1, keepdims=True)
        share_KL: Float64 = np.divide(support_KL, total_K, out=np.zeros_like(support_KL), where=total_K > 0)
        return share_KL

    def _unit_rows(self, row_B: Int64) -> Float32:
        """Return rows of the features as [B, C, D], each checkpoint's part divided by its norm."""
        return self._view.take(row_B).reshape(len(row_B), len(self._weight_C), -1)

    def _sum_by_label(self, progress: ProgressCallback) -> Float64:
        """Return the sums [L, C, D] over the present rows with a label of their unit gradients."""
        sum_LF, done = np.zeros((self._n_labels, self._view.dim)), 0
        for ids_B, unit_BF in Subset(self._view, self._present_V).blocks(_BLOCK):
            label_B = self.label_V[ids_B]
            order = np.argsort(label_B, kind="stable")
            found, first = np.unique(label_B[order], return_index=True)
            sum_LF[found] += np.add.reduceat(unit_BF[order], first, axis=0, dtype=np.float64)
            done += len(ids_B)
            progress("labels", done, len(self._present_V))
        return sum_LF.reshape(self._n_labels, len(self._weight_C), -1)

    def _checkpoint_weights(self) -> Float64:
        """Return the inverse of the median loss [C] at each checkpoint, counted from the lowest."""
        loss_VC = self._view.store.losses(self._view.checkpoints).astype(np.float64)[self._present_V]
        median_C = np.median(loss_VC, axis=0) - loss_VC.min(axis=0)
        if not median_C.any():
            return np.ones(len(median_C))
        weight_C: Float64 = 1 / np.maximum(median_C, _LEAST_LOSS * median_C.max())
        return weight_C


def _scale_to_unit(rows: Float64) -> Float64:
    """Return vectors, the last axis of an array, divided by their norms; zero stays zero."""
    norms = np.linalg.norm(rows, axis=-1, keepdims=True)
    unit: Float64 = np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)
    return unit


def _add_suggestions(
    suspects: Sequence[Suspect], voters: _Voters, names_L: npt.NDArray[Any], progress: ProgressCallback
) -> list[Suspect]:
    """Return suspects with the best-supported other label, where one has any support."""
    row_K = np.array([suspect.row for suspect in suspects], dtype=np.int64)
    if not len(row_K):
        return []
    support_KL = voters.support(row_K, progress)
    support_KL[np.arange(len(row_K)), voters.label_V[row_K]] = 0
    return [
        replace(suspect, suggested_label=_to_label(names_L[best]), support=float(support_L[best]))
        if support_L[best] > 0
        else suspect
        for suspect, support_L, best in zip(suspects, support_KL, support_KL.argmax(axis=1), strict=True)
    ]


def _scores(by: By, known: _StoredFigures, votes: _Votes | None) -> Float64:
    """Return the scores [N] of rows; rows without a vote keep the order of their stored figures."""
    if votes is None or by in _WITHOUT_LABELS:
        return known.own_N if by == "self-influence" else known.loss_N
    score_N, against_A = known.first_N.copy(), 1 - votes.own_A
    score_N[: len(votes)] = against_A if by == "votes" else score_N[: len(votes)] * against_A
    return score_N


def _estimate_wrong_labels(known_A: Float64, votes: _Votes) -> int:
    """Return how many rows with a vote reach the value of 19 in 20 outvoted rows, at most 5 times the outvoted."""
    outvoted_A = votes.outvoted_A
    if not outvoted_A.any():
        return 0
    least = np.quantile(known_A[outvoted_A], _QUANTILE, method="lower")
    return int(min((known_A >= least).sum(), _TIMES * outvoted_A.sum()))


def _find_label_column(index: InfluenceIndex, labels: str) -> npt.NDArray[Any]:
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
                expected="integers, bools or strings",
                remedy="name another column, or --no-labels",
            )
        )
    return column


def _to_label(value: Any) -> Label:
    plain = value.item() if isinstance(value, np.generic) else value
    return str(plain).lower() if isinstance(plain, bool) else plain
