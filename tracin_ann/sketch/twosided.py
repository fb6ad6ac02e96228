"""Two-sided sketches of a gradient matrix: map rows and columns, contract over positions, map the result to D.

`kronecker` and `factored` share this contraction. Both sides are mapped before the sum over positions, which
makes that product smaller as well (Johnson-Lindenstrauss with Kronecker factors, as in LoGra, Choe et al. 2024;
the folds are CountSketches, Charikar et al. 2002).

Shapes: B batch, T positions, R × C a parameter as a matrix, K1 × K2 its mapped sides, D sketch dimension.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from tracin_ann.gradients import Allocator, Convolution, Dense, Form, Outer, Rows, Scratch, channels_last, materialise
from tracin_ann.sketch.sides import ChannelFold, Fold, Side, fold

_BLOCK_ELEMENTS = 1 << 19


class Finish(Protocol):
    """The last linear map, from the flat contraction [B, K1·K2] to D."""

    def add(self, out_BD: Tensor, flat_BK: Tensor) -> None:
        """Add the mapped rows to `out_BD`."""


@dataclass(frozen=True)
class PlainSum:
    """The identity, where the contraction is the sketch: K1·K2 = D."""

    def add(self, out_BD: Tensor, flat_BK: Tensor) -> None:
        """Add the rows unchanged."""
        out_BD += flat_BK


@dataclass(frozen=True)
class SignFold:
    """Random signs, and sums over the positions that are equal modulo D; position 0 goes to column `offset`."""

    signs_K: Tensor
    offset: int

    def add(self, out_BD: Tensor, flat_BK: Tensor) -> None:
        """Add the folded rows, rotated by the offset, so that small layers spread over all D columns."""
        dim = out_BD.shape[1]
        # The first group goes to columns offset .. D, the next to 0 .. D, and so on.
        start, column = 0, self.offset
        while start < flat_BK.shape[1]:
            stop = min(start + dim - column, flat_BK.shape[1])
            out_BD[:, column : column + stop - start].addcmul_(flat_BK[:, start:stop], self.signs_K[start:stop])
            start, column = stop, 0


@dataclass(frozen=True)
class TwoSided:
    """The map of one parameter: grad [R, C] -> finish(L grad Rᵀ).

    Attributes:
        matrix: (R, C).
        left: the map of the rows, R -> K1.
        right: the map of the columns, C -> K2.
        finish: the map of the contraction, K1·K2 -> D.
        taps: kernel taps of a convolution whose sides are folds of channels, which are applied before patches
            are extracted; the contraction then has the order [tap, input channel, output]. 0: not such a map.
        scratch: work buffers.
    """

    matrix: tuple[int, int]
    left: Side
    right: Side
    finish: Finish
    taps: int = 0
    scratch: Scratch = field(default_factory=Scratch)

    def add(self, out_BD: Tensor, form: Form) -> None:
        """Add the sketch of the per-example gradients to `out_BD`, in blocks that fit the cache."""
        step = max(1, _BLOCK_ELEMENTS // max(1, self._elements(form)))
        for start in range(0, out_BD.shape[0], step):
            rows = slice(start, start + step)
            self.finish.add(out_BD[rows], self._contract(form[rows]).flatten(1))

    def _contract(self, form: Form) -> Tensor:
        if isinstance(form, Convolution) and form.geometry.groups == 1 and self.taps == prod(form.geometry.kernel):
            return self._fold_sides(form).contract(self.scratch, self.scratch["contraction"])
        grad_BKK = contract(form, self.matrix, self.left, self.right, self.scratch)
        return grad_BKK.reshape(*grad_BKK.shape[:2], -1, self.taps).permute(0, 3, 2, 1) if self.taps else grad_BKK

    def _fold_sides(self, form: Convolution) -> Convolution:
        """Return the form with input and output channels folded, before it is contracted."""
        delta, x = form.delta_BO, form.input_BC
        if isinstance(self.left, Fold):
            delta = _fold_channels(delta, self.left.signs_n, self.left.width, self.scratch["left"])
        if isinstance(self.right, ChannelFold):
            x = _fold_channels(x, self.right.signs_C, self.right.channels, self.scratch["right"])
        return Convolution(delta, x, form.geometry)

    def _elements(self, form: Form) -> int:
        """Return the number of elements of the largest temporary of one example."""
        if isinstance(form, Outer):
            return form.left_BTR.shape[1] * (self.left.width + self.right.width)
        if isinstance(form, Rows):
            return form.index_BT.shape[1] * max(self.left.width, form.value_BTC.shape[2])
        if isinstance(form, Convolution) and self.taps:
            # Patches do not count: the form extracts them for a few examples at a time.
            delta = self.left.width * prod(form.delta_BO.shape[2:]) if isinstance(self.left, Fold) else 0
            return delta + self.left.width * self.right.width
        return self.matrix[0] * self.matrix[1]


def contract(form: Form, matrix: tuple[int, int], left: Side, right: Side, scratch: Scratch) -> Tensor:
    """Return L grad Rᵀ per example, [B, K1, K2], for a parameter as a matrix (R, C); may be a view of `scratch`."""
    if isinstance(form, Rows):
        return torch.bmm(left.columns(form.index_BT, form.value_BTC.dtype).mT, right.apply(form.value_BTC))
    if isinstance(form, Outer):
        left_BTK = left.apply(form.left_BTR, scratch["left"])
        right_BTK = right.apply(form.right_BTC, scratch["right"])
        out = scratch["contraction"]((len(left_BTK), left.width, right.width), left_BTK)
        return torch.bmm(left_BTK.mT, right_BTK, out=out)
    flat = form.grad_BP if isinstance(form, Dense) else materialise(form)
    return left.apply(right.apply(flat.view(-1, *matrix)).mT).mT


def _fold_channels(x: Tensor, signs_C: Tensor, width: int, allocate_out: Allocator) -> Tensor:
    if channels_last(x):
        return fold(x.movedim(1, -1), signs_C, width, -1, allocate_out).movedim(-1, 1)
    return fold(x, signs_C, width, 1, allocate_out)
