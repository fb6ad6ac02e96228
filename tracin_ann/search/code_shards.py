"""Product codes in shards: each shard has the rows of a range of ids, with the same coder, and a file of its own.

A search scans the codes of every shard, and keeps the best candidates of all. A shard is read when it is first
searched, unless it is the only one: with workers, no process has the codes of all rows in memory.

Shapes: N rows, B rows of a block, Q queries, M candidates, R reduced dimension, S shards.
"""

from __future__ import annotations

import copy
import itertools
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tracin_ann.files import report_damage
from tracin_ann.search.faiss_file import REMEDY, WrittenFile
from tracin_ann.search.product_codes import CODE_BITS, Layout, ProductCodes
from tracin_ann.search.product_scan import scan_codes, select_candidates
from tracin_ann.types import Float32, Int64

_LARGEST_ID = np.iinfo(np.int64).max


@dataclass(frozen=True, eq=False)
class CodeQuery:
    """A search in the codes of one shard.

    Attributes:
        queries_QR: float32 reduced queries.
        n_candidates: candidates per query.
        allowed: int64 ids of the shard, increasing, to which the candidates are restricted; None: all.
    """

    queries_QR: Float32
    n_candidates: int
    allowed: Int64 | None

    def run(self, codes: ProductCodes) -> tuple[Int64, Float32]:
        """Return (ids [Q, M], estimated scores [Q, M]), unordered; the id of padding is -1."""
        return scan_codes(codes, self.queries_QR, self.n_candidates, self.allowed)


CodeScanner = Callable[[Sequence[CodeQuery]], Sequence[tuple[Int64, Float32]]]
"""Runs one query in each shard; returns the results of the shards that answered."""


@dataclass(frozen=True, eq=False)
class CodeFile:
    """The file of a shard, and what it contains."""

    path: Path
    written: WrittenFile
    layout: Layout
    factor_N: Float32

    def open(self) -> ProductCodes:
        """Return the codes.

        Raises:
            DamagedIndexError: the file is missing, or is not the one that was written.
        """
        with report_damage(self.path, "a file written by a build", REMEDY):
            return ProductCodes.load(self.path, self.written, self.layout, self.factor_N)


class CodeShards:
    """Product codes whose rows are split by ranges of ids; one shard is not split."""

    def __init__(self, layout: Layout, factors: Sequence[Float32], first_id_S: Int64) -> None:
        """Store what is known without the codes; use `hold` or `load` to create shards.

        Args:
            layout: of all codes.
            factors: of the rows of each shard.
            first_id_S: int64, nondecreasing: a shard has the rows from its first id to that of the next shard.
        """
        self.layout, self.factors, self.first_id_S = layout, tuple(factors), first_id_S
        self.files: Sequence[CodeFile] = ()
        self._opened: dict[int, ProductCodes] = {}
        self._lock = threading.Lock()
        self._scanner: CodeScanner | None = None

    @classmethod
    def hold(cls, shards: Sequence[ProductCodes], first_id_S: Int64) -> CodeShards:
        """Return shards in memory."""
        held = cls(shards[0].layout, [shard.factor_N for shard in shards], first_id_S)
        held._opened = dict(enumerate(shards))
        return held

    @classmethod
    def load(cls, files: Sequence[CodeFile], first_id_S: Int64) -> CodeShards:
        """Return the shards of files; a single one is read at once.

        Raises:
            DamagedIndexError: the single file is missing, or is not the one that was written.
        """
        loaded = cls(files[0].layout, [file.factor_N for file in files], first_id_S)
        loaded.files = files
        if len(files) == 1:
            loaded.open(0)
        return loaded

    def with_scanner(self, scanner: CodeScanner) -> CodeShards:
        """Return the same shards, which `scanner` searches."""
        other = copy.copy(self)
        other._scanner = scanner
        return other

    def open(self, number: int) -> ProductCodes:
        """Return the codes of a shard.

        Raises:
            DamagedIndexError: its file is missing, or is not the one that was written.
        """
        with self._lock:
            if number not in self._opened:
                self._opened[number] = self.files[number].open()
            return self._opened[number]

    def save(self, paths: Sequence[Path]) -> list[WrittenFile]:
        """Write each shard to its path; the caller renames and fsyncs."""
        return [self.open(number).save(path) for number, path in enumerate(paths)]

    def __len__(self) -> int:
        """Return the number of rows."""
        return sum(map(len, self.factors))

    @property
    def bytes_per_row(self) -> int:
        """Return the bytes of a row: its codes, its id, twice, and its factor."""
        return math.ceil(len(self.layout.size_C) * CODE_BITS / 8) + 2 * 8 + 4

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """Return the range of ids of each shard, as (first, first of the next)."""
        return list(itertools.pairwise([0, *self.first_id_S[1:].tolist(), _LARGEST_ID]))

    def list_ids(self) -> Int64:
        """Return the ids of all rows, increasing in each shard."""
        return np.concatenate([self.open(number).ids_N for number in range(len(self.factors))])

    def count_misplaced(self) -> int:
        """Return the number of rows that are in the shard of another range of ids."""
        return sum(
            int(((self.open(number).ids_N < first) | (self.open(number).ids_N >= last)).sum())
            for number, (first, last) in enumerate(self.ranges)
        )

    def count_wrong(self, rows_BR: Float32, id_B: Int64) -> int:
        """Return how many rows [B, R] do not have the codes and factors that are stored for these ids, increasing."""
        parts = ((number, slice(*np.searchsorted(id_B, ends))) for number, ends in enumerate(self.ranges))
        return sum(self.open(at).count_wrong(rows_BR[part], id_B[part]) for at, part in parts if part.stop > part.start)

    def scan(self, queries_QR: Float32, n_candidates: int, allowed: Int64 | None = None) -> tuple[Int64, Float32]:
        """Return (ids int64, estimated scores float32) [Q, M] of the best rows by their codes, unordered.

        The id of padding is -1, and its score -infinity.

        Args:
            queries_QR: float32.
            n_candidates: M, if there are as many rows.
            allowed: int64 ids, increasing, to which the candidates are restricted; None: all.
        """
        queries = [
            CodeQuery(
                queries_QR, n_candidates, None if allowed is None else allowed[slice(*np.searchsorted(allowed, ends))]
            )
            for ends in self.ranges
        ]
        if self._scanner is None:
            found: Sequence[tuple[Int64, Float32]] = [query.run(self.open(at)) for at, query in enumerate(queries)]
        else:
            found = self._scanner(queries)
        if len(found) == 1 == len(queries):
            return found[0]
        # Other shards may not have answered, so there can be less than M rows.
        shape = len(queries_QR), min(n_candidates, len(self))
        found = [(np.full(shape, -1, np.int64), np.full(shape, -np.inf, np.float32)), *found]
        ids_QX, scores_QX = (np.concatenate(arrays, axis=1) for arrays in zip(*found, strict=True))
        return select_candidates(ids_QX, scores_QX, shape[1])


def list_code_files(n_shards: int) -> tuple[str, ...]:
    """Return the names of the files of the shards."""
    return ("codes.faiss",) if n_shards == 1 else tuple(f"codes-{number:04d}.faiss" for number in range(n_shards))
