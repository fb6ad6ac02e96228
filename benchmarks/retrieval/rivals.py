"""Other indexes of the same rows, at settings of increasing cost: FAISS IVF and HNSW, LoRANN, RaBitQ-Library.

Shapes: N rows, Q queries, F feature dimension, K results.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from tracin_ann.device import import_faiss
from tracin_ann.types import Float32, Int64

TRAINING_ROWS = 200_000
CANDIDATES = 100


class Rival(Protocol):
    """An index of float32 rows in memory.

    Attributes:
        name: the library, the kind of index and its number of lists.
        parameter: the name of the setting.
        settings: values of the setting, in increasing order of cost.
        bytes_a_row: bytes in memory per row; without the rows themselves if the index has codes of them.
    """

    name: str
    parameter: str
    settings: tuple[int, ...]
    bytes_a_row: float

    def search(self, signed_QF: Float32, k: int, setting: int) -> tuple[list[Int64], float]:
        """Return the ids [K] of the best rows of each query, ranked by the rows, and the mean number of rows scored.

        For libraries that do not count them, rows scored are the lists probed times the mean size of a list.
        """


def count_lists(n_rows: int) -> int:
    """Return the power of two from 4·√N on."""
    return 1 << math.ceil(math.log2(4 * math.sqrt(n_rows)))


def _rank(row_NF: Float32, found_QM: Int64, signed_QF: Float32, k: int) -> list[Int64]:
    """Return the best k of the candidates of each query by the inner products with their rows."""
    ranked = []
    for found, query_F in zip(found_QM, signed_QF, strict=True):
        ids = found[found >= 0].astype(np.int64)
        ranked.append(ids[np.argsort(-(row_NF[ids] @ query_F), kind="stable")[:k]])
    return ranked


class _FaissLists:
    """FAISS inverted lists, by a factory string."""

    parameter = "nprobe"

    def __init__(self, row_NF: Float32, codes: str, settings: tuple[int, ...]) -> None:
        faiss = import_faiss()
        self._rows, self._statistics = row_NF, faiss.cvar.indexIVF_stats
        factory = f"IVF{count_lists(len(row_NF))},{codes}"
        self._index = faiss.index_factory(row_NF.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
        self._index.train(row_NF[np.linspace(0, len(row_NF) - 1, min(TRAINING_ROWS, len(row_NF))).astype(np.int64)])
        self._index.add(row_NF)
        self.name, self.settings, self.bytes_a_row = f"FAISS {factory}", settings, self._index.code_size + 8

    def search(self, signed_QF: Float32, k: int, setting: int) -> tuple[list[Int64], float]:
        self._index.nprobe = setting
        self._statistics.reset()
        _, found_QM = self._index.search(signed_QF, max(k, CANDIDATES))
        scored = self._statistics.ndis / len(signed_QF) + self._index.nlist
        return _rank(self._rows, found_QM, signed_QF, k), scored


class _FaissGraph:
    """FAISS HNSW by inner product over one byte per dimension."""

    parameter, settings = "ef", (64, 128, 256, 512, 1024)
    links = 32

    def __init__(self, row_NF: Float32) -> None:
        faiss = import_faiss()
        self._rows, self._statistics = row_NF, faiss.cvar.hnsw_stats
        quantizer = faiss.ScalarQuantizer.QT_8bit
        self._index = faiss.IndexHNSWSQ(row_NF.shape[1], quantizer, self.links, faiss.METRIC_INNER_PRODUCT)
        self._index.hnsw.efConstruction = 80
        self._index.train(row_NF[: min(TRAINING_ROWS, len(row_NF))])
        self._index.add(row_NF)
        self.name, self.bytes_a_row = f"FAISS HNSW{self.links},SQ8", row_NF.shape[1] + 2 * self.links * 4

    def search(self, signed_QF: Float32, k: int, setting: int) -> tuple[list[Int64], float]:
        self._index.hnsw.efSearch = max(setting, k)
        self._statistics.reset()
        _, found_QM = self._index.search(signed_QF, max(k, CANDIDATES))
        return _rank(self._rows, found_QM, signed_QF, k), self._statistics.ndis / len(signed_QF)


class _Lorann:
    """LoRANN: lists whose scores are predicted by low-rank regression; the best are ranked by their rows."""

    parameter = "lists"

    def __init__(self, row_NF: Float32) -> None:
        import lorann  # noqa: PLC0415

        n_lists = round(math.sqrt(len(row_NF)))
        # The width that its documentation suggests.
        width = 256 if row_NF.shape[1] > 1000 else 128
        self._index = lorann.LorannIndex(row_NF, n_lists, width, distance=lorann.IP)
        self._index.build(n_threads=torch.get_num_threads())
        self._rows, self._rows_a_list = row_NF, len(row_NF) / n_lists
        self.name, self.settings = f"LoRANN, {n_lists} lists", _list_probes(n_lists)
        self.bytes_a_row = _measure_file(self._index.save) / len(row_NF)

    def search(self, signed_QF: Float32, k: int, setting: int) -> tuple[list[Int64], float]:
        threads = torch.get_num_threads()
        found_QK = self._index.search(signed_QF, k, setting, max(2 * k, CANDIDATES), n_threads=threads)
        scored = self._rows_a_list * setting
        # It does not sort the results if it finds no more than it should rank.
        found = list(found_QK) if scored > 4 * k else _rank(self._rows, found_QK, signed_QF, k)
        return found, scored + self._index.n_clusters


class _RaBitQ:
    """RaBitQ-Library: lists of codes of 4 bits per dimension; the best are ranked by their rows."""

    parameter = "nprobe"
    bits = 4

    def __init__(self, row_NF: Float32) -> None:
        import rabitqlib  # noqa: PLC0415

        n_rows, dim = row_NF.shape
        n_lists, threads = count_lists(n_rows), torch.get_num_threads()
        clustering = rabitqlib.RaBitQKMeans(dim, n_lists, num_threads=threads)
        clustering.train(row_NF)
        self._index = rabitqlib.IvfIndex(dim, n_rows, n_lists, self.bits, metric="ip")
        self._index.build(row_NF, clustering.centroids, clustering.assignments, num_threads=threads)
        self._rows, self._rows_a_list = row_NF, n_rows / n_lists
        self.name, self.settings = f"RaBitQ-Library IVF{n_lists}, {self.bits} bits", _list_probes(n_lists)
        self.bytes_a_row = _measure_file(self._index.save) / n_rows

    def search(self, signed_QF: Float32, k: int, setting: int) -> tuple[list[Int64], float]:
        threads = torch.get_num_threads()
        found_QM, _ = self._index.search(signed_QF, max(k, CANDIDATES), setting, num_threads=threads)
        scored = self._rows_a_list * setting + self._index.num_clusters
        # Padding is the largest uint32, which is -1 as int32.
        return _rank(self._rows, found_QM.astype(np.int32), signed_QF, k), scored


def _list_probes(n_lists: int) -> tuple[int, ...]:
    """Return numbers of lists to probe, up to half of the lists."""
    return tuple(2**i for i in range(2, n_lists.bit_length()) if 2**i <= n_lists // 2)


def _measure_file(save: Callable[[str], Any]) -> int:
    """Return the size of the file of an index."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "index"
        save(str(path))
        return path.stat().st_size


RIVALS: dict[str, Callable[[Float32], Rival]] = {
    "faiss-ivf": lambda row_NF: _FaissLists(row_NF, "Flat", (16, 32, 64, 128, 256, 512)),
    "faiss-ivf-pq": lambda row_NF: _FaissLists(row_NF, "PQ96", (64, 256)),
    "faiss-hnsw": _FaissGraph,
    "lorann": _Lorann,
    "rabitqlib": _RaBitQ,
}


def is_installed(rival: str) -> bool:
    """Return whether the package of a rival is installed; FAISS always is."""
    return rival.startswith("faiss-") or find_spec(rival) is not None
