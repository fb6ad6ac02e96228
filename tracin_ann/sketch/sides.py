"""Random maps of one side of a gradient matrix: folded by signs, multiplied by Gaussians, or left alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from tracin_ann.gradients import Room, allocate
from tracin_ann.sketch.generator import Stream


def fold(x: Tensor, signs_n: Tensor, width: int, dim: int = -1, room: Room = allocate) -> Tensor:
    """Return Σ_{i ≡ k mod width} signs_i · x_i along one dimension, which becomes min(n, width) long.

    A CountSketch whose hash is i mod width, so that the sums run over contiguous groups; added group
    by group, because a temporary as large as `x` costs more than the arithmetic.
    """
    n = x.shape[dim]
    signs = signs_n.view(-1, *[1] * (x.dim() - 1 - dim % x.dim()))
    first = x.narrow(dim, 0, min(n, width))
    out = torch.mul(first, signs[:width], out=room(first.shape, x))
    for start in range(width, n, width):
        length = min(width, n - start)
        out.narrow(dim, 0, length).addcmul_(x.narrow(dim, start, length), signs[start : start + length])
    return out


class Side(Protocol):
    """A linear map of vectors of length n to vectors of length `width`, with E[SᵀS] = I."""

    @property
    def width(self) -> int:
        """Return the length of the images."""

    def apply(self, x: Tensor, room: Room = allocate) -> Tensor:
        """Map the last axis: [..., n] -> [..., width], in `room` where memory is needed."""

    def columns(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the images of unit vectors: index [...] -> [..., width]."""


@dataclass(frozen=True)
class Untouched:
    """A side already narrow enough."""

    width: int

    def apply(self, x: Tensor, room: Room = allocate) -> Tensor:
        """Return `x`."""
        return x

    def columns(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Return one-hot vectors."""
        return F.one_hot(index, self.width).to(dtype)


@dataclass(frozen=True)
class Folded:
    """A side multiplied by random signs and summed in `width` groups (i mod width)."""

    width: int
    signs_n: Tensor

    def apply(self, x: Tensor, room: Room = allocate) -> Tensor:
        """Return the folded vectors."""
        return fold(x, self.signs_n, self.width, room=room)

    def columns(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Return signed one-hot vectors."""
        return F.one_hot(index % self.width, self.width).to(dtype) * self.signs_n[index].unsqueeze(-1)


@dataclass(frozen=True)
class ChannelsFolded:
    """A convolution's input side, channels × kernel taps: channels folded by signs, every tap kept apart."""

    channels: int
    taps: int
    signs_C: Tensor

    @property
    def width(self) -> int:
        """Return the length of the images."""
        return self.channels * self.taps

    def apply(self, x: Tensor, room: Room = allocate) -> Tensor:
        """Return the folded vectors, [..., C·K] -> [..., width]."""
        by_channel = x.reshape(*x.shape[:-1], -1, self.taps)
        return fold(by_channel, self.signs_C, self.channels, dim=-2, room=room).flatten(-2)

    def columns(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Return signed one-hot vectors."""
        channel, tap = index // self.taps, index % self.taps
        hot = F.one_hot(channel % self.channels * self.taps + tap, self.width).to(dtype)
        return hot * self.signs_C[channel].unsqueeze(-1)


@dataclass(frozen=True)
class Projected:
    """A side multiplied by a Gaussian matrix [n, width] of variance 1/width."""

    width: int
    matrix_nk: Tensor

    def apply(self, x: Tensor, room: Room = allocate) -> Tensor:
        """Return the projected vectors."""
        return torch.matmul(x, self.matrix_nk, out=room((*x.shape[:-1], self.width), x))

    def columns(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Return rows of the matrix."""
        return self.matrix_nk[index]


def folded(stream: Stream, n: int, width: int, device: torch.device, dtype: torch.dtype) -> Side:
    """Return a fold of n to `width`; a side no wider than that is left as it is."""
    if n <= width:
        return Untouched(n)
    return Folded(width, torch.from_numpy(stream.signs(0, n)).to(device, dtype))


def projected(stream: Stream, n: int, width: int, device: torch.device, dtype: torch.dtype) -> Projected:
    """Return a Gaussian projection of n to `width`."""
    flat = torch.from_numpy(stream.gaussians(0, n * width)).to(device, dtype)
    return Projected(width, flat.view(n, width) / width**0.5)


def channels_folded(
    stream: Stream, shape: tuple[int, int], width: int, device: torch.device, dtype: torch.dtype
) -> Side:
    """Return a fold of (channels, taps) to `width` channels; none where there are no more."""
    channels, taps = shape
    if channels <= width:
        return Untouched(channels * taps)
    return ChannelsFolded(width, taps, torch.from_numpy(stream.signs(0, channels)).to(device, dtype))
