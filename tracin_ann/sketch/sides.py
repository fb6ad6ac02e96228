"""Random maps of one side of a gradient matrix: folded by signs, multiplied by Gaussians, or left alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from tracin_ann.sketch.generator import Stream


def fold(x: Tensor, signs_n: Tensor, width: int) -> Tensor:
    """Return Σ_{i ≡ k mod width} signs_i · x[..., i] as [..., min(n, width)].

    A CountSketch whose hash is i mod width, so that the sums run over contiguous groups.
    """
    signed = x * signs_n
    n = x.shape[-1]
    if n <= width:
        return signed
    groups = -(-n // width)
    if groups * width != n:
        signed = F.pad(signed, (0, groups * width - n))
    return signed.view(*signed.shape[:-1], groups, width).sum(-2)


class Side(Protocol):
    """A linear map of vectors of length n to vectors of length `width`, with E[SᵀS] = I."""

    @property
    def width(self) -> int:
        """Return the length of the images."""

    def apply(self, x: Tensor) -> Tensor:
        """Map the last axis: [..., n] -> [..., width]."""

    def columns(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the images of unit vectors: index [...] -> [..., width]."""


@dataclass(frozen=True)
class Untouched:
    """A side already narrow enough."""

    width: int

    def apply(self, x: Tensor) -> Tensor:
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

    def apply(self, x: Tensor) -> Tensor:
        """Return the folded vectors."""
        return fold(x, self.signs_n, self.width)

    def columns(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Return signed one-hot vectors."""
        return F.one_hot(index % self.width, self.width).to(dtype) * self.signs_n[index].unsqueeze(-1)


@dataclass(frozen=True)
class Projected:
    """A side multiplied by a Gaussian matrix [n, width] of variance 1/width."""

    width: int
    matrix_nk: Tensor

    def apply(self, x: Tensor) -> Tensor:
        """Return the projected vectors."""
        return x @ self.matrix_nk

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
