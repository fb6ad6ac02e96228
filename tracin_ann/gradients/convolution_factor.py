"""The factor form of a convolution's per-example weight gradient: output gradient, input and geometry.

grad_b[o, c, tap] = Σ_t δ_b[o, t] · x_b[c, t + tap]. For each example this is one matrix product of the output gradient
and the patches under its positions. The patches are copied, row by row of the input, into a reused buffer that fits
the cache. A view of shifted windows needs one product per tap and was slower for all measured shapes (docs/design.md).

Shapes: B batch, O output channels, C input channels, T output positions, K kernel taps.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from tracin_ann.gradients.buffers import Allocator, Scratch, allocate

_PATCH_ELEMENTS = 1 << 19


@dataclass(frozen=True)
class Geometry:
    """The geometry of a convolution: one number per spatial dimension, for padding two (before and after)."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    padding: tuple[tuple[int, int], ...] = ()

    def with_image_dimension(self) -> Geometry:
        """Return the same kernel with one more spatial dimension in front, of kernel size 1, over several images."""
        padding = ((0, 0), *self.padding) if self.padding else ()
        return Geometry((1, *self.kernel), (1, *self.stride), (1, *self.dilation), self.groups, padding)


@dataclass(frozen=True)
class Convolution:
    """The weight gradients of a convolution: δ [B, O, *space out], input [B, C, *space in], zero padding."""

    delta_BO: Tensor
    input_BC: Tensor
    geometry: Geometry

    @property
    def shape(self) -> tuple[int, int]:
        """Return (O, C/groups·K), the shape of the weight as a matrix."""
        channels = self.input_BC.shape[1] // self.geometry.groups
        return self.delta_BO.shape[1], channels * prod(self.geometry.kernel)

    def __getitem__(self, rows: slice | Tensor) -> Convolution:
        """Return the form of some of the examples."""
        return Convolution(self.delta_BO[rows], self.input_BC[rows], self.geometry)

    def output_channels(self, start: int, stop: int) -> Convolution:
        """Return the form of some rows of the weight, for a convolution with one group."""
        assert self.geometry.groups == 1
        return Convolution(self.delta_BO[:, start:stop], self.input_BC, self.geometry)

    def contract(self, scratch: Scratch | None = None, out: Allocator = allocate) -> Tensor:
        """Return the per-example gradients [B, groups·K·C/groups, O/groups], in memory from `out`.

        Output channels are the last dimension: they are more often a multiple of 16, which makes the product up to
        four times faster. This order costs nothing in either memory format; `as_weight` converts it to the order of
        the weight.
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
        """Return the per-example gradients in the order of the weight, [B, O, C/groups·K]."""
        taps, groups = prod(self.geometry.kernel), self.geometry.groups
        grad = self.contract()
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
        """Return the patch under every output position, [B, groups, T, K·C/groups], copied in runs of the input."""
        geometry, space = self.geometry, self.delta_BO.shape[2:]
        n, groups = len(space), self.geometry.groups
        x = _pad(self.input_BC, geometry.padding, scratch)
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
            return _make_contiguous(windows, scratch).flatten(2 + n).flatten(2, 1 + n)
        return _make_contiguous(windows, scratch).flatten(3 + n).flatten(2, 2 + n).mT


def _make_contiguous(windows: Tensor, scratch: Scratch) -> Tensor:
    return windows if windows.is_contiguous() else scratch["patches"](windows.shape, windows).copy_(windows)


def channels_last(x: Tensor) -> bool:
    """Return whether the channels (dimension 1) of a position are adjacent in memory."""
    return x.shape[1] > 1 and x.stride(1) == 1


def _pad(x: Tensor, padding: tuple[tuple[int, int], ...], scratch: Scratch) -> Tensor:
    """Return the input padded with zeros, in its own memory format."""
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
