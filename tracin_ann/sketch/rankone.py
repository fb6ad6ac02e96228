"""A sign-fold of the whole gradient matrix, for layers called once an example: no outer product is formed.

Entry (i, j) gets a sign of its own and goes to bucket (i mod A, j mod W) of D = A·W. For a rank-one
gradient l ⊗ r the sum over i is a matrix product over the batch, u[a, j] = Σ_{i ≡ a mod A} s_ij l_i,
and the sketch is Σ_{j ≡ w mod W} u[a, j]·r_j: about the cost of the layer's forward, and as true as a
CountSketch of the full gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from tracin_ann.factors import Form, Outer
from tracin_ann.scratch import Scratch
from tracin_ann.sketch.sides import Side
from tracin_ann.sketch.twosided import add_turned, contracted

BUCKET_WIDTH = 128


@dataclass(frozen=True)
class RankOne:
    """The map of one parameter [R, C].

    Attributes:
        matrix: (R, C).
        left: R to K1, a fold or untouched.
        right: C to K2, likewise.
        signs_AQK: the entries' signs, [A, ⌈K1/A⌉, K2]; entry (i, j) at [i mod A, i // A, j].
        offset: where in D the first bucket lies.
        scratch: buffers for everything in between.
    """

    matrix: tuple[int, int]
    left: Side
    right: Side
    signs_AQK: Tensor
    offset: int
    scratch: Scratch = field(default_factory=Scratch)

    def add(self, out_BD: Tensor, form: Form) -> None:
        """Add the sketch of the per-example gradients to `out_BD`."""
        if isinstance(form, Outer) and form.left_BTR.shape[1] == 1:
            left_BK = self.left.apply(form.left_BTR[:, 0], self.scratch["left"])
            right_BK = self.right.apply(form.right_BTC[:, 0], self.scratch["right"])
            left_ABQ = self._by_class(left_BK.unsqueeze(2))[..., 0]
            room = self.scratch["contraction"]((*left_ABQ.shape[:2], right_BK.shape[1]), left_BK)
            summed_ABK = torch.bmm(left_ABQ, self.signs_AQK, out=room)
        else:
            grad_BKK = contracted(form, self.matrix, self.left, self.right, self.scratch)
            summed_ABK = torch.einsum("abqk,aqk->abk", self._by_class(grad_BKK), self.signs_AQK)
            right_BK = None
        add_turned(out_BD, self._folded(summed_ABK, right_BK), self.offset)

    def _by_class(self, grad_BKK: Tensor) -> Tensor:
        """Return [B, K1, k] as [A, B, ⌈K1/A⌉, k], rows i by i mod A."""
        classes, rows, _ = self.signs_AQK.shape
        missing = classes * rows - grad_BKK.shape[1]
        padded = F.pad(grad_BKK, (0, 0, 0, missing)) if missing else grad_BKK
        return padded.reshape(len(padded), rows, classes, -1).permute(2, 0, 1, 3)

    def _folded(self, summed_ABK: Tensor, right_BK: Tensor | None) -> Tensor:
        """Return Σ_{j ≡ w mod W} summed[a, b, j]·right[b, j] as [B, A·W]; a factor of 1 where there is none."""
        classes, batch, columns = summed_ABK.shape
        out_ABW = summed_ABK.new_zeros(classes, batch, BUCKET_WIDTH)
        for start in range(0, columns, BUCKET_WIDTH):
            part = summed_ABK[:, :, start : start + BUCKET_WIDTH]
            into = out_ABW[:, :, : part.shape[2]]
            if right_BK is None:
                into.add_(part)
            else:
                into.addcmul_(part, right_BK[:, start : start + BUCKET_WIDTH])
        return out_ABW.transpose(0, 1).flatten(1)
