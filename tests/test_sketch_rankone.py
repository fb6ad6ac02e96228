"""The whole-matrix sign-fold of layers called once: against its definition, in every form, and its statistics."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import forms
from tracin_ann.factors import Dense
from tracin_ann.sketch import ParameterKey
from tracin_ann.sketch.factored import FactoredSketch
from tracin_ann.sketch.rankone import RankOne

CPU = torch.device("cpu")
SHAPES = [(5, 7), (130, 200), (17, 128), (1, 300), (3, 1025), (20, 6, 3, 3)]
DIM = 256


def key_for(shape, checkpoint=0, rank_one=True):
    return ParameterKey(4, checkpoint, "head.weight", shape, rank_one)


def sketched(several, shape, device=CPU, checkpoint=0, dim=DIM):
    out = torch.zeros(3, dim, dtype=torch.float64, device=device)
    parameter = FactoredSketch(dim).parameter(key_for(shape, checkpoint), device, torch.float64)
    assert isinstance(parameter, RankOne)
    for form in several:
        parameter.add(out, forms.moved(form, device, torch.float64))
    return out.cpu()


def naive(grad_BRC, key, dim):
    """Entry (i, j) with sign [i mod A, i // A, j] into bucket (i mod A, j mod 128), turned by the offset."""
    _, rows, columns = grad_BRC.shape
    classes = dim // 128
    signs = key.stream("fold").signs(0, classes * -(-rows // classes) * columns).reshape(classes, -1, columns)
    out = np.zeros((len(grad_BRC), dim))
    for i in range(rows):
        for j in range(columns):
            bucket = (i % classes) * 128 + j % 128 + key.stream("offset").integer(dim)
            out[:, bucket % dim] += signs[i % classes, i // classes, j] * grad_BRC[:, i, j]
    return out


@pytest.mark.parametrize("shape", [s for s in SHAPES if len(s) == 2 and s[0] * s[1] < 5000], ids=str)
def test_it_is_its_definition(shape, device):
    grad = forms.gradient(forms.outer(shape, 2)).view(3, *shape)
    expected = torch.from_numpy(naive(grad.numpy(), key_for(shape), DIM))
    torch.testing.assert_close(sketched([Dense(grad.flatten(1))], shape, device), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_form_gives_the_same_and_one_position_is_the_shortcut(shape, device):
    matrix = key_for(shape).matrix
    once = forms.outer(matrix, 1)
    grad = forms.gradient(once).view(3, *matrix)
    expected = sketched([Dense(grad.flatten(1))], shape)
    torch.testing.assert_close(sketched([once], shape, device), expected, rtol=1e-9, atol=1e-9)
    for name, several in forms.same_gradient(grad).items():
        found = sketched(several, shape, device)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9, msg=name)


def test_a_large_matrix_folds_its_sides_first():
    key = key_for((700, 3000))
    parameter = FactoredSketch(DIM).parameter(key, CPU, torch.float64)
    assert isinstance(parameter, RankOne)
    assert parameter.left.width * parameter.right.width <= 1 << 18
    assert parameter.left.width == 512 and parameter.right.width == 512
    once = forms.outer((700, 3000), 1)
    whole = sketched([Dense(forms.gradient(once))], (700, 3000))
    torch.testing.assert_close(sketched([once], (700, 3000)), whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("rank_one", "dim"), [(False, 256), (True, 250)])
def test_only_layers_called_once_and_dims_of_whole_buckets_have_it(rank_one, dim):
    parameter = FactoredSketch(dim).parameter(key_for((9, 8), rank_one=rank_one), CPU, torch.float32)
    assert not isinstance(parameter, RankOne)


def test_it_is_unbiased_with_the_variance_of_its_buckets():
    """Var = Σ over pairs p ≠ q of one bucket of (u_p²v_q² + u_p v_p u_q v_q)."""
    shape, dim, draws = (6, 400), 128, 3000
    first, second = (forms.gradient(forms.outer(shape, 1, seed=seed))[0] for seed in (1, 2))
    second = second + 0.5 * first
    both = [Dense(torch.stack([first, second, first]))]
    products = []
    for checkpoint in range(draws):
        rows = sketched(both, shape, checkpoint=checkpoint, dim=dim)
        products.append(float(rows[0] @ rows[1]))
    u, v = (g.view(6, 400).numpy() for g in (first, second))
    buckets = np.arange(400) % 128
    variance = 0.0
    for b in range(128):
        p, q = u[:, buckets == b].ravel(), v[:, buckets == b].ravel()
        variance += (p @ p) * (q @ q) + (p @ q) ** 2 - 2 * (p**2) @ (q**2)
    true = float(first @ second)
    assert abs(np.mean(products) - true) < 4 * np.std(products) / draws**0.5
    assert np.var(products) == pytest.approx(variance, rel=0.10)
