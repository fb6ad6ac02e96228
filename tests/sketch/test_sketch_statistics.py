"""Statistics of sketches over keys (mean and variance of inner products), and of the random streams.

The keys are fixed, so the numbers are the same in every run; the bounds follow from the standard errors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

import forms
from tracin_ann.gradients.factors import Dense, Form, Outer
from tracin_ann.sketch import SKETCHES, ParameterKey, Sketch, make_sketch
from tracin_ann.sketch.dense import DenseSketch
from tracin_ann.sketch.factored import FactoredSketch
from tracin_ann.sketch.generator import Stream
from tracin_ann.sketch.kronecker import KroneckerSketch

pytestmark = pytest.mark.slow

PAIRS = 12
DRAWS = 2500
CPU = torch.device("cpu")


def pairs(size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return vectors u, v [PAIRS, size] with cosines from 1 to −1, some with one large entry (large fourth powers)."""
    g = torch.Generator().manual_seed(seed)
    u = torch.randn(PAIRS, size, generator=g, dtype=torch.float64)
    mix = torch.linspace(1, -1, PAIRS, dtype=torch.float64).unsqueeze(1)
    v = mix * u + (1 - mix.square()).sqrt() * torch.randn(PAIRS, size, generator=g, dtype=torch.float64)
    u[::3, 0] *= 4
    v[::3, 0] *= 4
    return u, v


def gaussian_variance(u: Tensor, v: Tensor, dim: int) -> Tensor:
    return (u.square().sum(-1) * v.square().sum(-1) + (u * v).sum(-1).square()) / dim


def sign_variance(u: Tensor, v: Tensor, dim: int) -> Tensor:
    return gaussian_variance(u, v, dim) - 2 * (u.square() * v.square()).sum(-1) / dim


def fold_variance(u: Tensor, v: Tensor, width: int) -> Tensor:
    """Return the sum over buckets of Σ_{i≠j} u_i²v_j² + u_iv_iu_jv_j; u, v [..., n]."""
    total = torch.zeros(u.shape[:-1], dtype=torch.float64)
    for bucket in range(min(width, u.shape[-1])):
        a, b = u[..., bucket::width], v[..., bucket::width]
        total += a.square().sum(-1) * b.square().sum(-1) + (a * b).sum(-1).square() - 2 * (a * b).square().sum(-1)
    return total


def convolution_variance(u: Tensor, v: Tensor) -> Tensor:
    """Return the fold variance of a convolution's gradient, which is folded in the order tap, input channel, output."""
    return fold_variance(*(x.view(-1, 4, 2, 4).permute(0, 3, 2, 1).flatten(1) for x in (u, v)), width=7)


def all_signs(n: int) -> Tensor:
    return torch.tensor(list(product((-1.0, 1.0), repeat=n)), dtype=torch.float64)


def fold_matrices(n: int, width: int) -> Tensor:
    """Return all folds of n to `width`, [2^n, width, n], which are equally likely."""
    place = torch.nn.functional.one_hot(torch.arange(n) % width, width).double().T
    return all_signs(n).unsqueeze(1) * place


def composed_variance(u: Tensor, v: Tensor, shape: tuple[int, int], side: int, dim: int) -> Tensor:
    """Return the total variance (Var E + E Var) of both side folds and the last fold, over all signs of the sides."""
    left, right = fold_matrices(shape[0], side), fold_matrices(shape[1], side)
    a, b = (torch.einsum("sri,pij,tcj->pstrc", left, x.view(-1, *shape), right).flatten(3) for x in (u, v))
    within = fold_variance(a, b, dim).mean((1, 2))
    between = (a * b).sum(-1).flatten(1).var(1, correction=0)
    return within + between


