"""TensorSketch (layers called once per example): its definition, all forms of a gradient, spectra, statistics."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

import forms
from tracin_ann.gradients.factors import Dense, Outer, column_blocks
from tracin_ann.sketch import ParameterKey, TensorSketch, is_rank_one
from tracin_ann.sketch.factored import FactoredSketch
from tracin_ann.sketch.twosided import TwoSided

CPU = torch.device("cpu")
# Wide, tall, one row, sides longer than D, an odd D.
CASES = [((5, 70), 32), ((70, 5), 32), ((1, 300), 32), ((40, 50), 32), ((50, 40), 33), ((130, 200), 64)]


def key_for(shape, checkpoint=0, rank_one=True, name="head.weight"):
    return ParameterKey(4, checkpoint, name, shape, rank_one)


def compute_sketch(several, shape, dim, device=CPU, checkpoint=0):
    out = torch.zeros(3, dim, dtype=torch.float64, device=device)
    parameter = FactoredSketch(dim).parameter(key_for(shape, checkpoint), device, torch.float64)
    assert isinstance(parameter, TensorSketch)
    for form in several:
        parameter.add(out, forms.move(form, device, torch.float64))
    return out.cpu()


def naive(grad_BRC, key, dim):
    """Add entry (i, j) to bucket h₁(i) + h₂(j) mod D with sign s₁(i)s₂(j); h of the shorter side is the position."""
    _, rows, columns = grad_BRC.shape
    left, right = key.stream("left").signs(0, rows), key.stream("right").signs(0, columns)
    bucket = key.stream("bucket").integers(0, max(rows, columns), dim)
    out = np.zeros((len(grad_BRC), dim))
    for i in range(rows):
        for j in range(columns):
            place = i + bucket[j] if rows <= columns else bucket[i] + j
            out[:, place % dim] += float(left[i] * right[j]) * grad_BRC[:, i, j]
    return out


@pytest.mark.parametrize(("shape", "dim"), CASES, ids=str)
def test_the_sketch_of_every_form_equals_the_definition(shape, dim, device):
    grad = forms.compute_gradient(forms.outer(shape, 2)).view(3, *shape)
    expected = torch.from_numpy(naive(grad.numpy(), key_for(shape), dim))
    torch.testing.assert_close(
        compute_sketch([Dense(grad.flatten(1))], shape, dim, device), expected, rtol=1e-10, atol=1e-10
    )
    for name, several in forms.split_gradient(grad).items():
        found = compute_sketch(several, shape, dim, device)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9, msg=name)


def test_blocks_of_gradients_are_hashed_at_their_positions(monkeypatch):
    monkeypatch.setattr("tracin_ann.sketch.tensorsketch.column_blocks", partial(column_blocks, elements=100))
    grad = forms.compute_gradient(forms.outer((40, 50), 2)).view(3, 40, 50)
    expected = torch.from_numpy(naive(grad.numpy(), key_for((40, 50)), 32))
    for several in forms.split_gradient(grad).values():
        torch.testing.assert_close(compute_sketch(several, (40, 50), 32), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("shape", "dim"), CASES, ids=str)
def test_an_outer_product_is_transformed_and_never_formed(shape, dim, device, monkeypatch):
    form = forms.outer(shape, 1)
    expected = torch.from_numpy(naive(forms.compute_gradient(form).view(3, *shape).numpy(), key_for(shape), dim))
    monkeypatch.setattr("tracin_ann.sketch.tensorsketch.column_blocks", None)
    torch.testing.assert_close(compute_sketch([form], shape, dim, device), expected, rtol=1e-9, atol=1e-9)


def test_spectra_of_several_parameters_share_one_inverse_transform():
    shapes, dim = [(5, 70), (70, 20)], 33
    total, expected = torch.zeros(()), torch.zeros(3, dim, dtype=torch.float64)
    for shape in shapes:
        form = forms.outer(shape, 1)
        assert is_rank_one(form)
        parameter = FactoredSketch(dim).parameter(key_for(shape), CPU, torch.float64)
        assert isinstance(parameter, TensorSketch)
        total = total + parameter.spectrum(form, dim)
        parameter.add(expected, form)
    torch.testing.assert_close(torch.fft.irfft(total, n=dim), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("shape", "rank_one", "method"),
    [
        ((9, 80), True, "tensor"),
        ((9, 80), False, "sides"),
        ((8, 32), True, "fold"),
        ((8, 33), True, "tensor"),
        ((80,), True, "fold"),
        ((9, 80, 1, 1), True, "channels"),
    ],
)
def test_the_method_depends_on_shape_and_calls(shape, rank_one, method):
    sketch = FactoredSketch(32)
    assert sketch.method(key_for(shape, rank_one=rank_one)) == method
    parameter = sketch.parameter(key_for(shape, rank_one=rank_one), CPU, torch.float32)
    assert isinstance(parameter, TensorSketch if method == "tensor" else TwoSided)
    assert ("TensorSketch" in sketch.describe(key_for(shape, rank_one=rank_one))) == (method == "tensor")


def variance(u, v, dim):
    """Return Var ⟨Su, Sv⟩ from the pairs of entries that can collide; rows are the shorter side, columns random.

    In one row, two columns collide with probability 1/D. In one column, rows that are equal modulo D always
    collide. Otherwise (i, j) and (i', j') collide with probability 1/D; where 2(i − i') ≡ 0 modulo D, then
    (i, j') and (i', j) collide as well.
    """
    rows, columns = u.shape
    total = 0.0
    inner = np.einsum("ij,ik->jk", u, v)
    pairs = np.triu_indices(columns, 1)
    total += ((inner + inner.T)[pairs] ** 2).sum() / dim
    across = np.einsum("ij,kj->ik", u, v)
    for i in range(rows):
        for k in range(i + 1, rows):
            if (k - i) % dim == 0:
                total += (across[i, k] + across[k, i]) ** 2
            # [j, j']: entries (i, j) and (k, j'), in both orders.
            meet = np.outer(u[i], v[k]) + np.outer(v[i], u[k])
            first, second = meet[pairs], meet.T[pairs]
            total += (first**2 + second**2).sum() / dim
            if 2 * (k - i) % dim == 0:
                total += 2 * (first * second).sum() / dim
    return total


@pytest.mark.parametrize(("shape", "dim"), [((4, 30), 8), ((11, 12), 6)], ids=str)
def test_the_sketch_is_unbiased_with_the_variance_of_its_collisions(shape, dim):
    draws = 6000
    first, second = (forms.compute_gradient(forms.outer(shape, 2, seed=seed))[0] for seed in (1, 2))
    second = second + 0.5 * first
    both = [Dense(torch.stack([first, second, first]))]
    products = []
    for checkpoint in range(draws):
        rows = compute_sketch(both, shape, dim, checkpoint=checkpoint)
        products.append(float(rows[0] @ rows[1]))
    true = float(first @ second)
    expected = variance(*(g.view(shape).numpy() for g in (first, second)), dim)
    assert abs(np.mean(products) - true) < 4 * np.std(products) / draws**0.5
    assert np.var(products) == pytest.approx(expected, rel=0.10)


def test_inner_products_of_gradients_of_one_hot_inputs_are_preserved():
    """A gradient may have all its entries in one column; its sketch must still use all of D."""
    shape, dim, draws = (100, 400), 256, 300
    g = torch.Generator().manual_seed(0)
    left = torch.randn(3, 1, 100, generator=g, dtype=torch.float64)
    hot = torch.zeros(3, 1, 400, dtype=torch.float64)
    hot[:, 0, 7] = 1.0
    form = Outer(left, hot)
    true = float(left[0, 0] @ left[1, 0])
    scale = float(left[0].norm() * left[1].norm())
    off = []
    for checkpoint in range(draws):
        rows = compute_sketch([form], shape, dim, checkpoint=checkpoint)
        off.append((float(rows[0] @ rows[1]) - true) / scale)
    assert np.std(off) <= 1e-9  # 100 rows have 256 buckets: no collisions
