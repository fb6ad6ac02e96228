"""Groups of training rows with nearly parallel gradients: duplicates from the model's point of view.

The cosine of two rows is ⟨f, f'⟩ / (‖f‖ ‖f'‖) over their complete stored features, all checkpoints concatenated. It
estimates score(z, z') / √(score(z, z) score(z', z')), where score is TracInCP. Checkpoints are weighted as in a score,
by learning rate and gradient size. The norm of a row's features has no effect.

Every pair is compared, in time quadratic in the number of rows. Principal directions rule out most pairs: let Vf be the
projection of a unit row f on the first principal directions and ρ the norm of the rest; then ⟨f, f'⟩ ≤ ⟨Vf, Vf'⟩ + ρρ'.
This bound is an inner product of short unit rows (Vf, ρ). For the remaining pairs, the cosine is computed from the
complete rows in float64, so that no pair is missed.

Shapes: N compared rows, B rows of a block, S sampled rows, A rows that occur in pairs, P pairs, F feature dimension,
R reduced dimension.
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
from tracin_ann.results import Describe, Fields, Id, Record, RowList
from tracin_ann.store import FeatureView, RowFilter
from tracin_ann.types import Float64, Int64, ProgressCallback, ignore_progress

_BLOCK = 2048
"""Rows of a block; a block is compared with another block at once."""
_DIRECTIONS = 64
"""Number of principal directions."""
_SAMPLE = 2048
"""Rows from which the principal directions are computed."""
_ENTRIES = 1 << 23
"""Numbers of complete rows in memory at once: 64 MiB in float64."""
_MANY = 1 << 15
"""Number of pairs of a block above which one matrix product of complete rows is faster than pair by pair."""
_SLACK = 1e-5
"""More than the rounding error of an inner product of 65 float32 numbers, for unit rows."""

ArePairsLinked = Callable[[Int64, Int64], npt.NDArray[np.bool_]]


@dataclass(frozen=True)
class Duplicate:
    """A row in a group of duplicates.

    Attributes:
        group: number of the group, from 1; the largest group is first.
        size: number of rows in the group.
        lowest_cosine: minimum over all pairs of the group; below the threshold if rows are linked through others.
        id: the task's own id of the row, else its position.
        row: its position in train_data.
    """

    group: int
    size: int
    lowest_cosine: float
    id: Id
    row: int


@dataclass(frozen=True)
class Extent:
    """The comparison that found the duplicates.

    Attributes:
        threshold: minimum cosine that links two rows.
        n_rows: number of compared rows.
        n_zero: number of rows that were excluded because their features are zero and have no direction.
    """

    threshold: float
    n_rows: int
    n_zero: int


class Duplicates(RowList[Duplicate]):
    """The rows that have a duplicate: the largest group first, rows of a group by ascending position."""

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
        groups: dict[int, list[int]] = defaultdict(list)
        for row in self:
            groups[row.group].append(row.row)
        return [tuple(rows) for rows in groups.values()]

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
    """Return groups of training rows whose stored features have a cosine of at least the threshold.

    Such pairs are linked, and all rows that are linked directly or through others form a group. The features of equal
    examples differ by rounding if they were in different batches: their cosine is some millionths below 1, so a
    threshold of 1 finds few of them. No task is needed. The time is quadratic in the number of rows; memory is 260
    bytes per row, plus the features of some thousand rows.

    Args:
        index: an open index.
        threshold: minimum cosine of a pair, above 0 and at most 1.
        rows: which rows are compared; None: all. Removed rows, skipped rows and rows with a zero gradient are
            never compared.
        checkpoints: positions of the checkpoints whose features are compared; None: all.
        progress: called with (stage, done, total): rows read, and pairs of blocks compared.

    Raises:
        UsageError: the threshold, a checkpoint or the filter is invalid.
    """
    if not 0 < threshold <= 1:
        raise UsageError(
            problem("bad --threshold", got=threshold, expected="above 0, at most 1", remedy="change --threshold")
        )
    view, chosen = index.view(checkpoints), index.present(rows)
    report_progress = progress or ignore_progress
    ids_N, row_NR = _reduce_rows(view, chosen, index.device, report_progress)
    links = _UnionFind(len(ids_N))
    for pairs in _candidate_pairs(row_NR, threshold - _SLACK, report_progress):
        one, other = _filter_pairs(view, ids_N, pairs, threshold - _SLACK) if len(pairs[0]) > _MANY else pairs
        links.union_if(one, other, lambda a, b: _cosines(view, ids_N[a], ids_N[b]) >= threshold, _pairs_at_once(view))
    groups = sorted((ids_N[group] for group in links.groups()), key=lambda group: (-len(group), group[0]))
    duplicates = []
    for number, group in enumerate(groups, start=1):
        lowest = _lowest_cosine(view, group)
        duplicates += [Duplicate(number, len(group), lowest, index.rows.id_at(row), row) for row in group.tolist()]
    return Duplicates(duplicates, index.describe, Extent(threshold, len(ids_N), len(chosen) - len(ids_N)))


def _pairs_at_once(view: FeatureView) -> int:
    return min(2 * _BLOCK, max(1, _ENTRIES // (2 * view.dim)))


def _reduce_rows(
    view: FeatureView, chosen: Int64, device: torch.device, progress: ProgressCallback
) -> tuple[Int64, Tensor]:
    """Return the positions [N] of the nonzero rows, and their unit rows (Vf, ρ) [N, R] in float32."""
    direction_RF = _principal_directions(view, chosen, device)
    ids, reduced = [np.zeros(0, np.int64)], [torch.zeros(0, len(direction_RF) + 1, device=device)]
    size = max(1, _ENTRIES // view.dim)
    for start in range(0, len(chosen), size):
        ids_B = chosen[start : start + size]
        unit_BF, nonzero_B = _normalise_rows(view, ids_B)
        reduced_BR = torch.from_numpy(unit_BF).to(device) @ direction_RF.T
        # In float64; _SLACK covers the rounding to float32, which could otherwise rule out a pair.
        rest_B = (1 - reduced_BR.square().sum(1)).clamp_min(0).sqrt()
        ids.append(ids_B[nonzero_B])
        reduced.append(torch.cat([reduced_BR, rest_B[:, None]], dim=1).float())
        progress("rows", start + len(ids_B), len(chosen))
    return np.concatenate(ids), torch.cat(reduced)


def _principal_directions(view: FeatureView, chosen: Int64, device: torch.device) -> Tensor:
    """Return the first principal directions (not centred) of rows spread over the chosen, orthonormal [R - 1, F]."""
    size = min(_SAMPLE, len(chosen), max(_DIRECTIONS, _ENTRIES // view.dim))
    spread = np.unique(np.linspace(0, len(chosen) - 1, size).astype(np.int64)) if size else np.zeros(0, np.int64)
    unit_SF = torch.from_numpy(_normalise_rows(view, chosen[spread])[0]).to(device)
    has_many_rows = len(unit_SF) >= view.dim
    # The smaller of the two Gram matrices; eigh returns the largest eigenvalues last.
    gram = unit_SF.T @ unit_SF if has_many_rows else unit_SF @ unit_SF.T
    vectors = torch.linalg.eigh(gram).eigenvectors[:, -_DIRECTIONS:]
    orthonormal_FR: Tensor = torch.linalg.qr(vectors if has_many_rows else unit_SF.T @ vectors).Q
    return orthonormal_FR.T


def _normalise_rows(view: FeatureView, ids: Int64) -> tuple[Float64, npt.NDArray[np.bool_]]:
    """Return the nonzero rows of these ids as unit rows in float64 [≤ B, F], and which rows are nonzero [B]."""
    row_BF = view.take(ids).astype(np.float64)
    peak_B = np.abs(row_BF).max(axis=1, initial=0)
    nonzero_B = peak_B > 0
    row_BF = row_BF[nonzero_B] / peak_B[nonzero_B, None]
    return row_BF / np.linalg.norm(row_BF, axis=1, keepdims=True), nonzero_B


def _candidate_pairs(row_NR: Tensor, least: float, progress: ProgressCallback) -> Iterator[tuple[Int64, Int64]]:
    """Yield, block by block, the pairs of places (smaller first) whose bound on the cosine is at least `least`."""
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
    """Return the cosines [P] of pairs of rows; exactly 1 for equal rows."""
    ids, place = np.unique(np.concatenate([one, other]), return_inverse=True)
    unit_BF, _ = _normalise_rows(view, ids)
    difference_PF = unit_BF[place[: len(one)]] - unit_BF[place[len(one) :]]
    cosines: Float64 = 1 - np.square(difference_PF).sum(axis=1) / 2
    return cosines


def _filter_pairs(view: FeatureView, ids_N: Int64, pairs: tuple[Int64, Int64], least: float) -> tuple[Int64, Int64]:
    """Return the pairs whose cosine, by one product of complete rows, is at least `least`."""
    one, other = pairs
    (a, place_A), (b, place_B) = (np.unique(side, return_inverse=True) for side in pairs)
    near_AB = np.zeros((len(a), len(b)), dtype=bool)
    for at, to, cosine_BB in _cosine_blocks(view, ids_N[a], ids_N[b]):
        near_AB[at : at + len(cosine_BB), to : to + cosine_BB.shape[1]] = cosine_BB >= least
    near_P = near_AB[place_A, place_B]
    return one[near_P], other[near_P]


def _lowest_cosine(view: FeatureView, group: Int64) -> float:
    return min(1.0, *(float(cosine_BB.min()) for *_, cosine_BB in _cosine_blocks(view, group, group)))


def _cosine_blocks(view: FeatureView, one: Int64, other: Int64) -> Iterator[tuple[int, int, Float64]]:
    """Yield the matrix of cosines in blocks, each with the place of its first row and first column."""
    size = max(1, _ENTRIES // view.dim)
    for at in range(0, len(one), size):
        unit_BF, _ = _normalise_rows(view, one[at : at + size])
        for to in range(0, len(other), size):
            yield at, to, unit_BF @ _normalise_rows(view, other[to : to + size])[0].T


class _UnionFind:
    """Sets of N places that are linked directly or through others."""

    def __init__(self, n_places: int) -> None:
        self._parent = np.arange(n_places, dtype=np.int64)

    def union_if(self, one: Int64, other: Int64, are_linked: ArePairsLinked, at_once: int) -> None:
        """Link the pairs of places for which `are_linked` is true; it is not called for linked pairs."""
        for start in range(0, len(one), at_once):
            chunk_2P = np.stack([one[start : start + at_once], other[start : start + at_once]])
            chunk_2P = chunk_2P[:, self._roots(chunk_2P[0]) != self._roots(chunk_2P[1])]
            for a, b in chunk_2P.T[are_linked(*chunk_2P)].tolist() if chunk_2P.size else []:
                low, high = sorted((self._root(a), self._root(b)))
                self._parent[high] = low

    def groups(self) -> list[Int64]:
        """Return the places of every set of two or more, ascending."""
        roots = self._roots(np.arange(len(self._parent), dtype=np.int64))
        order = np.argsort(roots, kind="stable")
        groups = np.split(order, np.flatnonzero(np.diff(roots[order])) + 1)
        return [group for group in groups if len(group) > 1]

    def _root(self, place: int) -> int:
        while (parent := int(self._parent[place])) != place:
            place = parent
        return place

    def _roots(self, places: Int64) -> Int64:
        roots = self._parent[places]
        while (self._parent[roots] != roots).any():
            roots = self._parent[roots]
        self._parent[places] = roots
        return roots