@dataclass(frozen=True)
class Case:
    """A sketch, the shape of a parameter, and the variance of the sketched inner product of two gradients."""

    sketch: Sketch
    shape: tuple[int, ...]
    variance: Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class RankOne:
    """The same for rank-one gradients δxᵀ: the variance that each side's map adds to α = ⟨δ,δ'⟩ and β = ⟨x,x'⟩."""

    sketch: Sketch
    shape: tuple[int, int]
    left: Callable[[Tensor, Tensor], Tensor]
    right: Callable[[Tensor, Tensor], Tensor]


VECTORS = {
    "dense": Case(DenseSketch(8), (12,), lambda u, v: sign_variance(u, v, 8)),
    "dense, a matrix": Case(DenseSketch(5), (3, 4), lambda u, v: sign_variance(u, v, 5)),
    "dense-gaussian": Case(DenseSketch(8, gaussian=True), (12,), lambda u, v: gaussian_variance(u, v, 8)),
    "kronecker, a vector": Case(KroneckerSketch(16), (12,), lambda u, v: gaussian_variance(u, v, 16)),
    "factored, a vector": Case(FactoredSketch(5), (33,), lambda u, v: fold_variance(u, v, 5)),
    "factored, a long vector": Case(FactoredSketch(16), (300,), lambda u, v: fold_variance(u, v, 16)),
    "factored, the last fold only": Case(FactoredSketch(6), (4, 7), lambda u, v: fold_variance(u, v, 6)),
    "factored, a convolution": Case(FactoredSketch(7), (4, 2, 2, 2), convolution_variance),
    "factored, all three folds": Case(
        FactoredSketch(6, side=4), (6, 7), lambda u, v: composed_variance(u, v, (6, 7), 4, 6)
    ),
    "factored, one side folded": Case(
        FactoredSketch(5, side=4), (3, 9), lambda u, v: composed_variance(u, v, (3, 9), 4, 5)
    ),
}

RANK_ONE = {
    "kronecker": RankOne(
        KroneckerSketch(256),
        (9, 5),
        lambda u, v: gaussian_variance(u, v, 16),
        lambda u, v: gaussian_variance(u, v, 16),
    ),
    "kronecker, uneven": RankOne(
        KroneckerSketch(128),
        (5, 9),
        lambda u, v: gaussian_variance(u, v, 8),
        lambda u, v: gaussian_variance(u, v, 16),
    ),
    "factored, both sides folded": RankOne(
        FactoredSketch(64, side=8), (20, 27), lambda u, v: fold_variance(u, v, 8), lambda u, v: fold_variance(u, v, 8)
    ),
    "factored, rows folded": RankOne(
        FactoredSketch(64, side=8), (27, 8), lambda u, v: fold_variance(u, v, 8), lambda u, v: torch.zeros(PAIRS)
    ),
}


