"""Seeded factories of per-example gradients in every form that can say them, and the naive float64 oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from tracin_ann.factors import Dense, Form, Outer, Rows


def outer(shape: tuple[int, int], positions: int, *, batch: int = 3, groups: int = 1, seed: int = 0) -> Outer:
    """Return a drawn Outer of a parameter [R, C]."""
    g = torch.Generator().manual_seed(seed)
    left = torch.randn(batch, positions, shape[0], generator=g, dtype=torch.float64)
    right = torch.randn(batch, positions, groups * shape[1], generator=g, dtype=torch.float64)
    return Outer(left, right, groups)


def rows(shape: tuple[int, int], positions: int, *, batch: int = 3, seed: int = 0) -> Rows:
    """Return drawn Rows of a parameter [R, C]: repeated indices, and a last position that carries zero."""
    g = torch.Generator().manual_seed(seed)
    value = torch.randn(batch, positions, shape[1], generator=g, dtype=torch.float64)
    value[:, -1] = 0
    return Rows(torch.randint(0, shape[0], (batch, positions), generator=g), value, shape[0])


def dense(size: int, *, batch: int = 3, seed: int = 0) -> Dense:
    """Return a drawn Dense of a parameter of P numbers."""
    return Dense(torch.randn(batch, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


def moved(form: Form, device: torch.device, dtype: torch.dtype) -> Form:
    """Return the form on a device, in a dtype."""
    if isinstance(form, Outer):
        return Outer(form.left_BTR.to(device, dtype), form.right_BTC.to(device, dtype), form.groups)
    if isinstance(form, Rows):
        return Rows(form.index_BT.to(device), form.value_BTC.to(device, dtype), form.n_rows)
    return Dense(form.grad_BP.to(device, dtype))


def gradient(form: Form) -> Tensor:
    """Return the gradients [B, P] in float64 from the definition of the form."""
    if isinstance(form, Dense):
        return form.grad_BP.double().cpu()
    if isinstance(form, Rows):
        batch, positions = form.index_BT.shape
        grad = torch.zeros(batch, *form.shape, dtype=torch.float64)
        for b in range(batch):
            for t in range(positions):
                grad[b, int(form.index_BT[b, t])] += form.value_BTC[b, t].double().cpu()
        return grad.flatten(1)
    lefts = form.left_BTR.double().cpu().chunk(form.groups, 2)
    rights = form.right_BTC.double().cpu().chunk(form.groups, 2)
    parts = [torch.einsum("btr,btc->brc", left, right) for left, right in zip(lefts, rights, strict=True)]
    return torch.cat(parts, 1).flatten(1)


def same_gradient(grad_BRC: Tensor) -> dict[str, list[Form]]:
    """Return lists of forms that add up to these gradients; each list as several calls of a layer might leave them."""
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
    for groups in (g for g in range(2, n_rows + 1) if n_rows % g == 0):
        size = n_rows // groups
        right = grad_BRC.view(batch, groups, size, n_columns).transpose(1, 2).flatten(2)
        forms[f"outer in {groups} groups"] = [Outer(eye[:, :size, :size].repeat(1, 1, groups), right, groups)]
        if groups < n_rows:
            break
    return forms
