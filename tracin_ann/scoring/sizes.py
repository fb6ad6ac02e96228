"""The sizes of an index that a build would write."""

from __future__ import annotations

from dataclasses import dataclass

from tracin_ann.search import Codes, estimate_bytes, expect_index
from tracin_ann.store import Dtype, measure_row_bytes

# Bytes of a row's columns in a feature file: id, exponent, squared norm, loss.
_COLUMN_BYTES = 8 + 2 + 8 + 4
# Copies of the rows of a partition at one checkpoint, in float32, that are in memory while they are computed.
_COPIES = 3


@dataclass(frozen=True)
class IndexShape:
    """What the size of an index follows from, besides D.

    Attributes:
        n_rows: N.
        n_checkpoints: C.
        partition_rows: rows of a partition.
        dtype: of the stored features.
        index: `auto` or the kind of the search index.
        codes: how inverted lists store rows.
    """

    n_rows: int
    n_checkpoints: int
    partition_rows: int
    dtype: Dtype
    index: str
    codes: Codes

    def estimate_size(self, dim: int) -> IndexSize:
        """Return the sizes with sketches of D numbers."""
        feature_dim = dim * self.n_checkpoints
        choice = expect_index(self.index, self.n_rows, feature_dim)
        index_bytes = estimate_bytes(self.index, self.n_rows, feature_dim, self.codes)
        row_bytes = self.n_checkpoints * measure_row_bytes(dim, self.dtype)
        return IndexSize(
            choice.kind,
            choice.reason,
            row_bytes,
            self.n_rows * (row_bytes + self.n_checkpoints * _COLUMN_BYTES) + index_bytes,
            min(self.n_rows, self.partition_rows) * dim * 4 * _COPIES,
            2 * index_bytes,
        )


@dataclass(frozen=True)
class IndexSize:
    """The sizes of an index.

    Attributes:
        kind: kind of search index.
        reason: why this kind is chosen.
        row_bytes: stored numbers of a row.
        disk_bytes: the feature files and the search index.
        block_bytes: memory for the rows of a partition while features are computed.
        index_bytes: memory while the search index is built.
    """

    kind: str
    reason: str
    row_bytes: int
    disk_bytes: int
    block_bytes: int
    index_bytes: int

    @property
    def memory_bytes(self) -> int:
        """Return the larger memory of the two phases, without batches of examples."""
        return max(self.block_bytes, self.index_bytes)
