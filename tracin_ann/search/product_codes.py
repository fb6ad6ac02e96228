"""Product codes of reduced rows: coded by few bits, and scanned completely by FAISS for each query.

A code has 4 bits and encodes 1, 2, 4 or 8 coordinates by the nearest of 16 centroids (Jégou, Douze and Schmid 2011).
Coordinates of large variance share a code with fewer others, so that the codes lose the least variance for their
number. FAISS's fast scan (André, Kermarrec and Le Scouarnec 2015) computes the inner products of a query with all
codes from tables in registers.

Rows are scaled to norm 1 before they are coded, so that all of them are equally accurate. A centroid is a mean, so
decoded rows û are shorter than the rows u, some by more than others; the factor ‖x‖ / ⟨u, û⟩ of a row x = ‖x‖·u
corrects this and the scaling (Gao and Long 2024, RaBitQ, equation 6). The fast scan has no place for a factor for each
row. Rows of similar factors are therefore in one inverted list; see `product_scan` for a scan of all lists.

Shapes: N rows, B rows of a block, Q queries, K results, R reduced dimension, C codes of a row, L lists.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tracin_ann.device import import_faiss
from tracin_ann.search.clustering import LARGEST_EXPONENT
from tracin_ann.search.faiss_file import WrittenFile, read_faiss, write_faiss
from tracin_ann.search.inverted_lists import Selector, search_lists
from tracin_ann.search.reduction import normalize
from tracin_ann.types import Float32, Float64, Int64

CODE_BITS = 4
_CENTROIDS = 2**CODE_BITS
_LEVELS = (8, 4, 2, 1)
"""Numbers of coordinates that share a code, in increasing order of precision."""
_LOSS = (1.0, 0.601, 0.343, 0.109, 0.0124)
"""Share of the variance that is lost without a code, and at each level (k-means of normal coordinates)."""
TRAIN_ROWS = 8192
"""As many rows are enough to train the centroids."""
_ITERATIONS = 8
_ROWS_AT_ONCE = 4096
_LISTS = 16
_LISTS_PER_OCTAVE = 3
"""Factors in a list differ by at most the third root of two; the last list has the small ones."""
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

    def _list_levels(self) -> Iterator[tuple[int, slice, slice]]:
        """Yield each size of a code, with the codes of this size and their coordinates."""
        coordinate = code = 0
        for size, count in zip(*(each.tolist() for each in np.unique_counts(self.size_C)), strict=True):
            yield size, slice(code, code + count), slice(coordinate, coordinate + size * count)
            code, coordinate = code + count, coordinate + size * count

    def make_rotation(self, seed: int) -> Float32:
        """Return a random orthogonal matrix [R, R] that mixes the coordinates that codes of equal size encode.

        Single coordinates of a row can be much larger than usual, beyond all centroids; sums of many cannot.
        """
        random = np.random.Generator(np.random.Philox(seed))
        rotation_RR = np.zeros((self.width, self.width), np.float32)
        for _, _, own in self._list_levels():
            n_own = own.stop - own.start
            rotation_RR[own, own] = np.linalg.qr(random.standard_normal((n_own, n_own)))[0]
        return rotation_RR

    def pad(self, rows_BR: Float32) -> Float32:
        """Return the rows with the coordinates of each code side by side, and zeros: float32 [B, C · slots]."""
        padded_BCS = np.zeros((len(rows_BR), len(self.size_C), self.slots), np.float32)
        for size, codes, own in self._list_levels():
            padded_BCS[:, codes, :size] = rows_BR[:, own].reshape(len(rows_BR), -1, size)
        return padded_BCS.reshape(len(rows_BR), -1)


class ProductCoder:
    """Centroids of all codes, and the rows that are coded with them."""

    def __init__(self, quantizer: Any, layout: Layout) -> None:
        """Wrap a trained `faiss.ProductQuantizer`; use `train` to create one."""
        faiss = import_faiss()
        self.layout, self._quantizer, dim = layout, quantizer, len(layout.size_C) * layout.slots
        n_codes, metric = len(layout.size_C), faiss.METRIC_INNER_PRODUCT
        # Unlike FAISS's other fast scans, that of lists accepts filters.
        self._index = faiss.IndexIVFPQ(faiss.IndexFlatIP(dim), dim, _LISTS, n_codes, CODE_BITS, metric)
        self._index.pq, self._index.by_residual, self._index.is_trained = quantizer, False, True
        self._factors = [np.zeros(0, np.float32)]

    @classmethod
    def train(cls, sample_BR: Float32, layout: Layout, seed: int) -> ProductCoder:
        """Return a coder without rows, for rows like those of the sample."""
        faiss = import_faiss()
        padded = layout.pad(normalize(sample_BR)[0])
        # FAISS needs as many rows as centroids.
        padded = np.resize(padded, (max(len(padded), _CENTROIDS), padded.shape[1]))
        quantizer = faiss.ProductQuantizer(padded.shape[1], len(layout.size_C), CODE_BITS)
        quantizer.cp.niter, quantizer.cp.seed = _ITERATIONS, seed % 2**31
        quantizer.cp.min_points_per_centroid, quantizer.cp.max_points_per_centroid = 1, len(padded)
        quantizer.train(padded)
        return cls(quantizer, layout)

    def encode(self, rows_BR: Float32) -> tuple[npt.NDArray[np.uint8], Float32]:
        """Return the codes and the factors of rows [B, R]."""
        unit_BR, norm_B = normalize(rows_BR)
        padded = self.layout.pad(unit_BR)
        codes = self._quantizer.compute_codes(padded)
        cosine_B = np.einsum("bp,bp->b", padded, self.decode(codes), dtype=np.float64)
        factor_B = np.divide(norm_B, cosine_B, out=np.zeros_like(norm_B), where=cosine_B > 0)
        return codes, factor_B.astype(np.float32)

    def decode(self, codes: npt.NDArray[np.uint8]) -> Float32:
        """Return decoded rows, padded."""
        decoded: Float32 = self._quantizer.decode(codes)
        return decoded

    def add(self, rows_BR: Float32, id_B: Int64) -> None:
        """Code rows [B, R] of norms below 2^13; their ids must be larger than those before."""
        faiss = import_faiss()
        for at in range(0, len(rows_BR), _ROWS_AT_ONCE):
            codes, factor_B = self.encode(rows_BR[at : at + _ROWS_AT_ONCE])
            octaves_B = LARGEST_EXPONENT - np.log2(factor_B, out=np.full_like(factor_B, -np.inf), where=factor_B > 0)
            list_B = (_LISTS_PER_OCTAVE * octaves_B).clip(0, _LISTS - 1).astype(np.int64)
            for number in np.unique(list_B).tolist():
                ids, part = id_B[at : at + _ROWS_AT_ONCE][list_B == number], codes[list_B == number]
                self._index.invlists.add_entries(number, len(ids), faiss.swig_ptr(ids), faiss.swig_ptr(part))
            self._index.ntotal += len(factor_B)
            self._factors.append(factor_B)

    def make_empty_copy(self) -> ProductCoder:
        """Return a coder with the same centroids, and without rows."""
        return ProductCoder(self._quantizer, self.layout)

    def finish(self) -> ProductCodes:
        """Return the codes of all rows."""
        scanned = import_faiss().IndexIVFPQFastScan(self._index, _BLOCK)
        self._index.reset()
        return ProductCodes(scanned, self.layout, np.concatenate(self._factors))


class ProductCodes:
    """Codes of rows, which are scanned by inner product; several threads can scan them.

    Attributes:
        layout: the coordinates of the codes.
        factor_N: float32 factor of each row, in increasing order of their ids.
    """

    def __init__(self, index: Any, layout: Layout, factor_N: Float32) -> None:
        """Wrap a `faiss.IndexIVFPQFastScan`.

        Raises:
            ValueError: the index does not have the codes of the layout, or another number of rows than factors.
        """
        n_codes, kind = len(layout.size_C), import_faiss().IndexIVFPQFastScan
        if factor_N.dtype != np.float32 or factor_N.ndim != 1 or not isinstance(index, kind):
            raise ValueError(f"factors of {factor_N.dtype} {factor_N.shape} for {type(index).__name__}")
        got = index.d, index.M, index.nlist, index.ntotal
        if got != (n_codes * layout.slots, n_codes, _LISTS, len(factor_N)):
            raise ValueError(f"not {len(factor_N):,} rows of {n_codes} codes")
        self._index, self.layout, self.factor_N = index, layout, factor_N

    @classmethod
    def load(cls, path: Path, written: WrittenFile, layout: Layout, factor_N: Float32) -> ProductCodes:
        """Return the codes of a file.

        Raises:
            DamagedIndexError: the file is missing, or is not the one that was written.
            ValueError: it does not have codes of this layout, or not as many rows as factors.
            OSError: the system has no memory or file descriptors left.
        """
        return cls(read_faiss(path, written), layout, factor_N)

    def save(self, path: Path) -> WrittenFile:
        """Write the codes to this path; the caller renames and fsyncs."""
        return write_faiss(path, self._index)

    def __len__(self) -> int:
        """Return the number of rows."""
        return int(self._index.ntotal)

    @cached_property
    def ids_N(self) -> Int64:
        """Return the ids of all rows, int64, increasing."""
        return np.sort(np.concatenate([self._list_ids(number) for number in range(_LISTS)]))

    def _list_ids(self, number: int) -> Int64:
        """Return the ids of a list; memory of FAISS."""
        faiss, lists = import_faiss(), self._index.invlists
        size = int(lists.list_size(number))
        ids: Int64 = faiss.rev_swig_ptr(lists.get_ids(number), size) if size else np.zeros(0, np.int64)
        return ids

    def _find_places(self, ids_QM: Int64) -> Int64:
        """Return the place of each row by its id; any place for padding."""
        places: Int64 = ids_QM - self.ids_N[0]
        if self.ids_N[-1] - self.ids_N[0] >= len(self):
            # Ids with gaps.
            places = np.searchsorted(self.ids_N, ids_QM)
        return places.clip(0, len(self) - 1)

    def count_wrong(self, rows_BR: Float32, id_B: Int64) -> int:
        """Return how many rows [B, R] do not have the codes and factors that are stored for these ids, increasing."""
        layout, coder = self.layout, ProductCoder(self._index.pq, self.layout)
        codes, factor_B = coder.encode(rows_BR)
        padded = layout.pad(normalize(rows_BR)[0])
        shape = len(rows_BR), len(layout.size_C), layout.slots
        off, least = (
            np.square(padded - coder.decode(each)).reshape(shape).sum(axis=2)
            for each in (self._unpack(id_B, codes), codes)
        )
        # Rounding can move coordinates between two centroids to the other one.
        wrong_B = (off > (1 + _TOLERANCE) * least + _TOLERANCE / len(layout.size_C)).any(axis=1)
        wrong_B |= np.abs(self.factor_N[self._find_places(id_B)] - factor_B) > _TOLERANCE * factor_B
        return int(wrong_B.sum())

    def _unpack(self, id_B: Int64, like: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Return the codes stored for these ids, increasing, in an array like another."""
        faiss, packer = import_faiss(), self._index.get_CodePacker()
        codes = np.zeros_like(like)
        for number in range(_LISTS):
            _, place_B, offset_B = np.intersect1d(id_B, self._list_ids(number), return_indices=True)
            for place, offset in zip(place_B.tolist(), offset_B.tolist(), strict=True):
                packer.unpack_1_c(self._index.invlists.get_codes(number), offset, faiss.swig_ptr(codes[place]))
        return codes

    @cached_property
    def list_sizes(self) -> Int64:
        """Return the number of rows of each list, int64 [L]."""
        return np.array([int(self._index.invlists.list_size(number)) for number in range(_LISTS)])

    @cached_property
    def list_factors(self) -> Float64:
        """Return the median factor of the rows of each list, [L]; 1 for an empty list."""
        ids = (self._list_ids(number) for number in range(_LISTS))
        return np.array([np.median(self.factor_N[self._find_places(each)]) if len(each) else 1.0 for each in ids])

    def search_lists(
        self, numbers: Sequence[int], padded: Float32, k: int, selector: Selector | None
    ) -> tuple[Int64, Float32]:
        """Return (ids, scores) [Q, k] of the best rows of some lists by their codes, best first before their factors.

        The id of padding is −1, and its score −infinity.
        """
        ids_QK, scores_QK = search_lists(self._index, padded, k, np.tile(numbers, (len(padded), 1)), selector)
        is_padding_QK = ids_QK < 0
        scores_QK[is_padding_QK] = 0
        scores_QK *= self.factor_N[self._find_places(ids_QK)]
        scores_QK[is_padding_QK] = -np.inf
        return ids_QK, scores_QK
