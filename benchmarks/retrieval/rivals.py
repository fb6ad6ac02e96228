"""FAISS indexes of the same rows, at settings of increasing cost: IVF, IVF with product quantization, HNSW."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any

import numpy as np

from tracin_ann.device import import_faiss
from tracin_ann.types import Float32

N_LISTS, TRAINING_ROWS = 4096, 200_000
CANDIDATES = 100


def _read_rows(rows: Any) -> Float32:
    return np.concatenate([block for _, block in rows.blocks(65_536)])


def _measure(
    search: Callable[[Float32, int], tuple[np.ndarray, float]], rows: Any, queries: Float32, truth: Any, sides: Any
) -> dict[str, Any]:
    """Return recall, scored rows and seconds per query by direction; candidates are ranked by exact scores."""
    result: dict[str, Any] = {}
    for side, sign in sides:
        signed = np.ascontiguousarray(sign * queries)
        times = []
        for _ in range(3):
            start_s = time.perf_counter()
            found, scored = search(signed, CANDIDATES)
            ranked = [_rank(rows, ids[ids >= 0], query) for ids, query in zip(found, signed, strict=True)]
            times.append((time.perf_counter() - start_s) / len(queries))
        result[side] = truth.compare(side, sign, ranked, queries, rows) | {"scored": scored, "batch": median(times)}
    return result


def _rank(rows: Any, ids: np.ndarray, query: Float32) -> np.ndarray:
    return ids[np.argsort(-(rows.take(ids) @ query), kind="stable")[:10]]


def _make_ivf(factory: str, probes: Sequence[int]) -> Callable[..., Iterator[dict[str, Any]]]:
    def run(rows: Any, queries: Float32, truth: Any, sides: Any) -> Iterator[dict[str, Any]]:
        faiss = import_faiss()
        start_s = time.perf_counter()
        row_NF = _read_rows(rows)
        index = faiss.index_factory(row_NF.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
        index.train(row_NF[np.linspace(0, len(row_NF) - 1, min(TRAINING_ROWS, len(row_NF))).astype(np.int64)])
        index.add(row_NF)
        build_s = time.perf_counter() - start_s
        del row_NF
        for nprobe in probes:

            def search(signed: Float32, k: int, nprobe: int = nprobe) -> tuple[np.ndarray, float]:
                index.nprobe = nprobe
                faiss.cvar.indexIVF_stats.reset()
                _, ids = index.search(signed, k)
                return ids, faiss.cvar.indexIVF_stats.ndis / len(signed) + index.nlist

            figures = _measure(search, rows, queries, truth, sides)
            yield figures | {"nprobe": nprobe, "build_seconds": build_s, "bytes_a_row": index.code_size + 8}

    return run


def _measure_hnsw(rows: Any, queries: Float32, truth: Any, sides: Any) -> Iterator[dict[str, Any]]:
    faiss = import_faiss()
    start_s = time.perf_counter()
    row_NF = _read_rows(rows)
    index = faiss.IndexHNSWSQ(row_NF.shape[1], faiss.ScalarQuantizer.QT_8bit, 32, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = 80
    index.train(row_NF[: min(TRAINING_ROWS, len(row_NF))])
    index.add(row_NF)
    build_s = time.perf_counter() - start_s
    del row_NF
    for ef in (128, 256, 512, 1024):

        def search(signed: Float32, k: int, ef: int = ef) -> tuple[np.ndarray, float]:
            index.hnsw.efSearch = ef
            faiss.cvar.hnsw_stats.reset()
            _, ids = index.search(signed, k)
            return ids, faiss.cvar.hnsw_stats.ndis / len(signed)

        figures = _measure(search, rows, queries, truth, sides)
        yield figures | {"ef": ef, "build_seconds": build_s, "bytes_a_row": rows.dim + 2 * 32 * 4}


RIVALS: dict[str, Callable[..., Iterator[dict[str, Any]]]] = {
    "FAISS IVF4096,Flat": _make_ivf(f"IVF{N_LISTS},Flat", (16, 64, 256)),
    "FAISS IVF4096,PQ96": _make_ivf(f"IVF{N_LISTS},PQ96", (64, 256)),
    "FAISS HNSW32,SQ8": _measure_hnsw,
}
