"""Time and memory of building an index from stored features, and the share of the time that the features took.

Reads the rows that benchmarks.retrieval.rows wrote, which also recorded how long the features took and by how many
threads; each build runs in a new process, with as many threads. Memory is what the process itself holds, not the mapped
feature files; the interpreter and PyTorch are included.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common.results import report_results
from benchmarks.retrieval.lists import CPU, First
from benchmarks.retrieval.stages import set_faiss_threads
from tracin_ann.search import NAMES, IndexRequest, build_index, choose_index, diagnose
from tracin_ann.store import FeatureStore
from tracin_ann.store.manifest import FEATURES, Manifest

RESULT = "retrieval_building"
KINDS = tuple(kind for kind in NAMES if kind != "flat")


class MemoryWatch(threading.Thread):
    """The largest private memory of this process, which is read every tenth of a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak_mb, self._finished = 0.0, threading.Event()

    def run(self) -> None:
        """Read the memory until `finish` is called."""
        while True:
            status = Path("/proc/self/status").read_text()
            found = re.search(r"RssAnon:\s+(\d+)", status)
            self.peak_mb = max(self.peak_mb, int(found[1]) / 1e3 if found else 0.0)
            if self._finished.wait(0.1):
                return

    def finish(self) -> float:
        """Return the peak in MB."""
        self._finished.set()
        self.join()
        return self.peak_mb


def build_in_process(kind: str, index: Path, n_threads: int) -> dict[str, float]:
    """Build an index of this kind, and return seconds, peak memory in MB, and bytes a row."""
    torch.set_num_threads(n_threads)
    set_faiss_threads(n_threads)
    rows, watch = open_rows(index), MemoryWatch()
    watch.start()
    with tempfile.TemporaryDirectory(dir=index.parent) as folder:
        start_s = time.perf_counter()
        built = build_index(kind, rows, IndexRequest(0, "sq8", CPU, Path(folder), ()), lambda done, total: None)
        seconds = time.perf_counter() - start_s
    return {"seconds": seconds, "peak_mb": watch.finish(), "bytes_a_row": built.resident_bytes / len(rows)}


def open_rows(index: Path) -> First:
    """Return all rows of an index."""
    view = FeatureStore(index / FEATURES, Manifest.read(index).build.layout).view()
    return First(view, len(view))


def choose_kind(rows: First) -> str:
    """Return the kind that a build tries first."""
    choices = choose_index("auto", len(rows), rows.dim, lambda: diagnose(rows, np.arange(len(rows)), 0))
    return choices[0].kind


def measure(families: dict[str, Path], kinds: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the figures of each kind, or of the automatic one, for each folder."""
    for name, folder in families.items():
        for made in sorted(folder.glob("made-*.json")):
            features = json.loads(made.read_text())
            n_threads = int(re.search(r"(\d+) threads", features["environment"]["device"])[1])
            index = folder / f"index-{features['rows']}"
            rows = open_rows(index)
            result = {"family": name, "rows": len(rows), "dim": rows.dim}
            result |= {"threads": n_threads, "features_seconds": features["seconds"]}
            for kind in kinds or [choose_kind(rows)]:
                # A new process: memory that an earlier build returned could be used again.
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    yield result | {"kind": kind} | pool.apply(build_in_process, (kind, index, n_threads))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("families", nargs="+", help="models and the folders of their rows", metavar="NAME=FOLDER")
    parser.add_argument("--kinds", nargs="*", default=[], choices=KINDS, help="index kinds; default: automatic")
    options = parser.parse_args()
    families = {name: Path(folder) for name, _, folder in (each.partition("=") for each in options.families)}
    report_results(RESULT, {"kinds": options.kinds}, measure(families, options.kinds))


if __name__ == "__main__":
    main()
