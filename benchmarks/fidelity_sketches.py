"""Sketches to compare with the library's: hashes of the whole gradient, Gaussian and masked sides, kept signs.

Each is linear and unbiased, drawn from the library's streams, and maps materialised gradients as the library's own do:
`parameter(key, device, dtype).add(out_BD, Dense(grad_BP))`. Whole-gradient hashes are a CountSketch (Charikar et al.
2002) and a TensorSketch (Pham and Pagh 2013); masked sides and the hash behind them are FactGraSS's (Hu et al. 2025).
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
from tracin_ann.sketch.sides import Side, Untouched, projected
from tracin_ann.sketch.twosided import Finish, SignFold, TwoSided

_BLOCK = 1 << 22


def hashed(key: ParameterKey, role: str, count: int, buckets: int) -> tuple[Tensor, Tensor]:
    """Return a random bucket (int64) and a random sign (float32) for each of `count` coordinates."""
    bucket = key.stream(f"{role} bucket").words(0, count) % np.uint64(buckets)
    sign = key.stream(f"{role} sign").signs(0, count)
    return torch.from_numpy(bucket.astype(np.int64)), torch.from_numpy(sign).float()


@dataclass(frozen=True)
class Hash:
    """Coordinate p goes to bucket h(p) with sign s(p): the map of a parameter, and the finish of a two-sided map."""

    bucket_P: Tensor
    sign_P: Tensor

    def add(self, out_BD: Tensor, grad: Dense | Tensor) -> None:
        flat_BP = grad.grad_BP if isinstance(grad, Dense) else grad
        for out_D, row_P in zip(out_BD, flat_BP, strict=True):
            out_D.index_add_(0, self.bucket_P, row_P * self.sign_P)


@dataclass(frozen=True)
class CountSketch:
    """Every coordinate of the gradient hashed on its own."""

    dim: int

    def parameter(self, key: ParameterKey, device: torch.device, dtype: torch.dtype) -> Hash:
        rows, columns = key.matrix
        return Hash(*hashed(key, "entry", rows * columns, self.dim))


@dataclass(frozen=True)
class TensorSketch:
    """Entry (i, j) to bucket h₁(i) + h₂(j) mod D with sign s₁(i)·s₂(j); a vector as by CountSketch."""

    dim: int

    def parameter(self, key: ParameterKey, device: torch.device, dtype: torch.dtype) -> Hash:
        rows, columns = key.matrix
        bucket_R, sign_R = hashed(key, "row", rows, self.dim)
        if columns == 1:
            return Hash(bucket_R, sign_R)
        bucket_C, sign_C = hashed(key, "column", columns, self.dim)
        return Hash(
            ((bucket_R[:, None] + bucket_C) % self.dim).flatten(),
            (sign_R[:, None] * sign_C).flatten(),
        )


@dataclass(frozen=True)
class FoldedSides:
    """The library's fold of both sides to K, then of the result to D, whether or not a layer is called once."""

    dim: int
    side: int

    def parameter(self, key: ParameterKey, device: torch.device, dtype: torch.dtype) -> ParameterSketch:
        # A convolution's input side counts channels x taps; it is folded where that halves it at least.
        kept = max(1, self.side // prod(key.shape[2:]))
        if len(key.shape) > 1 and key.shape[1] < 2 * kept:
            kept = key.shape[1]
        folds = FactoredSketch(self.dim, side=self.side, channels=(self.side, kept))
        return folds.parameter(replace(key, rank_one=False), device, dtype)


def _sign_fold(key: ParameterKey, entries: int, dim: int) -> SignFold:
    signs = torch.from_numpy(key.stream("fold").signs(0, entries)).float()
    return SignFold(signs, key.stream("offset").integer(dim))


@dataclass(frozen=True)
class GaussianSides:
    """Each side wider than K times a Gaussian matrix, then signs and sums to D; a vector by those alone."""

    dim: int
    side: int

    def parameter(self, key: ParameterKey, device: torch.device, dtype: torch.dtype) -> TwoSided:
        rows, columns = key.matrix
        left: Side = Untouched(rows)
        right: Side = Untouched(columns)
        if columns > 1 and rows > self.side:
            left = projected(key.stream("left"), rows, self.side, device, dtype)
        if columns > self.side:
            right = projected(key.stream("right"), columns, self.side, device, dtype)
        return TwoSided(key.matrix, left, right, _sign_fold(key, left.width * right.width, self.dim))


@dataclass(frozen=True)
class Masked:
    """Some of n coordinates, times √(n/width)."""

    width: int
    index_k: Tensor
    n: int

    def apply(self, x: Tensor, room: Any = None) -> Tensor:
        return x[..., self.index_k] * (self.n / self.width) ** 0.5

    def columns(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        return (index.unsqueeze(-1) == self.index_k).to(dtype) * (self.n / self.width) ** 0.5


@dataclass(frozen=True)
class MaskedSides:
    """K random coordinates of each side wider than K, scaled to be unbiased, then a hash to D; a vector only hashed."""

    dim: int
    side: int

    def parameter(self, key: ParameterKey, device: torch.device, dtype: torch.dtype) -> TwoSided:
        rows, columns = key.matrix
        left = Untouched(rows) if columns == 1 else self._side(key, "left", rows)
        right = self._side(key, "right", columns)
        finish: Finish = Hash(*hashed(key, "entry", left.width * right.width, self.dim))
        return TwoSided(key.matrix, left, right, finish)

    def _side(self, key: ParameterKey, role: str, n: int) -> Side:
        if n <= self.side:
            return Untouched(n)
        order = np.argsort(key.stream(role).words(0, n), kind="stable")
        return Masked(self.side, torch.from_numpy(np.sort(order[: self.side])), n)


@dataclass(frozen=True)
class KeptSigns:
    """The library's `dense` sketch, its signs made once a checkpoint and kept as bytes: P·D of them."""

    dim: int

    def parameter(self, key: ParameterKey, device: torch.device, dtype: torch.dtype) -> KeptSignsParameter:
        rows, columns = key.matrix
        signs_PD = torch.empty(rows * columns, self.dim, dtype=torch.int8)
        step = max(1, _BLOCK // self.dim)
        for start in range(0, len(signs_PD), step):
            part = signs_PD[start : start + step]
            part.copy_(torch.from_numpy(key.stream("dense").signs(start * self.dim, part.numel())).view_as(part))
        return KeptSignsParameter(signs_PD)


@dataclass(frozen=True)
class KeptSignsParameter:
    signs_PD: Tensor

    def add(self, out_BD: Tensor, form: Dense) -> None:
        n, dim = self.signs_PD.shape
        step = max(1, _BLOCK // dim)
        block = torch.empty(min(step, n), dim)
        for start in range(0, n, step):
            stop = min(start + step, n)
            entries = block[: stop - start].copy_(self.signs_PD[start:stop])
            out_BD.addmm_(form.grad_BP[:, start:stop], entries, alpha=dim**-0.5)
