"""Rows that may be no answers: those that were removed, and those that the build skipped as they are not finite.

Each kind is a file of the generation, there only where there are any such rows.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tracin_ann.files import atomic_write, open_plain, read_array, report_damage, save_array
from tracin_ann.search import Subset
from tracin_ann.store.feature_file import FileRecord
from tracin_ann.store.feature_store import FeatureStore
from tracin_ann.store.generations import carry_over, generation_folder
from tracin_ann.store.manifest import UNLISTED, Manifest, record_file
from tracin_ann.types import Int64, RowSource

REMOVED, SKIPPED = "removed.npy", "skipped.npy"
_LISTED = 8


@dataclass(frozen=True, eq=False)
class Skipped:
    """Rows with a loss, gradient or squared norm that is NaN or infinite, rising, and the first checkpoint of each."""

    row_S: Int64
    checkpoint_S: Int64

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.row_S)

    @property
    def counted(self) -> str:
        """Return how many there are, in words."""
        return f"{len(self):,} {'row' if len(self) == 1 else 'rows'} skipped at the build: not finite"

    @property
    def named(self) -> str:
        """Return the first few with their checkpoints, in words."""
        pairs = zip(self.row_S[:_LISTED].tolist(), self.checkpoint_S[:_LISTED].tolist(), strict=True)
        more = ", ..." if len(self) > _LISTED else ""
        return ", ".join(f"row {row} at checkpoint {checkpoint}" for row, checkpoint in pairs) + more


def read_removed_ids(directory: Path, manifest: Manifest | None) -> Int64:
    """Return the ids of the removed rows, rising; none where there is no index yet.

    Raises:
        DamagedIndexError: their file is missing or cannot be read.
    """
    if manifest is None:
        return np.zeros(0, np.int64)
    return _read_ids(directory, manifest, manifest.removed, 1)[:, 0]


def read_skipped_rows(directory: Path, manifest: Manifest) -> Skipped:
    """Return the rows that the build skipped.

    Raises:
        DamagedIndexError: their file is missing or cannot be read.
    """
    found = _read_ids(directory, manifest, manifest.skipped, 2)
    return Skipped(found[:, 0], found[:, 1])


def select_listed_rows(view: RowSource, unlisted_U: Int64) -> RowSource:
    """Return the rows that lists are made of: all but those that were removed when they were made."""
    if not len(unlisted_U):
        return view
    return Subset(view, np.setdiff1d(np.arange(len(view), dtype=np.int64), unlisted_U))


def read_unlisted_ids(directory: Path, manifest: Manifest) -> Int64:
    """Return the ids of the rows that are in no list as they were removed before, rising.

    Raises:
        DamagedIndexError: their file is missing or cannot be read.
    """
    found = [record for record in manifest.index.files if record.name == UNLISTED]
    return _read_ids(directory, manifest, found[0] if found else None, 1)[:, 0]


def write_unlisted(folder: Path, row_U: Int64) -> list[FileRecord]:
    """Write the ids of the rows that are in no list into a generation's directory; nothing where there are none."""
    return [_write_ids(folder / UNLISTED, row_U)] if len(row_U) else []


def write_removed(folder: Path, row_R: Int64) -> FileRecord:
    """Write the ids of the removed rows into a generation's directory."""
    return _write_ids(folder / REMOVED, row_R)


def write_skipped(folder: Path, store: FeatureStore) -> FileRecord | None:
    """Write which rows the feature files say were skipped into a generation's directory; nothing where none were."""
    row_S, checkpoint_S = store.skipped()
    return _write_ids(folder / SKIPPED, np.stack([row_S, checkpoint_S], axis=1)) if len(row_S) else None


def carry_removed(directory: Path, manifest: Manifest | None, folder: Path) -> FileRecord | None:
    """Take over which rows were removed into the next generation's directory."""
    if manifest is None or manifest.removed is None:
        return None
    carry_over(directory, manifest, folder, [manifest.removed])
    return manifest.removed


def _write_ids(path: Path, values: Int64) -> FileRecord:
    with atomic_write(path) as file:
        save_array(file, values)
    return record_file(path)


def _read_ids(directory: Path, manifest: Manifest, record: FileRecord | None, width: int) -> Int64:
    """Return [n, width], ids of rows in the first column."""
    if record is None:
        return np.zeros((0, width), np.int64)
    path = generation_folder(directory, manifest.generation) / record.name
    remedy = "restore the file, or build a new index"
    with report_damage(path, "the ids of rows that may be no answers", remedy), open_plain(path) as file:
        found: Int64 = read_array(file, os.fstat(file.fileno()).st_size)
        if found.dtype != np.int64 or found.shape != ((len(found),) if width == 1 else (len(found), width)):
            raise ValueError(f"{found.dtype} of shape {found.shape}")
        table = found.reshape(-1, width)
        limits = [manifest.build.layout.n_rows, manifest.build.layout.n_checkpoints][:width]
        if (np.diff(table[:, 0], prepend=-1) <= 0).any() or (table < 0).any() or (table >= limits).any():
            raise ValueError("ids that do not rise or are of no row")
    return table
