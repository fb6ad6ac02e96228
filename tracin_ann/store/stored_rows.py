"""Stored rows, of one file or of all files of a checkpoint, and what verifies them.

Shapes: N rows, K rows selected by position.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from tracin_ann.choices import DTYPES, Dtype
from tracin_ann.errors import DamagedIndexError
from tracin_ann.store.checksums import Checksums, checksum
from tracin_ann.store.codec import Int16, Stored, is_coded
from tracin_ann.types import Int64

VERSION = 3
"""Of files with numbers; those with codes have the next one, so that earlier versions of the library say why."""
ROW_INFO = np.dtype([("checksum", "<u8"), ("exponent", "<i2"), ("verified", "?")])
_DENSE_SHARE = 1 / 8
"""The checksum of a block takes less time than those of this share of its rows."""


@dataclass(frozen=True)
class FileHeader:
    """The header of a feature file; files with equal headers are interchangeable.

    Attributes:
        spec_digest: digest of everything that determines a feature row.
        start: first row of the partition.
        stop: one past its last row.
        checkpoint: index of the checkpoint.
        dim: D.
        dtype: dtype of the stored features.
        block_rows: rows of a block that shares one checksum.
    """

    spec_digest: str
    start: int
    stop: int
    checkpoint: int
    dim: int
    dtype: Dtype = "float16"
    block_rows: int = 256

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not (0 <= self.start < self.stop and self.checkpoint >= 0 and self.dim >= 1 and self.block_rows >= 1):
            raise ValueError(f"impossible header {self}")
        if self.dtype not in DTYPES or not self.spec_digest:
            raise ValueError(f"impossible header {self}")

    @property
    def n_rows(self) -> int:
        """Return N."""
        return self.stop - self.start

    @property
    def version(self) -> int:
        """Return the version of the format."""
        return VERSION + is_coded(self.dtype)

    @property
    def salt(self) -> bytes:
        """Return the header as bytes; as part of a checksum, it reveals altered attributes."""
        return json.dumps(asdict(self), sort_keys=True).encode()


@dataclass(frozen=True, eq=False)
class StoredRows(ABC):
    """Rows in their stored format, addressed by position.

    Attributes:
        header: the header of their file, or that which a file of all rows would have.
        stored_ND: the stored features, memory-mapped.
        row_info_N: checksum and exponent of each row, and whether the row has been verified since the file was opened,
            in one array of records: all are needed for every row taken.
        verified_blocks: which blocks have been verified since the file was opened, bool [ceil(N / block_rows)].
        block_checksum: the checksum of each block.
    """

    header: FileHeader
    stored_ND: Stored
    row_info_N: npt.NDArray[np.void]
    verified_blocks: npt.NDArray[np.bool_]
    block_checksum: Checksums

    @property
    def exponent_N(self) -> Int16:
        """Return the exponents of the rows."""
        return self.row_info_N["exponent"]

    @property
    def row_checksum(self) -> Checksums:
        """Return the checksums of the rows."""
        return self.row_info_N["checksum"]

    def find_unverified(self, position_K: Int64) -> npt.NDArray[np.bool_]:
        """Return which of the rows at these positions [K] are not verified, neither alone nor with their block.

        A block with many of the rows is verified first, which takes less time than to verify these. If one of its rows
        is altered, it remains unverified.
        """
        if self.verified_blocks.all():
            return np.zeros(len(position_K), dtype=bool)
        size = self.header.block_rows
        block_K = position_K // size
        unverified_K: npt.NDArray[np.bool_] = ~(self.verified_blocks[block_K] | self.row_info_N["verified"][position_K])
        count = np.bincount(block_K[unverified_K])
        for block in np.flatnonzero(count >= _DENSE_SHARE * size).tolist():
            rows = self.stored_ND[block * size : (block + 1) * size]
            self.verified_blocks[block] = checksum(rows) == self.block_checksum[block]
        unverified_K &= ~self.verified_blocks[block_K]
        return unverified_K

    def remember_verified(self, position_K: Int64) -> None:
        """Store that the rows at these positions are verified."""
        self.row_info_N["verified"][position_K] = True

    @abstractmethod
    def alteration_error(self, positions: Int64) -> DamagedIndexError:
        """Return the error for altered rows at these positions, ascending; it names the file of the first."""
