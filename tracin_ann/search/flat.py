"""Exact search: every row of a source against every query, by float32 matrix products in blocks.

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
"""Entries of the Q × B block of scores held at once: 64 MiB."""
_RESIDENT_SHARE = 0.5
"""Share of an accelerator's free memory that rows may fill and stay."""


class FlatIndex:
    """The exact scan of a `RowSource`; keeps no file, reads the source.

    On an accelerator the rows stay in its memory after the first search where they fit.
    """

    kind = "flat"

    def __init__(self, source: RowSource, device: torch.device, block_rows: int = 8192) -> None:
        """Remember what to scan and where; nothing is read before the first search.

        Args:
            source: the rows.
            device: computes the products.
            block_rows: rows read and multiplied at once.
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
            NonFiniteError: a query, or a row among the answers, is not finite.
        """
        return self._of(allowed)._scan(queries_QF, k, signs=(1.0,))[0]

    def search_both(self, queries_QF: Float32, k: int, allowed: Int64 | None = None) -> tuple[TopK, TopK]:
        """Return (proponents, opponents) from one pass over the rows."""
        proponents, opponents = self._of(allowed)._scan(queries_QF, k, signs=(1.0, -1.0))
        return proponents, negate(opponents)

    def _of(self, allowed: Int64 | None) -> FlatIndex:
        if allowed is None or len(allowed) == len(self):
            return self
        return FlatIndex(Subset(self._source, allowed), self._device, self._block_rows)

    def _scan(self, queries_QF: Float32, k: int, signs: tuple[float, ...]) -> list[TopK]:
        """Return, for each sign, the best k of sign × inner product."""
        queries = torch.from_numpy(check_queries(self, queries_QF, k)).to(self._device)
        at_once = max(1, _SCORES_AT_ONCE // self._block_rows)
        chunks = [queries[at : at + at_once] for at in range(0, len(queries), at_once)]
        found = [[_RunningBest(len(chunk), k, self._device) for chunk in chunks] for _ in signs]
        for ids_B, rows_BF in self._blocks():
            for at, chunk_QF in enumerate(chunks):
                scores_QB = chunk_QF @ rows_BF.T
                for side, sign in zip(found, signs, strict=True):
                    side[at].add(ids_B, sign * scores_QB)
        return [self._answer(side, k) for side in found]

    def _answer(self, chunks: list[_RunningBest], k: int) -> TopK:
        ids = [chunk.ids_QK.cpu().numpy() for chunk in chunks] or [np.zeros((0, 0), np.int64)]
        scores = [chunk.scores_QK.cpu().numpy() for chunk in chunks] or [np.zeros((0, 0), np.float32)]
        ids_QK, scores_QK = np.concatenate(ids), np.concatenate(scores)
        check_finite(ids_QK, scores_QK)
        return from_padded(ids_QK, scores_QK, k, np.full(len(ids_QK), len(self), dtype=np.int64))

    def _blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (ids [B], rows [B, F]) on the device, in rising id order."""
        if self._resident is not None:
            yield from self._resident
            return
        keep: list[tuple[Tensor, Tensor]] | None = [] if self._fits() else None
        for ids, rows in self._source.blocks(self._block_rows):
            block = (as_tensor(ids).to(self._device), as_tensor(rows).to(self._device))
            if keep is not None:
                keep.append(block)
            yield block
        self._resident = keep

    def _fits(self) -> bool:
        """Return whether the rows are to stay on an accelerator."""
        rows_bytes = len(self) * (4 * self.dim + 8)
        return self._device.type != "cpu" and rows_bytes <= _RESIDENT_SHARE * free_memory_bytes(self._device)


@dataclass(frozen=True)
class Subset:
    """Some rows of a source, as a RowSource: `ids` rise."""

    source: RowSource
    ids: Int64

    @property
    def dim(self) -> int:
        """Return F."""
        return self.source.dim

    def __len__(self) -> int:
        """Return how many rows were chosen."""
        return len(self.ids)

    def blocks(self, block_rows: int, start: int = 0) -> Iterator[tuple[Int64, Float32]]:
        """Yield the rows in rising id order."""
        if 2 * len(self.ids) < len(self.source) or start:
            for at in range(start, len(self.ids), block_rows):
                ids_B = self.ids[at : at + block_rows]
                yield ids_B, self.source.take(ids_B)
            return
        # Most rows: whole blocks are read faster than rows by id.
        for ids_B, rows_BF in self.source.blocks(block_rows):
            first, last = np.searchsorted(self.ids, [ids_B[0], ids_B[-1] + 1])
            chosen = self.ids[first:last]
            if len(chosen) == len(ids_B):
                yield ids_B, rows_BF
            elif len(chosen):
                yield chosen, rows_BF[np.searchsorted(ids_B, chosen)]

    def take(self, ids: Sequence[int] | Int64) -> Float32:
        """Return rows of these ids."""
        return self.source.take(ids)


class _RunningBest:
    """The best k of the blocks seen so far, of one chunk of queries; blocks come in rising id order."""

    def __init__(self, n_queries: int, k: int, device: torch.device) -> None:
        self._k = k
        self.ids_QK = torch.zeros((n_queries, 0), dtype=torch.int64, device=device)
        self.scores_QK = torch.zeros((n_queries, 0), dtype=torch.float32, device=device)

    def add(self, ids_B: Tensor, scores_QB: Tensor) -> None:
        """Let a block of higher ids compete: earlier positions win ties, and they hold lower ids."""
        where = best_positions(scores_QB, self._k)
        ids = torch.cat([self.ids_QK, ids_B[where]], dim=1)
        scores = torch.cat([self.scores_QK, scores_QB.gather(1, where)], dim=1)
        where = best_positions(scores, self._k)
        self.ids_QK, self.scores_QK = ids.gather(1, where), scores.gather(1, where)


def as_tensor(array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> Tensor:
    """Return a tensor over the array's memory, or over a copy where torch may not write to it."""
    whole = np.ascontiguousarray(array)
    return torch.from_numpy(whole if whole.flags.writeable else whole.copy())


def check_finite(ids: Int64, scores: Float32) -> None:
    """Refuse scores that are not numbers, whether of spoilt rows or past float32's range.

    Raises:
        NonFiniteError: names the first such id.
    """
    bad = ids[~np.isfinite(scores)]
    if len(bad):
        raise NonFiniteError(
            problem(
                f"the inner product with row {bad[0]} is not finite",
                got="NaN or infinity",
                expected="finite features",
                remedy="rebuild the index; if it stays, mend the example or its checkpoint",
            )
        )
