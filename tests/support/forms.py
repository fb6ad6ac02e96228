"""Seeded factories of gradient forms, and their float64 gradients from the definitions."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn import functional as F

from tracin_ann.gradients.convolution_factor import Convolution, Geometry
from tracin_ann.gradients.factors import Dense, Form, Outer, Rows, Scaled


def outer(shape: tuple[int, int], positions: int, *, batch: int = 3, seed: int = 0) -> Outer:
    """Return a random Outer of a parameter [R, C]."""
    g = torch.Generator().manual_seed(seed)
    left = torch.randn(batch, positions, shape[0], generator=g, dtype=torch.float64)
    return Outer(left, torch.randn(batch, positions, shape[1], generator=g, dtype=torch.float64))


def convolution(
    weight: tuple[int, ...],
    space: tuple[int, ...],
    *,
    groups: int = 1,
    stride: int = 1,
    dilation: int = 1,
    padding: tuple[tuple[int, int], ...] = (),
) -> Convolution:
    """Return a random Convolution of a weight [O, C/groups, *kernel] over an input of these sizes."""
    g = torch.Generator().manual_seed(len(space) + groups)
    outputs, channels, *kernel = weight
    batch = 3
    n = len(kernel)
    wide = [s + sum(p) for s, p in zip(space, padding or ((0, 0),) * n, strict=True)]
    out = [(s - dilation * (k - 1) - 1) // stride + 1 for s, k in zip(wide, kernel, strict=True)]
    delta = torch.randn(batch, outputs, *out, generator=g, dtype=torch.float64)
    x = torch.randn(batch, channels * groups, *space, generator=g, dtype=torch.float64)
    return Convolution(delta, x, Geometry(tuple(kernel), (stride,) * n, (dilation,) * n, groups, padding))


def channels_last(form: Convolution) -> Convolution:
    """Return the form with its tensors in channels-last memory format."""
    delta, x = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (form.delta_BO, form.input_BC))
    return Convolution(delta, x, form.geometry)


def rows(shape: tuple[int, int], positions: int, *, batch: int = 3, seed: int = 0) -> Rows:
    """Return random Rows of a parameter [R, C], with repeated indices and zero values at the last position."""
    g = torch.Generator().manual_seed(seed)
    value = torch.randn(batch, positions, shape[1], generator=g, dtype=torch.float64)
    value[:, -1] = 0
    return Rows(torch.randint(0, shape[0], (batch, positions), generator=g), value, shape[0])


def dense(size: int, *, batch: int = 3, seed: int = 0) -> Dense:
    """Return a random Dense of a parameter with P elements."""
    return Dense(torch.randn(batch, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


def scaled(form: Form) -> Scaled:
    """Return the form with a random positive weight for each entry, the same for parameters of one size."""
    assert not isinstance(form, Scaled)
    size = form.shape[0] * form.shape[1]
    return Scaled(form, torch.rand(size, generator=torch.Generator().manual_seed(size), dtype=torch.float64) + 0.1)


def move(form: Form, device: torch.device, dtype: torch.dtype) -> Form:
    """Return the form on a device, with a floating-point dtype."""
    if isinstance(form, Scaled):
        moved = move(form.form, device, dtype)
        assert not isinstance(moved, Scaled)
        return Scaled(moved, form.weight_P.to(device, dtype))
    if isinstance(form, Outer):
        return Outer(form.left_BTR.to(device, dtype), form.right_BTC.to(device, dtype))
    if isinstance(form, Convolution):
        return Convolution(form.delta_BO.to(device, dtype), form.input_BC.to(device, dtype), form.geometry)
    if isinstance(form, Rows):
        return Rows(form.index_BT.to(device), form.value_BTC.to(device, dtype), form.n_rows)
    return Dense(form.grad_BP.to(device, dtype))


def compute_gradient(form: Form) -> Tensor:
    """Return the gradients [B, P] in float64 from the definition of the form."""
    if isinstance(form, Scaled):
        return compute_gradient(form.form) * form.weight_P.double().cpu()
    if isinstance(form, Dense):
        return form.grad_BP.double().cpu()
    if isinstance(form, Rows):
        batch, positions = form.index_BT.shape
        grad = torch.zeros(batch, *form.shape, dtype=torch.float64)
        for b in range(batch):
            for t in range(positions):
                grad[b, int(form.index_BT[b, t])] += form.value_BTC[b, t].double().cpu()
        return grad.flatten(1)
    if isinstance(form, Convolution):
        return compute_convolution_gradient(form)
    return torch.einsum("btr,btc->brc", form.left_BTR.double().cpu(), form.right_BTC.double().cpu()).flatten(1)


def compute_convolution_gradient(form: Convolution) -> Tensor:
    """Return the autograd gradients of a convolution's weight, one example at a time."""
    geometry = form.geometry
    apply = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(geometry.kernel)]
    channels = form.input_BC.shape[1] // geometry.groups
    grads = []
    for delta, x in zip(form.delta_BO.double().cpu(), form.input_BC.double().cpu(), strict=True):
        weight = torch.zeros(len(delta), channels, *geometry.kernel, dtype=torch.float64, requires_grad=True)
        pairs = list(itertools.chain.from_iterable(reversed(geometry.padding)))
        y = apply(
            F.pad(x[None], pairs), weight, stride=geometry.stride, dilation=geometry.dilation, groups=geometry.groups
        )
        grads.append(torch.autograd.grad(y, weight, delta[None])[0].flatten())
    return torch.stack(grads)


def split_gradient(grad_BRC: Tensor) -> dict[str, list[Form]]:
    """Return lists of forms, each of which sums to these gradients, as from several calls of a layer."""
    batch, n_rows, n_columns = grad_BRC.shape
    eye = torch.eye(n_rows, dtype=grad_BRC.dtype, device=grad_BRC.device).expand(batch, -1, -1)
    across = torch.eye(n_columns, dtype=grad_BRC.dtype, device=grad_BRC.device).expand(batch, -1, -1)
    index = torch.arange(n_rows, device=grad_BRC.device).expand(batch, -1)
    part = 0.3 * grad_BRC.roll(1, 0)
    rest = grad_BRC - part
    half = n_rows // 2
    forms: dict[str, list[Form]] = {
        "dense": [Dense(grad_BRC.flatten(1))],
        "outer by rows": [Outer(eye, grad_BRC)],
        "outer by columns": [Outer(grad_BRC.mT, across)],
        "outer in two calls": [
            Outer(eye[:, :half], grad_BRC[:, :half]),
            Outer(eye[:, half:], grad_BRC[:, half:]),
        ],
        "rows": [Rows(index.flip(1), grad_BRC.flip(1), n_rows)],
        "rows with repeats": [Rows(torch.cat([index, index], 1), torch.cat([part, rest], 1), n_rows)],
        "rows, outer and dense": [Rows(index, rest, n_rows), Outer(eye, part / 2), Dense(part.flatten(1) / 2)],
    }
    # A convolution of one tap over R positions represents any matrix: the output gradient is the identity.
    pointwise = Geometry((1,), (1,), (1,))
    forms["convolution"] = [Convolution(eye, grad_BRC.mT, pointwise)]
    for groups in (g for g in range(2, n_rows + 1) if n_rows % g == 0):
        size = n_rows // groups
        x = grad_BRC.view(batch, groups, size, n_columns).transpose(2, 3).flatten(1, 2)
        delta = eye[:, :size, :size].repeat(1, groups, 1)
        forms[f"convolution in {groups} groups"] = [Convolution(delta, x, Geometry((1,), (1,), (1,), groups))]
        if groups < n_rows:
            break
    return forms
