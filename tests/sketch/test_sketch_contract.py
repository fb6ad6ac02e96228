"""Contract of every sketch: linear, equal for all forms of a gradient, determined by its key, and equal to its formula.

`NAIVE` has a slow implementation of each sketch.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

import forms
from tracin_ann.errors import UsageError
from tracin_ann.gradients.factors import Dense, batch_size, column_blocks
from tracin_ann.sketch import SKETCHES, ParameterKey, dense, make_sketch, twosided
from tracin_ann.sketch.factored import CHANNEL_WIDTHS, SIDE_WIDTH

SHAPES = {
    "scalar": (),
    "one number": (1,),
    "vector": (7,),
    "long vector": (300,),
    "column": (150, 1),
    "row": (1, 9),
    "narrow": (5, 7),
    "at the border": (65, 64),
    "tall": (300, 9),
    "wide": (6, 300),
    "wide both ways": (150, 140),
    "convolution": (6, 3, 3, 2),
    "wide convolution": (140, 70, 2, 2),
    "embedding": (200, 20),
}
DIMS = [16, 64]
CPU = torch.device("cpu")


def key_for(shape, seed=3, checkpoint=1, name="layer.weight"):
    return ParameterKey(seed, checkpoint, name, shape)


def draw_gradients(shape, batch=3, positions=3, seed=0):
    """Return gradients [B, R, C] in float64: sums of outer products, as those of a layer."""
    matrix = key_for(shape).matrix
    return forms.compute_gradient(forms.outer(matrix, positions, batch=batch, seed=seed)).view(batch, *matrix)


def compute_sketch(sketch, key, several, device=CPU, dtype=torch.float64):
    out = torch.zeros(batch_size(several[0]), sketch.dim, device=device, dtype=dtype)
    parameter = sketch.parameter(key, device, dtype)
    for form in several:
        parameter.add(out, forms.move(form, device, dtype))
    return out.cpu()


def assert_rows_equal(actual, expected, tolerance, why=""):
    """Check that the error of every row is at most `tolerance` times its norm."""
    error = (actual.double() - expected.double()).norm(dim=1) / expected.double().norm(dim=1)
    assert float(error.max()) <= tolerance, why


def naive_fold(x, signs, width):
    folded = np.zeros((*x.shape[:-1], min(width, x.shape[-1])))
    for i in range(x.shape[-1]):
        folded[..., i % width] += signs[i] * x[..., i]
    return folded


def naive_dense(key, grad_BRC, dim, make):
    numbers = make(key.stream("dense"))(0, grad_BRC[0].size * dim).astype(np.float64)
    return grad_BRC.reshape(len(grad_BRC), -1) @ numbers.reshape(-1, dim) / dim**0.5


def naive_kronecker(key, grad_BRC, dim):
    rows, columns = grad_BRC.shape[1:]
    k1, k2 = {16: (4, 4), 64: (8, 8)}[dim]
    if columns == 1:
        left = key.stream("left").gaussians(0, rows * dim).astype(np.float64).reshape(rows, dim)
        return grad_BRC[:, :, 0] @ left / dim**0.5
    left = key.stream("left").gaussians(0, rows * k1).astype(np.float64).reshape(rows, k1)
    right = key.stream("right").gaussians(0, columns * k2).astype(np.float64).reshape(columns, k2)
    return grad_BRC.reshape(len(grad_BRC), -1) @ np.kron(left, right) / dim**0.5


def naive_factored(key, grad_BRC, dim):
    rows, columns = grad_BRC.shape[1:]
    taps = int(np.prod(key.shape[2:]))
    width = CHANNEL_WIDTHS[0] if len(key.shape) > 2 else SIDE_WIDTH
    if len(key.shape) > 2:
        grad_BRC = naive_channel_fold(grad_BRC, key, taps)
    elif columns > SIDE_WIDTH:
        grad_BRC = naive_fold(grad_BRC, key.stream("right").signs(0, columns), SIDE_WIDTH)
    if columns > 1 and rows > width:
        turned = naive_fold(grad_BRC.transpose(0, 2, 1), key.stream("left").signs(0, rows), width)
        grad_BRC = turned.transpose(0, 2, 1)
    if len(key.shape) > 2:  # tap, input channel, output
        grad_BRC = grad_BRC.reshape(*grad_BRC.shape[:2], -1, taps).transpose(0, 3, 2, 1)
    flat = grad_BRC.reshape(len(grad_BRC), -1)
    signs = key.stream("fold").signs(0, flat.shape[1])
    offset = key.stream("offset").integer(dim)
    out = np.zeros((len(flat), dim))
    for i in range(flat.shape[1]):
        out[:, (offset + i) % dim] += signs[i] * flat[:, i]
    return out


def naive_channel_fold(grad_BRC, key, taps):
    """Return the gradients with channel c added to c mod w, with one sign for all its taps."""
    channels, width = key.shape[1], CHANNEL_WIDTHS[1]
    if channels <= width:
        return grad_BRC
    signs = key.stream("right").signs(0, channels)
    by_channel = grad_BRC.reshape(*grad_BRC.shape[:2], channels, taps)
    folded = np.zeros((*grad_BRC.shape[:2], width, taps))
    for c in range(channels):
        folded[:, :, c % width] += signs[c] * by_channel[:, :, c]
    return folded.reshape(*grad_BRC.shape[:2], -1)


NAIVE = {
    "dense": partial(naive_dense, make=lambda stream: stream.signs),
    "dense-gaussian": partial(naive_dense, make=lambda stream: stream.gaussians),
    "kronecker": naive_kronecker,
    "factored": naive_factored,
}


CONVOLUTIONS = {
    "a convolution": partial(forms.convolution, (6, 5, 3, 2), (7, 6), padding=((1, 1), (0, 2))),
    "channels folded": partial(forms.convolution, (140, 90, 3, 3), (4, 5), padding=((1, 1), (1, 1))),
    "pointwise": partial(forms.convolution, (140, 300, 1, 1), (3, 2)),
    "grouped": partial(forms.convolution, (6, 50, 3, 3), (5, 6), groups=2, stride=2),
}


@pytest.fixture(params=DIMS)
def dim(request):
    return request.param


@pytest.fixture(params=SKETCHES)
def sketch(request, dim):
    return make_sketch(request.param, dim)


@pytest.fixture(params=SHAPES)
def shape(request):
    return SHAPES[request.param]


def test_every_sketch_has_an_oracle():
    assert set(NAIVE) == set(SKETCHES)


def test_the_sketch_equals_its_definition(sketch, shape, device):
    grad = draw_gradients(shape)
    expected = NAIVE[sketch.name](key_for(shape), grad.numpy(), dim=sketch.dim)
    found = compute_sketch(sketch, key_for(shape), [Dense(grad.flatten(1))], device)
    assert_rows_equal(found, torch.from_numpy(expected), 1e-12)


def test_the_sketch_is_linear(sketch, shape, device):
    first, second = Dense(draw_gradients(shape).flatten(1)), Dense(draw_gradients(shape, seed=1).flatten(1))
    both = Dense(2.5 * first.grad_BP - 0.75 * second.grad_BP)
    one, two, combined = (compute_sketch(sketch, key_for(shape), [form], device) for form in (first, second, both))
    assert_rows_equal(combined, 2.5 * one - 0.75 * two, 1e-12)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_is_sketched_as_its_gradient_in_either_memory_format(sketch, name, channels_last, device):
    form = CONVOLUTIONS[name]()
    form = forms.channels_last(form) if channels_last else form
    shape = (form.shape[0], form.shape[1] // int(np.prod(form.geometry.kernel)), *form.geometry.kernel)
    found = compute_sketch(sketch, key_for(shape), [form], device)
    assert_rows_equal(
        found, compute_sketch(sketch, key_for(shape), [Dense(forms.compute_gradient(form))], device), 1e-12
    )


def test_the_sketch_is_added_to_the_output(sketch, shape, device):
    form = Dense(draw_gradients(shape).flatten(1))
    out = torch.full((3, sketch.dim), 2.0, device=device, dtype=torch.float64)
    sketch.parameter(key_for(shape), device, torch.float64).add(out, forms.move(form, device, torch.float64))
    assert_rows_equal(out.cpu() - 2.0, compute_sketch(sketch, key_for(shape), [form], device), 1e-12)


def test_every_form_of_a_gradient_gives_the_same_sketch(sketch, shape, device):
    grad = draw_gradients(shape)
    expected = compute_sketch(sketch, key_for(shape), [Dense(grad.flatten(1))], device)
    for name, several in forms.split_gradient(grad).items():
        assert_rows_equal(compute_sketch(sketch, key_for(shape), several, device), expected, 1e-12, name)
    for positions in (1, 3):
        outer = forms.outer(key_for(shape).matrix, positions)
        flat = Dense(forms.compute_gradient(outer))
        assert_rows_equal(
            compute_sketch(sketch, key_for(shape), [outer], device),
            compute_sketch(sketch, key_for(shape), [flat], device),
            1e-12,
        )


def test_float32_agrees_with_float64_on_every_device(sketch, shape, device):
    outer = forms.outer(key_for(shape).matrix, 3)
    expected = compute_sketch(sketch, key_for(shape), [outer])
    assert_rows_equal(compute_sketch(sketch, key_for(shape), [outer], device, torch.float32), expected, 1e-5)


@pytest.fixture
def tiny_blocks(monkeypatch):
    monkeypatch.setattr(twosided, "_BLOCK_ELEMENTS", 1000)
    monkeypatch.setattr(dense, "_PROJECTION_ELEMENTS", 1 << 14)
    monkeypatch.setattr(dense, "column_blocks", partial(column_blocks, elements=20000))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vector", "narrow", "tall", "wide convolution", "embedding"])
@pytest.mark.parametrize("kind", ["dense", "outer by rows", "rows with repeats", "groups"])
def test_any_split_of_the_batch_gives_the_same_rows(sketch, name, kind, device, request):
    key = key_for(SHAPES[name])
    by_kind = forms.split_gradient(draw_gradients(SHAPES[name], batch=7))
    form = by_kind[kind if kind in by_kind else next(k for k in by_kind if k.endswith("groups"))][0]
    expected = compute_sketch(sketch, key, [form], device, torch.float32)
    request.getfixturevalue("tiny_blocks")
    for sizes in ([7], [1] * 7, [2, 5], [4, 3]):
        stops = np.cumsum(sizes)
        parts = [form[int(stop - size) : int(stop)] for size, stop in zip(sizes, stops, strict=True)]
        split = torch.cat([compute_sketch(sketch, key, [part], device, torch.float32) for part in parts])
        assert_rows_equal(split, expected, 1e-5)


LARGE = 256


@pytest.mark.parametrize("name", SKETCHES)
@pytest.mark.parametrize("shape", [(3000,), (150, 40)], ids=str)
def test_other_keys_give_independent_numbers_and_the_same_key_the_same(name, shape):
    key = key_for(shape, seed=0, checkpoint=1, name="weight")
    others = [
        key_for(shape, seed=1, checkpoint=1, name="weight"),
        key_for(shape, seed=0, checkpoint=0, name="weight"),
        key_for(shape, seed=1, checkpoint=0, name="weight"),
        key_for(shape, seed=0, checkpoint=1, name="weights"),
        key_for(shape, seed=0, checkpoint=11, name="weight"),
    ]
    sketch = make_sketch(name, LARGE)
    form = forms.dense(int(np.prod(shape)))
    first = compute_sketch(sketch, key, [form])
    assert torch.equal(first, compute_sketch(make_sketch(name, LARGE), key_for(shape, 0, 1, "weight"), [form]))
    rows = torch.stack([first, *(compute_sketch(sketch, other, [form]) for other in others)])
    unit = rows / rows.norm(dim=2, keepdim=True)
    cosine = torch.einsum("kbd,lbd->klb", unit, unit)
    apart = cosine[~torch.eye(len(rows), dtype=torch.bool)]
    assert float(apart.abs().max()) < 5 / LARGE**0.5


@pytest.mark.parametrize("name", ["kronecker", "factored"])
def test_left_and_right_are_independent(name):
    """If both sides used one stream, the sketch of a transposed matrix would be the transposed sketch."""
    grad = forms.outer((160, 160), 200, batch=2)
    turned = Dense(forms.compute_gradient(grad).view(2, 160, 160).mT.flatten(1))
    sketch = make_sketch(name, LARGE)
    one, two = (compute_sketch(sketch, key_for((160, 160)), [form]).view(2, 16, 16) for form in (grad, turned))
    for other in (two, two.mT):
        cosine = (one * other).sum((1, 2)) / (one.norm(dim=(1, 2)) * other.norm(dim=(1, 2)))
        assert float(cosine.abs().max()) < 5 / LARGE**0.5


@pytest.mark.parametrize("name", SKETCHES)
@pytest.mark.parametrize("dim", [1, 6, 12])
def test_small_dimensions_are_supported(name, dim):
    sketch = make_sketch(name, dim)
    assert (sketch.name, sketch.dim) == (name, dim)
    assert sketch.version >= 1
    out = compute_sketch(sketch, key_for((5, 7)), [forms.outer((5, 7), 2)])
    assert out.shape == (3, dim)
    assert bool(out.isfinite().all())


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("factored", (7,), "7 folded to 256"),
        ("factored", (300, 9), "300x9: folded to 64x9, then to 256"),
        ("factored", (140, 80, 3, 3), "140x720: folded to 128x576, then to 256"),
        ("kronecker", (7,), "7 projected to 256"),
        ("kronecker", (6, 3, 3, 2), "6x18 projected to 16x16"),
        ("dense", (6, 3), "projected to 256 by signs"),
        ("dense-gaussian", (6, 3), "projected to 256 by Gaussians"),
    ],
)
def test_every_sketch_has_a_description(name, shape, words):
    assert make_sketch(name, 256).describe(key_for(shape)) == words


@pytest.mark.parametrize(
    ("dim", "sides"), [(1, (1, 1)), (6, (2, 3)), (16, (4, 4)), (922 + 2, (28, 33)), (1024, (32, 32)), (2048, (32, 64))]
)
def test_kronecker_uses_the_most_even_factors(dim, sides):
    assert make_sketch("kronecker", dim).sides == sides


@pytest.mark.parametrize(("dim", "factors"), [(13, "1 and 13"), (1021, "1 and 1021"), (34, "2 and 17")])
def test_kronecker_rejects_a_dimension_without_even_factors(dim, factors):
    with pytest.raises(UsageError) as raised:
        make_sketch("kronecker", dim)
    message = str(raised.value)
    assert f"got {dim}, whose most even factors are {factors}" in message
    assert "expected a product of two factors within a ratio of 4" in message
    assert "change --dim, or use --sketch factored" in message


def test_an_unknown_sketch_is_rejected_with_the_known_names():
    with pytest.raises(UsageError) as raised:
        make_sketch("fourier", 256)
    message = str(raised.value)
    assert "got 'fourier', expected factored or kronecker or dense or dense-gaussian; change --sketch" in message


@pytest.mark.parametrize("name", SKETCHES)
@pytest.mark.parametrize("dim", [0, -4])
def test_a_sketch_without_dimensions_is_rejected(name, dim):
    with pytest.raises(UsageError, match=f"got {dim}, expected 1 or more; change --dim"):
        make_sketch(name, dim)
