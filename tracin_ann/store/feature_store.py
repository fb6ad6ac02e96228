"""A directory of feature files, one for each partition of rows and checkpoint, and a view of its rows.

Shapes: N rows, C checkpoints, D sketch dimension of a checkpoint, F = (checkpoints chosen)·D, K rows selected by id.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from tracin_ann.errors import DamagedIndexError, UsageError, problem
from tracin_ann.files import describe_difference, make_directory
from tracin_ann.store.checkpoint_rows import CheckpointRows
from tracin_ann.store.codec import Int16, Stored, is_coded, measure_row_bytes
from tracin_ann.store.codes import CodeBlock, measure_code_differences
from tracin_ann.store.feature_file import FeatureBlock, FeatureFile, FileRecord, write_feature_file
from tracin_ann.store.layout import StoreLayout
from tracin_ann.store.stored_rows import StoredRows
from tracin_ann.store.taking import gather_stored, take_grouped_rows, take_rows
from tracin_ann.types import CodedPart, Float32, Float64, Int64, PendingReads, StoredPart

Number = TypeVar("Number", np.float32, np.float64)
_MOST_OPEN_FILES = 8192
"""Each is one memory map, of which a process may have 65,530 on Linux."""
_MOST_OPEN_ROWS = 2**27
"""Rows of all open files, 24 bytes each: at most 3.2 GB."""
_FEW_ROWS = 512
"""Up to this many rows, `take` copies each row by itself if files are not joined; more are grouped by file."""
_TAKEN_BYTES = 1 << 26
_ROWS_AT_ONCE = 4096
"""Rows that `take` decodes together."""


class FeatureStore:
    """The features of N rows × C checkpoints, one file for each partition of rows and checkpoint.

    Many threads may read at the same time; many processes may write different files at the same time.
    """

    def __init__(self, directory: Path, layout: StoreLayout) -> None:
        """Set the directory and its layout; nothing is read or written."""
        self.directory = directory
        self.layout = layout
        self._open: dict[tuple[int, int], FeatureFile] = {}
        self._rows: dict[int, CheckpointRows | None] = {}
        self._verified: set[frozenset[int]] = set()  # checkpoints all of whose rows are verified, in open files
        self._lock = threading.Lock()
        self._taken = threading.local()
        self._most_open = min(_MOST_OPEN_FILES, _MOST_OPEN_ROWS // min(layout.partition_rows, layout.n_rows))

    def path(self, partition: int, checkpoint: int) -> Path:
        """Return the path of a file, which need not exist."""
        return self.directory / self.layout.file_name(partition, checkpoint)

    def partitions(self) -> list[tuple[int, int]]:
        """Return (start, stop) of every partition."""
        return [self.layout.rows(partition) for partition in range(self.layout.n_partitions)]

    def missing(
        self, trusted: Iterable[FileRecord] = (), files: Iterable[tuple[int, int]] | None = None
    ) -> list[tuple[int, int]]:
        """Return (partition, checkpoint) of the files that are missing or damaged, of some or (None) all.

        Reads every byte of a file; of trusted files that have the recorded size, only header and columns.
        """
        sizes = {record.name: record.size for record in trusted}
        return [file for file in (self.layout.files if files is None else files) if not self._is_intact(*file, sizes)]

    def write(self, partition: int, checkpoint: int, block: FeatureBlock) -> FileRecord:
        """Write one file, durably; an existing file is replaced.

        Raises:
            NonFiniteError: the block contains NaN or inf in a row that is not skipped.
            OSError: the system cannot write the file.
        """
        header = self.layout.header(partition, checkpoint)
        make_directory(self.directory)
        record = write_feature_file(self.path(partition, checkpoint), block, header=header)
        with self._lock:
            self._open.pop((partition, checkpoint), None)
            self._rows.pop(checkpoint, None)
            self._verified.clear()
        return record

    def check(self, records: Iterable[FileRecord]) -> None:
        """Compare the sizes of the files on disk with their records.

        Raises:
            DamagedIndexError: a file is missing or has another size; the message names the first.
        """
        for record in records:
            path = self.directory / record.name
            got = describe_difference(path, record.size, digest=None)
            if got:
                expected, remedy = f"{record.size} bytes", "run the build again, or restore the file"
                raise DamagedIndexError(problem(f"{path}", got=got, expected=expected, remedy=remedy))

    def sqnorms(self, checkpoints: Sequence[int] | None = None) -> Float64:
        """Return squared gradient norms, without the learning rate, as [N, checkpoints] in the given order."""
        return self._read_column("sqnorm_N", np.float64, checkpoints)

    def losses(self, checkpoints: Sequence[int] | None = None) -> Float32:
        """Return losses [N, checkpoints] in the given order; losses of skipped rows are not finite."""
        return self._read_column("loss_N", np.float32, checkpoints)

    def skipped(self) -> tuple[Int64, Int64]:
        """Return the ids of the rows skipped at any checkpoint, ascending, and the first such checkpoint of each."""
        rows, firsts = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for partition, (start, stop) in enumerate(self.partitions()):
            first_N = np.full(stop - start, -1, np.int64)
            for checkpoint in reversed(range(self.layout.n_checkpoints)):
                first_N[self.file(partition, checkpoint).skipped_K] = checkpoint
            skipped = np.flatnonzero(first_N >= 0)
            rows.append(start + skipped)
            firsts.append(first_N[skipped])
        return np.concatenate(rows), np.concatenate(firsts)

    def measure_differences(self, checkpoint: int, rows: Sequence[int], expected_ND: Float64) -> Float64:
        """Return how far stored rows are from expected ones at a checkpoint, [N].

        For numbers, these are the norms of the differences. For codes, they are the distances that rounding does not
        explain (`measure_code_differences`).

        Raises:
            DamagedIndexError: a row is altered.
        """
        dtype = self.layout.dtype
        if not is_coded(dtype):
            stored_ND = self.view([checkpoint]).take(rows).astype(np.float64)
            difference_N: Float64 = np.linalg.norm(stored_ND - expected_ND, axis=1)
            return difference_N
        places = [divmod(row, self.layout.partition_rows) for row in rows]
        read = [self.file(partition, checkpoint).read_stored(at, at + 1) for partition, at in places]
        stored_NW, exponent_N = (np.concatenate(parts) for parts in zip(*read, strict=True))
        return measure_code_differences(stored_NW, exponent_N, dtype, expected_ND)

    def view(self, checkpoints: Sequence[int] | None = None, *, cosine: bool = False) -> FeatureView:
        """Return a view of the rows at the chosen checkpoints (None: all); nothing is read until rows are requested.

        With `cosine`, each checkpoint's part of a row is divided by its norm; a zero part remains zero.

        Raises:
            UsageError: a checkpoint is not in the store, or none is chosen.
        """
        return FeatureView(self, self._choose_checkpoints(checkpoints), cosine)

    def file(self, partition: int, checkpoint: int) -> FeatureFile:
        """Return a file as by `files`.

        Raises:
            DamagedIndexError: the file is missing, unreadable or has another header.
        """
        return self.files([(partition, checkpoint)])[0]

    def files(self, keys: Sequence[tuple[int, int]]) -> list[FeatureFile]:
        """Return the open files of pairs (partition, checkpoint).

        A file remains open, with the rows that were verified, until the store has the largest number of open files. A
        further file is open only while the caller uses it: with the usual rule, which closes the file whose last use is
        longest ago, a scan of more files than the limit would open every file again.

        Raises:
            DamagedIndexError: a file is missing, unreadable or has another header.
        """
        found = []
        with self._lock:
            for key in keys:
                opened = self._open.get(key)
                if opened is None:
                    opened = self._open_file(*key)
                    if len(self._open) < self._most_open:
                        self._open[key] = opened
                found.append(opened)
        return found

    def _open_file(self, partition: int, checkpoint: int) -> FeatureFile:
        path, layout = self.path(partition, checkpoint), self.layout
        header = layout.header(partition, checkpoint)
        if checkpoint not in self._rows:
            can_all_be_open = layout.n_partitions * layout.n_checkpoints <= self._most_open
            of_all = replace(header, start=0, stop=layout.n_rows)
            self._rows[checkpoint] = CheckpointRows.reserve(of_all, layout.partition_rows) if can_all_be_open else None
        rows = self._rows[checkpoint]
        return FeatureFile.open(path, header) if rows is None else rows.open_file(path, header)

    def join_rows(self, checkpoint: int) -> CheckpointRows | None:
        """Return all rows of a checkpoint if its files are open side by side in memory."""
        rows = self._rows.get(checkpoint)
        return rows if rows is not None and rows.is_complete else None

    def pending_reads(self, checkpoints: Sequence[int]) -> PendingReads:
        """Return what a scan of all rows at these checkpoints has to do, and later scans do not.

        Nothing, if the files cannot all remain open: every scan opens and verifies them again.
        """
        chosen, layout = frozenset(checkpoints), self.layout
        n_files = layout.n_partitions * len(chosen)
        with self._lock:
            if n_files > self._most_open or chosen in self._verified:
                return PendingReads(files_per_row=len(chosen))
            opened = [file for (_, checkpoint), file in self._open.items() if checkpoint in chosen]
            n_unverified = layout.n_rows * len(chosen) - sum(_count_verified_rows(file) for file in opened)
            if n_unverified == 0:
                self._verified.add(chosen)
        row_bytes = measure_row_bytes(layout.dim, layout.dtype)
        return PendingReads(n_files - len(opened), n_unverified * row_bytes, len(chosen))

    @contextmanager
    def remember_taken(self) -> Iterator[None]:
        """Keep the rows that this thread takes in the block, up to 64 MB: a search and the scores take the same."""
        outer = getattr(self._taken, "rows", None)
        self._taken.rows = []
        try:
            yield
        finally:
            self._taken.rows = outer

    def recall(self, view: FeatureView, id_K: Int64) -> tuple[Float32, Int64] | None:
        """Return rows and the places of those with these ids among them; None if not all were taken from this view.

        Only rows that were taken in the block of `remember_taken` are found.
        """
        for own, row_N, row_NF in getattr(self._taken, "rows", None) or ():
            place_K = np.searchsorted(row_N, id_K)
            if own == view and (row_N.take(place_K, mode="clip") == id_K).all():
                return row_NF, place_K
        return None

    def remember(self, view: FeatureView, id_K: Int64, row_KF: Float32) -> None:
        """Keep rows with ascending ids in the block of `remember_taken`."""
        taken = getattr(self._taken, "rows", None)
        if taken is None or not len(id_K) or (np.diff(id_K) <= 0).any():
            return
        if row_KF.nbytes + sum(kept.nbytes for *_, kept in taken) <= _TAKEN_BYTES:
            taken.append((view, id_K, row_KF))

    def _is_intact(self, partition: int, checkpoint: int, sizes: Mapping[str, int]) -> bool:
        path = self.path(partition, checkpoint)
        try:
            file = FeatureFile.open(path, self.layout.header(partition, checkpoint))
            if path.lstat().st_size != sizes.get(path.name):
                file.verify()
        except DamagedIndexError:
            return False
        return True

    def _choose_checkpoints(self, checkpoints: Sequence[int] | None) -> tuple[int, ...]:
        n_checkpoints = self.layout.n_checkpoints
        chosen = tuple(range(n_checkpoints)) if checkpoints is None else tuple(checkpoints)
        if not chosen or not all(0 <= checkpoint < n_checkpoints for checkpoint in chosen):
            expected = f"some of 0..{n_checkpoints - 1}"
            raise UsageError(
                problem("checkpoints", got=list(chosen), expected=expected, remedy="choose checkpoints of the index")
            )
        return chosen

    def _read_column(self, name: str, dtype: type[Number], checkpoints: Sequence[int] | None) -> npt.NDArray[Number]:
        column, chosen = attrgetter(name), self._choose_checkpoints(checkpoints)
        value_NC = np.empty((self.layout.n_rows, len(chosen)), dtype=dtype)
        for partition, (start, stop) in enumerate(self.partitions()):
            for i, checkpoint in enumerate(chosen):
                value_NC[start:stop, i] = column(self.file(partition, checkpoint))
        return value_NC


def _count_verified_rows(file: FeatureFile) -> int:
    """Return the number of rows of a file that have been verified in blocks; the last block may have fewer rows."""
    return min(file.header.n_rows, file.header.block_rows * int(np.count_nonzero(file.verified_blocks)))


@dataclass(frozen=True)
class FeatureView:
    """The rows [N, F] of a store at some of its checkpoints, as a RowSource with ids 0..N-1."""

    store: FeatureStore
    checkpoints: tuple[int, ...]
    cosine: bool

    @property
    def dim(self) -> int:
        """Return F."""
        return len(self.checkpoints) * self.store.layout.dim

    def __len__(self) -> int:
        """Return N."""
        return self.store.layout.n_rows

    def pending_reads(self) -> PendingReads:
        """Return what a scan of all rows has to do, and later scans do not."""
        return self.store.pending_reads(self.checkpoints)

    def blocks(self, block_rows: int, start: int = 0) -> Iterator[tuple[Int64, Float32]]:
        """Yield (ids [n], rows [n, F]) from row `start` on, n ≤ block_rows; no block spans two partitions."""
        if block_rows < 1:
            raise ValueError(f"block_rows is {block_rows}")
        dim = self.store.layout.dim
        for partition, (first, last) in enumerate(self.store.partitions()):
            if last <= start:
                continue
            files = self._open_partition(partition)
            for at in range(max(first, start), last, block_rows):
                stop = min(at + block_rows, last)
                row_NF = np.empty((stop - at, self.dim), dtype=np.float32)
                for i, file in enumerate(files):
                    out_ND = row_NF[:, i * dim : (i + 1) * dim]
                    file.read(at - first, stop - first, out_ND=out_ND, unit=self.cosine)
                yield np.arange(at, stop, dtype=np.int64), row_NF

    def stored_blocks(
        self, block_rows: int, partitions: range | None = None
    ) -> Iterator[tuple[Int64, list[StoredPart | CodedPart]]]:
        """Yield (ids [n], one part for each checkpoint), n ≤ block_rows; no block spans two partitions.

        Args:
            block_rows: rows of a block.
            partitions: those whose rows are read; None: all.

        Raises:
            DamagedIndexError: a row is altered.
        """
        if block_rows < 1:
            raise ValueError(f"block_rows is {block_rows}")
        for partition in range(self.store.layout.n_partitions) if partitions is None else partitions:
            first, last = self.store.layout.rows(partition)
            files = self._open_partition(partition)
            for at in range(first, last, block_rows):
                stop = min(at + block_rows, last)
                parts = [self._stored_part(file, at - first, stop - first) for file in files]
                yield np.arange(at, stop, dtype=np.int64), parts

    def _stored_part(self, file: FeatureFile, start: int, stop: int) -> StoredPart | CodedPart:
        """Return rows start..stop-1 of a file."""
        if self.cosine and file.header.dtype == "float32":
            # Squares of stored float32 numbers can overflow or underflow; `read` scales them first.
            return StoredPart(file.read(start, stop, unit=True), np.zeros(stop - start, np.int16))
        return self._wrap_stored(*file.read_stored(start, stop))

    def take(self, ids: Sequence[int] | Int64) -> Float32:
        """Return float32 rows [K, F] in the order of `ids`.

        Raises:
            KeyError: an id is outside 0..N-1.
        """
        id_K = self._check_ids(ids)
        taken = self.store.recall(self, id_K)
        return self._read_rows(id_K) if taken is None else taken[0][taken[1]]

    def locate(self, ids: Sequence[int] | Int64) -> tuple[Float32, Int64]:
        """Return float32 rows [N, F], and the places [K] of the rows with these ids among them.

        The rows are not to be written to: they can be those of an earlier call, in the block of `remember_taken`.

        Raises:
            KeyError: an id is outside 0..N-1.
        """
        id_K = self._check_ids(ids)
        taken = self.store.recall(self, id_K)
        if taken is None:
            row_N, place_K = np.unique(id_K, return_inverse=True)
            taken = self._read_rows(row_N), place_K
        return taken

    def _check_ids(self, ids: Sequence[int] | Int64) -> Int64:
        id_K = np.asarray(ids, dtype=np.int64)
        unknown_K = (id_K < 0) | (id_K >= len(self))
        if unknown_K.any():
            raise KeyError(int(id_K[unknown_K][0]))
        return id_K

    def _read_rows(self, id_K: Int64) -> Float32:
        if len(id_K) > _FEW_ROWS:
            row_KF = self._take_sorted(id_K)
        elif all(self.store.join_rows(checkpoint) for checkpoint in self.checkpoints):
            row_KF = np.empty((len(id_K), self.dim), dtype=np.float32)
            self._take_many(id_K, row_KF)
        else:
            row_KF = self._take_few(id_K)
        self.store.remember(self, id_K, row_KF)
        return row_KF

    def _take_sorted(self, id_K: Int64) -> Float32:
        # In ascending order, so that files are read forwards, each row once, and in groups that bound the memory.
        row_N, place_K = np.unique(id_K, return_inverse=True)
        row_NF = np.empty((len(row_N), self.dim), dtype=np.float32)
        for start in range(0, len(row_N), _ROWS_AT_ONCE):
            self._take_many(row_N[start : start + _ROWS_AT_ONCE], row_NF[start : start + _ROWS_AT_ONCE])
        return row_NF if np.array_equal(row_N, id_K) else row_NF[place_K]

    def _take_few(self, id_K: Int64) -> Float32:
        if not len(id_K):
            return np.empty((0, self.dim), dtype=np.float32)
        partition_K, position_K = (part.tolist() for part in np.divmod(id_K, self.store.layout.partition_rows))
        keys = [(partition, checkpoint) for partition in set(partition_K) for checkpoint in self.checkpoints]
        opened, n_parts = self.store.files(keys), len(self.checkpoints)
        files = {keys[start][0]: opened[start : start + n_parts] for start in range(0, len(keys), n_parts)}
        return take_rows([files[partition] for partition in partition_K], position_K, unit=self.cosine)

    def take_stored(self, ids: Int64) -> Iterator[StoredPart | CodedPart]:
        """Yield the rows with these ids, increasing, in their stored format: one part for each checkpoint.

        A part may be overwritten when the same thread takes other rows, those of the next part among them.

        Raises:
            KeyError: an id is outside 0..N-1.
            DamagedIndexError: a row is altered.
        """
        layout, id_K = self.store.layout, self._check_ids(ids)
        if self.cosine and layout.dtype == "float32":
            # Squares of stored float32 numbers can overflow or underflow; `take` scales them first.
            yield StoredPart(self._take_sorted(id_K), np.zeros(len(id_K), np.int16))
        elif len(id_K):
            for groups in self._group(id_K):
                yield self._wrap_stored(*gather_stored(groups))

    def _wrap_stored(self, stored_KD: Stored, exponent_K: Int16) -> StoredPart | CodedPart:
        """Return stored rows of a checkpoint as a part of this view's rows."""
        layout = self.store.layout
        if is_coded(layout.dtype):
            own_K = np.zeros_like(exponent_K) if self.cosine else exponent_K
            return CodeBlock(stored_KD.view(np.uint8), own_K, layout.dtype, layout.dim, unit=self.cosine)
        return StoredPart(stored_KD, exponent_K, unit=self.cosine)  # type: ignore[arg-type]

    def _take_many(self, id_K: Int64, out_KF: Float32) -> None:
        """Write the rows with these ids into `out_KF`."""
        dim = self.store.layout.dim
        for i, groups in enumerate(self._group(id_K)):
            take_grouped_rows(groups, out_KF[:, i * dim : (i + 1) * dim], unit=self.cosine)

    def _group(self, id_K: Int64) -> Iterator[Sequence[tuple[StoredRows, Int64]]]:
        """Yield, for each checkpoint, the files of the rows with these ids, and their positions, in the same order.

        All files are one group if they are joined. Otherwise, ids that ascend give one group for each file.
        """
        for checkpoint in self.checkpoints:
            joined = self.store.join_rows(checkpoint)
            yield self._split(id_K, checkpoint) if joined is None else [(joined, id_K)]

    def _split(self, id_K: Int64, checkpoint: int) -> list[tuple[StoredRows, Int64]]:
        """Return the files of the rows with these ids at a checkpoint, and their positions, in the same order."""
        partition_K, position_K = np.divmod(id_K, self.store.layout.partition_rows)
        starts = np.flatnonzero(np.diff(partition_K, prepend=-1))
        files = self.store.files([(partition, checkpoint) for partition in partition_K[starts].tolist()])
        return list(zip(files, np.split(position_K, starts[1:]), strict=True))

    def _open_partition(self, partition: int) -> list[FeatureFile]:
        """Return the files of a partition, one for each checkpoint."""
        return self.store.files([(partition, checkpoint) for checkpoint in self.checkpoints])


