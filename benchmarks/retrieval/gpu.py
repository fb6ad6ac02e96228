"""Search on a GPU: exact scans of 10 million rows by FAISS and by PyTorch, and inverted lists of 3.2 million rows.

Rows of the scans are drawn on the GPU. A scan is compared with the time to read its rows once, at the measured
bandwidth of the memory, and with the time of the matrix product alone. The results of lists on the GPU are compared
with those of the same lists on the CPU.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.common.results import write_results
from tracin_ann.device import Gpu, list_gpus, resolve_device
from tracin_ann.search import IVFIndex, IVFParams
from tracin_ann.search.gpu import GpuRows, RowPart
from tracin_ann.search.gpu_scan import ArrayRows
from tracin_ann.search.settings import Setting

OUTPUT = "retrieval_gpu.json in benchmarks/results"
K = 42
"""Candidates of a scan for 10 results."""
_BLOCK = 2**20
_GIB = 2**30


def make_points(n_rows: int, dim: int, n_centers: int = 2000) -> ArrayRows:
    """Return rows around centers."""
    random = np.random.default_rng(0)
    centers = random.standard_normal((n_centers, dim), dtype=np.float32)
    row_NF = np.empty((n_rows, dim), np.float32)
    for at in range(0, n_rows, _BLOCK):
        block = row_NF[at : at + _BLOCK]
        random.standard_normal(block.shape, dtype=np.float32, out=block)
        block *= 0.5
        block += centers[random.integers(0, n_centers, len(block))]
    return ArrayRows(row_NF)


def time_call(run: Callable[[], object], rounds: int) -> float:
    """Return the median seconds of a call, after one that is not timed."""
    run()
    torch.accelerator.synchronize()
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        run()
        torch.accelerator.synchronize()
        seconds.append(time.perf_counter() - began)
    return median(seconds)


def measure_bandwidth(device: torch.device, rounds: int) -> float:
    """Return the bytes per second that a copy within the memory reads and writes."""
    source = torch.empty(4 * _GIB, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * len(source) / time_call(lambda: target.copy_(source), rounds)


def measure_scan(gpu: Gpu, n_rows: int, dim: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Yield the seconds of scans for numbers of queries, in one direction."""
    bandwidth = measure_bandwidth(gpu.device, rounds)
    row_NF = torch.empty(n_rows, dim, dtype=torch.float16, device=gpu.device)
    for at in range(0, n_rows, _BLOCK):
        row_NF[at : at + _BLOCK].normal_()
    torch.accelerator.synchronize()
    rows = GpuRows([RowPart(gpu, row_NF, 0)], np.arange(n_rows), 0)
    for n_queries in (1, 64, 1000):
        query_QF = np.random.default_rng(1).standard_normal((n_queries, dim), dtype=np.float32)
        query_QF /= np.linalg.norm(query_QF, axis=1, keepdims=True)
        half_QF = torch.from_numpy(query_QF).to(gpu.device, torch.float16)
        faiss_s = time_call(lambda query_QF=query_QF: rows.find(query_QF, K), rounds)
        product_s = time_call(lambda half_QF=half_QF: _scan(half_QF, row_NF, 0), rounds)
        pytorch_s = time_call(lambda half_QF=half_QF: _scan(half_QF, row_NF, K), rounds)
        read_s = row_NF.nbytes / bandwidth
        yield {
            "rows": n_rows,
            "dim": dim,
            "queries": n_queries,
            "faiss_s": faiss_s,
            "pytorch_s": pytorch_s,
            "product_s": product_s,
            "read_s": read_s,
            "bytes_per_s": bandwidth,
            "faiss_to_limit": faiss_s / max(read_s, product_s),
        }


def _scan(half_QF: torch.Tensor, row_NF: torch.Tensor, k: int) -> None:
    """Multiply queries and rows in blocks, and select the best k of each block."""
    for at in range(0, len(row_NF), _BLOCK):
        score_QB = half_QF @ row_NF[at : at + _BLOCK].T
        if k:
            score_QB.topk(k)


def measure_lists(device: torch.device, n_rows: int, dim: int, rounds: int) -> dict[str, Any]:
    """Return the seconds of searches in lists on the GPU and on the CPU, and how many results agree."""
    source = make_points(n_rows, dim)
    began = time.perf_counter()
    index = IVFIndex.build(source, IVFParams(), device)
    result: dict[str, Any] = {"rows": n_rows, "dim": dim, "build_s": time.perf_counter() - began}
    with tempfile.TemporaryDirectory() as folder:
        index.save(Path(folder))
        on_cpu = IVFIndex.load(Path(folder), source, torch.device("cpu"))
    setting = Setting(4000, 4000, 0.2)
    index, on_cpu = index.with_settings(setting), on_cpu.with_settings(setting)
    result["place"] = index.describe_place(10)
    random = np.random.default_rng(2)
    for n_queries in (1, 64, 1000):
        query_QF = source.take(random.integers(0, n_rows, n_queries)) + random.standard_normal((n_queries, dim))
        query_QF = query_QF.astype(np.float32)
        for name, searched in (("gpu", index), ("cpu", on_cpu)):
            result[f"{name}_s_{n_queries}"] = time_call(lambda s=searched, q=query_QF: s.search_both(q, 10), rounds)
    found, expected = (searched.search(query_QF, 10).ids for searched in (index, on_cpu))
    agreeing = [len(np.intersect1d(a, b)) / 10 for a, b in zip(found, expected, strict=True)]
    return {**result, "agreement": float(np.mean(agreeing))}


def find_gpu() -> tuple[torch.device, Gpu]:
    """Return the device and the GPU to measure; exit with a line if there is none."""
    device = resolve_device("auto")
    gpus = list_gpus(device)
    if device.type == "cpu":
        sys.exit(f"no GPU: PyTorch {torch.__version__} sees none; run this on a machine with an NVIDIA GPU")
    if not gpus:
        sys.exit("FAISS has no GPU: the installed package is for CPUs; install tracin-ann[gpu] instead of [cpu]")
    return device, gpus[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only check that there is a GPU")
    parser.add_argument("--rows", type=int, default=10_000_000, help="rows of the scans")
    parser.add_argument("--dim", type=int, default=768, help="numbers of their rows")
    parser.add_argument("--list-rows", type=int, default=3_200_000, help="rows of the lists")
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each kind")
    options = parser.parse_args()
    device, gpu = find_gpu()
    if options.check:
        return
    scans = list(measure_scan(gpu, options.rows, options.dim, options.rounds))
    lists = measure_lists(device, options.list_rows, 256, options.rounds)
    results = {"scans": scans, "lists": lists}
    print(results)
    print(write_results("retrieval_gpu", vars(options), results, device))


if __name__ == "__main__":
    main()
