"""Codes of 8 to 1 bits a number: format, factors, bounds, unbiased inner products, comparison with expected rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from blocks import CODES, DTYPES
from tracin_ann.sketch import make_rotation
from tracin_ann.store import Dtype, measure_row_bytes, noise_ratio
from tracin_ann.store.codec import decode_rows, encode_rows
from tracin_ann.store.codes import BITS, measure_code_differences
from tracin_ann.types import Float32, Float64

LEVELS = {
    4: [0.128395, 0.388048, 0.656759, 0.942340, 1.256231, 1.618047, 2.069017, 2.732636],
    2: [0.452780, 1.510418],
    1: [0.797885],
}
EXTREMES = [0.0, -0.0, 1e-45, 1e-38, 1e-30, 1e30, float(np.finfo(np.float32).max)]
finite_rows = arrays(
    np.float32,
    array_shapes(min_dims=2, max_dims=2, max_side=11),
    elements=st.floats(width=32, allow_nan=False, allow_infinity=False) | st.sampled_from(EXTREMES).map(np.float32),
)
usual_rows = arrays(
    np.float32,
    array_shapes(min_dims=2, max_dims=2, max_side=11),
    elements=st.floats(-(2.0**40), 2.0**40, width=32, allow_subnormal=False).map(lambda x: x if abs(x) > 1e-6 else 0.0),
)


def decode(feature_ND: Float32, dtype: Dtype, *, unit: bool = False) -> Float64:
    out_ND = np.empty_like(feature_ND)
    decode_rows(*encode_rows(feature_ND, dtype), out_ND, dtype, unit=unit)
    return out_ND.astype(np.float64)


def decode_slowly(stored_W: np.ndarray, exponent: int, dim: int, bits: int) -> Float64:
    """A slow implementation of the documented format."""
    factor = stored_W[:4].tobytes()
    levels = [-level for level in LEVELS[bits][::-1]] + LEVELS[bits] if bits < 8 else []
    row_D = np.zeros(dim)
    for i in range(dim):
        byte = int(stored_W[8 + i * bits // 8])
        code = byte >> (i * bits % 8) & ((1 << bits) - 1)
        row_D[i] = levels[code] if bits < 8 else code - 256 * (code >= 128)
    return np.ldexp(row_D * np.frombuffer(factor, "<f4")[0].astype(np.float64), exponent)


@settings(deadline=None, max_examples=150)
@given(finite_rows, st.sampled_from(CODES))
def test_rows_of_all_sizes_are_stored_in_the_documented_format(feature_ND: Float32, dtype: Dtype) -> None:
    dim, bits = feature_ND.shape[1], BITS[dtype]
    stored_NW, exponent_N = encode_rows(feature_ND, dtype)
    assert stored_NW.shape == (len(feature_ND), 8 + -(-dim * bits // 8)) and stored_NW.dtype == np.uint8
    assert measure_row_bytes(dim, dtype) == stored_NW.shape[1]
    decoded_ND = decode(feature_ND, dtype)
    assert np.isfinite(decoded_ND).all()
    for row_D, stored_W, exponent, decoded_D in zip(feature_ND, stored_NW, exponent_N, decoded_ND, strict=True):
        expected_D = decode_slowly(stored_W, int(exponent), dim, bits)
        np.testing.assert_allclose(decoded_D, expected_D, rtol=1e-5, atol=1e-44)
        if not row_D.any():
            assert not stored_W.any() and not decoded_D.any()
        elif bits < 8:
            large_D = np.abs(row_D) > 1e-30 * np.abs(row_D).max()
            assert (np.sign(decoded_D) == np.sign(row_D))[large_D & (np.abs(decoded_D) > 1e-44)].all()


@settings(deadline=None, max_examples=150)
@given(usual_rows, st.sampled_from(CODES))
def test_the_part_of_a_decoded_row_along_the_row_is_the_row(feature_ND: Float32, dtype: Dtype) -> None:
    wide_ND = feature_ND.astype(np.float64)
    square_N = np.square(wide_ND).sum(1)
    product_N = (decode(feature_ND, dtype) * wide_ND).sum(1)
    np.testing.assert_allclose(product_N, square_N, rtol=1e-5)
    unit_N = (decode(feature_ND, dtype, unit=True) * wide_ND).sum(1)
    np.testing.assert_allclose(unit_N, np.sqrt(square_N), rtol=1e-5)


@settings(deadline=None, max_examples=100)
@given(usual_rows, st.sampled_from(CODES))
def test_codes_are_the_nearest_levels(feature_ND: Float32, dtype: Dtype) -> None:
    bits, (stored_NW, exponent_N) = BITS[dtype], encode_rows(feature_ND, dtype)
    for row_D, stored_W, exponent in zip(feature_ND.astype(np.float64), stored_NW, exponent_N, strict=True):
        factor = np.ldexp(np.frombuffer(stored_W[:4].tobytes(), "<f4")[0].astype(np.float64), int(exponent))
        if factor == 0:
            continue
        level_D = decode_slowly(stored_W, int(exponent), len(row_D), bits) / factor
        unit = np.abs(row_D).max() / 127 if bits == 8 else np.sqrt(np.mean(row_D**2))
        levels = np.arange(-127, 128) if bits == 8 else np.array([s * level for level in LEVELS[bits] for s in (-1, 1)])
        best_D = np.abs(row_D[:, None] / unit - levels).min(1)
        assert (np.abs(row_D / unit - level_D) <= best_D + 1e-4 * (1 + np.abs(level_D))).all()


@pytest.mark.parametrize("dtype", CODES)
def test_the_noise_of_normal_rows_is_the_expected_one(dtype: Dtype) -> None:
    feature_ND = np.random.default_rng(0).standard_normal((200, 4096), dtype=np.float32) * np.float32(1e-20)
    decoded_ND, wide_ND = decode(feature_ND, dtype) * 1e20, feature_ND.astype(np.float64) * 1e20
    ratio = np.square(decoded_ND).sum() / np.square(wide_ND).sum()
    assert ratio - 1 == pytest.approx(noise_ratio(dtype) - 1, rel=0.2 if dtype == "int8" else 0.01)


def test_the_noise_ratio_is_one_for_numbers_and_increases_with_fewer_bits() -> None:
    assert noise_ratio("float16") == noise_ratio("float32") == 1
    ratios = [noise_ratio(dtype) for dtype in CODES]
    assert ratios == sorted(ratios) and ratios[-1] == pytest.approx(np.pi / 2, abs=1e-5)


def test_a_row_of_4096_bits_takes_the_bytes_of_256_float16_and_two_factors() -> None:
    assert [measure_row_bytes(256, dtype) for dtype in DTYPES] == [512, 1024, 264, 136, 72, 40]
    assert measure_row_bytes(4096, "int1") == 512 + 8


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("dim", [96, 128])
def test_inner_products_of_rotated_rows_are_unbiased_with_the_stated_variance(dtype: Dtype, dim: int) -> None:
    """For rows with one large number, which without a rotation have the largest error."""
    random = np.random.default_rng(1)
    row_D, query_D = np.zeros(dim), random.standard_normal(dim)
    row_D[3], row_D[5:9] = 3.0, random.standard_normal(4)
    exact = float(row_D @ query_D)
    rotated = [
        make_rotation(seed, 0, dim, torch.device("cpu"), torch.float64)
        .apply(torch.from_numpy(np.stack([row_D, query_D])))
        .numpy()
        for seed in range(2000)
    ]
    row_SD = np.stack([row for row, _ in rotated]).astype(np.float32)
    decoded_SD = decode(row_SD, dtype)
    error_S = np.einsum("sd,sd->s", decoded_SD, np.stack([query for _, query in rotated])) - exact
    assert abs(error_S.mean()) <= 4 * error_S.std() / len(error_S) ** 0.5 + 1e-6
    across = query_D @ query_D - exact**2 / (row_D @ row_D)
    ratio = np.square(decoded_SD).sum(1).mean() / (row_D @ row_D)
    assert error_S.var() == pytest.approx((ratio - 1) * (row_D @ row_D) * across / (dim - 1), rel=0.15)
    if dtype != "int8":
        assert ratio - 1 == pytest.approx(noise_ratio(dtype) - 1, rel=0.3)


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("dim", [1, 5, 64, 1000])
@pytest.mark.parametrize("rounding", [0.0, 1e-6, 5e-4])
def test_rounding_of_a_row_does_not_make_it_another_one(dtype: Dtype, dim: int, rounding: float) -> None:
    random = np.random.default_rng(dim)
    row_ND = random.standard_normal((50, dim))
    norm_N = np.linalg.norm(row_ND, axis=1)
    stored_NW, exponent_N = encode_rows(row_ND.astype(np.float32), dtype)
    change_ND = random.standard_normal((50, dim))
    close_ND = row_ND + rounding * change_ND / np.linalg.norm(change_ND, axis=1, keepdims=True) * norm_N[:, None]
    assert (measure_code_differences(stored_NW, exponent_N, dtype, close_ND) <= (4 * rounding + 2e-4) * norm_N).all()


@pytest.mark.parametrize("dtype", CODES)
def test_other_rows_differ_by_more_than_rounding(dtype: Dtype) -> None:
    row_ND = np.random.default_rng(0).standard_normal((20, 64))
    norm_N = np.linalg.norm(row_ND, axis=1)
    stored = encode_rows(row_ND.astype(np.float32), dtype)

    def measure(expected_ND: Float64) -> Float64:
        return measure_code_differences(*stored, dtype, expected_ND) / norm_N

    assert (measure(np.roll(row_ND, 1, axis=0)) > 0.3).all() and (measure(-row_ND) > 1).all()
    np.testing.assert_allclose(measure(1.01 * row_ND), 0.01, atol=2e-3)
    part_ND = row_ND.copy()
    part_ND[:, :8] = 0  # An eighth of the row is missing.
    assert measure(part_ND).mean() > 0.02
    np.testing.assert_allclose(measure(np.zeros_like(row_ND)), noise_ratio(dtype) ** 0.5, rtol=0.15)
    zero = encode_rows(np.zeros((1, 64), np.float32), dtype)
    assert measure_code_differences(*zero, dtype, np.zeros((1, 64))) == 0
    assert measure_code_differences(*zero, dtype, row_ND[:1])[0] > 0.5 * norm_N[0]
