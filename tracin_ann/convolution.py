"""A convolution's per-example weight gradient as its factors: output gradient, padded input, geometry.

grad_b[o, c, tap] = Σ_t δ_b[o, t] · x_b[c, t + tap]. With unit strides it is one product a tap of the
output gradient with a shifted *view* of the input: laid out on the padded input's grid, every tap is
a constant offset, so no patch is copied. Other strides, and large kernels over few channels, unfold patches.

Shapes: B batch, O output channels, C input channels, T output positions, K kernel taps.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

_TAPS_A_CHANNEL = 9


@dataclass(frozen=True)
class Geometry:
    """How kernel taps lie on the padded input; one number a spatial dimension, and the groups of channels."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1


@dataclass(frozen=True)
class Convolution:
    """The weight's gradient of a convolution: δ [B, O, *space out], padded input [B, C, *space in]."""

    delta_BO: Tensor
    input_BC: Tensor
    geometry: Geometry

    @property
    def shape(self) -> tuple[int, int]:
        """Return (O, C/groups·K), the weight read as a matrix."""
        channels = self.input_BC.shape[1] // self.geometry.groups
        return self.delta_BO.shape[1], channels * prod(self.geometry.kernel)

    def __getitem__(self, rows: slice) -> Convolution:
        """Return the form of some of the examples."""
        return Convolution(self.delta_BO[rows], self.input_BC[rows], self.geometry)

    def output_channels(self, start: int, stop: int) -> Convolution:
        """Return the form of some rows of the weight; there must be one group."""
        assert self.geometry.groups == 1
        return Convolution(self.delta_BO[:, start:stop], self.input_BC, self.geometry)

    def contracted(self) -> Tensor:
        """Return the per-example gradients as the weight lies, [B, O, C/groups·K]."""
        return self.by_tap().permute(0, 2, 3, 1).reshape(self.delta_BO.shape[0], *self.shape)

    def by_tap(self) -> Tensor:
        """Return the per-example gradients tap by tap, [B, K, O, C/groups], cheaper where the order is free."""
        groups = self.geometry.groups
        batch = self.delta_BO.shape[0]
        delta, x = (
            t.reshape(batch * groups, t.shape[1] // groups, *t.shape[2:]) for t in (self.delta_BO, self.input_BC)
        )
        unit = all(stride == 1 for stride in self.geometry.stride)
        many = prod(self.geometry.kernel) > _TAPS_A_CHANNEL * x.shape[1]
        contract = _by_taps if unit and not many else _by_patches
        grad = contract(delta, x, self.geometry)
        if groups == 1:
            return grad
        return grad.view(batch, groups, *grad.shape[1:]).transpose(1, 2).flatten(2, 3)


def _by_taps(delta: Tensor, x: Tensor, geometry: Geometry) -> Tensor:
    batch, outputs, *space = delta.shape
    channels, *padded = x.shape[1:]
    # δ on the input's grid: every dimension but the first is widened to the input's.
    widened = [(0, wide - narrow) for wide, narrow in zip(padded[1:], space[1:], strict=True)]
    grid = F.pad(delta, list(itertools.chain.from_iterable(reversed(widened)))).flatten(2)
    # One more slab of zeros, so that the last tap's view does not run over the end.
    flat = F.pad(x, [0, 0] * (len(padded) - 1) + [0, 1]).flatten(2) if len(padded) > 1 else x
    steps = [prod(padded[i + 1 :]) * geometry.dilation[i] for i in range(len(padded))]
    taps = list(itertools.product(*(range(k) for k in geometry.kernel)))
    out = x.new_empty(len(taps), batch, outputs, channels)
    for place, tap in enumerate(taps):
        offset = sum(i * step for i, step in zip(tap, steps, strict=True))
        torch.bmm(grid, flat[:, :, offset : offset + grid.shape[2]].mT, out=out[place])
    return out.transpose(0, 1)


def _by_patches(delta: Tensor, x: Tensor, geometry: Geometry) -> Tensor:
    grad = torch.bmm(delta.flatten(2), _patches(x, geometry).mT)
    return grad.view(*grad.shape[:2], x.shape[1], prod(geometry.kernel)).permute(0, 3, 1, 2)


def _patches(x: Tensor, geometry: Geometry) -> Tensor:
    """Return the receptive fields of all output positions, [B, C·K, T]."""
    n = len(geometry.kernel)
    if n == 1:
        flat = Geometry((1, *geometry.kernel), (1, *geometry.stride), (1, *geometry.dilation))
        return _patches(x.unsqueeze(2), flat)
    if n == 2:  # noqa: PLR2004
        return F.unfold(x, geometry.kernel, dilation=geometry.dilation, stride=geometry.stride)
    for i in range(n):
        span = geometry.dilation[i] * (geometry.kernel[i] - 1) + 1
        x = x.unfold(2 + i, span, geometry.stride[i])[..., :: geometry.dilation[i]]
    x = x.permute(0, 1, *range(2 + n, 2 + 2 * n), *range(2, 2 + n))
    return x.flatten(2 + n).flatten(1, 1 + n)
