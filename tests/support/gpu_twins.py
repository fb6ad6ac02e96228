"""CPU twins of FAISS's GPU classes, with the same arguments and restrictions, and GPUs whose memory is main memory.

A real GPU index ignores some arguments that it does not support. The twins reject them, so that no test relies on them.
"""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import faiss
import numpy as np
import pytest
import torch

MOST = 2048


def fail(message: str) -> None:
    raise RuntimeError(f"Error in faiss::gpu: {message}")


class StandardGpuResources:
    """Counts the calls in progress: real resources are not for several threads at a time."""

    def __init__(self) -> None:
        self._busy = threading.Lock()

    def __enter__(self) -> None:
        if not self._busy.acquire(blocking=False):
            fail("resources are in use by another thread")

    def __exit__(self, *_: object) -> None:
        self._busy.release()


class GpuIndexIVFScalarQuantizerConfig:
    device = 0


class GpuIndexIVFScalarQuantizer:
    """Inverted lists "on a GPU"; not an index for `write_index`."""

    n_searches = 0

    def __init__(self, resources: StandardGpuResources, index: Any, config: GpuIndexIVFScalarQuantizerConfig) -> None:
        kinds = faiss.ScalarQuantizer
        if index.quantizer.ntotal != index.nlist:
            fail("the coarse quantizer does not have as many centroids as there are lists")
        if index.sq.qtype not in (kinds.QT_8bit, kinds.QT_4bit, kinds.QT_fp16) or index.d >= 6144:  # noqa: PLR2004
            fail("unsupported scalar quantizer")
        self._resources, self.device = resources, config.device
        self.nlist, self.ntotal = index.nlist, index.ntotal
        self._index = faiss.deserialize_index(faiss.serialize_index(index))

    def search_preassigned_c(  # noqa: PLR0913, PLR0917
        self, n: int, x: Any, k: int, keys: Any, coarse: Any, out: Any, ids: Any, pairs: bool, params: Any, stats: Any
    ) -> None:
        if k > MOST or params.nprobe > MOST or params.nprobe > self.nlist:
            fail(f"k = {k}, nprobe = {params.nprobe} of {self.nlist} lists")
        if pairs or stats is not None or params.max_codes or params.sel is not None:
            fail("store_pairs, stats, max_codes and sel are not supported")
        type(self).n_searches += 1
        with self._resources:
            self._index.search_preassigned_c(n, x, k, keys, coarse, out, ids, False, params, None)


class GpuDistanceParams:
    metric = k = dims = device = numVectors = numQueries = None
    vectors = queries = outDistances = outIndices = vectorType = queryType = outIndicesType = None


n_scans = [0]


def bf_knn(resources: StandardGpuResources, call: GpuDistanceParams) -> None:
    if call.vectorType != "F16" or call.queryType != "F16" or call.outIndicesType != "I64":
        fail("types")
    if call.metric != faiss.METRIC_INNER_PRODUCT or not 0 < call.k <= min(MOST, call.numVectors):
        fail(f"metric {call.metric}, k = {call.k} of {call.numVectors}")
    n_scans[0] += 1
    with resources:
        rows, queries = (
            _view(pointer, (n, call.dims), np.float16).astype(np.float32)
            for pointer, n in ((call.vectors, call.numVectors), (call.queries, call.numQueries))
        )
        scores = queries @ rows.T
        order = np.argsort(-scores, axis=1)[:, : call.k]
        shape = call.numQueries, call.k
        _view(call.outIndices, shape, np.int64)[:] = order
        _view(call.outDistances, shape, np.float32)[:] = np.take_along_axis(scores, order, axis=1)


def _view(pointer: Any, shape: tuple[int, int], dtype: type) -> np.ndarray:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(int(pointer)), dtype).reshape(shape)


class TwinGpu:
    """A `tracin_ann.device.Gpu` in main memory."""

    def __init__(self, number: int, free_bytes: int = 2**40) -> None:
        self.number, self.free_bytes = number, free_bytes
        self.device = torch.device("cpu")
        self.resources, self.lock = StandardGpuResources(), threading.Lock()


def install(monkeypatch: pytest.MonkeyPatch, gpus: tuple[TwinGpu, ...]) -> None:
    """Give FAISS the twins, and every device these GPUs."""
    twins = {
        "StandardGpuResources": StandardGpuResources,
        "GpuIndexIVFScalarQuantizerConfig": GpuIndexIVFScalarQuantizerConfig,
        "GpuIndexIVFScalarQuantizer": GpuIndexIVFScalarQuantizer,
        "GpuDistanceParams": GpuDistanceParams,
        "bfKnn": bf_knn,
        "DistanceDataType_F16": "F16",
        "IndicesDataType_I64": "I64",
    }
    for name, twin in twins.items():
        monkeypatch.setattr(faiss, name, twin, raising=False)
    for module in ("gpu", "gpu_scan"):
        monkeypatch.setattr(f"tracin_ann.search.{module}.list_gpus", lambda device: gpus)
    monkeypatch.setattr(GpuIndexIVFScalarQuantizer, "n_searches", 0)
    n_scans[0] = 0
