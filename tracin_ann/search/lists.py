"""Inverted lists of half-precision rows in FAISS: filled by us, scanned in the lists we name, kept in one file.

The last list is always empty and belongs to no centroid: it fills up the keys of a query that is to
probe fewer lists than others of its batch, on every device.

Shapes: Q queries, W keys a query, L lists, B rows of a block, F feature dimension, K results.
"""

from __future__ import annotations

import importlib
import logging
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from tracin_ann.device import faiss_gpu_resources, import_faiss
from tracin_ann.errors import DamagedIndexError, problem
from tracin_ann.types import Float32, Int64

_LOG = logging.getLogger(__name__)
_GPU_LIMIT = 2048
"""The most results, and the most keys, that FAISS's classic GPU lists take."""
_GPU_BYTES_AT_ONCE = 2**30
"""FAISS allocates queries × keys × dimension × 4 bytes on the GPU for one call."""


class InvertedLists:
    """FAISS lists searched by inner product; safe to scan from several threads, one at a time."""

    def __init__(self, index: Any, device: torch.device) -> None:
        """Hold a filled `faiss.IndexIVFScalarQuantizer`; use `empty` or `load` to get one."""
        self._index = index
        self._device = device
        self._lock = threading.Lock()
        self._resources: Any | None = None
        self._gpu_index: Any | None = None

    @classmethod
    def empty(cls, centroids_LF: Float32, device: torch.device) -> InvertedLists:
        """Return lists without rows, one a centroid."""
        faiss = import_faiss()
        n_lists, dim = centroids_LF.shape
        quantizer = faiss.IndexFlatIP(dim)
        quantizer.add(np.concatenate([centroids_LF, np.zeros((1, dim), np.float32)]))
        index = faiss.IndexIVFScalarQuantizer(
            quantizer, dim, n_lists + 1, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT, False
        )
        index.is_trained = True
        return cls(index, device)

    @classmethod
    def load(cls, path: Path, device: torch.device) -> InvertedLists:
        """Return the lists of a file, its pages mapped rather than read.

        Raises:
            DamagedIndexError: the file is missing, cut short, or holds no lists of ours.
        """
        faiss = import_faiss()
        try:
            index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
        except RuntimeError as error:
            raise _damaged(path, "a file that FAISS cannot read") from error
        if not isinstance(index, faiss.IndexIVFScalarQuantizer) or index.metric_type != faiss.METRIC_INNER_PRODUCT:
            raise _damaged(path, type(index).__name__)
        return cls(index, device)

    def save(self, path: Path) -> None:
        """Write the lists to this very path; the caller moves and fsyncs."""
        import_faiss().write_index(self._index, str(path))

    def __len__(self) -> int:
        """Return the number of rows."""
        return int(self._index.ntotal)

    @property
    def dim(self) -> int:
        """Return F."""
        return int(self._index.d)

    @property
    def filler(self) -> int:
        """Return the number of the list that is always empty, which is L."""
        return int(self._index.nlist) - 1

    def centroids_LF(self) -> Float32:
        """Return the centroids, float32 [L, F]."""
        centroids: Float32 = self._index.quantizer.reconstruct_n(0, self.filler)
        return centroids

    def sizes_L(self) -> Int64:
        """Return the rows of each list."""
        lists = self._index.invlists
        return np.array([lists.list_size(number) for number in range(self.filler)], dtype=np.int64)

    def add(self, rows_BF: Float32, lists_B: Int64, ids_B: Int64) -> None:
        """Append rows to the lists named."""
        _ivf_tools().add_preassigned(
            self._index, np.ascontiguousarray(rows_BF), np.ascontiguousarray(lists_B), np.ascontiguousarray(ids_B)
        )

    def scan(self, queries_QF: Float32, k: int, keys_QW: Int64, coarse_QW: Float32) -> tuple[Int64, Float32]:
        """Return FAISS's padded (ids [Q, k], scores [Q, k]) of the lists named by the keys.

        Args:
            queries_QF: float32.
            k: places a query.
            keys_QW: int64 list numbers, `filler` where a query wants no more.
            coarse_QW: float32 q·c beside the keys.
        """
        width = keys_QW.shape[1]
        index = self._index
        at_once = max(1, len(queries_QF))
        if self._on_gpu():
            if max(k, width) <= _GPU_LIMIT:
                index = self._gpu_index
                at_once = max(1, _GPU_BYTES_AT_ONCE // (4 * width * self.dim))
            else:
                _LOG.info("k = %d of %d lists is more than FAISS's GPU lists take; scanning on the CPU", k, width)
        batches = [slice(at, at + at_once) for at in range(0, len(queries_QF), at_once)]
        found = [self._search(index, queries_QF[rows], k, keys_QW[rows], coarse_QW[rows]) for rows in batches]
        return np.concatenate([ids for ids, _ in found]), np.concatenate([scores for _, scores in found])

    def scan_above(self, query_F: Float32, score: float, keys_W: Int64, coarse_W: Float32) -> tuple[Int64, Float32]:
        """Return all (ids, scores) of the lists named whose inner product exceeds `score`; on the CPU."""
        with self._lock:
            self._index.nprobe = len(keys_W)
            _, scores, ids = _ivf_tools().range_search_preassigned(
                self._index, query_F[None], score, keys_W[None], coarse_W[None]
            )
        return ids, scores

    def _search(
        self, index: Any, queries_QF: Float32, k: int, keys_QW: Int64, coarse_QW: Float32
    ) -> tuple[Int64, Float32]:
        with self._lock:
            index.nprobe = keys_QW.shape[1]
            scores, ids = index.search_preassigned(queries_QF, k, keys_QW, coarse_QW)
        return ids, scores

    def _on_gpu(self) -> bool:
        """Return whether FAISS searches on a GPU; copies the lists there the first time."""
        with self._lock:
            if self._gpu_index is None:
                self._resources = faiss_gpu_resources(self._device)
                if self._resources is None:
                    return False
                self._index.nprobe = 1
                number = self._device.index or 0
                self._gpu_index = import_faiss().index_cpu_to_gpu(self._resources, number, self._index)
        return True


def _ivf_tools() -> ModuleType:
    import_faiss()
    return importlib.import_module("faiss.contrib.ivf_tools")


def _damaged(path: Path, got: str) -> DamagedIndexError:
    return DamagedIndexError(
        problem(f"cannot open {path}", got=got, expected="half-precision inverted lists", remedy="rebuild the index")
    )
