"""The factored sketch, the default: sides folded by signs, contracted, sign-folded to D; no projection matrices.

What is folded follows from shapes alone. A matrix whose layer is called once an example is kept whole
up to 2¹⁸ entries and sign-folded (rankone.py). Others fold each side wider than 128, a convolution's
input side by channels so that it folds before its patches are taken (twosided.py). It comes close to
the dense sketch on the gradients of real models at a small part of the cost: docs/design.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

from tracin_ann.scratch import Scratch
from tracin_ann.sketch.base import ParameterKey, ParameterSketch
from tracin_ann.sketch.rankone import BUCKET_WIDTH, RankOne
from tracin_ann.sketch.sides import Side, channels_folded, folded
from tracin_ann.sketch.twosided import SignFold, TwoSided

SIDE_WIDTH = 128
WHOLE_ENTRIES = 1 << 18


@dataclass(frozen=True)
class FactoredSketch:
    """Fold both sides of a matrix, contract over positions, fold to D."""

    dim: int
    side: int = SIDE_WIDTH
    name: str = "factored"
    version: int = 2

    def parameter(
        self, key: ParameterKey, device: torch.device, dtype: torch.dtype, scratch: Scratch | None = None
    ) -> ParameterSketch:
        """Return the map of one parameter; a vector goes straight to the last fold."""
        scratch = scratch or Scratch()
        left, right = self._sides(key, device, dtype)
        offset = key.stream("offset").integer(self.dim)
        if not self._whole(key):
            signs = torch.from_numpy(key.stream("fold").signs(0, left.width * right.width)).to(device, dtype)
            taps = prod(key.shape[2:]) if len(key.shape) > 2 else 0  # noqa: PLR2004
            return TwoSided(key.matrix, left, right, SignFold(signs, offset), taps, scratch)
        classes = self.dim // BUCKET_WIDTH
        shape = (classes, -(-left.width // classes), right.width)
        signs = torch.from_numpy(key.stream("fold").signs(0, prod(shape))).to(device, dtype).view(shape)
        return RankOne(key.matrix, left, right, signs, offset, scratch)

    def _whole(self, key: ParameterKey) -> bool:
        return key.rank_one and key.matrix[1] > 1 and self.dim % BUCKET_WIDTH == 0

    def _sides(self, key: ParameterKey, device: torch.device, dtype: torch.dtype) -> tuple[Side, Side]:
        rows, columns = key.matrix
        widths = rows if columns == 1 else self.side, self.side
        if self._whole(key):
            # The longer side is folded first: to what the entries allow, but no narrower than the others' width.
            short = max(self.side, int(WHOLE_ENTRIES**0.5))
            left = min(rows, max(short, WHOLE_ENTRIES // columns))
            widths = left, max(self.side, WHOLE_ENTRIES // left)
        left_side = folded(key.stream("left"), rows, widths[0], device, dtype)
        if len(key.shape) > 2:  # noqa: PLR2004
            taps = key.shape[1], prod(key.shape[2:])
            return left_side, channels_folded(key.stream("right"), taps, widths[1], device, dtype)
        return left_side, folded(key.stream("right"), columns, widths[1], device, dtype)

    def describe(self, key: ParameterKey) -> str:
        """Return what the map does with a parameter."""
        rows, columns = key.matrix
        if columns == 1:
            return f"{rows} folded to {self.dim}"
        left, right = self._sides(key, torch.device("cpu"), torch.float32)
        sides = "" if (left.width, right.width) == (rows, columns) else f" to {left.width}x{right.width}, then"
        once = ", called once" if self._whole(key) else ""
        return f"{rows}x{columns}{once}: folded{sides} to {self.dim}"
