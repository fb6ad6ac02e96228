"""Factor forms: blocks, sums, inner products and norms, compared with naive float64 einsum."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import forms
from tracin_ann.features.extractor import squared_norms
from tracin_ann.gradients import factors
from tracin_ann.gradients.factors import (
    Dense,
    Rows,
    batch_size,
    column_blocks,
    inner,
    inner_where,
    materialise,
    scale,
    squared_norm,
    weighted_sums,
)

FORMS = {
    "outer of rank one": lambda: forms.outer((5, 7), 1),
    "outer, few positions": lambda: forms.outer((9, 8), 2),
    "outer, many positions": lambda: forms.outer((5, 7), 11),
    "convolution": lambda: forms.convolution((6, 5, 3, 2), (7, 6)),
    "convolution of one channel": lambda: forms.convolution((4, 1, 3, 3), (6, 6)),
    "convolution with strides": lambda: forms.convolution((4, 5, 3, 3), (9, 8), stride=2),
    "convolution, dilated": lambda: forms.convolution((4, 5, 3, 2), (9, 8), dilation=2),
    "convolution in 2 groups": lambda: forms.convolution((6, 5, 3, 3), (5, 6), groups=2),
    "depthwise convolution": lambda: forms.convolution((6, 1, 3, 3), (5, 6), groups=6),
    "convolution of a line": lambda: forms.convolution((4, 5, 3), (9,), dilation=2),
    "convolution of a line with strides": lambda: forms.convolution((4, 5, 3), (9,), stride=2),
    "convolution of a volume": lambda: forms.convolution((3, 4, 2, 3, 2), (4, 5, 4)),
    "convolution of a volume with strides": lambda: forms.convolution((3, 2, 2, 3, 2), (4, 5, 4), stride=2, dilation=1),
    "convolution, padded": lambda: forms.convolution((6, 5, 3, 2), (7, 6), padding=((1, 1), (0, 2))),
    "convolution, channels last": lambda: forms.channels_last(
        forms.convolution((6, 5, 3, 2), (7, 6), padding=((1, 1), (0, 2)))
    ),
    "convolution in 2 groups, channels last": lambda: forms.channels_last(
        forms.convolution((6, 5, 3, 3), (5, 6), groups=2, stride=2, padding=((1, 1), (1, 1)))
    ),
    "pointwise convolution": lambda: forms.convolution((6, 5, 1, 1), (4, 3)),
    "pointwise convolution, channels last": lambda: forms.channels_last(forms.convolution((6, 5, 1, 1), (4, 3))),
    "convolution of a volume, channels last": lambda: forms.channels_last(
        forms.convolution((3, 2, 2, 3, 2), (4, 5, 4), dilation=1, padding=((0, 1), (1, 1), (1, 0)))
    ),
    "rows": lambda: forms.rows((6, 4), 9),
    "rows of one column": lambda: forms.rows((6, 1), 9),
    "dense": lambda: forms.dense(30),
    "dense scalar": lambda: forms.dense(1),
    "scaled outer of rank one": lambda: forms.scaled(forms.outer((5, 7), 1)),
    "scaled outer": lambda: forms.scaled(forms.outer((9, 8), 2)),
    "scaled convolution": lambda: forms.scaled(forms.convolution((6, 5, 3, 2), (7, 6))),
    "scaled convolution in 2 groups": lambda: forms.scaled(forms.convolution((6, 5, 3, 3), (5, 6), groups=2)),
    "scaled rows": lambda: forms.scaled(forms.rows((6, 4), 9)),
    "scaled dense": lambda: forms.scaled(forms.dense(30)),
}

SEVERAL = {
    "tied embedding": lambda: [forms.rows((6, 4), 5), forms.outer((6, 4), 5, seed=1)],
    "tied embedding, each twice": lambda: [
        forms.rows((6, 4), 5),
        forms.outer((6, 4), 5, seed=1),
        forms.rows((6, 4), 3, seed=2),
        forms.outer((6, 4), 2, seed=3),
    ],
    "a layer called twice": lambda: [forms.outer((9, 8), 2), forms.outer((9, 8), 1, seed=1)],
    "two look-ups": lambda: [forms.rows((6, 4), 5), forms.rows((6, 4), 7, seed=1)],
    "two dense": lambda: [forms.dense(12), forms.dense(12, seed=1)],
    "a convolution called twice": lambda: [
        forms.convolution((6, 5, 3), (9,)),
        forms.convolution((6, 5, 3), (7,)),
    ],
    "grouped and dense": lambda: [forms.convolution((6, 3, 1), (4,), groups=2), forms.dense(18, seed=1)],
    "scaled": lambda: [
        forms.scaled(form) for form in (forms.rows((6, 4), 5), forms.outer((6, 4), 5, seed=1), forms.outer((6, 4), 1))
    ],
    "scaled outer in two calls": lambda: [
        forms.scaled(form) for form in (forms.outer((6, 4), 5), forms.outer((6, 4), 2, seed=1))
    ],
    "all three": lambda: [forms.rows((6, 4), 5), forms.outer((6, 4), 5, seed=1), forms.dense(24, seed=2)],
}


def assert_near(actual, expected):
    torch.testing.assert_close(actual.double().cpu(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.fixture(params=FORMS)
def form(request, device):
    return forms.move(FORMS[request.param](), device, torch.float32)


def test_the_materialised_gradient_agrees_with_the_definition(form):
    assert_near(materialise(form), forms.compute_gradient(form))


@pytest.mark.parametrize("elements", [1, 7, 40, 1 << 24])
def test_column_blocks_are_complete_rows_in_order_and_cover_the_gradient(form, elements):
    truth = forms.compute_gradient(form)
    columns = form.shape[1]
    stop = 0
    for start, block in column_blocks(form, elements=elements):
        assert start == stop
        assert start % columns == block.shape[1] % columns == 0
        assert block.shape[1] == columns or block.numel() <= elements
        assert_near(block, truth[:, start : start + block.shape[1]])
        stop = start + block.shape[1]
    assert stop == truth.shape[1]


def test_weighted_sums_over_the_batch_agree_with_the_definition(form):
    weights_KB = torch.randn(2, batch_size(form), dtype=torch.float64)
    assert_near(weighted_sums(form, weights_KB), weights_KB @ forms.compute_gradient(form))


@pytest.mark.parametrize("queries", [1, 3])
def test_inner_products_with_directions_agree_with_the_definition(form, queries, device):
    truth = forms.compute_gradient(form)
    direction = torch.randn(queries, truth.shape[1], dtype=torch.float64)
    found = inner(form, direction.to(device, torch.float32))
    assert found.shape == (len(truth), queries)
    assert_near(found, truth @ direction.T)


@pytest.mark.parametrize("queries", [1, 2, 7])
@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_requested_inner_products_agree_with_the_definition(form, queries, share, device):
    truth = forms.compute_gradient(form)
    direction = torch.randn(queries, truth.shape[1], dtype=torch.float64)
    wanted = torch.rand(len(truth), queries, generator=torch.Generator().manual_seed(queries)) < share
    found = inner_where(form, direction.to(device, torch.float32), wanted)
    assert found.shape == wanted.shape
    # Entries that were not requested are replaced by zeros, which keeps the scale of the others.
    assert_near(torch.where(wanted.to(found.device), found, 0), torch.where(wanted, truth @ direction.T, 0))


@pytest.mark.parametrize("name", [name for name in FORMS if not name.startswith("scaled")])
def test_a_form_times_a_number_is_the_form_of_the_scaled_gradients(name):
    form = FORMS[name]()
    scaled = scale(form, 0.3)
    assert type(scaled) is type(form) and scaled.shape == form.shape
    torch.testing.assert_close(forms.compute_gradient(scaled), 0.3 * forms.compute_gradient(form))


def test_the_squared_norm_agrees_with_the_definition(form):
    assert_near(squared_norm([form]), forms.compute_gradient(form).square().sum(1))


@pytest.mark.parametrize("name", SEVERAL)
def test_the_squared_norm_of_several_forms_is_that_of_their_sum(name, device):
    several = [forms.move(form, device, torch.float32) for form in SEVERAL[name]()]
    total = torch.stack([forms.compute_gradient(form) for form in several]).sum(0)
    assert_near(squared_norm(several), total.square().sum(1))
    assert_near(squared_norm(several[::-1]), total.square().sum(1))


@pytest.mark.parametrize("elements", [1, 7, 40])
def test_inner_products_and_norms_add_up_over_blocks(form, elements, device, monkeypatch):
    monkeypatch.setattr(factors, "column_blocks", partial(column_blocks, elements=elements))
    truth = forms.compute_gradient(form)
    direction = torch.randn(2, truth.shape[1], dtype=torch.float64)
    assert_near(inner(form, direction.to(device, torch.float32)), truth @ direction.T)
    assert_near(squared_norm([form]), truth.square().sum(1))
    assert_near(materialise(form), truth)


@pytest.mark.parametrize("part", [slice(0, 1), slice(1, 3), slice(0, 3), slice(1, 9)])
def test_a_slice_of_a_form_is_the_form_of_those_examples(form, part):
    truth = forms.compute_gradient(form)[part]
    sliced = form[part]
    assert type(sliced) is type(form)
    assert sliced.shape == form.shape
    assert batch_size(sliced) == len(truth)
    torch.testing.assert_close(forms.compute_gradient(sliced), truth, rtol=1e-12, atol=1e-12)
    assert_near(squared_norm([sliced]), truth.square().sum(1))


def test_the_shape_is_that_of_the_parameter_as_a_matrix():
    assert forms.outer((6, 5), 4).shape == (6, 5)
    assert forms.convolution((6, 5, 3), (7,), groups=2).shape == (6, 15)
    assert forms.rows((6, 4), 9).shape == (6, 4)
    assert forms.dense(30).shape == (30, 1)


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (12, 1), (1, 9), (6, 4)])
def test_every_form_of_a_gradient_has_its_norm_and_its_sum(shape):
    grad = torch.randn(3, *shape, dtype=torch.float64)
    for name, several in forms.split_gradient(grad).items():
        total = torch.stack([materialise(form) for form in several]).sum(0)
        torch.testing.assert_close(total, grad.flatten(1), msg=lambda m, name=name: f"{name}: {m}")
        weights_KB = torch.randn(2, 3, dtype=torch.float64)
        total = torch.stack([weighted_sums(form, weights_KB) for form in several]).sum(0)
        torch.testing.assert_close(total, weights_KB @ grad.flatten(1), msg=lambda m, name=name: f"{name}: {m}")
        norm = squared_norm(several)
        torch.testing.assert_close(norm, grad.square().sum((1, 2)), msg=lambda m, name=name: f"{name}: {m}")


def test_forms_in_float64_are_computed_in_float64():
    for make in FORMS.values():
        form = make()
        truth = forms.compute_gradient(form)
        direction = torch.randn(2, truth.shape[1], dtype=torch.float64)
        torch.testing.assert_close(materialise(form), truth, rtol=1e-12, atol=1e-12)
        weights_KB = torch.randn(2, len(truth), dtype=torch.float64)
        torch.testing.assert_close(weighted_sums(form, weights_KB), weights_KB @ truth, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(inner(form, direction), truth @ direction.T, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(squared_norm([form]), truth.square().sum(1), rtol=1e-12, atol=1e-12)


def test_a_position_without_a_gradient_may_have_any_index_and_a_zero_value():
    index = torch.tensor([[0, 2, 0], [1, 1, 0]])
    value = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [0.0, 0.0]], [[1.0, 1.0], [2.0, 3.0], [0.0, 0.0]]])
    form = Rows(index, value, 3)
    expected = torch.tensor([[1.0, 2.0, 0.0, 0.0, 3.0, 4.0], [0.0, 0.0, 3.0, 4.0, 0.0, 0.0]])
    assert torch.equal(materialise(form), expected)
    assert torch.equal(squared_norm([form]), torch.tensor([30.0, 25.0]))
    assert torch.equal(squared_norm([form, Dense(-expected)]), torch.zeros(2))


@pytest.mark.parametrize("name", SEVERAL)
def test_exact_norms_of_very_large_and_small_gradients_do_not_overflow_in_float32(name, device):
    several = [forms.move(form, device, torch.float32) for form in SEVERAL[name]()]
    scale = torch.tensor([1e25, 1.0, 1e-28], device=device)
    # The scale is on one factor, as a scaled loss scales every output gradient.
    scaled = [scale_form(form, scale) for form in several]
    truth = torch.stack([forms.compute_gradient(form) for form in scaled]).sum(0).square().sum(1)
    found = squared_norms({("weight", 0, 3): scaled}, 3, device)
    assert found.dtype is torch.float64 and truth[0] > 1e48 and truth[2] < 1e-50
    torch.testing.assert_close(found.cpu(), truth, rtol=1e-5, atol=0)


def scale_form(form, scale):
    def times(values):
        return values * scale.view(-1, *[1] * (values.dim() - 1))

    if isinstance(form, factors.Scaled):
        return factors.Scaled(scale_form(form.form, scale), form.weight_P)
    if isinstance(form, factors.Outer):
        return factors.Outer(times(form.left_BTR), form.right_BTC)
    if isinstance(form, factors.Convolution):
        return factors.Convolution(times(form.delta_BO), form.input_BC, form.geometry)
    return (
        Rows(form.index_BT, times(form.value_BTC), form.n_rows)
        if isinstance(form, Rows)
        else Dense(times(form.grad_BP))
    )


def test_norms_are_of_all_forms_of_a_parameter_for_any_split_of_the_batch():
    first, second = torch.randn(2, 6, 4, dtype=torch.float64)
    cut = {
        ("weight", 0, 6): [factors.Dense(first)],
        ("weight", 0, 2): [factors.Dense(second[:2])],
        ("weight", 2, 6): [factors.Dense(second[2:])],
        ("bias", 1, 3): [factors.Dense(first[1:3])],
    }
    expected = (first + second).square().sum(1)
    expected[1:3] += first[1:3].square().sum(1)
    torch.testing.assert_close(squared_norms(cut, 6, torch.device("cpu")), expected)
