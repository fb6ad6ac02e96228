"""Sketches of a gradient matrix from both sides: map left, map right, contract over positions, finish.

The one contraction that `kronecker` and `factored` share. Both sides are mapped before the sum over
positions, which shrinks that product as well (Johnson-Lindenstrauss by Kronecker factors, as in
LoGra, Choe et al. 2024; the folds are CountSketches, Charikar et al. 2002).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from tracin_ann.convolution import Convolution
from tracin_ann.factors import Dense, Form, Outer, Rows, materialised
from tracin_ann.sketch.sides import ChannelsFolded, Folded, Side, fold

_BLOCK_ELEMENTS = 1 << 22


class Finish(Protocol):
    """The last linear map, from the flat contraction [B, K1·K2] into the shared D."""

    def add(self, out_BD: Tensor, flat_BK: Tensor) -> None:
        """Add the mapped rows to `out_BD`."""


@dataclass(frozen=True)
class Plain:
    """The contraction is the sketch: K1·K2 = D."""

    def add(self, out_BD: Tensor, flat_BK: Tensor) -> None:
        """Add the rows as they are."""
        out_BD += flat_BK


@dataclass(frozen=True)
class SignFold:
    """Signs, and sums over the positions that are equal modulo D, from an offset of its own."""

    signs_K: Tensor
    offset: int

    def add(self, out_BD: Tensor, flat_BK: Tensor) -> None:
        """Add the folded rows, turned by the offset, so that small layers spread over all of D."""
        add_turned(out_BD, fold(flat_BK, self.signs_K, out_BD.shape[1]), self.offset)


def add_turned(out_BD: Tensor, rows_BK: Tensor, offset: int) -> None:
    """Add rows of at most D numbers to `out_BD` from column `offset` on, going on at column 0."""
    head = min(rows_BK.shape[1], out_BD.shape[1] - offset)
    out_BD[:, offset : offset + head] += rows_BK[:, :head]
    if head < rows_BK.shape[1]:
        out_BD[:, : rows_BK.shape[1] - head] += rows_BK[:, head:]


@dataclass(frozen=True)
class TwoSided:
    """The map of one parameter: grad [R, C] -> finish(L grad Rᵀ).

    With more than one tap, the sides are folds of a convolution's channels, and its gradient is never
    laid out as the weight is.
    """

    matrix: tuple[int, int]
    left: Side
    right: Side
    finish: Finish
    taps: int = 1

    def add(self, out_BD: Tensor, form: Form) -> None:
        """Add the sketch of the per-example gradients to `out_BD`, in blocks that stay in cache."""
        step = max(1, _BLOCK_ELEMENTS // max(1, self._elements(form)))
        for start in range(0, out_BD.shape[0], step):
            rows = slice(start, start + step)
            self.finish.add(out_BD[rows], self._flat(form[rows]))

    def _flat(self, form: Form) -> Tensor:
        """Return the contraction [B, K1·K2]; a convolution's in the order tap, output, input channel."""
        if self.taps == 1:
            return contracted(form, self.matrix, self.left, self.right).flatten(1)
        if isinstance(form, Convolution) and form.geometry.groups == 1 and prod(form.geometry.kernel) == self.taps:
            return _channels_folded(form, self.left, self.right).by_tap().flatten(1)
        grad = contracted(form, self.matrix, self.left, self.right)
        return grad.view(*grad.shape[:2], -1, self.taps).permute(0, 3, 1, 2).flatten(1)

    def _elements(self, form: Form) -> int:
        """Return the numbers one example's largest temporary holds."""
        if isinstance(form, Outer):
            return form.left_BTR.shape[1] * max(form.left_BTR.shape[2], form.right_BTC.shape[2])
        if isinstance(form, Rows):
            return form.index_BT.shape[1] * max(self.left.width, form.value_BTC.shape[2])
        return self.matrix[0] * self.matrix[1]


def contracted(form: Form, matrix: tuple[int, int], left: Side, right: Side) -> Tensor:
    """Return L grad Rᵀ an example, [B, K1, K2], for a parameter read as a matrix (R, C)."""
    if isinstance(form, Rows):
        return torch.bmm(left.columns(form.index_BT, form.value_BTC.dtype).mT, right.apply(form.value_BTC))
    if isinstance(form, Outer):
        return torch.bmm(left.apply(form.left_BTR).mT, right.apply(form.right_BTC))
    flat = form.grad_BP if isinstance(form, Dense) else materialised(form)
    return left.apply(right.apply(flat.view(-1, *matrix)).mT).mT


def _channels_folded(form: Convolution, left: Side, right: Side) -> Convolution:
    """Return the form with its channels folded on either side, before anything is contracted."""
    delta, x = form.delta_BO, form.input_BC
    if isinstance(left, Folded):
        delta = fold(delta, left.signs_n, left.width, dim=1)
    if isinstance(right, ChannelsFolded):
        x = fold(x, right.signs_C, right.channels, dim=1)
    return Convolution(delta, x, form.geometry)
