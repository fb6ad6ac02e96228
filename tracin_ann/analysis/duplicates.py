"""Groups of training rows whose gradients point the same way: duplicates, as the model sees them.

The cosine of two rows is ⟨f, f'⟩ / (‖f‖ ‖f'‖) of their whole stored features, all checkpoints side by side: an estimate
of score(z, z') / √(score(z, z) score(z', z')), where score is TracInCP. Checkpoints weigh as in a score, by learning
rate and size of gradient; the length of a row's gradient does not matter: rows of one direction are duplicates.

Every pair is compared, in time that grows with the square of the rows. Most are ruled out by their first principal
directions: with ρ the length of what those leave of a unit row, ⟨f, f'⟩ ≤ ⟨Vf, Vf'⟩ + ρρ', itself an inner product of
unit rows of few numbers. What it does not rule out is computed from the whole rows in float64; so nothing is missed.

Shapes: N rows that may be duplicates, B rows of a block, M of a group, F feature dimension, R reduced dimension.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tracin_ann.errors import UsageError, problem
from tracin_ann.index import InfluenceIndex
from tracin_ann.scoring import Describe, Fields, Id, Record, RowList
from tracin_ann.store import FeatureView, RowFilter
from tracin_ann.types import Float64, Int64, ProgressCallback

_BLOCK = 2048
"""Rows that are compared with as many others at once."""
_DIRECTIONS = 64
"""Principal directions by which pairs are ruled out."""
_SAMPLE = 2048
"""Rows, spread over all, that those are the directions of."""
_ENTRIES = 1 << 23
"""Numbers of whole rows held at once: 64 MiB in float64."""
_MANY = 1 << 15
"""Pairs of a block from which on a matrix product of whole rows is cheaper than pair after pair."""
_SLACK = 1e-5
"""More than 65 products of unit rows in float32 are off by."""


Linked = Callable[[Int64, Int64], npt.NDArray[np.bool_]]


@dataclass(frozen=True)
class Duplicate:
    """A row of a group of duplicates.

    Attributes:
        group: the group's number from 1, the largest first.
        size: how many rows the group has.
        lowest_cosine: of any two of its rows; may lie below the threshold, where rows are linked by others.
        id: the row's own id, else its position.
        row: its position in train_data.
    """

    group: int
    size: int
    lowest_cosine: float
    id: Id
    row: int


@dataclass(frozen=True)
class Extent:
    """What was compared.

    Attributes:
        threshold: the least cosine that links two rows.
        n_rows: rows that were compared.
        n_zero: rows left out as their features are zero: they point nowhere.
    """

    threshold: float
    n_rows: int
    n_zero: int


class Duplicates(RowList[Duplicate]):
    """The rows that have a duplicate, group after group, the largest group first, rows rising."""

    FIELDS = Fields(
        (
            ("group", "int"),
            ("size", "int"),
            ("lowest_cosine", "float"),
            ("id", "id"),
            ("row", "int"),
            ("text", "text"),
        )
    )

    def __init__(self, rows: Iterable[Duplicate], describe: Describe, extent: Extent) -> None:
        super().__init__(rows, describe)
        self.extent = extent

    @property
    def groups(self) -> list[tuple[int, ...]]:
        """Return the positions of each group's rows."""
        found: dict[int, list[int]] = defaultdict(list)
        for row in self:
            found[row.group].append(row.row)
        return [tuple(rows) for rows in found.values()]

    def record(self, row: Duplicate) -> Record:
        """Return a row's record."""
        return {
            "group": row.group,
            "size": row.size,
            "lowest_cosine": row.lowest_cosine,
            "id": row.id,
            "row": row.row,
            "text": self.texts("train", row.row),
        }


