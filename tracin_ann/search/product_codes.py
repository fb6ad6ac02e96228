"""Product codes of reduced rows: coded by few bits, and scanned completely by FAISS for each query.

A code has 4 bits and encodes 1, 2, 4 or 8 coordinates by the nearest of 16 centroids (Jégou, Douze and Schmid 2011).
Coordinates of large variance share a code with fewer others, so that the codes lose the least variance for their
number. FAISS's fast scan (André, Kermarrec and Le Scouarnec 2015) computes the inner products of a query with all
codes from tables in registers.

The inner products are not exact: a centroid is a mean, so decoded rows x̂ are shorter than the rows x, some by more
than others. The factor ‖x‖² / ⟨x, x̂⟩ of a row corrects this (Gao and Long 2024, RaBitQ, equation 6). The fast scan has
no place for it, so it is applied to the best candidates.

Shapes: N rows, B rows of a block, Q queries, M candidates, R reduced dimension, C codes of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tracin_ann.device import import_faiss
from tracin_ann.search.faiss_file import FaissFile, read_faiss, write_faiss
from tracin_ann.search.inverted_lists import make_selector
from tracin_ann.types import Float32, Int64

CODE_BITS = 4
_CENTROIDS = 2**CODE_BITS
_LEVELS = (8, 4, 2, 1)
"""Numbers of coordinates that share a code, in increasing order of precision."""
_LOSS = (1.0, 0.601, 0.343, 0.109, 0.0124)
"""Share of the variance that is lost without a code, and at each level (k-means of normal coordinates)."""
_TRAIN_ROWS = 8192
_ITERATIONS = 8
_ROWS_AT_ONCE = 4096
_OVERSAMPLING = 4
"""The factors are applied to this many times the wanted candidates."""
_LEAST_COSINE = 0.5
_FEW_QUERIES = 16
_BLOCK = 32
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Layout:
    """The coordinates that each code encodes.

    Attributes:
        size_C: int64 number of coordinates of each code, nondecreasing.
    """

    size_C: Int64

    def __post_init__(self) -> None:
        """Check the sizes.

        Raises:
            ValueError: there are none, or they are not nondecreasing levels.
        """
        size_C = self.size_C
        valid = size_C.dtype == np.int64 and size_C.ndim == 1 and len(size_C) > 0
        if not (valid and np.isin(size_C, _LEVELS).all() and (np.diff(size_C) >= 0).all()):
            raise ValueError("not the sizes of product codes")

    @classmethod
    def allocate(cls, variance_R: npt.NDArray[np.floating[Any]], n_codes: int) -> Layout:
        """Return the layout of at most n_codes codes that loses the least variance of independent coordinates.

        Args:
            variance_R: variance of each coordinate, decreasing.
            n_codes: number of codes.
        """
        cost = np.diff([0.0, *(1 / level for level in _LEVELS)])
        gain = -np.diff(_LOSS) / cost
        # The best steps from one level to the next, while there are codes. Gains of a coordinate decrease.
        steps = np.argsort(-np.outer(variance_R, gain).ravel(), kind="stable") % len(_LEVELS)
        taken = steps[np.cumsum(cost[steps]) <= n_codes + 1e-9]
        reach = dict(zip(_LEVELS, np.bincount(taken, minlength=len(_LEVELS)).tolist(), strict=True))
        sizes: list[int] = []
        for level in sorted(_LEVELS):
            sizes += [level] * ((reach[level] - sum(sizes)) // level)
        return cls(np.array(sizes, dtype=np.int64))

    @property
    def width(self) -> int:
        """Return R, the number of coordinates."""
        return int(self.size_C.sum())

    @property
    def slots(self) -> int:
        """Return the number of coordinates of the largest code: FAISS needs codes of equal size."""
        return int(self.size_C[-1])

    @cached_property
    def _place_R(self) -> Int64:
        """Return the place of each coordinate in a padded row; the coordinates of a code are far apart in R."""
        places, start = [], 0
        for level in np.unique(self.size_C).tolist():
            n_codes = int((self.size_C == level).sum())
            code_LC = np.arange(start, start + n_codes) * self.slots + np.arange(level)[:, None]
            places.append(code_LC.ravel())
            start += n_codes
        return np.concatenate(places).astype(np.int64)

    def pad(self, rows_BR: Float32) -> Float32:
        """Return the rows with the coordinates of each code side by side, and zeros: float32 [B, C · slots]."""
        padded = np.zeros((len(rows_BR), len(self.size_C) * self.slots), np.float32)
        padded[:, self._place_R] = rows_BR
        return padded


class ProductCoder:
    """Centroids of all codes, and the rows that are coded with them."""

    def __init__(self, quantizer: Any, layout: Layout) -> None:
        """Wrap a trained `faiss.ProductQuantizer`; use `train` or `ProductCodes.coder` to create one."""
        faiss = import_faiss()
        self.layout, self._quantizer, dim = layout, quantizer, len(layout.size_C) * layout.slots
        # One list, of all rows: unlike FAISS's other fast scans, that of lists accepts filters.
        origin = faiss.IndexFlatIP(dim)
        origin.add(np.zeros((1, dim), np.float32))
        self._index = faiss.IndexIVFPQ(origin, dim, 1, len(layout.size_C), CODE_BITS, faiss.METRIC_INNER_PRODUCT)
        self._index.pq, self._index.by_residual, self._index.is_trained = quantizer, False, True
        self._factors = [np.zeros(0, np.float32)]

    @classmethod
    def train(cls, sample_BR: Float32, n_codes: int, seed: int) -> ProductCoder:
        """Return a coder without rows for coordinates like those of the sample, in decreasing order of variance."""
        faiss = import_faiss()
        layout = Layout.allocate(np.square(sample_BR, dtype=np.float64).mean(axis=0), n_codes)
        step = -(-len(sample_BR) // _TRAIN_ROWS)
        padded = layout.pad(sample_BR[::step, : layout.width])
        # FAISS needs as many rows as centroids.
        padded = np.resize(padded, (max(len(padded), _CENTROIDS), padded.shape[1]))
        quantizer = faiss.ProductQuantizer(padded.shape[1], len(layout.size_C), CODE_BITS)
        quantizer.cp.niter, quantizer.cp.seed = _ITERATIONS, seed % 2**31
        quantizer.cp.min_points_per_centroid, quantizer.cp.max_points_per_centroid = 1, len(padded)
        quantizer.train(padded)
        return cls(quantizer, layout)

    def encode(self, rows_BR: Float32) -> tuple[npt.NDArray[np.uint8], Float32, Float32]:
        """Return the codes, the decoded rows, padded, and the factors of rows [B, R]."""
        padded = self.layout.pad(rows_BR)
        codes = self._quantizer.compute_codes(padded)
        decoded = self.decode(codes)
        square_B, decoded_B, inner_B = (
            np.einsum("bp,bp->b", left, right, dtype=np.float64)
            for left, right in ((padded, padded), (decoded, decoded), (padded, decoded))
        )
        # Rows that are small among the others have bad codes. Their estimates must not be larger than most.
        inner_B = np.maximum(inner_B, _LEAST_COSINE * np.sqrt(square_B * decoded_B))
        factor_B = np.divide(square_B, inner_B, out=np.ones_like(square_B), where=inner_B > 0)
        return codes, decoded, factor_B.astype(np.float32)

    def decode(self, codes: npt.NDArray[np.uint8]) -> Float32:
        """Return decoded rows, padded."""
        decoded: Float32 = self._quantizer.decode(codes)
        return decoded

    def add(self, rows_BR: Float32, id_B: Int64) -> None:
        """Code rows [B, R]; their ids must be larger than those before."""
        faiss = import_faiss()
        for at in range(0, len(rows_BR), _ROWS_AT_ONCE):
            codes, _, factor_B = self.encode(rows_BR[at : at + _ROWS_AT_ONCE])
            ids = np.ascontiguousarray(id_B[at : at + _ROWS_AT_ONCE])
            self._index.invlists.add_entries(0, len(ids), faiss.swig_ptr(ids), faiss.swig_ptr(codes))
            self._index.ntotal += len(ids)
            self._factors.append(factor_B)

    def finish(self) -> ProductCodes:
        """Return the codes of all rows, in the order in which FAISS scans them."""
        scanned = import_faiss().IndexIVFPQFastScan(self._index, _BLOCK)
        self._index.reset()
        return ProductCodes(scanned, self.layout, np.concatenate(self._factors))


class ProductCodes:
    """Codes of rows that are scanned by inner product; several threads can scan them.

    Attributes:
        layout: the coordinates of the codes.
        factor_N: float32 factor of each row, in increasing order of their ids.
    """

    def __init__(self, index: Any, layout: Layout, factor_N: Float32) -> None:
        """Wrap a `faiss.IndexIVFPQFastScan` with one list.

        Raises:
            ValueError: the index does not have the codes of the layout, or another number of rows than factors.
        """
        n_codes, kind = len(layout.size_C), import_faiss().IndexIVFPQFastScan
        if factor_N.dtype != np.float32 or factor_N.ndim != 1 or not isinstance(index, kind):
            raise ValueError(f"factors of {factor_N.dtype} {factor_N.shape} for {type(index).__name__}")
        got = index.d, index.M, index.nlist, index.ntotal
        if got != (n_codes * layout.slots, n_codes, 1, len(factor_N)):
            raise ValueError(f"not {len(factor_N):,} rows of {n_codes} codes")
        self._index, self.layout, self.factor_N = index, layout, factor_N

    @classmethod
    def load(cls, path: Path, written: FaissFile, layout: Layout, factor_N: Float32) -> ProductCodes:
        """Return the codes of a file.

        Raises:
            DamagedIndexError: the file is missing, or is not the one that was written.
            ValueError: it does not have codes of this layout, or not as many rows as factors.
            OSError: the system has no memory or file descriptors left.
        """
        return cls(read_faiss(path, written), layout, factor_N)

    def save(self, path: Path) -> FaissFile:
        """Write the codes to this path; the caller renames and fsyncs."""
        return write_faiss(path, self._index)

    def __len__(self) -> int:
        """Return the number of rows."""
        return int(self._index.ntotal)

    @property
    def bytes_per_row(self) -> int:
        """Return the bytes of a row: its codes, its id and its factor."""
        return int(self._index.code_size) + 8 + self.factor_N.itemsize

    @cached_property
    def ids_N(self) -> Int64:
        """Return the ids of all rows, int64, increasing; memory of FAISS."""
        faiss, lists = import_faiss(), self._index.invlists
        ids: Int64 = faiss.rev_swig_ptr(lists.get_ids(0), len(self)) if len(self) else np.zeros(0, np.int64)
        return ids

    def _find_places(self, ids_QM: Int64) -> Int64:
        """Return the place of each row by its id; any place for padding."""
        places: Int64 = ids_QM - self.ids_N[0]
        if self.ids_N[-1] - self.ids_N[0] >= len(self):
            # Ids with gaps.
            places = np.searchsorted(self.ids_N, ids_QM)
        return places.clip(0, len(self) - 1)

    def count_wrong(self, rows_BR: Float32, place_B: Int64) -> int:
        """Return how many rows [B, R] do not have the codes and the factor stored at these places."""
        layout = self.layout
        coder = ProductCoder(self._index.pq, layout)
        codes, nearest, factor_B = coder.encode(rows_BR)
        stored = coder.decode(self._unpack(place_B, codes))
        padded = layout.pad(rows_BR)
        shape = len(rows_BR), len(layout.size_C), layout.slots
        off, least = (np.square(padded - each).reshape(shape).sum(axis=2) for each in (stored, nearest))
        # Rounding can move coordinates between two centroids to the other one.
        slack = _TOLERANCE * np.square(padded).sum(axis=1, keepdims=True) / len(layout.size_C)
        wrong = (off > (1 + _TOLERANCE) * least + slack).any(axis=1)
        return int((wrong | (np.abs(self.factor_N[place_B] - factor_B) > _TOLERANCE)).sum())

    def _unpack(self, place_B: Int64, like: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Return the codes stored at these places, in an array like another."""
        faiss = import_faiss()
        codes = np.zeros_like(like)
        packer, blocks = self._index.get_CodePacker(), self._index.invlists.get_codes(0)
        for place, code in zip(place_B.tolist(), codes, strict=True):
            packer.unpack_1_c(blocks, place, faiss.swig_ptr(code))
        return codes

    def scan(self, queries_QR: Float32, n_candidates: int, allowed: Int64 | None = None) -> Int64:
        """Return the ids of the best rows by their codes, int64 [Q, M], unordered; −1: padding.

        Args:
            queries_QR: float32.
            n_candidates: M.
            allowed: int64 ids, increasing, to which the candidates are restricted; None: all.
        """
        faiss = import_faiss()
        if not len(self):
            return np.zeros((len(queries_QR), 0), np.int64)
        parameters = faiss.SearchParametersIVF(nprobe=1)
        if allowed is not None:
            selector, memory = make_selector(allowed, len(self))
            parameters.sel = selector
        # For one query, FAISS uses one thread; several wait for each other, for milliseconds if a core is in use.
        step = 1 if len(queries_QR) <= _FEW_QUERIES else len(queries_QR)
        padded, k = self.layout.pad(queries_QR), min(_OVERSAMPLING * n_candidates, len(self))
        found = [self._index.search(padded[at : at + step], k, params=parameters) for at in range(0, len(padded), step)]
        if allowed is not None:
            del selector, memory
        scores_QM = np.concatenate([np.zeros((0, k), np.float32), *(scores for scores, _ in found)])
        ids_QM = np.concatenate([np.zeros((0, k), np.int64), *(ids for _, ids in found)])
        place_QM = self._find_places(ids_QM)
        scores_QM[ids_QM < 0] = -np.inf
        estimate_QM = scores_QM * self.factor_N[place_QM]
        n = min(n_candidates, k)
        best = np.argpartition(-estimate_QM, n - 1, axis=1)[:, :n]
        return np.take_along_axis(ids_QM, best, axis=1)
