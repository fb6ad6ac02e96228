"""Types shared by all packages: arrays, the result of a search, a source of rows, the progress callback.

Shape suffixes: N train rows, Q queries, B batch, T positions, P parameters, C checkpoints,
D sketch dimension per checkpoint, F = C·D feature dimension, K results.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TopK:
    """The best rows of each query by inner product, best first.

    Attributes:
        ids: Q arrays of int64, one per query, of length at most K; shorter only if fewer rows exist or were searched.
            Contains no padding ids.
        scores: Q arrays of float32, parallel to `ids`, in descending order; equal scores are in order of ascending id.
        rows_scored: int64 [Q], number of stored rows (and coarse centroids) compared with the query.
    """

    ids: tuple[Int64, ...]
    scores: tuple[Float32, ...]
    rows_scored: Int64

    def __post_init__(self) -> None:
        """Check that the three fields have one entry per query."""
        if not len(self.ids) == len(self.scores) == len(self.rows_scored):
            raise ValueError(f"TopK of {len(self.ids)} ids, {len(self.scores)} scores, {len(self.rows_scored)} counts")


class RowSource(Protocol):
    """Rows with ids, readable in blocks and by id; a search index is built from it and re-scores hits with it."""

    @property
    def dim(self) -> int:
        """Return F, the length of a row."""

    def __len__(self) -> int:
        """Return N, the number of rows."""

    def blocks(self, block_rows: int, start: int = 0) -> Iterator[tuple[Int64, Float32]]:
        """Yield all rows from position `start` on in blocks (ids [n], rows [n, F]), n ≤ block_rows, by ascending id."""

    def take(self, ids: Sequence[int] | Int64) -> Float32:
        """Return float32 rows [len(ids), F] of these ids, in the order given.

        Raises:
            KeyError: the source has no row with one of the ids.
        """


@dataclass(frozen=True, eq=False)
class StoredPart:
    """Consecutive columns of consecutive rows in their stored format.

    Attributes:
        stored_BD: float16 or float32 numbers; may be read-only memory.
        exponent_B: the rows are `stored_BD` × 2^`exponent_B`.
        unit: if true, the rows are these divided by their norms; a zero row remains zero. Only for float16 numbers
            that are scaled so that no square overflows or underflows float32.
    """

    stored_BD: npt.NDArray[np.float16] | npt.NDArray[np.float32]
    exponent_B: npt.NDArray[np.int16]
    unit: bool = False


class CodedPart(Protocol):
    """Consecutive columns of consecutive rows as codes: each row is its levels times its factor and 2^exponent."""

    @property
    def dim(self) -> int:
        """Return D, the number of columns."""

    @property
    def exponent_B(self) -> npt.NDArray[np.int16]:
        """Return the exponents of the rows."""

    def read_factors(self, rows: slice) -> Float32:
        """Return the factors [b] of some rows."""

    def decode(self, rows: slice, out_BD: Float32) -> None:
        """Write the levels of some rows, numbers of magnitude 127 or less, into a contiguous array."""


@runtime_checkable
class StoredRows(Protocol):
    """A `RowSource` that also gives its rows in their stored format, for a scan that does not decode them first."""

    @property
    def dim(self) -> int:
        """Return F, the length of a row."""

    def __len__(self) -> int:
        """Return N, the number of rows."""

    def stored_blocks(self, block_rows: int) -> Iterator[tuple[Int64, Sequence[StoredPart | CodedPart]]]:
        """Yield all rows in blocks (ids [n], parts), n ≤ block_rows, by ascending id.

        The columns of the parts, one part after the other, are the columns of the rows.
        """


@runtime_checkable
class StoredCandidates(Protocol):
    """A `RowSource` that also gives the rows with some ids in their stored format."""

    def take_stored(self, ids: Int64) -> Iterator[StoredPart | CodedPart]:
        """Yield the parts whose columns, one part after the other, are those of the rows with these ids, increasing.

        A part may be overwritten when the same thread takes other rows, those of the next part among them.

        Raises:
            KeyError: the source has no row with one of the ids.
        """


@dataclass(frozen=True)
class PendingReads:
    """What a scan of all rows has to do once, because no search of the open index has done it yet.

    Attributes:
        files: number of files that are not open.
        n_bytes: bytes of rows that are not verified.
        files_per_row: number of files that contain a part of one row.
    """

    files: int = 0
    n_bytes: int = 0
    files_per_row: int = 1


@runtime_checkable
class LazyRows(Protocol):
    """Rows whose files are opened, and whose checksums are verified, when they are first read."""

    def pending_reads(self) -> PendingReads:
        """Return what a scan of all rows has to do once."""


class ProgressCallback(Protocol):
    """A function that is called with the progress of a long operation."""

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Report that `done` of `total` units of a stage are finished, such as rows × checkpoints of "features".

        What it raises ends the operation.
        """


def ignore_progress(stage: str, done: int, total: int) -> None:
    """Do nothing: the progress callback of calls without one."""
