"""Inverted lists of quantized rows in FAISS: added to and scanned by explicit list numbers, stored in one file.

A reduced row has one code per dimension: 8 bits (`sq8`), 4 bits (`sq4`) or a half-precision number (`fp16`).

Shapes: Q queries, W keys (list numbers) per query, L lists, B rows of a block, R reduced dimension, K results.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt

from tracin_ann.device import import_faiss
from tracin_ann.errors import attach_path
from tracin_ann.files import open_regular, report_damage
from tracin_ann.types import Float32, Int64

Codes = Literal["sq8", "sq4", "fp16"]
Measure = Literal["product", "distance"]
CODES: tuple[Codes, ...] = ("sq8", "sq4", "fp16")
_QUANTIZERS = {"sq8": "QT_8bit", "sq4": "QT_4bit", "fp16": "QT_fp16"}
_BITMAP_BITS_PER_ROW = 64
# FAISS's file format: the position of the number of rows, the tag before the lists, and the header of the lists.
_N_ROWS = slice(8, 16)
_LISTS = b"ilar"
_TAIL = struct.Struct("<4sQQ4sQ")


class InvertedLists:
    """FAISS lists that are searched by inner product; several threads can scan them."""

    def __init__(self, index: Any) -> None:
        """Wrap a trained `faiss.IndexIVFScalarQuantizer`; use `train` or `load` to create one."""
        self._index = index

    @classmethod
    def train(cls, sample_BR: Float32, n_lists: int, codes: Codes) -> InvertedLists:
        """Return empty lists whose codes have the value ranges of the sample."""
        index = make_empty_index(n_lists, sample_BR.shape[1], codes)
        index.sq.train(np.ascontiguousarray(sample_BR))
        return cls(index)

    @classmethod
    def load(cls, path: Path, shape: tuple[int, int], codes: Codes, *, mapped: bool = True) -> InvertedLists:
        """Return the lists of a file with this shape (L, R): memory-mapped and read-only, or read into memory.

        Raises:
            DamagedIndexError: the file is missing or truncated, or has lists of another shape or other codes.
            OSError: the system has no memory or file descriptors left.
        """
        faiss = import_faiss()
        with report_damage(path, "inverted lists", "rebuild the index"):
            with open_regular(path) as file:
                _check_layout(file, shape, codes)
            return cls(faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC if mapped else 0))

    def save(self, path: Path) -> None:
        """Write the lists to this path; the caller renames and fsyncs."""
        faiss = import_faiss()
        # Not FAISS's own file: it reports no error if the disk is full when the last block is written.
        with attach_path(path), path.open("wb") as file:
            faiss.write_index(self._index, faiss.PyCallbackIOWriter(file.write))

    def __len__(self) -> int:
        """Return the number of rows."""
        return int(self._index.ntotal)

    @property
    def dim(self) -> int:
        """Return R."""
        return int(self._index.d)

    @property
    def n_lists(self) -> int:
        """Return L."""
        return int(self._index.nlist)

    def sizes(self) -> Int64:
        """Return the number of rows of each list, int64 [L]."""
        lists = self._index.invlists
        return np.array([lists.list_size(number) for number in range(lists.nlist)], dtype=np.int64)

    @property
    def bytes_per_row(self) -> int:
        """Return the bytes of a row: its code and its id."""
        return int(self._index.code_size) + 8

    def make_empty_copy(self) -> InvertedLists:
        """Return empty lists with the same shape and codes."""
        faiss = import_faiss()
        own = self._index
        index = faiss.IndexIVFScalarQuantizer(
            faiss.IndexFlatIP(own.d), own.d, own.nlist, own.sq.qtype, own.metric_type, False
        )
        index.sq, index.is_trained = own.sq, True
        return InvertedLists(index)

    def make_shard(self, centroid_LR: Float32, number: int, n_shards: int) -> Any:
        """Return a FAISS index with these centroids and the rows whose ids are `number` modulo n_shards.

        A single shard shares the memory of these lists, which must exist as long as it.
        """
        faiss, own = import_faiss(), self._index
        quantizer = faiss.IndexFlatIP(own.d)
        quantizer.add(np.ascontiguousarray(centroid_LR))
        shard = faiss.IndexIVFScalarQuantizer(quantizer, own.d, own.nlist, own.sq.qtype, own.metric_type, False)
        shard.sq, shard.is_trained = own.sq, True
        if n_shards == 1:
            shard.replace_invlists(own.invlists, False)
            shard.ntotal = own.ntotal
        else:
            own.copy_subset_to(shard, faiss.InvertedLists.SUBSET_TYPE_ID_MOD, n_shards, number)
        return shard

    def merge(self, other: InvertedLists) -> None:
        """Move the rows of other lists to the ends of these lists; the others become empty."""
        # Not the merge_from of the index: it compares centroids, which these lists do not have.
        self._index.invlists.merge_from(other._index.invlists, 0)
        self._index.ntotal += other._index.ntotal
        other._index.ntotal = 0

    def copy_range(self, other: InvertedLists, first: int, last: int) -> None:
        """Append the rows of other lists whose ids are at least `first` and below `last`."""
        lists = other._index.invlists
        n_rows = lists.copy_subset_to(self._index.invlists, lists.SUBSET_TYPE_ID_RANGE, first, last)
        self._index.ntotal += n_rows

    def add(self, rows_BR: Float32, list_B: Int64, id_B: Int64) -> None:
        """Append rows to the lists with these numbers."""
        faiss = import_faiss()
        # The names keep the arrays alive while FAISS uses their pointers.
        rows, lists, ids = (np.ascontiguousarray(a) for a in (rows_BR, list_B, id_B))
        self._index.add_core(len(rows), faiss.swig_ptr(rows), faiss.swig_ptr(ids), faiss.swig_ptr(lists))

    def ids(self) -> tuple[Int64, Int64]:
        """Return the ids of all rows, ordered by list, and the list number of each."""
        faiss, lists = import_faiss(), self._index.invlists
        sizes = self.sizes()
        by_list = [
            faiss.rev_swig_ptr(lists.get_ids(int(number)), int(sizes[number])).copy()
            for number in np.flatnonzero(sizes)
        ]
        return np.concatenate([np.zeros(0, np.int64), *by_list]), np.repeat(np.arange(self.n_lists), sizes)

    def decode_list(self, number: int) -> Float32:
        """Return the rows of one list, decoded, float32 [B, R]."""
        faiss, lists = import_faiss(), self._index.invlists
        size = int(lists.list_size(number))
        n_bytes = size * int(self._index.code_size)
        codes = faiss.rev_swig_ptr(lists.get_codes(number), n_bytes).reshape(size, -1) if size else None
        rows: Float32 = np.zeros((0, self.dim), np.float32) if codes is None else self._index.sq.decode(codes.copy())
        return rows

    def quantize(self, rows_BR: Float32) -> tuple[Float32, Float32]:
        """Return rows [B, R] rounded to their codes, and the distance to the neighboring codes, [B, R]."""
        sq = self._index.sq
        rows = np.ascontiguousarray(rows_BR)
        codes = sq.compute_codes(rows)
        rounded: Float32 = sq.decode(codes)
        if self._index.sq.qtype == import_faiss().ScalarQuantizer.QT_fp16:
            return rounded, np.abs(rounded) * np.float32(2**-9) + np.float32(1e-6)
        lowest, highest = sq.decode(np.zeros_like(codes[:1])), sq.decode(np.full_like(codes[:1], 255))
        levels = 255 if self._index.sq.qtype == import_faiss().ScalarQuantizer.QT_8bit else 15
        return rounded, np.broadcast_to((highest - lowest) / np.float32(levels), rounded.shape)

    def scan(self, queries_QR: Float32, k: int, key_QW: Int64, allowed: Int64 | None = None) -> tuple[Int64, Float32]:
        """Return FAISS's padded (ids [Q, k], scores [Q, k]) of the rows in the lists with these keys.

        Args:
            queries_QR: float32.
            k: results per query.
            key_QW: int64 list numbers; -1: padding.
            allowed: int64 ids, increasing, to which the results are restricted; None: all.
        """
        return search_lists(self._index, queries_QR, k, key_QW, make_selector(allowed, len(self)))


def search_lists(
    index: Any, queries_QR: Float32, k: int, key_QW: Int64, selector: Selector | None = None
) -> tuple[Int64, Float32]:
    """Return padded (ids, distances) [Q, k] of a search in the lists with these keys of a FAISS IVF index.

    The function `search_preassigned` of FAISS's Python package reads the number of lists from the index instead of
    parameters, so two threads with different numbers would disturb each other.
    """
    faiss = import_faiss()
    parameters = faiss.SearchParametersIVF(nprobe=key_QW.shape[1])
    if selector is not None:
        parameters.sel = selector.selector
    queries, keys = np.ascontiguousarray(queries_QR), np.ascontiguousarray(key_QW)
    coarse = np.zeros(keys.shape, np.float32)
    distances, ids = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
    if len(queries):
        pointers = [faiss.swig_ptr(a) for a in (queries, keys, coarse, distances, ids)]
        index.search_preassigned_c(len(queries), pointers[0], k, *pointers[1:], False, parameters, None)
    return ids, distances


@dataclass(frozen=True)
class Selector:
    """A FAISS selector, and the array that it points to."""

    selector: Any
    memory: npt.NDArray[Any]


def make_selector(allowed: Int64 | None, n_rows: int) -> Selector | None:
    """Return a selector of these ids for an index of this many rows; None: of all rows."""
    faiss = import_faiss()
    if allowed is None:
        return None
    largest = int(allowed[-1]) if len(allowed) else 0
    if largest < _BITMAP_BITS_PER_ROW * max(n_rows, 1):
        bits = np.zeros(largest // 8 + 1, np.uint8)
        np.bitwise_or.at(bits, allowed // 8, np.left_shift(1, allowed % 8).astype(np.uint8))
        return Selector(faiss.IDSelectorBitmap(bits), bits)
    return Selector(faiss.IDSelectorBatch(allowed), allowed)


def make_empty_index(n_lists: int, dim: int, codes: Codes, measure: Measure = "product") -> Any:
    """Return a FAISS index with empty lists, which compares by inner product or by squared distance."""
    faiss = import_faiss()
    quantizer = getattr(faiss.ScalarQuantizer, _QUANTIZERS[codes])
    metric = faiss.METRIC_INNER_PRODUCT if measure == "product" else faiss.METRIC_L2
    index = faiss.IndexIVFScalarQuantizer(faiss.IndexFlatIP(dim), dim, n_lists, quantizer, metric, False)
    index.is_trained = True
    return index


def _check_layout(file: BinaryIO, shape: tuple[int, int], codes: Codes) -> None:
    """Check that a file differs from lists of this shape only in its rows and the value ranges of the codes.

    FAISS does not check the sizes in a file; a wrong size makes it read or write outside its memory.

    Raises:
        ValueError: there are other differences.
    """
    n_bytes = os.fstat(file.fileno()).st_size
    plain, marked = (_serialize_empty(shape, codes, ranges) for ranges in (0x00, 0xFF))
    start = plain.tobytes().rfind(_LISTS)
    same = plain == marked
    same[_N_ROWS] = False
    head = np.frombuffer(file.read(start), np.uint8)
    if len(head) < start or (head != plain[:start])[same[:start]].any():
        raise ValueError(f"not {shape[0]:,} lists of {shape[1]} dimensions with {codes} codes")
    tail = file.read(_TAIL.size).ljust(_TAIL.size)
    # FAISS stores the sizes of all lists ("full"), or pairs (list, size) if most lists are empty ("sprs").
    name, n_lists, code_size, kind, n_numbers = _TAIL.unpack(tail)
    ours = _TAIL.unpack(plain[start:].tobytes()[: _TAIL.size])
    if (name, n_lists, code_size) != ours[:3] or kind not in (b"full", b"sprs") or n_numbers > 2 * n_lists:
        raise ValueError("lists of another format")
    numbers = np.frombuffer(file.read(8 * n_numbers).ljust(8 * n_numbers), "<u8")
    sizes, at = (numbers, np.arange(n_lists)) if kind == b"full" else (numbers[1::2], numbers[::2])
    n_rows = sum(sizes.tolist())
    valid = (
        len(sizes) == len(at) and (at < n_lists).all() and n_rows == int.from_bytes(head[_N_ROWS].tobytes(), "little")
    )
    if not valid or start + _TAIL.size + 8 * n_numbers + n_rows * (code_size + 8) != n_bytes:
        raise ValueError(f"the file size, {n_bytes:,} bytes, does not match {n_rows:,} rows")


def _serialize_empty(shape: tuple[int, int], codes: Codes, ranges: int) -> npt.NDArray[np.uint8]:
    """Return the bytes of a file of empty lists, where all bytes of the codes' value ranges are `ranges`."""
    faiss = import_faiss()
    index = make_empty_index(*shape, codes)
    n_ranges = 0 if codes == "fp16" else 2 * shape[1]
    faiss.copy_array_to_vector(np.full(4 * n_ranges, ranges, np.uint8).view(np.float32), index.sq.trained)
    content: npt.NDArray[np.uint8] = faiss.serialize_index(index)
    return content
