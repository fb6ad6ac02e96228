"""Random maps of one side (rows or columns) of a gradient matrix: sign folds, Gaussian projections, the identity.

Shapes: n length of the side, C channels, K kernel taps, k output width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tracin_ann.device import array_to_device
from tracin_ann.gradients import Allocator, allocate
from tracin_ann.sketch.generator import Stream


def fold(x: Tensor, signs_n: Tensor, width: int, dim: int = -1, allocate_out: Allocator = allocate) -> Tensor:
    """Return Σ_{i ≡ k mod width} signs_i · x_i along one dimension, whose length becomes min(n, width).

    This is a CountSketch with the hash i mod width, so that the sums run over contiguous groups. Groups are
    added one by one, because a temporary as large as `x` costs more than the arithmetic.
    """
    n = x.shape[dim]
    signs = signs_n.view(-1, *[1] * (x.dim() - 1 - dim % x.dim()))
    first = x.narrow(dim, 0, min(n, width))
    out = torch.mul(first, signs[:width], out=allocate_out(first.shape, x))
    for start in range(width, n, width):
        length = min(width, n - start)
        out.narrow(dim, 0, length).addcmul_(x.narrow(dim, start, length), signs[start : start + length])
    return out


class Side(Protocol):
    """A random linear map of vectors of length n to vectors of length `width`, with E[SᵀS] = I."""

    @property
    def width(self) -> int:
        """Return the length of the mapped vectors."""

    def apply(self, x: Tensor, allocate_out: Allocator = allocate) -> Tensor:
        """Map the last axis: [..., n] -> [..., width]; `allocate_out` allocates the result."""

    def columns(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the mapped unit vectors: index [...] -> [..., width]."""


def _one_hot(index: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Return one-hot vectors; unlike `torch.nn.functional.one_hot`, this does not read the largest index."""
    return (index.unsqueeze(-1) == torch.arange(width, device=index.device)).to(dtype)


@dataclass(frozen=True)
class Identity:
    """The identity, for a side that is narrow enough already."""

    width: int

    def apply(self, x: Tensor, allocate_out: Allocator = allocate) -> Tensor:
        """Return `x`."""
        return x

    def columns(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Return one-hot vectors."""
        return _one_hot(index, self.width, dtype)


@dataclass(frozen=True)
class Fold:
    """Multiplication by random signs and sums over `width` groups (i mod width)."""

    width: int
    signs_n: Tensor

    def apply(self, x: Tensor, allocate_out: Allocator = allocate) -> Tensor:
        """Return the folded vectors."""
        return fold(x, self.signs_n, self.width, allocate_out=allocate_out)

    def columns(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Return signed one-hot vectors."""
        return _one_hot(index % self.width, self.width, dtype) * self.signs_n[index].unsqueeze(-1)


@dataclass(frozen=True)
class ChannelFold:
    """A sign fold of the channels of a convolution's input side (channels × kernel taps), for each tap separately."""

    channels: int
    taps: int
    signs_C: Tensor

    @property
    def width(self) -> int:
        """Return the length of the mapped vectors."""
        return self.channels * self.taps

    def apply(self, x: Tensor, allocate_out: Allocator = allocate) -> Tensor:
        """Return the folded vectors: [..., C·K] -> [..., width]."""
        by_channel = x.reshape(*x.shape[:-1], -1, self.taps)
        return fold(by_channel, self.signs_C, self.channels, dim=-2, allocate_out=allocate_out).flatten(-2)

    def columns(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Return signed one-hot vectors."""
        channel, tap = index // self.taps, index % self.taps
        hot = _one_hot(channel % self.channels * self.taps + tap, self.width, dtype)
        return hot * self.signs_C[channel].unsqueeze(-1)


@dataclass(frozen=True)
class Projection:
    """Multiplication by a Gaussian matrix [n, width] with entries of variance 1/width."""

    width: int
    matrix_nk: Tensor

    def apply(self, x: Tensor, allocate_out: Allocator = allocate) -> Tensor:
        """Return the projected vectors."""
        return torch.matmul(x, self.matrix_nk, out=allocate_out((*x.shape[:-1], self.width), x))

    def columns(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Return rows of the matrix."""
        return self.matrix_nk[index]


def make_fold(stream: Stream, n: int, width: int, device: torch.device, dtype: torch.dtype) -> Side:
    """Return a fold of n to `width`, or the identity where n ≤ width."""
    if n <= width:
        return Identity(n)
    return Fold(width, array_to_device(stream.signs(0, n), device).to(dtype))


def make_projection(stream: Stream, n: int, width: int, device: torch.device, dtype: torch.dtype) -> Projection:
    """Return a Gaussian projection of n to `width`."""
    flat = array_to_device(stream.gaussians(0, n * width), device).to(dtype)
    return Projection(width, flat.view(n, width) / width**0.5)


def make_channel_fold(
    stream: Stream, shape: tuple[int, int], width: int, device: torch.device, dtype: torch.dtype
) -> Side:
    """Return a fold of (channels, taps) to `width` channels, or the identity where channels ≤ width."""
    channels, taps = shape
    if channels <= width:
        return Identity(channels * taps)
    return ChannelFold(width, taps, array_to_device(stream.signs(0, channels), device).to(dtype))
