"""Sketches for comparison with those of the library: hashes, Gaussian and masked factors, stored signs.

Each sketch is linear and unbiased, draws its random numbers from the library's generator, and has the interface of the
library's sketches for materialised gradients: `parameter(key, device, dtype).add(out_BD, Dense(grad_BP))`. The
hashes of the complete gradient are CountSketch (Charikar et al. 2002) and TensorSketch (Pham and Pagh 2013). Masked
factors followed by a hash are those of FactGraSS (Hu et al. 2025).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tracin_ann.gradients.factors import Dense
from tracin_ann.sketch import ParameterKey, ParameterSketch
from tracin_ann.sketch.factored import FactoredSketch
from tracin_ann.sketch.sides import Identity, Side, make_projection
from tracin_ann.sketch.twosided import Finish, SignFold, TwoSided

_BLOCK = 1 << 22


def draw_hash(key: ParameterKey, role: str, count: int, buckets: int) -> tuple[Tensor, Tensor]:
    """Return a random bucket (int64) and a random sign (float32) for each of `count` coordinates."""
    bucket = key.stream(f"{role} bucket").words(0, count) % np.uint64(buckets)
    sign = key.stream(f"{role} sign").signs(0, count)
    return torch.from_numpy(bucket.astype(np.int64)), torch.from_numpy(sign).float()


@dataclass(frozen=True)
class Hash:
    """The map of coordinate p to bucket h(p) with sign s(p), for a parameter or for the result of a two-sided map."""

    bucket_P: Tensor
    sign_P: Tensor

    def add(self, out_BD: Tensor, grad: Dense | Tensor) -> None:
        flat_BP = grad.grad_BP if isinstance(grad, Dense) else grad
        for out_D, row_P in zip(out_BD, flat_BP, strict=True):
            out_D.index_add_(0, self.bucket_P, row_P * self.sign_P)


@dataclass(frozen=True)
class CountSketch:
    """A hash of each coordinate of the gradient."""

    dim: int

    def parameter(self, key: ParameterKey, device: torch.device, dtype: torch.dtype) -> Hash:
        rows, columns = key.matrix
        return Hash(*draw_hash(key, "entry", rows * columns, self.dim))


@dataclass(frozen=True)
class TensorSketch:
    """The map of entry (i, j) to bucket h₁(i) + h₂(j) mod D with sign s₁(i)·s₂(j); CountSketch for vectors."""

    dim: int

    def parameter(self, key: ParameterKey, device: torch.device, dtype: torch.dtype) -> Hash:
        rows, columns = key.matrix
        bucket_R, sign_R = draw_hash(key, "row", rows, self.dim)
        if columns == 1:
            return Hash(bucket_R, sign_R)
        bucket_C, sign_C = draw_hash(key, "column", columns, self.dim)
        return Hash(
            ((bucket_R[:, None] + bucket_C) % self.dim).flatten(),
            (sign_R[:, None] * sign_C).flatten(),
        )


@dataclass(frozen=True)
class FoldedSides:
    """The library's fold of both factors to K, then of the result to D, also for layers that are called once."""

    dim: int
    side: int

    def parameter(self, key: ParameterKey, device: torch.device, dtype: torch.dtype) -> ParameterSketch:
        # The input factor of a convolution has channels x taps entries; it is folded if that at least halves it.
        width = max(1, self.side // prod(key.shape[2:]))
        if len(key.shape) > 1 and key.shape[1] < 2 * width:
            width = key.shape[1]
        folds = FactoredSketch(self.dim, side=self.side, channels=(self.side, width))
        return folds.parameter(replace(key, rank_one=False), device, dtype)


def _draw_sign_fold(key: ParameterKey, entries: int, dim: int) -> SignFold:
    signs = torch.from_numpy(key.stream("fold").signs(0, entries)).float()
    return SignFold(signs, key.stream("offset").integer(dim))


@dataclass(frozen=True)
class GaussianSides:
    """A Gaussian matrix for each factor wider than K, then a sign fold to D; only the sign fold for vectors."""

    dim: int
    side: int

    def parameter(self, key: ParameterKey, device: torch.device, dtype: torch.dtype) -> TwoSided:
        rows, columns = key.matrix
        left: Side = Identity(rows)
        right: Side = Identity(columns)
        if columns > 1 and rows > self.side:
            left = make_projection(key.stream("left"), rows, self.side, device, dtype)
        if columns > self.side:
            right = make_projection(key.stream("right"), columns, self.side, device, dtype)
        return TwoSided(key.matrix, left, right, _draw_sign_fold(key, left.width * right.width, self.dim))


@dataclass(frozen=True)
class Masked:
    """A selection of n coordinates, scaled by √(n/width)."""

    width: int
    index_k: Tensor
    n: int

    def apply(self, x: Tensor, allocate_out: Any = None) -> Tensor:
        return x[..., self.index_k] * (self.n / self.width) ** 0.5

    def columns(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        return (index.unsqueeze(-1) == self.index_k).to(dtype) * (self.n / self.width) ** 0.5


@dataclass(frozen=True)
class MaskedSides:
    """K random coordinates of each factor wider than K, scaled to be unbiased, then a hash to D; a hash for vectors."""

    dim: int
    side: int

    def parameter(self, key: ParameterKey, device: torch.device, dtype: torch.dtype) -> TwoSided:
        rows, columns = key.matrix
        left = Identity(rows) if columns == 1 else self._select_side(key, "left", rows)
        right = self._select_side(key, "right", columns)
        finish: Finish = Hash(*draw_hash(key, "entry", left.width * right.width, self.dim))
        return TwoSided(key.matrix, left, right, finish)

    def _select_side(self, key: ParameterKey, role: str, n: int) -> Side:
        if n <= self.side:
            return Identity(n)
        order = np.argsort(key.stream(role).words(0, n), kind="stable")
        return Masked(self.side, torch.from_numpy(np.sort(order[: self.side])), n)


@dataclass(frozen=True)
class StoredSigns:
    """The library's `dense` sketch with its P·D signs computed once per checkpoint and stored as bytes."""

    dim: int

    def parameter(self, key: ParameterKey, device: torch.device, dtype: torch.dtype) -> StoredSignsParameter:
        rows, columns = key.matrix
        signs_PD = torch.empty(rows * columns, self.dim, dtype=torch.int8)
        step = max(1, _BLOCK // self.dim)
        for start in range(0, len(signs_PD), step):
            part = signs_PD[start : start + step]
            part.copy_(torch.from_numpy(key.stream("dense").signs(start * self.dim, part.numel())).view_as(part))
        return StoredSignsParameter(signs_PD)


@dataclass(frozen=True)
class StoredSignsParameter:
    """The signs [P, D] of one parameter."""

    signs_PD: Tensor

    def add(self, out_BD: Tensor, form: Dense) -> None:
        n, dim = self.signs_PD.shape
        step = max(1, _BLOCK // dim)
        block = torch.empty(min(step, n), dim)
        for start in range(0, n, step):
            stop = min(start + step, n)
            entries = block[: stop - start].copy_(self.signs_PD[start:stop])
            out_BD.addmm_(form.grad_BP[:, start:stop], entries, alpha=dim**-0.5)
