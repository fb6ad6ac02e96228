"""Other indexes of the same rows, at settings from cheap to dear: FAISS's inverted lists as they come, IVF+PQ, HNSW."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any

import numpy as np

from tracin_ann.device import import_faiss
from tracin_ann.types import Float32

LISTS, TRAINED_ON = 4096, 200_000
REFINED = 100


def _array(rows: Any) -> Float32:
    return np.concatenate([block for _, block in rows.blocks(65_536)])


def _measured(
    search: Callable[[Float32, int], tuple[np.ndarray, float]], rows: Any, queries: Float32, truth: Any, sides: Any
) -> dict[str, Any]:
    """Return recall, what was scored and seconds a query, of both directions; candidates ranked by the rows."""
    result: dict[str, Any] = {}
    for side, sign in sides:
        signed = np.ascontiguousarray(sign * queries)
        times = []
        for _ in range(3):
            began = time.perf_counter()
            found, scored = search(signed, REFINED)
            ranked = [_ranked(rows, ids[ids >= 0], query) for ids, query in zip(found, signed, strict=True)]
            times.append((time.perf_counter() - began) / len(queries))
        result[side] = truth.figures(side, sign, ranked, queries, rows) | {"scored": scored, "batch": median(times)}
    return result


def _ranked(rows: Any, ids: np.ndarray, query: Float32) -> np.ndarray:
    return ids[np.argsort(-(rows.take(ids) @ query), kind="stable")[:10]]


def _lists(factory: str, probes: Sequence[int]) -> Callable[..., Iterator[dict[str, Any]]]:
    def run(rows: Any, queries: Float32, truth: Any, sides: Any) -> Iterator[dict[str, Any]]:
        faiss = import_faiss()
        began = time.perf_counter()
        held = _array(rows)
        index = faiss.index_factory(held.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
        index.train(held[np.linspace(0, len(held) - 1, min(TRAINED_ON, len(held))).astype(np.int64)])
        index.add(held)
        built = time.perf_counter() - began
        del held
        for nprobe in probes:

            def search(signed: Float32, k: int, nprobe: int = nprobe) -> tuple[np.ndarray, float]:
                index.nprobe = nprobe
                faiss.cvar.indexIVF_stats.reset()
                _, ids = index.search(signed, k)
                return ids, faiss.cvar.indexIVF_stats.ndis / len(signed) + index.nlist

            figures = _measured(search, rows, queries, truth, sides)
            yield figures | {"nprobe": nprobe, "build_seconds": built, "bytes_a_row": index.code_size + 8}

    return run


def _hnsw(rows: Any, queries: Float32, truth: Any, sides: Any) -> Iterator[dict[str, Any]]:
    faiss = import_faiss()
    began = time.perf_counter()
    held = _array(rows)
    index = faiss.IndexHNSWSQ(held.shape[1], faiss.ScalarQuantizer.QT_8bit, 32, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = 80
    index.train(held[: min(TRAINED_ON, len(held))])
    index.add(held)
    built = time.perf_counter() - began
    del held
    for ef in (128, 256, 512, 1024):

        def search(signed: Float32, k: int, ef: int = ef) -> tuple[np.ndarray, float]:
            index.hnsw.efSearch = ef
            faiss.cvar.hnsw_stats.reset()
            _, ids = index.search(signed, k)
            return ids, faiss.cvar.hnsw_stats.ndis / len(signed)

        figures = _measured(search, rows, queries, truth, sides)
        yield figures | {"ef": ef, "build_seconds": built, "bytes_a_row": rows.dim + 2 * 32 * 4}


RIVALS: dict[str, Callable[..., Iterator[dict[str, Any]]]] = {
    "FAISS IVF4096,Flat": _lists(f"IVF{LISTS},Flat", (16, 64, 256)),
    "FAISS IVF4096,PQ96": _lists(f"IVF{LISTS},PQ96", (64, 256)),
    "FAISS HNSW32,SQ8": _hnsw,
}