def keys(shape: tuple[int, ...], name: str = "layer.weight") -> list[ParameterKey]:
    return [ParameterKey(draw // 50, draw % 50, name, shape) for draw in range(DRAWS)]


def rows_of(sketch: Sketch, key: ParameterKey, form: Form, size: int = 2 * PAIRS) -> Tensor:
    out = torch.zeros(size, sketch.dim, dtype=torch.float64)
    sketch.parameter(key, CPU, torch.float64).add(out, form)
    return out


def sketched_products(sketch: Sketch, shape: tuple[int, ...], form: Form) -> Tensor:
    """Return inner products [DRAWS, PAIRS] of the sketches of the first half of the examples with the second half."""
    rows = torch.stack([rows_of(sketch, key, form) for key in keys(shape)])
    return (rows[:, :PAIRS] * rows[:, PAIRS:]).sum(2)


def assert_moments(sample: Tensor, mean: Tensor, variance: Tensor) -> None:
    """Check means within 4 standard errors, and the mean variance over all pairs within 10% (4 errors or more).

    The variance of each pair must be within 5 of its standard errors.
    """
    scaled = (sample - mean) / variance.sqrt()
    assert float(scaled.mean(0).abs().max()) < 4 / DRAWS**0.5
    square = scaled.square()
    error = float(square.mean(1).std()) / DRAWS**0.5
    assert 4 * error < 0.1, "too few draws for a bound of 10%"
    assert abs(float(square.mean()) - 1) < 0.1
    assert float(((square.mean(0) - 1).abs() / (square.std(0) / DRAWS**0.5)).max()) < 5


@pytest.mark.parametrize("name", VECTORS)
def test_inner_products_have_the_mean_and_variance_of_the_formula(name):
    case = VECTORS[name]
    u, v = pairs(int(np.prod(case.shape)))
    sample = sketched_products(case.sketch, case.shape, Dense(torch.cat([u, v])))
    assert_moments(sample, (u * v).sum(1), case.variance(u, v))


@pytest.mark.parametrize("name", RANK_ONE)
def test_rank_one_inner_products_have_the_mean_and_variance_of_the_formula(name):
    case = RANK_ONE[name]
    (delta, other_delta), (x, other_x) = pairs(case.shape[0]), pairs(case.shape[1], seed=1)
    form = Outer(torch.cat([delta, other_delta]).unsqueeze(1), torch.cat([x, other_x]).unsqueeze(1))
    alpha, beta = (delta * other_delta).sum(1), (x * other_x).sum(1)
    left, right = case.left(delta, other_delta), case.right(x, other_x)
    variance = (alpha.square() + left) * (beta.square() + right) - (alpha * beta).square()
    assert_moments(sketched_products(case.sketch, case.shape, form), alpha * beta, variance)


@pytest.mark.parametrize("shape", [(), (1,), (40,), (5, 8), (40, 1), (2, 2, 3, 3)], ids=str)
def test_small_parameters_keep_exact_inner_products(shape):
    u, v = pairs(int(np.prod(shape)))
    for key in keys(shape)[:20]:
        out = rows_of(FactoredSketch(40), key, Dense(torch.cat([u, v])))
        torch.testing.assert_close((out[:PAIRS] * out[PAIRS:]).sum(1), (u * v).sum(1))


@pytest.mark.parametrize("name", SKETCHES)
@pytest.mark.parametrize("shape", [(), (5, 6)], ids=str)
def test_cross_terms_of_other_parameters_and_checkpoints_have_mean_zero(name, shape):
    """Therefore parameters can share one row of D: the noise of the sum has no bias, even for similar gradients."""
    sketch = make_sketch(name, 16)
    form = forms.dense(int(np.prod(shape)), batch=PAIRS)
    first, second = (
        torch.stack([rows_of(sketch, key, form, PAIRS) for key in keys(shape, n)]) for n in ("first", "second")
    )
    for other in (second, first.roll(1, 0)):
        cross = (first * other).sum(2)
        assert float((cross.mean(0).abs() / (cross.std(0) / DRAWS**0.5)).max()) < 4


@pytest.mark.parametrize("name", SKETCHES)
def test_the_rows_of_a_whole_model_have_its_gradients_inner_products(name):
    """E⟨Σ_p S_p u_p, Σ_p S_p v_p⟩ = Σ_p ⟨u_p, v_p⟩."""
    sketch = make_sketch(name, 16)
    shapes = {"weight": (4, 6), "bias": (4,)}
    uv = {n: torch.cat(pairs(int(np.prod(shape)), seed)) for seed, (n, shape) in enumerate(shapes.items())}
    total = sum(
        torch.stack([rows_of(sketch, key, Dense(uv[n])) for key in keys(shape, n)]) for n, shape in shapes.items()
    )
    sample = (total[:, :PAIRS] * total[:, PAIRS:]).sum(2)
    mean = sum((x[:PAIRS] * x[PAIRS:]).sum(1) for x in uv.values())
    assert float(((sample.mean(0) - mean).abs() / (sample.std(0) / DRAWS**0.5)).max()) < 4


STREAM = Stream(5, 2, "layer.weight", "left")
MANY = 1 << 17
OTHER_STREAMS = [
    Stream(6, 2, "layer.weight", "left"),
    Stream(5, 3, "layer.weight", "left"),
    Stream(2, 5, "layer.weight", "left"),
    Stream(5, 2, "layer.weigh", "tleft"),
    Stream(5, 2, "layer.weight", "right"),
    Stream(52, 2, "layer.weight", "left"),
]


@pytest.mark.parametrize("kind", ["words", "signs", "gaussians"])
@pytest.mark.parametrize("start", [0, 1, 2, 3, 4, 5, 63, 64, 65, 127, 1000, 1021])
@pytest.mark.parametrize("count", [0, 1, 2, 7, 64, 130])
def test_a_stream_is_random_access(kind, start, count):
    make = getattr(STREAM, kind)
    part = make(start, count)
    assert part.shape == (count,)
    np.testing.assert_array_equal(part, make(0, start + count)[start:])


def test_a_stream_is_the_same_at_large_offsets():
    far = 10**12 + 3
    np.testing.assert_array_equal(STREAM.words(far + 5, 3), STREAM.words(far, 8)[5:])
    np.testing.assert_array_equal(STREAM.signs(far + 5, 3), STREAM.signs(far, 8)[5:])
    np.testing.assert_array_equal(STREAM.gaussians(far + 5, 3), STREAM.gaussians(far, 8)[5:])


def test_signs_are_balanced_and_independent_of_their_neighbours():
    signs = STREAM.signs(0, MANY).astype(np.float64)
    assert set(signs) == {-1.0, 1.0}
    assert abs(signs.mean()) < 4 / MANY**0.5
    for lag in (1, 2, 7, 8, 63, 64, 128, 256, 1024):
        assert abs((signs[lag:] * signs[:-lag]).mean()) < 4 / (MANY - lag) ** 0.5
    bit_mean = signs.reshape(-1, 64).mean(0)
    assert np.abs(bit_mean).max() < 4 / (MANY // 64) ** 0.5


def test_gaussians_have_the_normal_moments_and_are_independent_of_their_neighbours():
    x = STREAM.gaussians(0, MANY).astype(np.float64)
    moments = {1: (0, 1), 2: (1, 2), 3: (0, 15), 4: (3, 96)}
    for power, (mean, variance) in moments.items():
        assert abs((x**power).mean() - mean) < 4 * (variance / MANY) ** 0.5, power
    for lag in (1, 2, 3, 4, 8):
        assert abs((x[lag:] * x[:-lag]).mean()) < 4 / (MANY - lag) ** 0.5
        squares = (x[lag:] ** 2 - 1) * (x[:-lag] ** 2 - 1) / 2
        assert abs(squares.mean()) < 4 / (MANY - lag) ** 0.5
    inside = [(np.abs(x) < bound).mean() for bound in (0.6744897502, 1.9599639845, 3.2905267315)]
    for share, truth in zip(inside, (0.5, 0.95, 0.999), strict=True):
        assert abs(share - truth) < 4 * (truth * (1 - truth) / MANY) ** 0.5


@pytest.mark.parametrize("other", OTHER_STREAMS, ids=str)
def test_streams_of_other_names_are_independent(other):
    assert not np.isin(STREAM.words(0, 1000), other.words(0, 1000)).any()
    assert abs((STREAM.signs(0, MANY) * other.signs(0, MANY)).astype(np.float64).mean()) < 4 / MANY**0.5
    assert abs((STREAM.gaussians(0, MANY) * other.gaussians(0, MANY)).mean()) < 4 / MANY**0.5


def test_a_stream_of_the_same_name_is_the_same_stream():
    again = Stream(5, 2, "layer.weight", "left")
    np.testing.assert_array_equal(STREAM.words(0, 100), again.words(0, 100))


def test_integers_are_uniform_over_their_range():
    bound, draws = 7, 7000
    found = np.bincount([Stream(0, c, "w", "offset").integer(bound) for c in range(draws)], minlength=bound)
    assert len(found) == bound
    chi_square = ((found - draws / bound) ** 2 / (draws / bound)).sum()
    assert chi_square < 22.5  # 99.9% of χ² with 6 degrees of freedom
