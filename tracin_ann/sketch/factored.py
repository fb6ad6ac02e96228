"""The factored sketch, the default: sign folds of both sides of a gradient matrix, and of their contraction to D.

It uses no projection matrices. The method for a parameter depends on its shape and on whether its layer is
called once per example (`FactoredSketch.method`); each is the fastest for its case (docs/design.md has the
measurements). On gradients of real models its accuracy is close to that of the dense sketch, at a small part
of the cost.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

import torch

from tracin_ann.device import array_to_device
from tracin_ann.gradients import Scratch
from tracin_ann.sketch.base import ParameterKey, ParameterSketch
from tracin_ann.sketch.sides import Identity, Side, make_channel_fold, make_fold
from tracin_ann.sketch.tensorsketch import make_tensor_sketch
from tracin_ann.sketch.twosided import SignFold, TwoSided

SIDE_WIDTH = 64
CHANNEL_WIDTHS = 128, 64
# A Fourier transform of D numbers costs about as much as computing and folding this many times D entries.
_ENTRIES_PER_TRANSFORM = 8

Method = Literal["fold", "tensor", "sides", "channels"]


@dataclass(frozen=True)
class FactoredSketch:
    """Folds of both sides of a matrix, a contraction over positions and a fold to D; or a TensorSketch.

    Attributes:
        dim: D.
        side: width to which each side of a matrix is folded.
        channels: widths for a convolution: output channels, and input channels (kernel taps are not folded).
    """

    dim: int
    side: int = SIDE_WIDTH
    channels: tuple[int, int] = CHANNEL_WIDTHS
    name: str = "factored"
    version: int = 2

    def method(self, key: ParameterKey) -> Method:
        """Return the fastest method for a parameter; all methods are about equally accurate.

        - `fold`: compute the gradient and sign-fold it to D. For vectors, and for small matrices of layers that
          are called once per example.
        - `tensor`: TensorSketch. For larger matrices of such layers.
        - `sides`: fold both sides before the sum over positions, then fold the result to D. For other matrices.
        - `channels`: the same for convolutions, where the input side is folded by channels.
        """
        rows, columns = key.matrix
        if len(key.shape) > 2:  # noqa: PLR2004
            return "channels"
        if columns == 1 or (key.rank_one and rows * columns <= _ENTRIES_PER_TRANSFORM * self.dim):
            return "fold"
        return "tensor" if key.rank_one else "sides"

    def parameter(
        self, key: ParameterKey, device: torch.device, dtype: torch.dtype, scratch: Scratch | None = None
    ) -> ParameterSketch:
        """Return the map of one parameter."""
        scratch = scratch or Scratch()
        method = self.method(key)
        if method == "tensor":
            return make_tensor_sketch(key, self.dim, device, dtype, scratch)
        left, right = self._sides(key, device, dtype)
        signs = array_to_device(key.stream("fold").signs(0, left.width * right.width), device).to(dtype)
        finish = SignFold(signs, key.stream("offset").integer(self.dim))
        taps = prod(key.shape[2:]) if method == "channels" else 0
        return TwoSided(key.matrix, left, right, finish, taps, scratch)

    def _sides(self, key: ParameterKey, device: torch.device, dtype: torch.dtype) -> tuple[Side, Side]:
        (rows, columns), method = key.matrix, self.method(key)
        if method == "fold":
            return Identity(rows), Identity(columns)
        if method == "channels":
            left = make_fold(key.stream("left"), rows, self.channels[0], device, dtype)
            sizes = key.shape[1], prod(key.shape[2:])
            return left, make_channel_fold(key.stream("right"), sizes, self.channels[1], device, dtype)
        left = make_fold(key.stream("left"), rows, self.side, device, dtype)
        return left, make_fold(key.stream("right"), columns, self.side, device, dtype)

    def describe(self, key: ParameterKey) -> str:
        """Return a short description of the map of a parameter."""
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
