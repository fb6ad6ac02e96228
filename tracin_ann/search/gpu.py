"""Rows and inverted lists in the memory of GPUs, searched by FAISS within the limits of its GPU functions.

FAISS ignores filters on GPUs and has no files of GPU indexes, so these are copies: the index in main memory answers
filtered searches and is the one that is saved. A copy that does not fit on one GPU is divided among several.

Shapes: N rows, Q queries, L lists, W keys (list numbers) per query, K results, F feature dimension, R reduced.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tracin_ann.device import Gpu, import_faiss, list_gpus, record_event
from tracin_ann.search.clustering import survey
from tracin_ann.search.inverted_lists import InvertedLists, search_lists
from tracin_ann.types import Float32, Int64, RowSource

MOST_RESULTS = 2048
"""Results of a query that FAISS can select on a GPU."""
_MOST_LISTS = 2048
"""Lists of a query that FAISS can scan at once on a GPU."""
_CENTROID_BYTES = 2**29
"""FAISS copies the centroid of every key of every query; queries are searched in batches with at most these bytes."""
_FREE_SHARE = 0.8
"""Largest share of the free memory of a GPU that a copy uses."""
_TEMPORARY_BYTES = 2**31
"""Bytes that FAISS allocates for temporary results, at most 1.5 GiB, and for the batch of centroids."""
_LIST_BLOCK = 32
"""FAISS allocates memory on GPUs for lists of a multiple of this many rows."""
_QUERIES_AT_ONCE = 1024
_ROWS_AT_ONCE = 65_536
_ROW_EXPONENT = 13
"""Rows are scaled so that the largest norm is below 2^13: no inner product with a unit query leaves float16."""

logger = logging.getLogger(__name__)


def plan_gpus(n_bytes: int, gpus: Sequence[Gpu]) -> tuple[Gpu, ...]:
    """Return the fewest GPUs that can hold equal parts of n_bytes together; () if all of them cannot."""
    by_space = sorted(gpus, key=lambda gpu: -gpu.free_bytes)
    for count in range(1, len(by_space) + 1):
        if n_bytes / count <= _FREE_SHARE * (by_space[count - 1].free_bytes - _TEMPORARY_BYTES):
            return tuple(by_space[:count])
    return ()


class GpuLists:
    """A copy of inverted lists in the memory of GPUs; each of several has a part of the rows of every list."""

    def __init__(self, parts: Sequence[tuple[Gpu, Any]], dim: int) -> None:
        """Wrap FAISS indexes; use `load` to create them."""
        self._parts, self._dim = parts, dim

    @staticmethod
    def count_bytes(lists: InvertedLists) -> int:
        """Return the bytes of a copy, with the centroids that FAISS requires."""
        rows = int((-(-lists.sizes() // _LIST_BLOCK) * _LIST_BLOCK).sum())
        return rows * lists.bytes_per_row + 4 * lists.n_lists * lists.dim

    @classmethod
    def load(cls, lists: InvertedLists, centroid_LR: Float32, gpus: Sequence[Gpu]) -> GpuLists:
        """Copy lists with these centroids.

        Raises:
            RuntimeError: a GPU does not have enough memory.
        """
        faiss, parts = import_faiss(), []
        for number, gpu in enumerate(gpus):
            config = faiss.GpuIndexIVFScalarQuantizerConfig()
            config.device = gpu.number
            with gpu.lock:
                shard = lists.make_shard(centroid_LR, number, len(gpus))
                parts.append((gpu, faiss.GpuIndexIVFScalarQuantizer(gpu.resources, shard, config)))
        return cls(parts, lists.dim)

    @property
    def gpus(self) -> tuple[Gpu, ...]:
        """Return the GPUs."""
        return tuple(gpu for gpu, _ in self._parts)

    def scan(self, queries_QR: Float32, k: int, key_QW: Int64) -> tuple[Int64, Float32]:
        """Return padded (ids [Q, k], scores [Q, k]) of the rows in the lists with these keys, unordered.

        Args:
            queries_QR: float32.
            k: results per query, at most `MOST_RESULTS`.
            key_QW: int64 list numbers; -1: padding.
        """
        width = min(_MOST_LISTS, key_QW.shape[1])
        step = max(1, _CENTROID_BYTES // (4 * self._dim * width))
        ids, scores = [np.zeros((0, k), np.int64)], [np.zeros((0, k), np.float32)]
        for at in range(0, len(queries_QR), step):
            keys = [key_QW[at : at + step, first : first + width] for first in range(0, key_QW.shape[1], width)]
            found = [self._scan_part(part, queries_QR[at : at + step], k, key) for part in self._parts for key in keys]
            ids_QK, scores_QK = _select_best(found, k)
            ids.append(ids_QK)
            scores.append(scores_QK)
        return np.concatenate(ids), np.concatenate(scores)

    def _scan_part(self, part: tuple[Gpu, Any], queries_QR: Float32, k: int, key_QW: Int64) -> tuple[Int64, Float32]:
        gpu, index = part
        with gpu.lock:
            return search_lists(index, queries_QR, k, key_QW)


class LazyGpuLists:
    """Inverted lists that are copied to the memory of GPUs at the first search that GPUs can answer."""

    def __init__(self, lists: InvertedLists | None, centroid_LR: Float32, device: torch.device) -> None:
        """Store the arguments; searches run on the GPUs of the device. None: the lists are in shards."""
        self._lists, self._centroid_LR, self._device = lists, centroid_LR, device
        self._loading = threading.Lock()

    def find(self, n_candidates: int, allowed: Int64 | None) -> GpuLists | str:
        """Return the copy for a search, or the reason why GPUs cannot answer it, as text for users."""
        if allowed is not None:
            return "FAISS ignores filters on GPUs"
        if n_candidates > MOST_RESULTS:
            return f"FAISS finds at most {MOST_RESULTS:,} candidates on GPUs"
        with self._loading:
            return self._copy

    @cached_property
    def _copy(self) -> GpuLists | str:
        """Return the copy, or the reason why there is none."""
        if self._lists is None:
            return "the lists are in shards"
        gpus = list_gpus(self._device)
        if not gpus:
            return "the installed FAISS has no indexes for GPUs"
        n_bytes = GpuLists.count_bytes(self._lists)
        chosen = plan_gpus(n_bytes, gpus)
        if not chosen:
            return f"{n_bytes / 2**30:,.1f} GiB of lists do not fit in the memory of the GPUs"
        try:
            return GpuLists.load(self._lists, self._centroid_LR, chosen)
        except RuntimeError as error:
            logger.warning("inverted lists are not copied to the GPU: %s", error)
            return f"the GPU rejects a copy of the lists: {error}".splitlines()[0]


@dataclass(frozen=True)
class RowPart:
    """Consecutive rows of a source in the memory of a GPU: float16 numbers, and the position of the first one."""

    gpu: Gpu
    row_NF: Tensor
    first: int


class GpuRows:
    """A copy of all rows of a source in the memory of GPUs, in float16, scaled by a power of two.

    Attributes:
        error: bound of the difference between a score of `find` and the exact inner product.
    """

    def __init__(self, parts: Sequence[RowPart], ids_N: Int64, shift: int) -> None:
        """Wrap parts in order; use `load` to create them."""
        self._parts, self._ids_N, self._shift = parts, ids_N, shift
        dim = parts[0].row_NF.shape[1]
        # Rounding of rows and queries to 11 bits, sums in float32, and absolute rounding of numbers below 2^-14.
        relative = 2.0**-10 + 2.0**-22 + dim * 2.0**-23 + math.sqrt(dim) * 2.0**-24
        self.error = math.ldexp(relative, _ROW_EXPONENT - shift)

    @staticmethod
    def count_bytes(n_rows: int, dim: int) -> int:
        """Return the bytes of a copy of N rows."""
        return 2 * n_rows * dim

    @classmethod
    def load(cls, source: RowSource, gpus: Sequence[Gpu]) -> GpuRows:
        """Copy the rows, of which there must be one at least; reads them twice, the first time for the largest norm.

        Raises:
            NonFiniteError: a row contains NaN or infinity; the message has its id.
            RuntimeError: a GPU does not have enough memory.
        """
        measured = survey(source, _ROWS_AT_ONCE)
        shift = _ROW_EXPONENT - math.frexp(float(measured.norm_N.max()))[1]
        edges = np.linspace(0, len(source), len(gpus) + 1).astype(int).tolist()
        parts = [
            RowPart(gpu, torch.empty(last - first, source.dim, dtype=torch.float16, device=gpu.device), first)
            for gpu, first, last in zip(gpus, edges, edges[1:], strict=False)
            if first < last
        ]
        at = 0
        for ids_B, rows_BF in source.blocks(_ROWS_AT_ONCE):
            scaled_BF = torch.from_numpy(np.ldexp(rows_BF, shift))
            for part in parts:
                start, stop = max(at, part.first), min(at + len(ids_B), part.first + len(part.row_NF))
                if start < stop:
                    part.row_NF[start - part.first : stop - part.first] = scaled_BF[start - at : stop - at]
            at += len(ids_B)
        for part in parts:
            # FAISS reads the rows in another stream.
            record_event(part.row_NF.device)()
        return cls(parts, measured.ids_N, shift)

    @property
    def gpus(self) -> tuple[Gpu, ...]:
        """Return the GPUs."""
        return tuple(part.gpu for part in self._parts)

    def find(self, queries_QF: Float32, k: int) -> tuple[Int64, Float32]:
        """Return (ids [Q, k], scores [Q, k]), unordered, of the k best rows by scores within `error`.

        Args:
            queries_QF: float32, of norm at most 1.
            k: results per query, at most the number of rows and `MOST_RESULTS`.
        """
        half_QF = queries_QF.astype(np.float16)
        ids, scores = [np.zeros((0, k), np.int64)], [np.zeros((0, k), np.float32)]
        for at in range(0, len(half_QF), _QUERIES_AT_ONCE):
            found = [_find_in_part(part, half_QF[at : at + _QUERIES_AT_ONCE], k) for part in self._parts]
            place_QK, scores_QK = _select_best(found, k)
            ids.append(self._ids_N[place_QK])
            scores.append(np.ldexp(scores_QK, -self._shift))
        return np.concatenate(ids), np.concatenate(scores)


def _find_in_part(part: RowPart, half_QF: np.ndarray[Any, np.dtype[np.float16]], k: int) -> tuple[Int64, Float32]:
    """Return the positions and scores of the best min(k, N) rows of a part."""
    faiss, n_rows = import_faiss(), len(part.row_NF)
    k = min(k, n_rows)
    places, scores = np.empty((len(half_QF), k), np.int64), np.empty((len(half_QF), k), np.float32)
    call = faiss.GpuDistanceParams()
    call.metric, call.k, call.dims, call.device = faiss.METRIC_INNER_PRODUCT, k, half_QF.shape[1], part.gpu.number
    call.vectors, call.numVectors = faiss.cast_integer_to_void_ptr(part.row_NF.data_ptr()), n_rows
    call.queries, call.numQueries = faiss.swig_ptr(half_QF), len(half_QF)
    call.vectorType = call.queryType = faiss.DistanceDataType_F16
    call.outDistances, call.outIndices = faiss.swig_ptr(scores), faiss.swig_ptr(places)
    call.outIndicesType = faiss.IndicesDataType_I64
    with part.gpu.lock:
        faiss.bfKnn(part.gpu.resources, call)
    return places + part.first, scores


def join_names(gpus: Sequence[Gpu]) -> str:
    """Return the names of GPUs, for users."""
    return ", ".join(str(gpu.device) for gpu in gpus)


def _select_best(parts: Sequence[tuple[Int64, Float32]], k: int) -> tuple[Int64, Float32]:
    """Return the k entries of largest score of each query, unordered, of all parts; negative ids are padding."""
    ids_QM, scores_QM = (np.concatenate(each, axis=1) for each in zip(*parts, strict=True))
    if ids_QM.shape[1] <= k:
        return ids_QM, scores_QM
    order_QK = np.argpartition(-np.where(ids_QM < 0, -np.inf, scores_QM), k - 1, axis=1)[:, :k]
    return np.take_along_axis(ids_QM, order_QK, axis=1), np.take_along_axis(scores_QM, order_QK, axis=1)
