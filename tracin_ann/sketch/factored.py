"""The factored sketch, the default: sides folded by signs, contracted, sign-folded to D; no projection matrices.

What is done with a parameter follows from its shape, and from whether its layer is called once an example,
by the cost of a row (`FactoredSketch.method`): docs/design.md has the measurements. It comes close to the
dense sketch on the gradients of real models at a small part of the cost.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

import torch

from tracin_ann.gradients import Scratch
from tracin_ann.sketch.base import ParameterKey, ParameterSketch
from tracin_ann.sketch.sides import Side, Untouched, channels_folded, folded
from tracin_ann.sketch.tensorsketch import tensor_sketch
from tracin_ann.sketch.twosided import SignFold, TwoSided

SIDE_WIDTH = 64
CHANNEL_WIDTHS = 128, 64
# Transforms of D numbers cost about as much as forming and folding this many times D entries.
_ENTRIES_A_TRANSFORM = 8

Method = Literal["fold", "tensor", "sides", "channels"]


@dataclass(frozen=True)
class FactoredSketch:
    """Fold both sides of a matrix, contract over positions, fold to D; or a TensorSketch.

    Attributes:
        dim: D.
        side: width to which sides of a matrix are folded.
        channels: the same of a convolution: output channels, and input channels, whose taps stay apart.
    """

    dim: int
    side: int = SIDE_WIDTH
    channels: tuple[int, int] = CHANNEL_WIDTHS
    name: str = "factored"
    version: int = 2

    def method(self, key: ParameterKey) -> Method:
        """Return what is cheapest for a parameter, and as true as the others.

        - `fold`: the whole gradient is formed and sign-folded to D: vectors, and small matrices of layers
          called once an example;
        - `tensor`: TensorSketch: larger matrices of such layers;
        - `sides`: both sides are folded before the sum over positions, its result to D: other matrices;
        - `channels`: the same for convolutions, whose input side is folded by channels.
        """
        rows, columns = key.matrix
        if len(key.shape) > 2:  # noqa: PLR2004
            return "channels"
        if columns == 1 or (key.rank_one and rows * columns <= _ENTRIES_A_TRANSFORM * self.dim):
            return "fold"
        return "tensor" if key.rank_one else "sides"

    def parameter(
        self, key: ParameterKey, device: torch.device, dtype: torch.dtype, scratch: Scratch | None = None
    ) -> ParameterSketch:
        """Return the map of one parameter."""
        scratch = scratch or Scratch()
        method = self.method(key)
        if method == "tensor":
            return tensor_sketch(key, self.dim, device, dtype, scratch)
        left, right = self._sides(key, device, dtype)
        signs = torch.from_numpy(key.stream("fold").signs(0, left.width * right.width)).to(device, dtype)
        finish = SignFold(signs, key.stream("offset").integer(self.dim))
        taps = prod(key.shape[2:]) if method == "channels" else 0
        return TwoSided(key.matrix, left, right, finish, taps, scratch)

    def _sides(self, key: ParameterKey, device: torch.device, dtype: torch.dtype) -> tuple[Side, Side]:
        (rows, columns), method = key.matrix, self.method(key)
        if method == "fold":
            return Untouched(rows), Untouched(columns)
        if method == "channels":
            left = folded(key.stream("left"), rows, self.channels[0], device, dtype)
            sizes = key.shape[1], prod(key.shape[2:])
            return left, channels_folded(key.stream("right"), sizes, self.channels[1], device, dtype)
        left = folded(key.stream("left"), rows, self.side, device, dtype)
        return left, folded(key.stream("right"), columns, self.side, device, dtype)

    def describe(self, key: ParameterKey) -> str:
        """Return what the map does with a parameter."""
        rows, columns = key.matrix
        method = self.method(key)
        if columns == 1:
            return f"{rows} folded to {self.dim}"
        size = f"{rows}x{columns}"
        if method == "tensor":
            return f"{size}, called once: TensorSketch to {self.dim}"
        left, right = self._sides(key, torch.device("cpu"), torch.float32)
        sides = "" if (left.width, right.width) == (rows, columns) else f" to {left.width}x{right.width}, then"
        once = ", called once" if key.rank_one else ""
        return f"{size}{once}: folded{sides} to {self.dim}"
