"""Exact search: inner products of all rows of a source with all queries, by float32 matrix products in blocks.

On a CPU, a source that is also `StoredRows` is scanned in its stored format, without a decoded copy of the rows. Other
processes can scan parts of it, see `RowQuery`.

Shapes: N rows, B rows of a block, S rows of the blocks whose scores are in memory, Q queries, F feature dimension,
K results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tracin_ann.device import disable_tf32, free_memory_bytes
from tracin_ann.errors import NonFiniteError, problem
from tracin_ann.search.base import check_queries
from tracin_ann.search.stored_scores import StoredScorer
from tracin_ann.search.topk import best_positions, from_padded, make_empty, merge, negate
from tracin_ann.types import Float32, Int64, LazyRows, PendingReads, RowSource, StoredRows, TopK

Sign = Literal[1, -1]
Block = tuple[Int64, Callable[[Tensor], None]]
"""The ids [B] of a block, and a function that writes the scores [Q, B] of its rows into a tensor, or starts to."""

_SCORES_AT_ONCE = 2**24
"""Entries of the Q × S scores that are in memory at a time: 64 MiB."""
_TAKEN_SHARES = (1 / 16, 1 / 2)
"""A smaller share of a source of stored rows is read by id; otherwise all rows are scanned. The second share is that of
`_MANY_QUERIES`: most of the time of their scan are matrix products, which reading by id avoids."""
_MANY_QUERIES = 64
_RESIDENT_SHARE = 0.5
"""Rows stay in an accelerator's memory if they need at most this share of its free memory."""


@dataclass(frozen=True, eq=False)
class RowQuery:
    """A scan of a part of the stored rows of a `FlatIndex`, for the rows of largest sign × inner product.

    Attributes:
        queries_QF: float32 queries.
        k: results per query.
        signs: of the inner products.
        allowed: int64 ids, increasing, to which the results are restricted; None: all.
    """

    queries_QF: Float32
    k: int
    signs: tuple[Sign, ...]
    allowed: Int64 | None

    def run(self, source: RowSource) -> list[TopK]:
        """Return the results for each sign on the CPU; scores can be NaN or infinite.

        A score has the same bits as in a scan of all rows if blocks of stored rows begin at the same rows.
        """
        rows = source if self.allowed is None else Subset(source, self.allowed)
        scan = FlatIndex(rows, torch.device("cpu"), takes_few=False)
        return scan.find(self.queries_QF, self.k, self.signs)


RowScanner = Callable[[RowQuery], Sequence[Sequence[TopK]]]
"""Scans parts of the rows; returns, for each part that was scanned, the results for each sign."""


