"""Storage of rows: float16 with one power of two per row, float32, and rows of norm one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from blocks import NUMBERS
from tracin_ann.store import Dtype
from tracin_ann.store.codec import decode_rows, encode_rows
from tracin_ann.types import Float32

finite_rows = arrays(
    np.float32,
    array_shapes(min_dims=2, max_dims=2, max_side=6),
    elements=st.floats(width=32, allow_nan=False, allow_infinity=False)
    | st.sampled_from([0.0, -0.0, 1e-45, 1e-38, 1e-30, 1e30, float(np.finfo(np.float32).max)]).map(np.float32),
)


@settings(deadline=None, max_examples=150)
@given(finite_rows)
def test_the_error_of_float16_rows_is_at_most_2_to_the_minus_11_of_their_peak(feature_ND: Float32) -> None:
    stored_ND, exponent_N = encode_rows(feature_ND, "float16")
    out_ND = np.empty_like(feature_ND)
    decode_rows(stored_ND, exponent_N, out_ND, "float16")
    assert np.isfinite(out_ND).all()
    wide_ND = feature_ND.astype(np.float64)
    peak_N = np.abs(wide_ND).max(axis=1)
    assert (np.abs(out_ND.astype(np.float64) - wide_ND) <= 2.0**-11 * peak_N[:, None]).all()
    # A slow implementation of the documented format.
    assert np.array_equal(out_ND, np.ldexp(stored_ND.astype(np.float64), exponent_N[:, None].astype(np.int64)))
    stored_peak_N = np.abs(stored_ND).max(axis=1)
    assert ((stored_peak_N >= 2**14) & (stored_peak_N < 2**15) | (peak_N == 0)).all()


@settings(deadline=None, max_examples=100)
@given(finite_rows)
def test_float32_rows_are_read_back_bit_for_bit(feature_ND: Float32) -> None:
    stored_ND, exponent_N = encode_rows(feature_ND, "float32")
    out_ND = np.empty_like(feature_ND)
    decode_rows(stored_ND, exponent_N, out_ND, "float32")
    assert np.array_equal(out_ND.view(np.uint32), feature_ND.view(np.uint32))
    assert not exponent_N.any()


@settings(deadline=None, max_examples=100)
@given(finite_rows, st.sampled_from(NUMBERS))
def test_unit_rows_have_norm_one_or_are_zero(feature_ND: Float32, dtype: Dtype) -> None:
    out_ND = np.empty_like(feature_ND)
    decode_rows(*encode_rows(feature_ND, dtype), out_ND, dtype, unit=True)
    wide_ND = feature_ND.astype(np.float64)
    norm_N = np.linalg.norm(wide_ND, axis=1)
    zero_N = norm_N == 0
    assert not out_ND[zero_N].any()
    expected_ND = wide_ND[~zero_N] / norm_N[~zero_N, None]
    assert np.abs(out_ND[~zero_N] - expected_ND).max(initial=0) <= 2e-3
    assert np.abs(np.linalg.norm(out_ND[~zero_N], axis=1) - 1).max(initial=0) <= 1e-6


def test_every_finite_float16_decodes_as_numpy_does() -> None:
    half = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    half = half[np.isfinite(half)][None]
    out_ND = np.empty(half.shape, dtype=np.float32)
    decode_rows(half, np.zeros(1, dtype=np.int16), out_ND, "float16")
    assert np.array_equal(out_ND.view(np.uint32), half.astype(np.float32).view(np.uint32))


def test_rows_in_a_read_only_map_are_decoded_like_rows_in_memory(tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", np.random.default_rng(0).standard_normal((3, 50)).astype(np.float16))
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    exponent = np.array([-3, 0, 20], np.int16)
    found, expected = np.empty((2, *mapped.shape), np.float32)
    decode_rows(mapped, exponent, found, "float16")
    decode_rows(np.array(mapped), exponent, expected, "float16")
    assert np.array_equal(found, expected)
    assert np.array_equal(found, np.ldexp(mapped.astype(np.float32), exponent[:, None].astype(np.int32)))
