"""Rows taken by position from the files of an index, and compared with their checksums.

Shapes: C checkpoints, D sketch dimension of a checkpoint, K rows.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tracin_ann.store.checksums import row_checksums
from tracin_ann.store.codec import Int16, Stored, decode_rows, describe_storage, measure_row_bytes
from tracin_ann.store.feature_file import FeatureFile
from tracin_ann.store.stored_rows import ROW_INFO, StoredRows
from tracin_ann.types import Float32, Int64

_KEPT_BYTES = 16 << 20
"""Memory for rows that each thread keeps."""


def take_rows(files: Sequence[Sequence[FeatureFile]], positions: Sequence[int], *, unit: bool = False) -> Float32:
    """Return rows as float32 [K, C·D], whose C parts are in files of several checkpoints.

    All parts are copied, verified and decoded together: NumPy calls for each file would cost more than the copies.

    Args:
        files: the C files of each row; all have the same dimension and dtype.
        positions: the position of each row in its files.
        unit: divide each part by its norm; a zero part remains zero.

    Raises:
        DamagedIndexError: rows are altered; the message names the first such file and its rows.
        IndexError: a position is outside a file.
    """
    header, info_bytes = files[0][0].header, ROW_INFO.itemsize
    width, stored_dtype = describe_storage(header.dim, header.dtype)
    row_bytes = measure_row_bytes(header.dim, header.dtype)
    features: list[memoryview] = []
    infos: list[memoryview] = []
    for parts, position in zip(files, positions, strict=True):
        place = slice(position * row_bytes, (position + 1) * row_bytes)
        info_place = slice(position * info_bytes, (position + 1) * info_bytes)
        for file in parts:
            stored, info = file.buffers
            features.append(stored[place])
            infos.append(info[info_place])
    content = bytearray().join(features)
    if min(positions) < 0 or len(content) != len(features) * row_bytes:
        n_rows = min(file.header.n_rows for parts in files for file in parts)
        raise IndexError(f"position {min(positions)} or {max(positions)} of {n_rows} rows")
    stored_KD = np.frombuffer(content, dtype=stored_dtype).reshape(-1, width)
    info_K = np.frombuffer(b"".join(infos), dtype=ROW_INFO)

    def find_place(part: int) -> tuple[FeatureFile, int]:
        row, checkpoint = divmod(part, len(files[0]))
        return files[row][checkpoint], positions[row]

    _check_rows(stored_KD, info_K, find_place)
    row_KD = np.empty((len(stored_KD), header.dim), dtype=np.float32)
    decode_rows(stored_KD, info_K["exponent"], row_KD, header.dtype, unit=unit)
    return row_KD.reshape(len(positions), -1)


def take_grouped_rows(groups: Sequence[tuple[StoredRows, Int64]], out_KD: Float32, *, unit: bool = False) -> None:
    """Write rows of several files of one checkpoint into `out_KD`, group after group.

    This is faster than `take_rows` if the groups have many rows.

    Args:
        groups: rows of a file, or of all files, and positions of some.
        out_KD: its rows must be contiguous; it may be a part of the columns of a wider array.
        unit: divide each row by its norm; a zero row remains zero.

    Raises:
        DamagedIndexError: rows are altered; the message names the first such file and its rows.
    """
    stored_KD, exponent_K = gather_stored(groups)
    decode_rows(stored_KD, exponent_K, out_KD, groups[0][0].header.dtype, unit=unit)


def gather_stored(groups: Sequence[tuple[StoredRows, Int64]]) -> tuple[Stored, Int16]:
    """Return rows of several files of one checkpoint as they are stored, group after group, and their exponents.

    The next call of the same thread may overwrite the rows.

    Args:
        groups: rows of a file, or of all files, and positions of some.

    Raises:
        DamagedIndexError: rows are altered; the message names the first such file and its rows.
    """
    header = groups[0][0].header
    width, stored_dtype = describe_storage(header.dim, header.dtype)
    starts = np.cumsum([0, *(len(positions) for _, positions in groups)])
    stored_KD = _memory.provide((int(starts[-1]), width), stored_dtype)
    info_K = np.empty(starts[-1], dtype=ROW_INFO)
    for (file, positions), start, stop in zip(groups, starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        # With `clip`, NumPy writes into `out` without a buffer.
        file.stored_ND.take(positions, axis=0, out=stored_KD[start:stop], mode="clip")
        file.row_info_N.take(positions, out=info_K[start:stop], mode="clip")
    place_U = np.flatnonzero(np.concatenate([file.find_unverified(positions) for file, positions in groups]))

    def find_place(unverified: int) -> tuple[StoredRows, int]:
        place = place_U[unverified]
        group = int(np.searchsorted(starts, place, side="right")) - 1
        file, positions = groups[group]
        return file, int(positions[place - starts[group]])

    if len(place_U):
        _check_rows(stored_KD[place_U], info_K[place_U], find_place)
        for file, positions in groups:
            file.remember_verified(positions)
    return stored_KD, info_K["exponent"]


class _Memory(threading.local):
    """Memory that each thread keeps for rows: the system takes longer to provide new memory than to copy the rows."""

    def __init__(self) -> None:
        # The system provides pages when they are first written.
        self._kept = np.empty(_KEPT_BYTES, np.uint8)

    def provide(self, shape: tuple[int, int], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """Return an array, in new memory if it is larger than the memory that is kept."""
        n_bytes = math.prod(shape) * dtype.itemsize
        if n_bytes > _KEPT_BYTES:
            return np.empty(shape, dtype)
        return self._kept[:n_bytes].view(dtype).reshape(shape)


_memory = _Memory()


def _check_rows(
    stored_KD: Stored, info_K: npt.NDArray[np.void], find_place: Callable[[int], tuple[StoredRows, int]]
) -> None:
    """Compare rows with their checksums.

    Args:
        stored_KD: the stored rows.
        info_K: their checksums and exponents.
        find_place: returns file and position of one of them.

    Raises:
        DamagedIndexError: rows are altered; the message names the first such file and its rows.
    """
    altered_K = row_checksums(stored_KD) != info_K["checksum"]
    if altered_K.any():
        altered = [find_place(part) for part in np.flatnonzero(altered_K).tolist()]
        first = altered[0][0]
        raise first.alteration_error(np.unique([position for file, position in altered if file is first]))
