"""The files of a store: partitions of rows and checkpoints, their names and headers.

Shapes: N rows, C checkpoints, D sketch dimension of a checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from tracin_ann.choices import DTYPES, Dtype
from tracin_ann.store.stored_rows import FileHeader

_SMALLEST_PARTITION = 8192
_LARGEST_PARTITION = 65_536
_MOST_PARTITIONS = 32
"""Number of partitions above which a new index has larger ones."""
_FILE_NAME = re.compile(r"features-[0-9]{6,}-[0-9]{4,}(-[0-9]+)?\.h5")


def choose_partition_rows(n_rows: int) -> int:
    """Return the number of rows of a partition for a new index of `n_rows` rows.

    Each file takes time to open, a memory map and an fsync, and the candidates of a query lie in most partitions.
    A killed build, on the other hand, repeats at most two partitions of one checkpoint. The size is therefore 8,192
    rows for up to 262,144 rows, and then doubles so that there are at most 32 partitions: each has at most a 16th of
    the rows. The largest size is 65,536 rows, because a build has the rows of two partitions in memory.
    """
    size = _SMALLEST_PARTITION
    while size < _LARGEST_PARTITION and n_rows > _MOST_PARTITIONS * size:
        size *= 2
    return size


@dataclass(frozen=True)
class StoreLayout:
    """The parameters that determine the files of a store.

    Attributes:
        n_rows: N.
        partition_rows: rows of a file; the last partition may have fewer.
        dim: D.
        dtype: dtype of the stored features.
        digests: for each checkpoint, a digest of everything that determines a row's features there. It does not depend
            on the number of rows, so that the files remain valid when the store grows.
    """

    n_rows: int
    partition_rows: int
    dim: int
    dtype: Dtype
    digests: tuple[str, ...]

    def __post_init__(self) -> None:
        """Check the ranges."""
        if min(self.n_rows, self.partition_rows, self.n_checkpoints, self.dim) < 1:
            raise ValueError(f"impossible layout {self}")
        if self.dtype not in DTYPES or not (self.digests and all(self.digests)):
            raise ValueError(f"impossible layout {self}")

    @property
    def n_checkpoints(self) -> int:
        """Return C."""
        return len(self.digests)

    @property
    def n_partitions(self) -> int:
        """Return the number of partitions."""
        return -(-self.n_rows // self.partition_rows)

    @property
    def files(self) -> list[tuple[int, int]]:
        """Return (partition, checkpoint) of every file, partition by partition."""
        return [(p, c) for p in range(self.n_partitions) for c in range(self.n_checkpoints)]

    def rows(self, partition: int) -> tuple[int, int]:
        """Return (start, stop) of a partition."""
        if not 0 <= partition < self.n_partitions:
            raise IndexError(f"partition {partition} of {self.n_partitions}")
        start = partition * self.partition_rows
        return start, min(start + self.partition_rows, self.n_rows)

    def count_rows(self, files: Iterable[tuple[int, int]]) -> int:
        """Return the number of rows of files (partition, checkpoint)."""
        return sum(stop - start for start, stop in (self.rows(partition) for partition, _ in files))

    def file_name(self, partition: int, checkpoint: int) -> str:
        """Return the name of a file.

        The name of an incomplete partition includes its number of rows: when the partition grows, the old file remains
        for its readers.
        """
        start, stop = self.rows(partition)
        rows = "" if stop - start == self.partition_rows else f"-{stop - start}"
        return f"features-{partition:06d}-{checkpoint:04d}{rows}.h5"

    def header(self, partition: int, checkpoint: int) -> FileHeader:
        """Return the header that the file must have."""
        if not 0 <= checkpoint < self.n_checkpoints:
            raise IndexError(f"checkpoint {checkpoint} of {self.n_checkpoints}")
        start, stop = self.rows(partition)
        return FileHeader(self.digests[checkpoint], start, stop, checkpoint, self.dim, self.dtype)


def is_feature_file(name: str) -> bool:
    """Return whether a file name has the form of a feature file's."""
    return _FILE_NAME.fullmatch(name) is not None
