"""The factored sketch, the default: sides wider than 128 folded by signs, contracted, sign-folded to D.

No matrix product but the contraction itself. It comes close to the dense sketch on the gradients of
real models at a small part of the cost; the measurements are in docs/design.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tracin_ann.sketch.base import ParameterKey
from tracin_ann.sketch.sides import folded
from tracin_ann.sketch.twosided import SignFold, TwoSided

SIDE_WIDTH = 128


@dataclass(frozen=True)
class FactoredSketch:
    """Fold both sides of a matrix to at most `side`, contract over positions, fold to D."""

    dim: int
    side: int = SIDE_WIDTH
    name: str = "factored"
    version: int = 1

    def parameter(self, key: ParameterKey, device: torch.device, dtype: torch.dtype) -> TwoSided:
        """Return the map of one parameter; a vector goes straight to the last fold."""
        rows, columns = key.matrix
        left_width = rows if columns == 1 else self.side
        left = folded(key.stream("left"), rows, left_width, device, dtype)
        right = folded(key.stream("right"), columns, self.side, device, dtype)
        signs = torch.from_numpy(key.stream("fold").signs(0, left.width * right.width)).to(device, dtype)
        return TwoSided(key.matrix, left, right, SignFold(signs, key.stream("offset").integer(self.dim)))

    def describe(self, shape: tuple[int, ...]) -> str:
        """Return what the map does with a parameter of this shape."""
        rows, columns = ParameterKey(0, 0, "", shape).matrix
        if columns == 1:
            return f"{rows} folded to {self.dim}"
        kept = f"{min(rows, self.side)}x{min(columns, self.side)}"
        return f"{rows}x{columns} folded to {kept}, then to {self.dim}"
