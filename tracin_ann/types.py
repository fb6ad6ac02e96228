"""Frozen records that cross module boundaries, and the legend of the shape suffixes.

Shapes: N train rows, Q queries, B batch, T positions, P parameters, C checkpoints,
D sketch dimension a checkpoint, F = C·D feature dimension, K results.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TopK:
    """The best rows of each query by inner product, best first.

    Attributes:
        ids: Q arrays of int64, one a query; at most K long, shorter only where fewer rows exist
            (or were reached). Never holds a padding id.
        scores: Q arrays of float32 beside `ids`, falling; equal scores by rising id.
        rows_scored: int64 [Q], how many stored rows (and coarse centroids) were compared.
    """

    ids: tuple[Int64, ...]
    scores: tuple[Float32, ...]
    rows_scored: Int64

    def __post_init__(self) -> None:
        """Check that the three fields speak of the same queries."""
        if not len(self.ids) == len(self.scores) == len(self.rows_scored):
            raise ValueError(f"TopK of {len(self.ids)} ids, {len(self.scores)} scores, {len(self.rows_scored)} counts")


class RowSource(Protocol):
    """Rows with ids, readable in blocks and by id; what an index is built from and re-scored with."""

    @property
    def dim(self) -> int:
        """Return F, the length of a row."""

    def __len__(self) -> int:
        """Return N, the number of rows."""

    def blocks(self, block_rows: int, start: int = 0) -> Iterator[tuple[Int64, Float32]]:
        """Yield (ids [n], rows [n, F]) in rising id order, n ≤ block_rows, all rows from position start on once."""

    def take(self, ids: Sequence[int] | Int64) -> Float32:
        """Return float32 rows [len(ids), F] of these ids, in the order asked for.

        Raises:
            KeyError: an id that the source does not hold.
        """


class ProgressCallback(Protocol):
    """Told how far a long piece of work is."""

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Take note: `done` of `total` units of a stage, such as rows × checkpoints of "features"."""


def ignore_progress(stage: str, done: int, total: int) -> None:
    """Take progress and say nothing."""
