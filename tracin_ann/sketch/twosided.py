"""Sketches of a gradient matrix from both sides: map left, map right, contract over positions, finish.

The one contraction that `kronecker` and `factored` share. Both sides are mapped before the sum over
positions, which shrinks that product as well (Johnson-Lindenstrauss by Kronecker factors, as in
LoGra, Choe et al. 2024; the folds are CountSketches, Charikar et al. 2002).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tracin_ann.factors import Dense, Form, Outer, Rows, materialised
from tracin_ann.sketch.sides import Side, fold

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
        dim = out_BD.shape[1]
        folded = fold(flat_BK, self.signs_K, dim)
        head = min(folded.shape[1], dim - self.offset)
        out_BD[:, self.offset : self.offset + head] += folded[:, :head]
        if head < folded.shape[1]:
            out_BD[:, : folded.shape[1] - head] += folded[:, head:]


@dataclass(frozen=True)
class TwoSided:
    """The map of one parameter: grad [R, C] -> finish(L grad Rᵀ)."""

    matrix: tuple[int, int]
    left: Side
    right: Side
    finish: Finish

    def add(self, out_BD: Tensor, form: Form) -> None:
        """Add the sketch of the per-example gradients to `out_BD`, in blocks that stay in cache."""
        step = max(1, _BLOCK_ELEMENTS // max(1, self._elements(form)))
        for start in range(0, out_BD.shape[0], step):
            rows = slice(start, start + step)
            self.finish.add(out_BD[rows], self._contracted(form[rows]).flatten(1))

    def _elements(self, form: Form) -> int:
        """Return the numbers one example's largest temporary holds."""
        if isinstance(form, Outer) and form.groups == 1:
            return form.left_BTR.shape[1] * max(form.left_BTR.shape[2], form.right_BTC.shape[2])
        if isinstance(form, Rows):
            return form.index_BT.shape[1] * max(self.left.width, form.value_BTC.shape[2])
        return self.matrix[0] * self.matrix[1]

    def _contracted(self, form: Form) -> Tensor:
        if isinstance(form, Rows):
            left = self.left.columns(form.index_BT, form.value_BTC.dtype)
            return torch.bmm(left.mT, self.right.apply(form.value_BTC))
        if isinstance(form, Outer) and form.groups == 1:
            return torch.bmm(self.left.apply(form.left_BTR).mT, self.right.apply(form.right_BTC))
        flat = form.grad_BP if isinstance(form, Dense) else materialised(form)
        right = self.right.apply(flat.view(-1, *self.matrix))
        return self.left.apply(right.mT).mT
