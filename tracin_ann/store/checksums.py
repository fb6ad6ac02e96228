"""Checksums (xxh3_64) of a feature file: one for each row, one for each block of rows, one for header and columns.

Shapes: N rows, D sketch dimension a checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from tracin_ann.store.codec import Stored

Checksums = npt.NDArray[np.uint64]
_HASHED_AT_ONCE = 1 << 20


def checksum(array: npt.NDArray[Any]) -> int:
    """Return the checksum of an array's bytes."""
    # View as bytes: the buffer protocol cannot describe little-endian float16 on every platform.
    value: int = xxhash.xxh3_64_intdigest(array.view(np.uint8).data)
    return value


def block_checksums(stored_ND: Stored, block_rows: int) -> Checksums:
    """Return the checksum of each block of `block_rows` rows; the last block may have fewer rows."""
    starts = range(0, len(stored_ND), block_rows)
    return np.array([checksum(stored_ND[start : start + block_rows]) for start in starts], dtype="<u8")


def row_checksums(stored_ND: Stored) -> Checksums:
    """Return the checksum of each row [N]."""
    # NumPy converts many rows to bytes objects in one call, which is faster than one view for each row.
    row = np.dtype((np.void, stored_ND.shape[1] * stored_ND.itemsize))
    step = max(1, _HASHED_AT_ONCE // row.itemsize)
    values: list[int] = []
    for start in range(0, len(stored_ND), step):
        rows = np.ascontiguousarray(stored_ND[start : start + step]).view(row)[:, 0].tolist()
        values += map(xxhash.xxh3_64_intdigest, rows)
    return np.array(values, dtype="<u8")


def column_checksum(salt: bytes, columns: Iterable[npt.NDArray[Any]]) -> int:
    """Return one checksum of a header's bytes (`salt`) followed by the columns."""
    digest = xxhash.xxh3_64(salt)
    for column in columns:
        digest.update(column.view(np.uint8).data)
    value: int = digest.intdigest()
    return value
