"""Encoding of float32 feature rows: float16 with one exponent for each row, float32, or codes of 8 to 1 bits a number.

Shapes: N rows, D sketch dimension of a checkpoint.

Codes (`tracin_ann.store.codes`) are computed from rows that are scaled by the same powers of two as float16 rows.

A float16 row is scaled by a power of two so that its largest |x| lies in [2^14, 2^15). The stored x̂ satisfies
x = x̂ · 2^exponent with |x − x̂·2^exponent| ≤ 2^-11 · max|x|, for rows of any magnitude. NumPy 2.4 converts float16 to
float32 one number at a time; PyTorch is 7 times as fast. Rows with extreme exponents are converted by shifting the bits
of whole arrays, in groups of rows that fit into the cache, which is 2 to 3 times as fast.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tracin_ann.choices import Dtype
from tracin_ann.files import share_memory
from tracin_ann.store.codes import BITS, decode_codes, encode_codes, measure_code_bytes, read_factors, split_rows
from tracin_ann.types import Float32

Stored = npt.NDArray[np.float16] | npt.NDArray[np.float32] | npt.NDArray[np.uint8]
Int16 = npt.NDArray[np.int16]

_NUMBERS: dict[str, np.dtype[Any]] = {"float16": np.dtype("<f2"), "float32": np.dtype("<f4")}
_BYTE: np.dtype[np.uint8] = np.dtype("u1")
_PEAK_BITS = 15
_NUMBERS_OF_ONE_THREAD = (1 << 15) - 1
"""PyTorch uses several threads for more numbers; waiting for each other costs more than they save here."""
_EXPONENT_LIMITS = (-126, 127)
# The bits of a float16, shifted left by 13, are a float32 that is 2^112 too small: the exponent biases are 15 and 127.
_BIAS = 112
_SHIFT = 13
_FLOAT16_FIELDS = 0x8FFFE000
_LARGEST_BELOW_2_15 = np.float32(32752)


def describe_storage(dim: int, dtype: Dtype) -> tuple[int, np.dtype[Any]]:
    """Return the number of stored values of a row of D numbers, and their dtype: D numbers, or bytes of codes."""
    return (dim, _NUMBERS[dtype]) if dtype in _NUMBERS else (measure_code_bytes(dim, dtype), _BYTE)


def measure_row_bytes(dim: int, dtype: Dtype) -> int:
    """Return the bytes of a stored row of D numbers."""
    width, stored_dtype = describe_storage(dim, dtype)
    return width * stored_dtype.itemsize


def is_coded(dtype: str) -> bool:
    """Return whether rows are stored as codes; their sketches are rotated (`tracin_ann.sketch.Rotation`)."""
    return dtype in BITS


def encode_rows(feature_ND: Float32, dtype: Dtype) -> tuple[Stored, Int16]:
    """Return the stored rows [N, D], or as bytes [N, 8 + W], and their exponents [N]; the rows must be finite."""
    if dtype == "float32":
        return np.ascontiguousarray(feature_ND, dtype="<f4"), np.zeros(len(feature_ND), dtype="<i2")
    exponent_N = _peak_exponents(feature_ND)
    stored_ND = np.empty((len(feature_ND), describe_storage(feature_ND.shape[1], dtype)[0]), _NUMBERS.get(dtype, _BYTE))
    for part in split_rows(*feature_ND.shape):
        scaled = feature_ND[part].copy()
        _scale_rows(scaled, -exponent_N[part])
        if is_coded(dtype):
            stored_ND[part] = encode_codes(scaled, exponent_N[part], dtype)
            continue
        # If its largest number rounded up to 2^15, the row of the largest float32 would decode to infinity.
        stored_ND[part] = np.clip(scaled, -_LARGEST_BELOW_2_15, _LARGEST_BELOW_2_15, out=scaled)
    return stored_ND, exponent_N.astype("<i2")


def decode_rows(stored_ND: Stored, exponent_N: Int16, out_ND: Float32, dtype: Dtype, *, unit: bool = False) -> None:
    """Decode the rows into `out_ND`, whose rows must be contiguous.

    With `unit`, each row is divided by its norm, that of codes by the norm of the row that was encoded; a zero row
    remains zero.
    """
    exponent_wide_N = exponent_N.astype(np.int32)
    if is_coded(dtype):
        stored_NW = stored_ND.view(np.uint8)
        factor_N = read_factors(stored_NW, unit=unit)
        if unit or _are_normal(exponent_wide_N + np.frexp(factor_N)[1]):
            decode_codes(stored_NW, dtype, factor_N if unit else np.ldexp(factor_N, exponent_wide_N), out_ND)
            return
        decode_codes(stored_NW, dtype, factor_N, out_ND)
        for part in split_rows(*out_ND.shape):
            _scale_rows(out_ND[part], exponent_wide_N[part])
        return
    if stored_ND.dtype == np.float16 and _are_normal(exponent_wide_N):
        _multiply_rows(stored_ND, np.ldexp(np.float32(1), exponent_wide_N), out_ND)
        if unit:
            for part in split_rows(*stored_ND.shape):
                _normalize_rows(out_ND[part])
        return
    for part in split_rows(*stored_ND.shape):
        out = out_ND[part]
        if stored_ND.dtype == np.float32:
            out[...] = stored_ND[part]
        else:
            bits = out.view(np.int32)
            bits[...] = stored_ND[part].view(np.int16)
            np.left_shift(bits, _SHIFT, out=bits)
            np.bitwise_and(out.view(np.uint32), np.uint32(_FLOAT16_FIELDS), out=out.view(np.uint32))
            _scale_rows(out, exponent_wide_N[part] + _BIAS)
        if unit:
            _normalize_rows(out)


def _are_normal(exponent_N: npt.NDArray[np.int32]) -> bool:
    """Return whether two to the power of each exponent is a normal float32."""
    low, high = _EXPONENT_LIMITS
    return not len(exponent_N) or bool(low <= exponent_N.min() and exponent_N.max() <= high)


def _multiply_rows(stored_ND: Stored, factor_N: Float32, out_ND: Float32) -> None:
    """Write float16 rows times float32 factors; PyTorch converts and multiplies in one pass, which NumPy does not."""
    stored, factor, out = (
        torch.from_numpy(share_memory(stored_ND)),
        torch.from_numpy(factor_N)[:, None],
        torch.from_numpy(out_ND),
    )
    step = max(1, _NUMBERS_OF_ONE_THREAD // max(1, stored_ND.shape[1]))
    for start in range(0, len(stored), step):
        rows = slice(start, start + step)
        torch.mul(stored[rows], factor[rows], out=out[rows])


def row_peaks(feature_ND: Float32) -> Float32:
    """Return the largest |x| of each row [N]; NaN if the row contains NaN."""
    peak_N: Float32 = np.maximum(feature_ND.max(axis=1), -feature_ND.min(axis=1))
    return peak_N


def _normalize_rows(row_ND: Float32) -> None:
    # Scale by a power of two first, so that no square overflows or underflows.
    _scale_rows(row_ND, -_peak_exponents(row_ND))
    norm_N = np.sqrt(np.matmul(row_ND[:, None, :], row_ND[:, :, None])[:, 0, 0])
    inverse_N = np.divide(1.0, norm_N, out=np.zeros_like(norm_N), where=norm_N > 0)
    row_ND *= inverse_N[:, None]


def _peak_exponents(feature_ND: Float32) -> npt.NDArray[np.int32]:
    peak_N = row_peaks(feature_ND)
    exponent_N = np.frexp(peak_N)[1].astype(np.int32) - _PEAK_BITS
    return np.where(peak_N > 0, exponent_N, np.int32(0))


def _scale_rows(row_ND: Float32, exponent_N: npt.NDArray[np.int32]) -> None:
    """Multiply row i by 2^exponent_N[i] in place; in two steps if the factor is not a normal float32."""
    first_N = np.clip(exponent_N, *_EXPONENT_LIMITS)
    second_N = exponent_N - first_N
    one_N = np.ones(len(row_ND), dtype=np.float32)
    row_ND *= np.ldexp(one_N, first_N)[:, None]
    if second_N.any():
        row_ND *= np.ldexp(one_N, second_N)[:, None]