class FlatIndex:
    """The exact scan of a `RowSource`, without index files.

    On an accelerator, rows that fit stay in its memory after the first search.
    """

    kind = "flat"

    def __init__(
        self,
        source: RowSource,
        device: torch.device,
        block_rows: int = 8192,
        *,
        scanner: RowScanner | None = None,
        takes_few: bool = True,
    ) -> None:
        """Store the arguments; rows are read by the first search.

        Args:
            source: the rows.
            device: device of the matrix products.
            block_rows: rows read and multiplied at a time.
            scanner: scans the stored rows of the source elsewhere, except few of them; None: this process does.
            takes_few: whether few stored rows are read by id, instead of a scan of all of them.
        """
        self._source = source
        self._device = device
        self._block_rows = block_rows
        self._scanner = scanner
        self._takes_few = takes_few
        self._resident: list[tuple[Int64, Tensor]] | None = None

    @property
    def source(self) -> RowSource:
        """Return the rows."""
        return self._source

    @property
    def dim(self) -> int:
        """Return F, the length of a row."""
        return self._source.dim

    def __len__(self) -> int:
        """Return N, the number of rows."""
        return len(self._source)

    @property
    def device(self) -> torch.device:
        """Return the device of the matrix products."""
        return self._device

    @property
    def is_resident(self) -> bool:
        """Return whether the rows are in the memory of an accelerator."""
        return self._resident is not None

    def describe_place(self, k: int, allowed: Int64 | None = None) -> str:
        """Return where a search runs, as text for users; "" for a CPU and for other processes."""
        is_here = self._scanner is None and self._device.type != "cpu"
        return f"scanned on {self._device} by PyTorch" if is_here else ""

    def pending_reads(self) -> PendingReads:
        """Return what the next scan has to do once in this process: files to open and bytes to verify."""
        if self._scanner is None and isinstance(self._source, LazyRows):
            return self._source.pending_reads()
        return PendingReads()

    def without_resident_rows(self) -> FlatIndex:
        """Return the scan of the same rows, none of which is in an accelerator's memory, as a query creates it."""
        return FlatIndex(self._source, self._device, self._block_rows)

    def search(self, queries_QF: Float32, k: int, allowed: Int64 | None = None) -> TopK:
        """Return the k rows of largest inner product with each query.

        Raises:
            NonFiniteError: a query, or the score of a result, is not finite.
        """
        return self.search_signs(queries_QF, k, (1,), allowed)[0]

    def search_both(self, queries_QF: Float32, k: int, allowed: Int64 | None = None) -> tuple[TopK, TopK]:
        """Return (proponents, opponents) from one pass over the rows."""
        proponents, opponents = self.search_signs(queries_QF, k, (1, -1), allowed)
        return proponents, negate(opponents)

    def search_signs(
        self, queries_QF: Float32, k: int, signs: Sequence[Sign], allowed: Int64 | None = None
    ) -> list[TopK]:
        """Return the k rows of largest sign × inner product for each sign, from one pass over the rows."""
        queries_QF = check_queries(self, queries_QF, k)
        restricted = self._restrict(allowed)
        source, ids = _find_stored_rows(restricted.source)
        if self._scanner is None or source is None or self._is_few(source, ids, len(queries_QF)):
            found = restricted.find(queries_QF, k, signs)
        else:
            parts = self._scanner(RowQuery(queries_QF, k, tuple(signs), ids))
            found = [_merge_parts([part[at] for part in parts], k, len(queries_QF)) for at in range(len(signs))]
        for top in found:
            _check_scores(top)
        return found

    def _is_few(self, source: StoredRows, ids: Int64 | None, n_queries: int) -> bool:
        """Return whether some rows of a source are so few that they are read by id."""
        share = _TAKEN_SHARES[n_queries >= _MANY_QUERIES]
        return self._takes_few and ids is not None and len(ids) < share * len(source)

    def _restrict(self, allowed: Int64 | None) -> FlatIndex:
        """Return the scan of the allowed rows."""
        if allowed is None or len(allowed) == len(self):
            return self
        return FlatIndex(Subset(self._source, allowed), self._device, self._block_rows)

    def find(self, queries_QF: Float32, k: int, signs: Sequence[Sign]) -> list[TopK]:
        """Return the best k of sign × inner product for each sign, computed here; scores can be NaN or infinite."""
        # Threads of the scan are in PyTorch's default mode, in which tensors of the inference mode cannot be written.
        with torch.inference_mode(False):
            return self._scan_in_default_mode(queries_QF, k, signs)

    def _scan_in_default_mode(self, queries_QF: Float32, k: int, signs: Sequence[Sign]) -> list[TopK]:
        queries = torch.from_numpy(queries_QF).to(self._device)
        at_once = max(1, _SCORES_AT_ONCE // self._block_rows)
        found: list[list[_RunningBest]] = [[] for _ in signs]
        for at in range(0, len(queries), at_once):
            chunk_QF = queries[at : at + at_once]
            best = [_RunningBest(len(chunk_QF), k, self._device) for _ in signs]
            for ids_S, scores_QS in self.iter_scores(chunk_QF):
                sign_now: Sign = 1
                for side, sign in zip(best, signs, strict=True):
                    if sign != sign_now:
                        scores_QS.neg_()
                    sign_now = sign
                    side.add(ids_S, scores_QS)
            for chunks, side in zip(found, best, strict=True):
                chunks.append(side)
        return [self._collect(side, k) for side in found]

    def iter_scores(self, queries_QF: Tensor) -> Iterator[tuple[Int64, Tensor]]:
        """Yield (ids [S], scores [Q, S]) by increasing id; the next scores overwrite the memory of the last.

        Not for PyTorch's inference mode.
        """
        queries_QF = queries_QF.to(self._device)
        source, ids = _find_stored_rows(self._source)
        if source is None or self._device.type != "cpu" or self._is_few(source, ids, len(queries_QF)):
            blocks = ((ids_B, partial(_multiply, queries_QF, rows_BF)) for ids_B, rows_BF in self._blocks())
            yield from self._fill(len(queries_QF), blocks, lambda: None)
            return
        with StoredScorer(queries_QF) as scorer:
            yield from self._fill(len(queries_QF), self._iter_stored_blocks(source, ids, scorer), scorer.finish)

    def _fill(
        self, n_queries: int, blocks: Iterator[Block], finish: Callable[[], None]
    ) -> Iterator[tuple[Int64, Tensor]]:
        """Yield (ids [S], scores [Q, S]) of blocks; `finish` waits until the scores are written."""
        width = max(self._block_rows, _SCORES_AT_ONCE // n_queries)
        scores = torch.empty((n_queries, min(width, len(self))), dtype=torch.float32, device=self._device)
        ids: list[Int64] = []
        filled = 0
        for ids_B, write_scores in blocks:
            if filled + len(ids_B) > scores.shape[1]:
                finish()
                yield np.concatenate(ids), scores[:, :filled]
                ids, filled = [], 0
            write_scores(scores[:, filled : filled + len(ids_B)])
            ids.append(ids_B)
            filled += len(ids_B)
        finish()
        if filled:
            yield np.concatenate(ids), scores[:, :filled]

    def _iter_stored_blocks(self, source: StoredRows, ids: Int64 | None, scorer: StoredScorer) -> Iterator[Block]:
        """Yield the blocks of stored rows with these ids (None: all)."""
        for ids_B, parts in source.stored_blocks(self._block_rows):
            chosen = ids_B if ids is None else ids[slice(*np.searchsorted(ids, [ids_B[0], ids_B[-1] + 1]))]
            where_A = None if len(chosen) == len(ids_B) else np.searchsorted(ids_B, chosen)
            if len(chosen):
                yield chosen, partial(scorer.start, parts, where_A)

    def _collect(self, chunks: list[_RunningBest], k: int) -> TopK:
        """Return the results of all chunks of queries."""
        ids = [chunk.ids_QK.cpu().numpy() for chunk in chunks] or [np.zeros((0, 0), np.int64)]
        scores = [chunk.scores_QK.cpu().numpy() for chunk in chunks] or [np.zeros((0, 0), np.float32)]
        ids_QK = np.concatenate(ids)
        return from_padded(ids_QK, np.concatenate(scores), k, np.full(len(ids_QK), len(self), dtype=np.int64))

    def _blocks(self) -> Iterator[tuple[Int64, Tensor]]:
        """Yield (ids [B], rows [B, F] on the device) by increasing id."""
        if self._resident is not None:
            yield from self._resident
            return
        resident: list[tuple[Int64, Tensor]] | None = [] if self._fits_in_memory() else None
        for ids, rows in self._source.blocks(self._block_rows):
            block = (ids, as_tensor(rows).to(self._device))
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


def _find_stored_rows(source: RowSource) -> tuple[StoredRows | None, Int64 | None]:
    """Return the stored rows that a source gives or is a subset of, and the ids of the subset (None: all rows)."""
    ids = None
    while isinstance(source, Subset):
        ids = source.ids if ids is None else ids
        source = source.source
    return (source, ids) if isinstance(source, StoredRows) else (None, ids)


def _multiply(queries_QF: Tensor, rows_BF: Tensor, out_QB: Tensor) -> None:
    """Write the inner products of queries and rows."""
    with disable_tf32():
        torch.mm(queries_QF, rows_BF.T, out=out_QB)


class _RunningBest:
    """The best k results so far for some queries; scores are added by increasing id."""

    def __init__(self, n_queries: int, k: int, device: torch.device) -> None:
        self._k = k
        self.ids_QK = torch.zeros((n_queries, 0), dtype=torch.int64, device=device)
        self.scores_QK = torch.zeros((n_queries, 0), dtype=torch.float32, device=device)

    def add(self, ids_S: Int64, scores_QS: Tensor) -> None:
        """Merge the scores of rows with higher ids; at equal scores earlier positions win, which have lower ids."""
        where_QK = best_positions(scores_QS, self._k)
        ids_QK = torch.from_numpy(ids_S[where_QK.cpu().numpy()]).to(self.ids_QK.device)
        ids = torch.cat([self.ids_QK, ids_QK], dim=1)
        scores = torch.cat([self.scores_QK, scores_QS.gather(1, where_QK)], dim=1)
        where_QK = best_positions(scores, self._k)
        self.ids_QK, self.scores_QK = ids.gather(1, where_QK), scores.gather(1, where_QK)


def as_tensor(array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> Tensor:
    """Return a tensor that shares the array's memory, or a copy if the array is read-only or not contiguous."""
    contiguous = np.ascontiguousarray(array)
    return torch.from_numpy(contiguous if contiguous.flags.writeable else contiguous.copy())


def _merge_parts(parts: Sequence[TopK], k: int, n_queries: int) -> TopK:
    """Return the best k of the parts of a scan.

    Raises:
        NonFiniteError: a score is NaN, which a merge would rank last, and a scan of all rows reports.
    """
    for part in parts:
        _check_scores(part, np.isnan)
    return merge([make_empty(n_queries), *parts], k)


def _check_scores(top: TopK, is_bad: Callable[[Float32], npt.NDArray[np.bool_]] = lambda s: ~np.isfinite(s)) -> None:
    for ids, scores in zip(top.ids, top.scores, strict=True):
        bad = is_bad(scores)
        if bad.any():
            check_finite(ids[bad], scores[bad])


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
