"""The next generation of an index: the files that a build adds to an index directory, until they are published."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tracin_ann.errors import BusyIndexError, problem
from tracin_ann.store.columns import COLUMN_FILE, RowTable, write_columns
from tracin_ann.store.exclusions import copy_removed, read_removed_ids, write_skipped
from tracin_ann.store.feature_file import FileRecord
from tracin_ann.store.feature_store import FeatureStore
from tracin_ann.store.generations import (
    UNFINISHED_INDEX,
    BuildStart,
    agree_on_record,
    find_unnamed_files,
    generation_number,
    list_feature_records,
    make_next_folder,
    publish,
)
from tracin_ann.store.manifest import BuildRecord, Manifest, record_file
from tracin_ann.types import Int64


@dataclass(frozen=True)
class NextGeneration:
    """The generation that the writer of an index directory is making.

    Readers use the current generation until `publish`. An interrupted build leaves feature files, which the next build
    reuses, and a folder without a manifest, which the next build uses.

    Attributes:
        directory: the index directory.
        start: the current manifest and the last build record.
        record: what this build produces.
        store: the feature files.
        missing: (partition, checkpoint) of the feature files that this build writes.
        folder: the generation's own folder.
    """

    directory: Path
    start: BuildStart
    record: BuildRecord
    store: FeatureStore
    missing: Sequence[tuple[int, int]]
    folder: Path

    @classmethod
    def begin(
        cls,
        directory: Path,
        start: BuildStart,
        record: BuildRecord,
        store: FeatureStore,
        missing: Sequence[tuple[int, int]],
    ) -> NextGeneration:
        """Write the build record if it differs from the last build's, and make the generation's folder.

        Raises:
            BusyIndexError: another process has written the record of another build in the meantime.
        """
        if agree_on_record(directory, start.last_build, record) != record:
            raise BusyIndexError(
                problem(
                    f"another build has started in {directory}",
                    got="its record",
                    expected="one build at a time",
                    remedy="run this command again",
                )
            )
        return cls(directory, start, record, store, missing, make_next_folder(directory, start.manifest))

    @property
    def number(self) -> int:
        """Return the number of the generation."""
        return generation_number(self.folder)

    @property
    def unfinished_index(self) -> Path:
        """Return the folder of inverted lists that are not complete yet."""
        return self.directory / UNFINISHED_INDEX

    @cached_property
    def removed_R(self) -> Int64:
        """Return the ids [R] of the removed rows, ascending."""
        return read_removed_ids(self.directory, self.start.manifest)

    def write_columns(self, table: RowTable | None) -> FileRecord | None:
        """Write the columns and ids of the rows, if the task defines any."""
        if table is None:
            return None
        write_columns(self.folder / COLUMN_FILE, table)
        return record_file(self.folder / COLUMN_FILE)

    def write_skipped(self) -> FileRecord | None:
        """Write the list of the rows that the build skipped because they are not finite, if there are any."""
        return write_skipped(self.folder, self.store)

    def copy_removed(self) -> FileRecord | None:
        """Copy the ids of the removed rows from the current generation, if there are any."""
        return copy_removed(self.directory, self.start.manifest, self.folder)

    def list_features(self) -> tuple[FileRecord, ...]:
        """Return the records of all feature files."""
        return list_feature_records(self.store, self.start.manifest, self.missing)

    def delete_new_features(self) -> None:
        """Delete the feature files that the current manifest does not name."""
        for path in find_unnamed_files(self.store, self.start.manifest, self.missing):
            path.unlink(missing_ok=True)

    def publish(self, manifest: Manifest) -> None:
        """Make the generation the current one."""
        publish(self.directory, manifest)
