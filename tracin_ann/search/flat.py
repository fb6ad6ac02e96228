"""Exact search: inner products of all rows of a source with all queries, by float32 matrix products in blocks.

Shapes: N rows, B rows of a block, Q queries, F feature dimension, K results.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tracin_ann.device import free_memory_bytes
from tracin_ann.errors import NonFiniteError, problem
from tracin_ann.search.base import check_queries
from tracin_ann.search.topk import best_positions, from_padded, negate
from tracin_ann.types import Float32, Int64, RowSource, TopK

_SCORES_AT_ONCE = 2**24
"""Entries of the Q × B block of scores that is in memory at a time: 64 MiB."""
_RESIDENT_SHARE = 0.5
"""Rows stay in an accelerator's memory if they need at most this share of its free memory."""


class FlatIndex:
    """The exact scan of a `RowSource`, without index files.

    On an accelerator, rows that fit stay in its memory after the first search.
    """

    kind = "flat"

    def __init__(self, source: RowSource, device: torch.device, block_rows: int = 8192) -> None:
        """Store the arguments; rows are read by the first search.

        Args:
            source: the rows.
            device: device of the matrix products.
            block_rows: rows read and multiplied at a time.
        """
        self._source = source
        self._device = device
        self._block_rows = block_rows
        self._resident: list[tuple[Tensor, Tensor]] | None = None

    @property
    def dim(self) -> int:
        """Return F, the length of a row."""
        return self._source.dim

    def __len__(self) -> int:
        """Return N, the number of rows."""
        return len(self._source)

    def search(self, queries_QF: Float32, k: int, allowed: Int64 | None = None) -> TopK:
        """Return the k rows of largest inner product with each query.

        Raises:
            NonFiniteError: a query, or the score of a result, is not finite.
        """
        return self._restrict(allowed)._scan(queries_QF, k, signs=(1.0,))[0]

    def search_both(self, queries_QF: Float32, k: int, allowed: Int64 | None = None) -> tuple[TopK, TopK]:
        """Return (proponents, opponents) from one pass over the rows."""
        proponents, opponents = self._restrict(allowed)._scan(queries_QF, k, signs=(1.0, -1.0))
        return proponents, negate(opponents)

    def _restrict(self, allowed: Int64 | None) -> FlatIndex:
        """Return the scan of the allowed rows."""
        if allowed is None or len(allowed) == len(self):
            return self
        return FlatIndex(Subset(self._source, allowed), self._device, self._block_rows)

    def _scan(self, queries_QF: Float32, k: int, signs: tuple[float, ...]) -> list[TopK]:
        """Return the best k of sign × inner product for each sign."""
        queries = torch.from_numpy(check_queries(self, queries_QF, k)).to(self._device)
        at_once = max(1, _SCORES_AT_ONCE // self._block_rows)
        chunks = [queries[at : at + at_once] for at in range(0, len(queries), at_once)]
        found = [[_RunningBest(len(chunk), k, self._device) for chunk in chunks] for _ in signs]
        for ids_B, rows_BF in self._blocks():
            for at, chunk_QF in enumerate(chunks):
                scores_QB = chunk_QF @ rows_BF.T
                for side, sign in zip(found, signs, strict=True):
                    side[at].add(ids_B, sign * scores_QB)
        return [self._collect(side, k) for side in found]

    def _collect(self, chunks: list[_RunningBest], k: int) -> TopK:
        """Return the results of all chunks of queries."""
        ids = [chunk.ids_QK.cpu().numpy() for chunk in chunks] or [np.zeros((0, 0), np.int64)]
        scores = [chunk.scores_QK.cpu().numpy() for chunk in chunks] or [np.zeros((0, 0), np.float32)]
        ids_QK, scores_QK = np.concatenate(ids), np.concatenate(scores)
        check_finite(ids_QK, scores_QK)
        return from_padded(ids_QK, scores_QK, k, np.full(len(ids_QK), len(self), dtype=np.int64))

    def _blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (ids [B], rows [B, F]) on the device, by increasing id."""
        if self._resident is not None:
            yield from self._resident
            return
        resident: list[tuple[Tensor, Tensor]] | None = [] if self._fits_in_memory() else None
        for ids, rows in self._source.blocks(self._block_rows):
            block = (as_tensor(ids).to(self._device), as_tensor(rows).to(self._device))
            if resident is not None:
                resident.append(block)
            yield block
        self._resident = resident

    def _fits_in_memory(self) -> bool:
        """Return whether the rows can stay in the memory of an accelerator."""
        rows_bytes = len(self) * (4 * self.dim + 8)
        return self._device.type != "cpu" and rows_bytes <= _RESIDENT_SHARE * free_memory_bytes(self._device)


@dataclass(frozen=True)
class Subset:
    """The rows of a source with these ids (increasing), as a `RowSource`."""

    source: RowSource
    ids: Int64

    @property
    def dim(self) -> int:
        """Return F."""
        return self.source.dim

    def __len__(self) -> int:
        """Return the number of these rows."""
        return len(self.ids)

    def blocks(self, block_rows: int, start: int = 0) -> Iterator[tuple[Int64, Float32]]:
        """Yield (ids [B], rows [B, F]) by increasing id."""
        if 2 * len(self.ids) < len(self.source) or start:
            for at in range(start, len(self.ids), block_rows):
                ids_B = self.ids[at : at + block_rows]
                yield ids_B, self.source.take(ids_B)
            return
        # For most of the rows, reading complete blocks is faster than reading rows by id.
        for ids_B, rows_BF in self.source.blocks(block_rows):
            first, last = np.searchsorted(self.ids, [ids_B[0], ids_B[-1] + 1])
            chosen = self.ids[first:last]
            if len(chosen) == len(ids_B):
                yield ids_B, rows_BF
            elif len(chosen):
                yield chosen, rows_BF[np.searchsorted(ids_B, chosen)]

    def take(self, ids: Sequence[int] | Int64) -> Float32:
        """Return the rows with these ids, [B, F]."""
        return self.source.take(ids)


class _RunningBest:
    """The best k results so far for one chunk of queries; blocks are added by increasing id."""

    def __init__(self, n_queries: int, k: int, device: torch.device) -> None:
        self._k = k
        self.ids_QK = torch.zeros((n_queries, 0), dtype=torch.int64, device=device)
        self.scores_QK = torch.zeros((n_queries, 0), dtype=torch.float32, device=device)

    def add(self, ids_B: Tensor, scores_QB: Tensor) -> None:
        """Merge a block with higher ids; at equal scores earlier positions win, which have lower ids."""
        where = best_positions(scores_QB, self._k)
        ids = torch.cat([self.ids_QK, ids_B[where]], dim=1)
        scores = torch.cat([self.scores_QK, scores_QB.gather(1, where)], dim=1)
        where = best_positions(scores, self._k)
        self.ids_QK, self.scores_QK = ids.gather(1, where), scores.gather(1, where)


def as_tensor(array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> Tensor:
    """Return a tensor that shares the array's memory, or a copy if the array is read-only or not contiguous."""
    contiguous = np.ascontiguousarray(array)
    return torch.from_numpy(contiguous if contiguous.flags.writeable else contiguous.copy())


def check_finite(ids: Int64, scores: Float32) -> None:
    """Check that all scores are finite: rows can be damaged, and products can overflow float32.

    Raises:
        NonFiniteError: a score is not; the message has the first such id.
    """
    bad = ids[~np.isfinite(scores)]
    if len(bad):
        raise NonFiniteError(
            problem(
                f"the inner product with row {bad[0]} is not finite",
                got="NaN or infinity",
                expected="a finite score",
                remedy="rebuild the index; if the error remains, fix the example or its checkpoint",
            )
        )
