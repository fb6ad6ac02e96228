"""One immutable HDF5 file with the features of a partition of rows at one checkpoint: its format, writing and reading.

Shapes: N rows of the file, D sketch dimension of a checkpoint, K rows selected by position.

Every dataset is contiguous and uncompressed, so that the features can be memory-mapped at their offset:
`feature` [N, D] or, for codes, bytes [N, W] (`tracin_ann.store.codes`), `exponent` int16 [N], `id` int64 [N], `sqnorm`
float64 [N], `loss` float32 [N], and the checksums (xxh3_64, uint64): `row_checksum` [N] of each row of `feature`,
`block_checksum` of each block of `block_rows` rows, and `column_checksum` [1] of the header and all other datasets.

Header and columns are verified when the file is opened. Consecutive rows are verified in blocks when they are first
read. Rows that are selected by position are verified one by one, which takes ten times as long: when they are first
read, if rows of many files are read together, and otherwise at every read (`tracin_ann.store.taking`).

A row is skipped if its loss, gradient or squared norm is NaN or infinite. Its stored loss is not finite; its features
and squared norm are zero.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np
import numpy.typing as npt

from tracin_ann.errors import DamagedIndexError, NonFiniteError, problem
from tracin_ann.files import (
    atomic_path,
    file_digest,
    locate_own_dataset,
    map_file,
    open_regular,
    read_attribute,
    read_dataset,
    report_damage,
    write_hdf5,
)
from tracin_ann.store.checksums import block_checksums, checksum, column_checksum, row_checksums
from tracin_ann.store.codec import (
    Int16,
    Stored,
    decode_rows,
    describe_storage,
    encode_rows,
    row_peaks,
)
from tracin_ann.store.stored_rows import ROW_INFO, VERSION, FileHeader, StoredRows
from tracin_ann.types import Float32, Float64, Int64

FORMAT = "tracin_ann.features"
_ALIGNMENT = 4096
_REWRITE = "run the build again: it rewrites files that are missing or damaged"
_REPAIR = "run tracin-verify --repair, or restore the file"
_COLUMNS: dict[str, np.dtype[Any]] = {
    "exponent": np.dtype("<i2"),
    "id": np.dtype("<i8"),
    "sqnorm": np.dtype("<f8"),
    "loss": np.dtype("<f4"),
    "block_checksum": np.dtype("<u8"),
    "row_checksum": np.dtype("<u8"),
}
_COLUMN_CHECKSUM: np.dtype[Any] = np.dtype("<u8")
_NOT_IN_NAMES = frozenset("/\\\0")
_LONGEST_NAME = 100
_LONGEST_ATTRIBUTE = 1000

MapRows = Callable[[BinaryIO, int, tuple[int, ...], "np.dtype[Any]"], npt.NDArray[Any]]
"""Maps numbers of an open file from an offset on, like `map_file`."""


@dataclass(frozen=True, eq=False)
class FeatureBlock:
    """Features, squared gradient norms and losses of consecutive rows at one checkpoint.

    Attributes:
        ids_N: int64, consecutive.
        feature_ND: float32, sketches of the gradients, scaled by the square root of the learning rate.
        sqnorm_N: float64, squared norms of the full gradients, without the learning rate.
        loss_N: float32; not finite for a skipped row, whose other values are zero.
    """

    ids_N: Int64
    feature_ND: Float32
    sqnorm_N: Float64
    loss_N: Float32

    def __post_init__(self) -> None:
        """Check shapes and dtypes, and that the ids are consecutive."""
        n_rows = len(self.ids_N)
        columns: dict[str, tuple[npt.NDArray[Any], type[np.generic], tuple[int, ...]]] = {
            "ids_N": (self.ids_N, np.int64, (n_rows,)),
            "feature_ND": (self.feature_ND, np.float32, (n_rows, *self.feature_ND.shape[-1:])),
            "sqnorm_N": (self.sqnorm_N, np.float64, (n_rows,)),
            "loss_N": (self.loss_N, np.float32, (n_rows,)),
        }
        for name, (array, dtype, shape) in columns.items():
            if array.dtype != dtype or array.shape != shape:
                raise ValueError(f"{name} is {array.dtype} {array.shape}, expected {np.dtype(dtype)} {shape}")
        if self.feature_ND.size == 0:
            raise ValueError(f"feature_ND is {self.feature_ND.shape}, expected [N, D] with N, D ≥ 1")
        if (np.diff(self.ids_N) != 1).any():
            raise ValueError("ids_N are not consecutive")


@dataclass(frozen=True)
class FileRecord:
    """A manifest's record of a file.

    Attributes:
        name: its name in the directory.
        size: bytes.
        digest: xxh3_128, hexadecimal.
    """

    name: str
    size: int
    digest: str

    def __post_init__(self) -> None:
        """Reject names that refer to a file outside the directory."""
        if not 0 < len(self.name) < _LONGEST_NAME or self.name.startswith(".") or _NOT_IN_NAMES & set(self.name):
            raise ValueError(f"a file named {self.name!r} is not inside the index")


@dataclass(frozen=True, eq=False)
class FeatureFile(StoredRows):
    """An open feature file: features memory-mapped, the small columns in memory.

    Position 0 is row `header.start`. An open file uses 24 bytes of memory per row, and no file descriptor.
    """

    path: Path
    sqnorm_N: Float64
    loss_N: Float32

    @classmethod
    def open(cls, path: Path, expected: FileHeader | None = None, map_rows: MapRows = map_file) -> FeatureFile:
        """Open the file and compare its header with `expected`; the features are mapped by `map_rows`, and not read.

        Raises:
            DamagedIndexError: the file is missing, truncated, not HDF5 or of another version, its columns are altered,
                or its header differs.
            OSError: the system cannot open or map the file; the error names it.
        """
        with report_damage(path, "an intact feature file", _REWRITE), open_regular(path) as file:
            opened = cls._read(path, file, map_rows)
        if expected is not None and opened.header != expected:
            names = [f.name for f in fields(expected) if getattr(opened.header, f.name) != getattr(expected, f.name)]
            raise DamagedIndexError(
                problem(
                    f"{path} has another header",
                    got=", ".join(f"{name}={getattr(opened.header, name)}" for name in names),
                    expected=", ".join(f"{name}={getattr(expected, name)}" for name in names),
                    remedy="build into another directory, or run the build again to replace the file",
                )
            )
        return opened

    @cached_property
    def buffers(self) -> tuple[memoryview, memoryview]:
        """Return the bytes of the stored features and of `row_info_N`; slices of them are cheaper than of arrays."""
        return _view_bytes(self.stored_ND), _view_bytes(self.row_info_N)

    @property
    def skipped_K(self) -> Int64:
        """Return the positions of the skipped rows [K], ascending."""
        return np.flatnonzero(~np.isfinite(self.loss_N))

    @classmethod
    def _read(cls, path: Path, opened: BinaryIO, map_rows: MapRows) -> FeatureFile:
        # h5py does not lock a file object. A lock is not needed, because a file never changes after it has its name.
        # Locks fail on some network file systems, and conflict with other lock settings of h5py in the same process.
        with h5py.File(opened, "r") as file:
            root, size = file.id, os.fstat(opened.fileno()).st_size
            header = _read_header(root)
            n_rows, n_blocks = header.n_rows, -(-header.n_rows // header.block_rows)
            width, feature_dtype = describe_storage(header.dim, header.dtype)
            feature_shape = (n_rows, width)
            feature_offset = locate_own_dataset(root, "feature", feature_shape, feature_dtype, size)
            places = {
                name: (locate_own_dataset(root, name, shape, dtype, size), shape, dtype)
                for name, dtype in _COLUMNS.items()
                for shape in [(n_blocks if name == "block_checksum" else n_rows,)]
            }
            checksum_offset = locate_own_dataset(root, "column_checksum", (1,), _COLUMN_CHECKSUM, size)
        stored_ND = map_rows(opened, feature_offset, feature_shape, feature_dtype)
        # Reading through HDF5 would take several times as long.
        columns = {name: read_dataset(opened, *place) for name, place in places.items()}
        written = int(read_dataset(opened, checksum_offset, (1,), _COLUMN_CHECKSUM)[0])
        _check_columns(header, columns, stored_ND, written)
        row_info_N = np.zeros(n_rows, dtype=ROW_INFO)
        row_info_N["exponent"], row_info_N["checksum"] = columns["exponent"], columns["row_checksum"]
        verified_blocks = np.zeros(-(-n_rows // header.block_rows), dtype=bool)
        return cls(
            header=header,
            stored_ND=stored_ND,
            row_info_N=row_info_N,
            verified_blocks=verified_blocks,
            block_checksum=columns["block_checksum"],
            path=path,
            sqnorm_N=columns["sqnorm"],
            loss_N=columns["loss"],
        )

    def read(self, start: int, stop: int, *, out_ND: Float32 | None = None, unit: bool = False) -> Float32:
        """Return float32 rows start..stop-1 [stop - start, D]; with `unit`, divided by their norms (zero stays zero).

        The result is written into `out_ND` if given. Its rows must be contiguous; it may be a part of the columns of a
        wider array.

        Raises:
            DamagedIndexError: a row is altered.
        """
        if not 0 <= start <= stop <= self.header.n_rows:
            raise IndexError(f"rows {start}:{stop} of {self.header.n_rows}")
        self._check_blocks(start, stop)
        return self._decode(self.stored_ND[start:stop], self.exponent_N[start:stop], out_ND, unit)

    def read_stored(self, start: int, stop: int) -> tuple[Stored, Int16]:
        """Return rows start..stop-1 as they are stored, memory-mapped, and their exponents.

        Raises:
            DamagedIndexError: a row is altered.
        """
        if not 0 <= start <= stop <= self.header.n_rows:
            raise IndexError(f"rows {start}:{stop} of {self.header.n_rows}")
        self._check_blocks(start, stop)
        return self.stored_ND[start:stop], self.exponent_N[start:stop]

    def _decode(self, stored_ND: Stored, exponent_N: Int16, out_ND: Float32 | None, unit: bool) -> Float32:
        if out_ND is None:
            out_ND = np.empty((len(stored_ND), self.header.dim), dtype=np.float32)
        decode_rows(stored_ND, exponent_N, out_ND, self.header.dtype, unit=unit)
        return out_ND

    def verify(self) -> None:
        """Read all features and compare them with their checksums.

        Raises:
            DamagedIndexError: rows are altered; the message names the file and the rows.
        """
        blocks = np.flatnonzero(block_checksums(self.stored_ND, self.header.block_rows) != self.block_checksum)
        altered = [self._find_altered_rows(int(block)) for block in blocks]
        if altered:
            raise self.alteration_error(np.concatenate(altered))

    def _check_blocks(self, start: int, stop: int) -> None:
        """Verify the blocks that contain rows start..stop-1, unless they have been verified."""
        size = self.header.block_rows
        first, last = start // size, -(-stop // size)
        for block in (first + np.flatnonzero(~self.verified_blocks[first:last])).tolist():
            rows = slice(block * size, min((block + 1) * size, self.header.n_rows))
            if checksum(self.stored_ND[rows]) != self.block_checksum[block]:
                raise self.alteration_error(self._find_altered_rows(block))
            self.verified_blocks[block] = True

    def _find_altered_rows(self, block: int) -> Int64:
        """Return the positions of the altered rows of a damaged block; all its rows if their checksums all agree."""
        start = block * self.header.block_rows
        stop = min(start + self.header.block_rows, self.header.n_rows)
        altered = start + np.flatnonzero(row_checksums(self.stored_ND[start:stop]) != self.row_checksum[start:stop])
        return altered if len(altered) else np.arange(start, stop)

    def alteration_error(self, positions: Int64) -> DamagedIndexError:
        """Return the error for altered rows at these positions, ascending; see `StoredRows`."""
        first, last = self.header.start + int(positions[0]), self.header.start + int(positions[-1])
        which = f"row {first} is" if len(positions) == 1 else f"{len(positions)} of rows {first}..{last} are"
        got, expected = "features of another checksum", "the features that the build wrote"
        return DamagedIndexError(problem(f"{self.path}: {which} altered", got=got, expected=expected, remedy=_REPAIR))


def _check_columns(
    header: FileHeader, columns: Mapping[str, npt.NDArray[Any]], stored_ND: Stored, written: int
) -> None:
    """Check header and columns against the stored checksum, and that they are consistent.

    Raises:
        ValueError: they do not match.
    """
    skipped_K = np.flatnonzero(~np.isfinite(columns["loss"]))
    if not np.isfinite(columns["sqnorm"]).all() or any(
        column[skipped_K].any() for column in (columns["sqnorm"], columns["exponent"], stored_ND)
    ):
        raise ValueError("rows that are neither finite nor skipped")
    if column_checksum(header.salt, columns.values()) != written:
        raise ValueError("header or columns are altered")
    if not np.array_equal(columns["id"], np.arange(header.start, header.stop)):
        raise ValueError("the ids are those of other rows")


def _view_bytes(array: npt.NDArray[Any]) -> memoryview:
    return array.view(np.uint8).reshape(-1).data


def write_feature_file(path: Path, block: FeatureBlock, *, header: FileHeader) -> FileRecord:
    """Write the file atomically and return its record; equal arguments give equal bytes.

    Raises:
        NonFiniteError: a feature, squared norm or loss of a row that is not skipped is NaN or infinite; the message
            names checkpoint and row.
        OSError: the system cannot write the file.
    """
    extent = (int(block.ids_N[0]), int(block.ids_N[-1]) + 1, block.feature_ND.shape[1])
    if extent != (header.start, header.stop, header.dim):
        raise ValueError(f"block of (start, stop, dim) = {extent} does not match {header}")
    _check_finite(block, header.checkpoint)
    stored_ND, exponent_N = encode_rows(block.feature_ND, header.dtype)
    columns: dict[str, npt.NDArray[Any]] = {
        "feature": stored_ND,
        "exponent": exponent_N,
        "id": block.ids_N.astype("<i8"),
        "sqnorm": block.sqnorm_N.astype("<f8"),
        "loss": block.loss_N.astype("<f4"),
    }
    columns["block_checksum"] = block_checksums(stored_ND, header.block_rows)
    columns["row_checksum"] = row_checksums(stored_ND)
    rest = [array for name, array in columns.items() if name != "feature"]
    columns["column_checksum"] = np.array([column_checksum(header.salt, rest)], dtype="<u8")
    with atomic_path(path) as temporary:
        # "earliest": with "latest", a file that a killed process left could not be opened.
        with (
            write_hdf5(temporary) as opened,
            h5py.File(
                opened, "w", libver="earliest", alignment_threshold=_ALIGNMENT, alignment_interval=_ALIGNMENT
            ) as file,
        ):
            for name, value in {"format": FORMAT, "version": header.version, **asdict(header)}.items():
                file.attrs[name] = np.bytes_(value.encode()) if isinstance(value, str) else np.int64(value)
            for name, array in columns.items():
                file.create_dataset(name, data=array, track_times=False)
        record = FileRecord(path.name, temporary.stat().st_size, file_digest(temporary))
    return record


def _check_finite(block: FeatureBlock, checkpoint: int) -> None:
    peak_N = row_peaks(block.feature_ND)
    skipped_N = ~np.isfinite(block.loss_N) & (block.sqnorm_N == 0) & (peak_N == 0)
    for name, value_N in (("loss", block.loss_N), ("squared gradient norm", block.sqnorm_N), ("feature", peak_N)):
        bad = np.flatnonzero(~np.isfinite(value_N) & ~skipped_N)
        if len(bad):
            what = f"{name} of row {block.ids_N[bad[0]]} at checkpoint {checkpoint} ({len(bad)} such rows here)"
            got = f"{value_N[bad[0]]} at a loss of {block.loss_N[bad[0]]:.6g}"
            remedy = "leave out the rows or the checkpoint, fix the loss, or skip such rows"
            raise NonFiniteError(problem(what, got=got, expected="a finite number", remedy=remedy))


def _read_header(root: h5py.h5g.GroupID) -> FileHeader:
    written = (_read_header_field(root, "format"), _read_header_field(root, "version"))
    header = None
    if written in ((FORMAT, VERSION), (FORMAT, VERSION + 1)):
        header = FileHeader(**{field.name: _read_header_field(root, field.name) for field in fields(FileHeader)})
    if header is None or written[1] != header.version:
        known = f"{(FORMAT, VERSION)}, and version {VERSION + 1} with codes"
        raise ValueError(f"format and version {written}, this program reads {known}")
    return header


def _read_header_field(root: h5py.h5g.GroupID, name: str) -> Any:
    value = read_attribute(root, name, _LONGEST_ATTRIBUTE)
    return value.decode() if isinstance(value, bytes) else value