def find_duplicates(
    index: InfluenceIndex,
    threshold: float = 0.999,
    rows: RowFilter | None = None,
    *,
    checkpoints: Sequence[int] | None = None,
    progress: ProgressCallback | None = None,
) -> Duplicates:
    """Return groups of training rows whose stored features have a cosine of the threshold or more.

    A group is all that such pairs link. Equal examples have features that differ by rounding, since they were in
    different batches: a cosine of 1 less some millionths, so that a threshold of 1 finds few of them. Needs no task.
    Time grows with the square of the rows, memory with the rows (260 bytes each, beside the features of some thousand).

    Args:
        index: an open index.
        threshold: the least cosine of a pair, over 0 and up to 1.
        rows: which rows are compared; None: all. Removed and skipped rows never are, nor rows without a gradient.
        checkpoints: positions of those that features are compared at; None: all.
        progress: called with (stage, done, total): rows read, and pairs of blocks compared.

    Raises:
        UsageError: the threshold, a checkpoint or the filter is bad.
    """
    if not 0 < threshold <= 1:
        raise UsageError(
            problem("bad --threshold", got=threshold, expected="over 0, up to 1", remedy="change --threshold")
        )
    view, chosen = index.view(checkpoints), index.present(rows)
    told = progress or _silent
    kept, row_NR = _reduced(view, chosen, index.device, told)
    links = _Links(len(kept))
    for pairs in _likely(row_NR, threshold - _SLACK, told):
        one, other = _likelier(view, kept, pairs, threshold - _SLACK) if len(pairs[0]) > _MANY else pairs
        links.join(one, other, lambda a, b: _cosines(view, kept[a], kept[b]) >= threshold, _pairs_at_once(view))
    groups = sorted((kept[group] for group in links.groups()), key=lambda group: (-len(group), group[0]))
    found = []
    for number, group in enumerate(groups, start=1):
        lowest = _lowest_cosine(view, group)
        found += [Duplicate(number, len(group), lowest, index.rows.id_at(row), row) for row in group.tolist()]
    return Duplicates(found, index.described, Extent(threshold, len(kept), len(chosen) - len(kept)))


def _silent(stage: str, done: int, total: int) -> None:
    pass


