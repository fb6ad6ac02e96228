"""A convolution's per-example weight gradient as its factors: output gradient, input, geometry.

grad_b[o, c, tap] = Σ_t δ_b[o, t] · x_b[c, t + tap]: one matrix product an example of the output gradient
with the patches under its positions. The patches are copied, row by row of the input, into a buffer
that stays in cache and is used again; a view of shifted windows costs a product for every tap, which
is slower for all shapes measured (docs/design.md).

Shapes: B batch, O output channels, C input channels, T output positions, K kernel taps.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from tracin_ann.gradients.buffers import Room, Scratch, allocate

_PATCH_ELEMENTS = 1 << 19


@dataclass(frozen=True)
class Geometry:
    """How kernel taps lie on the input; one number (padding: before and after) a spatial dimension."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    padding: tuple[tuple[int, int], ...] = ()

    def deepened(self) -> Geometry:
        """Return the same kernel over layers of pictures: one dimension more in front, along which nothing moves."""
        padding = ((0, 0), *self.padding) if self.padding else ()
        return Geometry((1, *self.kernel), (1, *self.stride), (1, *self.dilation), self.groups, padding)


@dataclass(frozen=True)
class Convolution:
    """The weight's gradient of a convolution: δ [B, O, *space out], input [B, C, *space in], padded by zeros."""

    delta_BO: Tensor
    input_BC: Tensor
    geometry: Geometry

    @property
    def shape(self) -> tuple[int, int]:
        """Return (O, C/groups·K), the weight read as a matrix."""
        channels = self.input_BC.shape[1] // self.geometry.groups
        return self.delta_BO.shape[1], channels * prod(self.geometry.kernel)

    def __getitem__(self, rows: slice | Tensor) -> Convolution:
        """Return the form of some of the examples."""
        return Convolution(self.delta_BO[rows], self.input_BC[rows], self.geometry)

    def output_channels(self, start: int, stop: int) -> Convolution:
        """Return the form of some rows of the weight; there must be one group."""
        assert self.geometry.groups == 1
        return Convolution(self.delta_BO[:, start:stop], self.input_BC, self.geometry)

    def contracted(self, scratch: Scratch | None = None, out: Room = allocate) -> Tensor:
        """Return the per-example gradients [B, groups·K·C/groups, O/groups], in `out`.

        Output channels, which are round numbers more often, last: the product is up to four times faster so. The
        order costs nothing in either memory format; `as_weight` brings it into the weight's.
        """
        scratch = scratch or Scratch()
        outputs, columns = self.shape
        groups = self.geometry.groups
        grad_BPO = out((self.delta_BO.shape[0], groups * columns, outputs // groups), self.delta_BO)
        step = max(1, _PATCH_ELEMENTS // self._patch_elements)
        for start in range(0, len(grad_BPO), step):
            self[start : start + step]._contract(scratch, grad_BPO[start : start + step])
        return grad_BPO

    def as_weight(self) -> Tensor:
        """Return the per-example gradients as the weight lies, [B, O, C/groups·K]."""
        taps, groups = prod(self.geometry.kernel), self.geometry.groups
        grad = self.contracted()
        grad = grad.view(len(grad), groups, taps, -1, grad.shape[2])
        return grad.permute(0, 1, 4, 3, 2).reshape(len(grad), *self.shape)

    @property
    def _patch_elements(self) -> int:
        return self.input_BC.shape[1] * prod(self.geometry.kernel) * prod(self.delta_BO.shape[2:])

    def _contract(self, scratch: Scratch, grad_BPO: Tensor) -> None:
        batch, groups = len(grad_BPO), self.geometry.groups
        delta = self.delta_BO.flatten(2).reshape(batch * groups, grad_BPO.shape[2], -1)
        patches = self._patches(scratch).flatten(0, 1)
        torch.bmm(patches.mT, delta.mT, out=grad_BPO.view(batch * groups, -1, grad_BPO.shape[2]))

    def _patches(self, scratch: Scratch) -> Tensor:
        """Return what lies under every output position, [B, groups, T, K·C/groups], by longest runs of the input."""
        geometry, space = self.geometry, self.delta_BO.shape[2:]
        n, groups = len(space), self.geometry.groups
        x = _padded(self.input_BC, geometry.padding, scratch)
        example, channel, *steps = x.stride()
        taps = [step * dilation for step, dilation in zip(steps, geometry.dilation, strict=True)]
        moves = [step * stride for step, stride in zip(steps, geometry.stride, strict=True)]
        channels = x.shape[1] // groups
        windows = x.as_strided(
            (x.shape[0], groups, *geometry.kernel, channels, *space),
            (example, channel * channels, *taps, channel, *moves),
            x.storage_offset(),
        )
        if channels_last(x):
            # [B, groups, *space, *kernel, C]: a row of the kernel over all channels is one run.
            windows = windows.permute(0, 1, *range(3 + n, 3 + 2 * n), *range(2, 3 + n))
            return _together(windows, scratch).flatten(2 + n).flatten(2, 1 + n)
        return _together(windows, scratch).flatten(3 + n).flatten(2, 2 + n).mT


def _together(windows: Tensor, scratch: Scratch) -> Tensor:
    return windows if windows.is_contiguous() else scratch["patches"](windows.shape, windows).copy_(windows)


def channels_last(x: Tensor) -> bool:
    """Return whether the channels [dimension 1] of an example lie together in memory."""
    return x.shape[1] > 1 and x.stride(1) == 1


def _padded(x: Tensor, padding: tuple[tuple[int, int], ...], scratch: Scratch) -> Tensor:
    """Return the input between zeros, in its own memory format."""
    if not any(before or after for before, after in padding):
        return x
    batch, channels, *space = x.shape
    sizes = [n + before + after for n, (before, after) in zip(space, padding, strict=True)]
    if channels_last(x):
        out = scratch["padded"]((batch, *sizes, channels), x).zero_().movedim(-1, 1)
    else:
        out = scratch["padded"]((batch, channels, *sizes), x).zero_()
    inner = out
    for dim, (n, (before, _)) in enumerate(zip(space, padding, strict=True), start=2):
        inner = inner.narrow(dim, before, n)
    inner.copy_(x)
    return out