@dataclass(frozen=True)
class PartitionRows:
    """The rows of consecutive partitions of a view, as a `RowSource` with the same ids and blocks."""

    view: FeatureView
    partitions: range

    @property
    def dim(self) -> int:
        """Return F."""
        return self.view.dim

    @property
    def ids(self) -> range:
        """Return the ids of the rows."""
        layout = self.view.store.layout
        ends = [layout.rows(partition) for partition in self.partitions]
        return range(ends[0][0], ends[-1][1]) if ends else range(0)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.ids)

    def blocks(self, block_rows: int, start: int = 0) -> Iterator[tuple[Int64, Float32]]:
        """Yield (ids [n], rows [n, F]) from position `start` on, n ≤ block_rows; no block spans two partitions."""
        for ids_B, rows_BF in self.view.blocks(block_rows, self.ids.start + start):
            if ids_B[0] >= self.ids.stop:
                return
            yield ids_B, rows_BF

    def stored_blocks(self, block_rows: int) -> Iterator[tuple[Int64, list[StoredPart | CodedPart]]]:
        """Yield (ids [n], one part for each checkpoint), n ≤ block_rows, as the view does."""
        return self.view.stored_blocks(block_rows, self.partitions)

    def take(self, ids: Sequence[int] | Int64) -> Float32:
        """Return float32 rows [K, F] in the order of `ids`, which may be any of the view."""
        return self.view.take(ids)