def _pairs_at_once(view: FeatureView) -> int:
    return min(2 * _BLOCK, max(1, _ENTRIES // (2 * view.dim)))


def _reduced(
    view: FeatureView, chosen: Int64, device: torch.device, progress: ProgressCallback
) -> tuple[Int64, Tensor]:
    """Return the positions [N] of the rows that are not zero, and their reduced unit rows [N, R] in float32."""
    direction_RF = _directions(view, chosen, device)
    kept, made = [np.zeros(0, np.int64)], [torch.zeros(0, len(direction_RF) + 1, device=device)]
    size = max(1, _ENTRIES // view.dim)
    for start in range(0, len(chosen), size):
        ids_B = chosen[start : start + size]
        unit_BF, whole_B = _units(view, ids_B)
        reduced_BR = torch.from_numpy(unit_BF).to(device) @ direction_RF.T
        # Never too short: what rounding takes from it could rule out a pair.
        left_B = (1 - reduced_BR.square().sum(1)).clamp_min(0).sqrt()
        kept.append(ids_B[whole_B])
        made.append(torch.cat([reduced_BR, left_B[:, None]], dim=1).float())
        progress("rows", start + len(ids_B), len(chosen))
    return np.concatenate(kept), torch.cat(made)


def _directions(view: FeatureView, chosen: Int64, device: torch.device) -> Tensor:
    """Return orthonormal rows [R - 1, F]: the first principal directions, about 0, of rows spread over the chosen."""
    size = min(_SAMPLE, len(chosen), max(_DIRECTIONS, _ENTRIES // view.dim))
    spread = np.unique(np.linspace(0, len(chosen) - 1, size).astype(np.int64)) if size else np.zeros(0, np.int64)
    unit_SF = torch.from_numpy(_units(view, chosen[spread])[0]).to(device)
    wide = len(unit_SF) >= view.dim
    # Of the smaller of the two Gram matrices; the largest come last.
    gram = unit_SF.T @ unit_SF if wide else unit_SF @ unit_SF.T
    vectors = torch.linalg.eigh(gram).eigenvectors[:, -_DIRECTIONS:]
    orthonormal_FR: Tensor = torch.linalg.qr(vectors if wide else unit_SF.T @ vectors).Q
    return orthonormal_FR.T


def _units(view: FeatureView, ids: Int64) -> tuple[Float64, npt.NDArray[np.bool_]]:
    """Return the rows of these ids that are not zero, at length 1 in float64, and which those are."""
    row_BF = view.take(ids).astype(np.float64)
    peak_B = np.abs(row_BF).max(axis=1, initial=0)
    whole_B = peak_B > 0
    row_BF = row_BF[whole_B] / peak_B[whole_B, None]
    return row_BF / np.linalg.norm(row_BF, axis=1, keepdims=True), whole_B


def _likely(row_NR: Tensor, least: float, progress: ProgressCallback) -> Iterator[tuple[Int64, Int64]]:
    """Yield pairs of places whose bound on the cosine is not below `least`, block by block, the first the smaller."""
    starts = range(0, len(row_NR), _BLOCK)
    done, total = 0, len(starts) * (len(starts) + 1) // 2
    for at in starts:
        for other in starts[at // _BLOCK :]:
            bound_BB = row_NR[at : at + _BLOCK] @ row_NR[other : other + _BLOCK].T
            near_BB = bound_BB >= least
            if at == other:
                near_BB = near_BB.triu(1)
            one, two = near_BB.nonzero(as_tuple=True)
            if len(one):
                yield at + one.cpu().numpy(), other + two.cpu().numpy()
            done += 1
            progress("pairs of blocks", done, total)


def _cosines(view: FeatureView, one: Int64, other: Int64) -> Float64:
    """Return the cosines of pairs of rows; of equal rows 1, whatever the rounding."""
    ids, place = np.unique(np.concatenate([one, other]), return_inverse=True)
    unit_BF, _ = _units(view, ids)
    apart_PF = unit_BF[place[: len(one)]] - unit_BF[place[len(one) :]]
    cosines: Float64 = 1 - np.square(apart_PF).sum(axis=1) / 2
    return cosines


def _likelier(view: FeatureView, kept: Int64, pairs: tuple[Int64, Int64], least: float) -> tuple[Int64, Int64]:
    """Return those of a block's pairs whose product of whole rows is not below `least`."""
    one, other = pairs
    (a, place_A), (b, place_B) = (np.unique(side, return_inverse=True) for side in pairs)
    near_AB = np.zeros((len(a), len(b)), dtype=bool)
    for at, to, product_BB in _products(view, kept[a], kept[b]):
        near_AB[at : at + len(product_BB), to : to + product_BB.shape[1]] = product_BB >= least
    near_P = near_AB[place_A, place_B]
    return one[near_P], other[near_P]


def _lowest_cosine(view: FeatureView, group: Int64) -> float:
    return min(1.0, *(float(product_BB.min()) for *_, product_BB in _products(view, group, group)))


def _products(view: FeatureView, one: Int64, other: Int64) -> Iterator[tuple[int, int, Float64]]:
    """Yield the cosines of rows with others, blocks of a matrix, each with the place of its first row and column."""
    size = max(1, _ENTRIES // view.dim)
    for at in range(0, len(one), size):
        unit_BF, _ = _units(view, one[at : at + size])
        for to in range(0, len(other), size):
            yield at, to, unit_BF @ _units(view, other[to : to + size])[0].T


class _Links:
    """Which of N places are linked, directly or by others: a union-find."""

    def __init__(self, n_places: int) -> None:
        self._above = np.arange(n_places, dtype=np.int64)

    def join(self, one: Int64, other: Int64, linked: Linked, at_once: int) -> None:
        """Link those pairs of places that `linked` says so of; it is not asked of places that are linked already."""
        for start in range(0, len(one), at_once):
            chunk_2P = np.stack([one[start : start + at_once], other[start : start + at_once]])
            chunk_2P = chunk_2P[:, self._roots(chunk_2P[0]) != self._roots(chunk_2P[1])]
            for a, b in chunk_2P.T[linked(*chunk_2P)].tolist() if chunk_2P.size else []:
                low, high = sorted((self._root(a), self._root(b)))
                self._above[high] = low

    def groups(self) -> list[Int64]:
        """Return the places of every group of two or more, rising."""
        roots = self._roots(np.arange(len(self._above), dtype=np.int64))
        order = np.argsort(roots, kind="stable")
        groups = np.split(order, np.flatnonzero(np.diff(roots[order])) + 1)
        return [group for group in groups if len(group) > 1]

    def _root(self, place: int) -> int:
        while (above := int(self._above[place])) != place:
            place = above
        return place

    def _roots(self, places: Int64) -> Int64:
        roots = self._above[places]
        while (self._above[roots] != roots).any():
            roots = self._above[roots]
        self._above[places] = roots
        return roots
