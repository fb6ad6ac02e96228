"""Rows as codes of 8, 4, 2 or 1 bits a number, with two factors a row.

A stored row is bytes: its factor and its unit factor (float32, little-endian), then the codes, packed from the lowest
bits of a byte on; the bits after the last code are zero. A zero row is zero bytes. The level of a number depends on its
code alone:

- `int8`: the levels are -127..127, and the largest number of the row has level ±127;
- `int4`, `int2`, `int1`: 16, 4 and 2 levels of least mean square error for a normal variable (Max 1960), for numbers
  divided by the root mean square of the row.

Levels c become the row x̂ = s c, with s = ‖x‖² / ⟨c, x⟩, so that ⟨x̂, x⟩ = ‖x‖²: inner products of the row with queries
that are not rounded have no bias along x, and the rest x̂ - x is orthogonal to x (Gao and Long 2024, "RaBitQ"). The
factor s of least square error would be smaller, and so would all scores. In exchange, ‖x̂‖² is larger than ‖x‖²; the
ratio is `noise_ratio`, as the rows are rotated by a random rotation before (`tracin_ann.sketch.Rotation`). The unit
factor is s / ‖x‖: it replaces s where rows are divided by their norms.

Shapes: N rows, B rows of a block, D numbers of a row, W bytes of its codes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from tracin_ann.types import Float32, Float64

Bytes = npt.NDArray[np.uint8]

BITS = {"int8": 8, "int4": 4, "int2": 2, "int1": 1}
"""Bits of a number by dtype."""
FACTOR_BYTES = 8
"""Bytes of the factors of a row."""
_FACTOR: np.dtype[np.float32] = np.dtype("<f4")
_BYTE_BITS = 8
_PEAK_LEVEL = 127
# The positive levels of the best quantisers of a normal variable with these numbers of levels (Max 1960, table I).
_POSITIVE_LEVELS: dict[int, tuple[float, ...]] = {
    1: (0.7978846,),
    2: (0.4527800, 1.5104176),
    4: (0.1283950, 0.3880483, 0.6567591, 0.9423405, 1.2562313, 1.6180468, 2.0690169, 2.7326357),
}
# ‖x̂‖² / ‖x‖² of normal rows: 1 / (1 - e) for the mean square error e of a number of variance 1. With 8 bits, e depends
# on the largest number of a row; this is its value for some thousand numbers.
_SQUARE_ERRORS = {8: 8.5e-5, 4: 0.009497, 2: 0.11748, 1: 0.36338}
_CACHED_NUMBERS = 1 << 16
_LARGEST = float(np.finfo(np.float32).max)


def noise_ratio(dtype: str) -> float:
    """Return the expected ratio ‖x̂‖² / ‖x‖² of stored and original rows: 1 if they are stored as numbers.

    The variance of an inner product with a sketched row is in proportion to it: that of the sketch is ‖x‖²‖q‖² / D,
    and that of the codes (‖x̂‖² - ‖x‖²)‖q‖² / D.
    """
    return 1 / (1 - _SQUARE_ERRORS[BITS[dtype]]) if dtype in BITS else 1.0


def measure_code_bytes(dim: int, dtype: str) -> int:
    """Return the number of bytes of a row of D numbers, factors included."""
    return FACTOR_BYTES + _count_bytes(dim, BITS[dtype])


def encode_codes(scaled_ND: Float32, exponent_N: npt.NDArray[np.int32], dtype: str) -> Bytes:
    """Return the stored rows [N, 8 + W] of finite rows.

    Args:
        scaled_ND: the rows times 2^-exponent, so that no square overflows or underflows; x̂ is the decoded row times
            2^exponent.
        exponent_N: the exponents.
        dtype: one of `BITS`.
    """
    bits, (n_rows, dim) = BITS[dtype], scaled_ND.shape
    stored_NW = np.zeros((n_rows, measure_code_bytes(dim, dtype)), np.uint8)
    for part in split_rows(n_rows, dim):
        row_BD = scaled_ND[part]
        code_BD, level_BD = _find_codes(row_BD, bits)
        square_B = _sum_products(row_BD, row_BD)
        is_zero_B = square_B == 0
        product_B = np.where(is_zero_B, 1.0, _sum_products(row_BD, level_BD))
        factor_B = square_B / product_B
        # x̂ may exceed the largest number of its row, but must be finite.
        largest_B = np.abs(level_BD).max(axis=1).astype(np.float64).clip(min=1e-30)
        limit_B = np.ldexp(_LARGEST * (1 - 1e-6) / largest_B, -exponent_N[part].clip(min=0))
        factors_B2 = np.zeros((len(row_BD), 2), _FACTOR)
        factors_B2[:, 0] = np.minimum(factor_B, limit_B)
        factors_B2[:, 1] = factor_B / np.where(is_zero_B, 1.0, np.sqrt(square_B))
        code_BD[is_zero_B] = 0
        stored_NW[part, :FACTOR_BYTES] = factors_B2.view(np.uint8)
        stored_NW[part, FACTOR_BYTES:] = _pack(code_BD, bits)
    return stored_NW


def read_factors(stored_NW: Bytes, *, unit: bool) -> Float32:
    """Return the factors [N] of stored rows, or their unit factors."""
    start = _FACTOR.itemsize * unit
    column_NW = np.ascontiguousarray(stored_NW[:, start : start + _FACTOR.itemsize])
    # A view of a single row would keep the stride of the rows.
    return column_NW.reshape(-1).view(_FACTOR).astype(np.float32, copy=False)


def decode_levels(code_BW: Bytes, bits: int, out_BD: Float32) -> None:
    """Write the levels of packed codes."""
    if bits == _BYTE_BITS:
        out_BD[...] = code_BW.view(np.int8)
        return
    table, per_byte = _make_table(bits), _BYTE_BITS // bits
    n_rows, dim = out_BD.shape
    if out_BD.flags.c_contiguous and dim % per_byte == 0:
        # One copy of the 8, 16 or 32 bytes of an entry for each byte.
        np.take(table, code_BW, out=out_BD.view(table.dtype), mode="clip")
        return
    out_BD[...] = np.take(table, code_BW, mode="clip").view(np.float32).reshape(n_rows, -1)[:, :dim]


def decode_codes(stored_NW: Bytes, dtype: str, factor_N: Float32, out_ND: Float32) -> None:
    """Write the levels of the rows times factors."""
    for part in split_rows(*out_ND.shape):
        out_BD = out_ND[part]
        level_BD = out_BD if out_BD.flags.c_contiguous else np.empty(out_BD.shape, np.float32)
        decode_levels(stored_NW[part, FACTOR_BYTES:], BITS[dtype], level_BD)
        np.multiply(level_BD, factor_N[part, None], out=out_BD)


def measure_code_differences(
    stored_NW: Bytes, exponent_N: npt.NDArray[np.int16], dtype: str, expected_ND: Float64
) -> Float64:
    """Return how far stored rows are from those that other rows, which should be the same, would give [N].

    It is at most a few times the norm of the difference between the encoded and the expected rows, unlike the
    difference of decoded rows, in which a number that is close to the edge of two codes counts with their difference.
    It has two parts: the distance of the expected numbers from the intervals of the stored codes, and the difference of
    ⟨x̂, x⟩ / ‖x‖ and ‖x‖.
    """
    bits, dim = BITS[dtype], expected_ND.shape[1]
    level_ND = np.empty(expected_ND.shape, np.float32)
    decode_levels(stored_NW[:, FACTOR_BYTES:], bits, level_ND)
    if bits == _BYTE_BITS:
        low_ND, high_ND = level_ND - 0.5, level_ND + 0.5
        unit_N = np.abs(expected_ND).max(axis=1) / _PEAK_LEVEL
        last = np.float32(_PEAK_LEVEL)
    else:
        levels = _list_levels(bits)
        edges = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
        place_ND = np.searchsorted(levels, level_ND)
        low_ND, high_ND = edges[place_ND], edges[place_ND + 1]
        unit_N = np.linalg.norm(expected_ND, axis=1) / dim**0.5
        last = levels[-1]
    low_ND = np.where(level_ND <= -last, -np.inf, low_ND)
    high_ND = np.where(level_ND >= last, np.inf, high_ND)
    scaled_ND = expected_ND / np.where(unit_N > 0, unit_N, 1.0)[:, None]
    outside_ND = np.maximum(low_ND - scaled_ND, 0) + np.maximum(scaled_ND - high_ND, 0)
    outside_N = np.linalg.norm(outside_ND, axis=1) * unit_N
    factor_N = np.ldexp(read_factors(stored_NW, unit=False).astype(np.float64), exponent_N)
    norm_N = np.linalg.norm(expected_ND, axis=1)
    product_N = np.einsum("nd,nd->n", level_ND.astype(np.float64), expected_ND) * factor_N
    along_N = np.divide(product_N, norm_N, out=np.zeros_like(norm_N), where=norm_N > 0) - norm_N
    stored_N = np.linalg.norm(level_ND.astype(np.float64), axis=1) * factor_N
    difference_N: Float64 = np.where(norm_N > 0, np.hypot(outside_N, along_N), stored_N)
    return difference_N


@dataclass(frozen=True, eq=False)
class CodeBlock:
    """Consecutive columns of consecutive rows, as codes (`tracin_ann.types.CodedPart`).

    Attributes:
        stored_BW: the stored rows; may be read-only memory.
        exponent_B: exponents of the factors.
        dtype: one of `BITS`.
        dim: D.
        unit: whether the rows are divided by their norms.
    """

    stored_BW: Bytes
    exponent_B: npt.NDArray[np.int16]
    dtype: str
    dim: int
    unit: bool = False

    def read_factors(self, rows: slice) -> Float32:
        """Return the numbers [b] that levels are multiplied by, besides the exponents."""
        return read_factors(self.stored_BW[rows], unit=self.unit)

    def decode(self, rows: slice, out_BD: Float32) -> None:
        """Write the levels of some rows."""
        decode_levels(self.stored_BW[rows, FACTOR_BYTES:], BITS[self.dtype], out_BD)


def _find_codes(row_BD: Float32, bits: int) -> tuple[Bytes, Float32]:
    """Return the codes of rows and their levels, both [B, D]."""
    if bits == _BYTE_BITS:
        peak_B = np.abs(row_BD).max(axis=1)
        step_B = np.where(peak_B > 0, peak_B, np.float32(1)) / np.float32(_PEAK_LEVEL)
        level_BD = np.rint(row_BD / step_B[:, None]).clip(-_PEAK_LEVEL, _PEAK_LEVEL)
        return level_BD.astype(np.int8).view(np.uint8), level_BD
    levels = _list_levels(bits)
    root_B = np.sqrt(_sum_products(row_BD, row_BD) / row_BD.shape[1]).astype(np.float32)
    edge_B = root_B[:, None]
    code_BD = np.zeros(row_BD.shape, np.uint8)
    for low, high in zip(levels[:-1].tolist(), levels[1:].tolist(), strict=True):
        code_BD += row_BD >= np.float32((low + high) / 2) * edge_B
    return code_BD, levels.take(code_BD)


def _sum_products(one_BD: Float32, other_BD: Float32) -> Float64:
    """Return the inner products [B] of rows in float64."""
    product_B: Float64 = np.einsum("bd,bd->b", one_BD, other_BD, dtype=np.float64)
    return product_B


def _list_levels(bits: int) -> Float32:
    """Return the levels of the codes 0, 1, ..., ascending."""
    positive = np.array(_POSITIVE_LEVELS[bits], np.float32)
    return np.concatenate([-positive[::-1], positive])


def _pack(code_BD: Bytes, bits: int) -> Bytes:
    """Return the bytes [B, W] of codes."""
    if bits == _BYTE_BITS:
        return code_BD
    n_rows, dim = code_BD.shape
    per_byte, width = _BYTE_BITS // bits, _count_bytes(dim, bits)
    padded_BD = np.zeros((n_rows, width * per_byte), np.uint8)
    padded_BD[:, :dim] = code_BD
    byte_BW = padded_BD[:, ::per_byte].copy()
    for place in range(1, per_byte):
        byte_BW |= padded_BD[:, place::per_byte] << np.uint8(place * bits)
    return byte_BW


@cache
def _make_table(bits: int) -> npt.NDArray[np.void]:
    """Return the levels of every byte [256], each entry as one value of several float32 numbers."""
    per_byte = _BYTE_BITS // bits
    code = np.arange(256)[:, None] >> (bits * np.arange(per_byte)) & ((1 << bits) - 1)
    table = np.ascontiguousarray(_list_levels(bits)[code]).view(np.dtype((np.void, 4 * per_byte)))[:, 0]
    table.flags.writeable = False
    return table


def _count_bytes(dim: int, bits: int) -> int:
    """Return W."""
    return -(-dim * bits // _BYTE_BITS)


def split_rows(n_rows: int, dim: int) -> Iterator[slice]:
    """Yield groups of rows that fit into the cache."""
    step = max(1, _CACHED_NUMBERS // dim)
    for start in range(0, n_rows, step):
        yield slice(start, min(start + step, n_rows))
