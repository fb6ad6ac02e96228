"""xxh3_64 of what a feature file holds: of each row, of each block of rows, of header and columns together.

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
    """Return an array's."""
    # As bytes: the buffer protocol has no name for little-endian float16 on every platform.
    found: int = xxhash.xxh3_64_intdigest(array.view(np.uint8).data)
    return found


def block_checksums(stored_ND: Stored, block_rows: int) -> Checksums:
    """Return those of each so many rows; the last block may have fewer."""
    starts = range(0, len(stored_ND), block_rows)
    return np.array([checksum(stored_ND[start : start + block_rows]) for start in starts], dtype="<u8")


def row_checksums(stored_ND: Stored) -> Checksums:
    """Return each row's [N]; rows become objects of bytes by whole arrays, which is faster than a view a row."""
    row = np.dtype((np.void, stored_ND.shape[1] * stored_ND.itemsize))
    step = max(1, _HASHED_AT_ONCE // row.itemsize)
    found: list[int] = []
    for start in range(0, len(stored_ND), step):
        rows = np.ascontiguousarray(stored_ND[start : start + step]).view(row)[:, 0].tolist()
        found += map(xxhash.xxh3_64_intdigest, rows)
    return np.array(found, dtype="<u8")


def column_checksum(salt: bytes, columns: Iterable[npt.NDArray[Any]]) -> int:
    """Return that of a header's bytes and of columns, one after another."""
    digest = xxhash.xxh3_64(salt)
    for column in columns:
        digest.update(column.view(np.uint8).data)
    found: int = digest.intdigest()
    return found
