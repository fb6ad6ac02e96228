"""The rows of all files of a checkpoint in one array, so that one operation takes rows of many files.

A search takes its candidates from most files. An operation for each file would cost more than the copies of the rows:
between operations, threads wait for each other.

Shapes: N rows of the index, K rows selected by id.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from tracin_ann.errors import DamagedIndexError
from tracin_ann.files import AddressRange, map_file
from tracin_ann.store.codec import describe_storage, measure_row_bytes
from tracin_ann.store.feature_file import FeatureFile
from tracin_ann.store.stored_rows import ROW_INFO, FileHeader, StoredRows
from tracin_ann.types import Int64


@dataclass(frozen=True, eq=False)
class CheckpointRows(StoredRows):
    """The rows of a checkpoint by their ids; they can be read when the files of all partitions are open.

    Attributes:
        partition_rows: rows of a file; the last partition may have fewer.
        addresses: the addresses of `stored_ND`, to which files are mapped when they are opened.
        files: the open files that are mapped there, by partition.
    """

    partition_rows: int
    addresses: AddressRange
    files: dict[int, FeatureFile]

    @classmethod
    def reserve(cls, header: FileHeader, partition_rows: int) -> CheckpointRows | None:
        """Return rows without files; None if there would be one file, or files could not be side by side in memory.

        Args:
            header: the header that a file of all rows would have.
            partition_rows: rows of a file.
        """
        n_rows, row_bytes = header.n_rows, measure_row_bytes(header.dim, header.dtype)
        if (
            n_rows <= partition_rows
            or partition_rows * row_bytes % AddressRange.page_bytes
            or partition_rows % header.block_rows
        ):
            return None
        width, dtype = describe_storage(header.dim, header.dtype)
        try:
            addresses = AddressRange(n_rows * row_bytes)
        except OSError:
            # A limit of the process, which may still be able to map each file.
            return None
        n_blocks = -(-n_rows // header.block_rows)
        return cls(
            header=header,
            stored_ND=addresses.view((n_rows, width), dtype),
            row_info_N=np.zeros(n_rows, ROW_INFO),
            verified_blocks=np.zeros(n_blocks, bool),
            block_checksum=np.zeros(n_blocks, np.uint64),
            partition_rows=partition_rows,
            addresses=addresses,
            files={},
        )

    @property
    def is_complete(self) -> bool:
        """Return whether the files of all partitions are open."""
        return len(self.files) * self.partition_rows >= self.header.n_rows

    def open_file(self, path: Path, header: FileHeader) -> FeatureFile:
        """Open the file of a partition, see `FeatureFile.open`; it shares the memory of these rows, if it can."""
        partition = header.start // self.partition_rows
        if partition in self.files:
            # An open file keeps its addresses.
            return FeatureFile.open(path, header)
        own_ND, is_mapped = self.stored_ND[header.start : header.stop], False

        def map_rows(file: BinaryIO, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
            nonlocal is_mapped
            if (shape, dtype) != (own_ND.shape, own_ND.dtype) or offset % AddressRange.page_bytes:
                return map_file(file, offset, shape, dtype)
            self.addresses.map_file(file, offset, header.start * own_ND.strides[0], own_ND.nbytes)
            is_mapped = True
            return own_ND

        opened = FeatureFile.open(path, header, map_rows)
        if is_mapped:
            opened = self.files[partition] = self._share(opened)
        return opened

    def _share(self, opened: FeatureFile) -> FeatureFile:
        """Return the file with what verifies it in the arrays of these rows."""
        rows, start = slice(opened.header.start, opened.header.stop), opened.header.start // self.header.block_rows
        blocks = slice(start, start + len(opened.block_checksum))
        self.row_info_N[rows], self.block_checksum[blocks] = opened.row_info_N, opened.block_checksum
        return replace(
            opened,
            row_info_N=self.row_info_N[rows],
            verified_blocks=self.verified_blocks[blocks],
            block_checksum=self.block_checksum[blocks],
        )

    def alteration_error(self, positions: Int64) -> DamagedIndexError:
        """Return the error for altered rows with these ids, ascending, in the file of the first."""
        partition = int(positions[0]) // self.partition_rows
        file = self.files[partition]
        return file.alteration_error(positions[positions < file.header.stop] - file.header.start)
