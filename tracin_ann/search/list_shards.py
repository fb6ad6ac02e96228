"""Inverted lists in shards: each shard has the rows of a range of ids, in lists of its own, and a file of its own.

All shards have the same list numbers and codes. A search scans the same lists in every shard and merges the
candidates, so it finds those of lists that are not split, except among equal scores of the last candidates.

Shapes: Q queries, W keys (list numbers) per query, L lists, B rows of a block, R reduced dimension, K results,
S shards.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tracin_ann.search.inverted_lists import Codes, InvertedLists
from tracin_ann.search.topk import select_padded
from tracin_ann.types import Float32, Int64

_LARGEST_ID = np.iinfo(np.int64).max


@dataclass(frozen=True, eq=False)
class ListQuery:
    """A search in the lists of one shard.

    Attributes:
        queries_QR: float32 reduced queries.
        k: results per query.
        key_QW: int64 list numbers; -1: padding.
        allowed: int64 ids of the shard, increasing, to which the results are restricted; None: all.
    """

    queries_QR: Float32
    k: int
    key_QW: Int64
    allowed: Int64 | None

    def run(self, lists: InvertedLists) -> tuple[Int64, Float32]:
        """Return padded (ids [Q, k], scores [Q, k])."""
        return lists.scan(self.queries_QR, self.k, self.key_QW, self.allowed)


@dataclass(frozen=True)
class ShardFile:
    """The file of a shard, and what it contains."""

    path: Path
    n_lists: int
    dim: int
    codes: Codes

    def open(self) -> InvertedLists:
        """Return the lists, memory-mapped.

        Raises:
            DamagedIndexError: the file is missing or has other lists.
        """
        return InvertedLists.load(self.path, (self.n_lists, self.dim), self.codes)


Scanner = Callable[[Sequence[ListQuery]], Sequence[tuple[Int64, Float32]]]
"""Runs one query in each shard; returns the results of the shards that answered."""


class ListShards:
    """Inverted lists whose rows are split by ranges of ids; one shard is not split."""

    def __init__(self, shards: Sequence[InvertedLists], first_id_S: Int64, scanner: Scanner | None = None) -> None:
        """Store the arguments.

        Args:
            shards: lists of the same shape and codes.
            first_id_S: int64, nondecreasing: a shard has the rows from its first id to that of the next shard.
            scanner: runs searches elsewhere; None: in this thread, one shard after the other.
        """
        self._shards, self.first_id_S, self._scanner = list(shards), first_id_S, scanner

    @classmethod
    def split(cls, lists: InvertedLists, n_shards: int, ids_N: Int64) -> ListShards:
        """Return empty shards of about equal numbers of the rows with these ids (increasing), with codes as `lists`."""
        starts = np.arange(n_shards) * len(ids_N) // n_shards
        return cls([lists.make_empty_copy() for _ in range(n_shards)], ids_N[starts])

    @classmethod
    def load(cls, paths: Sequence[Path], shape: tuple[int, int], codes: Codes, first_id_S: Int64) -> ListShards:
        """Return memory-mapped shards, see `InvertedLists.load`."""
        return cls([InvertedLists.load(path, shape, codes) for path in paths], first_id_S)

    def with_scanner(self, scanner: Scanner) -> ListShards:
        """Return the same shards, which `scanner` searches."""
        return ListShards(self._shards, self.first_id_S, scanner)

    def save(self, paths: Sequence[Path]) -> None:
        """Write each shard to its path; the caller renames and fsyncs."""
        for shard, path in zip(self._shards, paths, strict=True):
            shard.save(path)

    def __len__(self) -> int:
        """Return the number of rows."""
        return sum(len(shard) for shard in self._shards)

    @property
    def whole(self) -> InvertedLists | None:
        """Return the lists if they are not split, and searched in this process; otherwise None."""
        return self._shards[0] if self.n_shards == 1 and self._scanner is None else None

    @property
    def n_shards(self) -> int:
        """Return S."""
        return len(self._shards)

    @property
    def dim(self) -> int:
        """Return R."""
        return self._shards[0].dim

    @property
    def n_lists(self) -> int:
        """Return L."""
        return self._shards[0].n_lists

    @property
    def bytes_per_row(self) -> int:
        """Return the bytes of a row: its code and its id."""
        return self._shards[0].bytes_per_row

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """Return the range of ids of each shard, as (first, first of the next)."""
        return list(itertools.pairwise([0, *self.first_id_S[1:].tolist(), _LARGEST_ID]))

    def sizes(self) -> Int64:
        """Return the number of rows of each list, int64 [L]."""
        sizes_L: Int64 = np.sum([shard.sizes() for shard in self._shards], axis=0, dtype=np.int64)
        return sizes_L

    def merge(self, other: InvertedLists) -> None:
        """Append the rows of other lists; these can become empty."""
        if len(self._shards) == 1:
            self._shards[0].merge(other)
            return
        for shard, (first, last) in zip(self._shards, self.ranges, strict=True):
            shard.copy_range(other, first, last)

    def replace(self, number: int, change: Callable[[InvertedLists], InvertedLists]) -> None:
        """Replace a shard by lists with the same rows."""
        self._shards[number] = change(self._shards[number])

    def ids(self) -> tuple[Int64, Int64]:
        """Return the ids of all rows, ordered by list and then by shard, and the list number of each."""
        ids, lists = (np.concatenate(arrays) for arrays in zip(*(shard.ids() for shard in self._shards), strict=True))
        order = np.argsort(lists, kind="stable")
        return ids[order], lists[order]

    def decode_list(self, number: int) -> Float32:
        """Return the rows of one list, decoded, float32 [B, R], in the order of `ids`."""
        return np.concatenate([shard.decode_list(number) for shard in self._shards])

    def quantize(self, rows_BR: Float32) -> tuple[Float32, Float32]:
        """Return rows [B, R] rounded to their codes, and the distance to the neighboring codes, [B, R]."""
        return self._shards[0].quantize(rows_BR)

    def find_misplaced_rows(self) -> int:
        """Return the number of rows that are in the shard of another range of ids."""
        wrong = 0
        for shard, (first, last) in zip(self._shards, self.ranges, strict=True):
            ids, _ = shard.ids()
            wrong += int(((ids < first) | (ids >= last)).sum())
        return wrong

    def scan(self, queries_QR: Float32, k: int, key_QW: Int64, allowed: Int64 | None = None) -> tuple[Int64, Float32]:
        """Return padded (ids [Q, k], scores [Q, k]) of the rows in the lists with these keys.

        Args:
            queries_QR: float32.
            k: results per query.
            key_QW: int64 list numbers; -1: padding.
            allowed: int64 ids, increasing, to which the results are restricted; None: all.
        """
        queries = [
            ListQuery(
                queries_QR, k, key_QW, None if allowed is None else allowed[slice(*np.searchsorted(allowed, ends))]
            )
            for ends in self.ranges
        ]
        if self._scanner is None:
            found: Sequence[tuple[Int64, Float32]] = [
                query.run(shard) for query, shard in zip(queries, self._shards, strict=True)
            ]
        else:
            found = self._scanner(queries)
        if len(found) == 1:
            return found[0]
        nothing = np.full((len(queries_QR), k), -1, np.int64), np.zeros((len(queries_QR), k), np.float32)
        ids_QM, scores_QM = (np.concatenate(arrays, axis=1) for arrays in zip(nothing, *found, strict=True))
        return select_padded(ids_QM, scores_QM, k)


def list_shard_files(n_shards: int) -> tuple[str, ...]:
    """Return the names of the files of the shards."""
    return ("ivf.faiss",) if n_shards == 1 else tuple(f"ivf-{number:04d}.faiss" for number in range(n_shards))
