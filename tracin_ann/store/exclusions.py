"""Removed and skipped rows: training rows of an index that are never hits.

A user removes rows with `tracin-remove`; a build skips rows with a NaN or infinite loss or gradient if it is run with
`--on-nonfinite skip`. Each list is a file of the generation, written only if it is not empty. A third list, unlisted
rows, contains the rows that were removed before the inverted lists were built, and so are in none of them.

Shapes: R removed, S skipped, U unlisted rows.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tracin_ann.files import atomic_write, open_regular, read_array, report_damage, save_array
from tracin_ann.search import Subset
from tracin_ann.store.feature_file import FileRecord
from tracin_ann.store.feature_store import FeatureStore
from tracin_ann.store.generations import copy_files, generation_folder
from tracin_ann.store.manifest import UNLISTED, Manifest, record_file
from tracin_ann.types import Int64, RowSource

REMOVED, SKIPPED = "removed.npy", "skipped.npy"
_LISTED = 8


@dataclass(frozen=True, eq=False)
class SkippedRows:
    """Rows with a NaN or infinite loss, gradient or squared norm.

    Attributes:
        row_S: the rows, ascending.
        checkpoint_S: the first checkpoint at which each row is not finite.
    """

    row_S: Int64
    checkpoint_S: Int64

    def __len__(self) -> int:
        """Return S."""
        return len(self.row_S)

    @property
    def summary(self) -> str:
        """Return the number of rows, as text."""
        return f"{len(self):,} {'row' if len(self) == 1 else 'rows'} skipped by the build: not finite"

    @property
    def first_rows(self) -> str:
        """Return the first rows and their checkpoints, as text."""
        pairs = zip(self.row_S[:_LISTED].tolist(), self.checkpoint_S[:_LISTED].tolist(), strict=True)
        more = ", ..." if len(self) > _LISTED else ""
        return ", ".join(f"row {row} at checkpoint {checkpoint}" for row, checkpoint in pairs) + more


def read_removed_ids(directory: Path, manifest: Manifest | None) -> Int64:
    """Return the ids of the removed rows [R], ascending; empty if there is no index yet (`manifest` is None).

    Raises:
        DamagedIndexError: the file is missing or cannot be read.
    """
    if manifest is None:
        return np.zeros(0, np.int64)
    return _read_ids(directory, manifest, manifest.removed, 1)[:, 0]


def read_skipped_rows(directory: Path, manifest: Manifest) -> SkippedRows:
    """Return the rows that the build skipped.

    Raises:
        DamagedIndexError: the file is missing or cannot be read.
    """
    table = _read_ids(directory, manifest, manifest.skipped, 2)
    return SkippedRows(table[:, 0], table[:, 1])


def select_listed_rows(view: RowSource, unlisted_U: Int64) -> RowSource:
    """Return the rows that the inverted lists contain: all rows without the unlisted ones."""
    if not len(unlisted_U):
        return view
    return Subset(view, np.setdiff1d(np.arange(len(view), dtype=np.int64), unlisted_U))


def read_unlisted_ids(directory: Path, manifest: Manifest) -> Int64:
    """Return the ids of the unlisted rows [U], ascending.

    Raises:
        DamagedIndexError: the file is missing or cannot be read.
    """
    record = next((record for record in manifest.index.files if record.name == UNLISTED), None)
    return _read_ids(directory, manifest, record, 1)[:, 0]


def write_unlisted(folder: Path, row_U: Int64) -> list[FileRecord]:
    """Write the ids of the unlisted rows into a generation's directory; writes nothing if there are none."""
    return [_write_ids(folder / UNLISTED, row_U)] if len(row_U) else []


def write_removed(folder: Path, row_R: Int64) -> FileRecord:
    """Write the ids of the removed rows into a generation's directory."""
    return _write_ids(folder / REMOVED, row_R)


def write_skipped(folder: Path, store: FeatureStore) -> FileRecord | None:
    """Write the rows that are skipped in the feature files into a generation's directory; nothing if there are none."""
    row_S, checkpoint_S = store.skipped()
    return _write_ids(folder / SKIPPED, np.stack([row_S, checkpoint_S], axis=1)) if len(row_S) else None


def copy_removed(directory: Path, manifest: Manifest | None, folder: Path) -> FileRecord | None:
    """Copy the list of removed rows into the next generation's directory, if there is one; return its record."""
    if manifest is None or manifest.removed is None:
        return None
    copy_files(directory, manifest, folder, [manifest.removed])
    return manifest.removed


def _write_ids(path: Path, values: Int64) -> FileRecord:
    with atomic_write(path) as file:
        save_array(file, values)
    return record_file(path)


def _read_ids(directory: Path, manifest: Manifest, record: FileRecord | None, width: int) -> Int64:
    """Return the content of a list as [n, width], with row ids in the first column; empty if `record` is None."""
    if record is None:
        return np.zeros((0, width), np.int64)
    path = generation_folder(directory, manifest.generation) / record.name
    remedy = "restore the file, or build a new index"
    with report_damage(path, "a list of removed or skipped rows", remedy), open_regular(path) as file:
        array: Int64 = read_array(file, os.fstat(file.fileno()).st_size)
        if array.dtype != np.int64 or array.shape != ((len(array),) if width == 1 else (len(array), width)):
            raise ValueError(f"{array.dtype} of shape {array.shape}")
        table = array.reshape(-1, width)
        limits = [manifest.build.layout.n_rows, manifest.build.layout.n_checkpoints][:width]
        if (np.diff(table[:, 0], prepend=-1) <= 0).any() or (table < 0).any() or (table >= limits).any():
            raise ValueError("ids are not ascending, or out of range")
    return table
