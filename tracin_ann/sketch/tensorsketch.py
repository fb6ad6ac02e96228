"""TensorSketch: the sketch of an outer product l ⊗ r without computing the product.

It is used for layers that are called once per example. Entry (i, j) of a gradient goes to bucket
h₁(i) + h₂(j) mod D with sign s₁(i)·s₂(j), so the sketch of l ⊗ r is the circular convolution of the CountSketches
of l and r: a product of their Fourier transforms (Pham and Pagh 2013). On the shorter side h₁(i) = i mod D, which
has no collisions if that side is shorter than D; h₂ is random. The spectra of all layers are added before one
inverse transform.

Shapes: B batch, T positions, R × C a parameter as a matrix, D sketch dimension.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeGuard

import torch
from torch import Tensor

from tracin_ann.device import array_to_device
from tracin_ann.gradients import Form, Outer, Scratch, column_blocks
from tracin_ann.sketch.base import ParameterKey
from tracin_ann.sketch.sides import fold


@dataclass(frozen=True)
class TensorSketch:
    """The map of one parameter [R, C].

    Attributes:
        matrix: (R, C).
        signs_R: s₁ or, where C is the shorter side, s₂.
        signs_C: the signs of the other side.
        bucket_n: h₂ of the coordinates of the longer side, int64.
        scratch: work buffers.
    """

    matrix: tuple[int, int]
    signs_R: Tensor
    signs_C: Tensor
    bucket_n: Tensor
    scratch: Scratch = field(default_factory=Scratch)

    def add(self, out_BD: Tensor, form: Form) -> None:
        """Add the sketch of the per-example gradients to `out_BD`."""
        if is_rank_one(form):
            dim = out_BD.shape[1]
            out_BD += torch.fft.irfft(self.spectrum(form, dim), n=dim)
            return
        signs, bucket = self._entries(out_BD.shape[1])
        for start, grad in column_blocks(form):
            columns = slice(start, start + grad.shape[1])
            out_BD.index_add_(1, bucket[columns], grad * signs[columns])

    def spectrum(self, form: Outer, dim: int) -> Tensor:
        """Return the Fourier transforms of the sketches, complex [B, D // 2 + 1]; the form has one position.

        `torch.fft.irfft(…, n=dim)` gives the sketch, also for a sum of the spectra of several parameters.
        """
        sides = (form.left_BTR[:, 0], self.signs_R), (form.right_BTC[:, 0], self.signs_C)
        (short, short_signs), (long, long_signs) = sides if self._rows_shorter else sides[::-1]
        short_sketch = fold(short, short_signs, dim, allocate_out=self.scratch["left"])
        signed = torch.mul(long, long_signs, out=self.scratch["signed"](long.shape, long))
        long_sketch = self.scratch["right"]((len(long), dim), long).zero_()
        long_sketch.index_add_(1, self.bucket_n, signed)
        product: Tensor = torch.fft.rfft(short_sketch, n=dim) * torch.fft.rfft(long_sketch, n=dim)
        return product

    @property
    def _rows_shorter(self) -> bool:
        return self.matrix[0] <= self.matrix[1]

    def _entries(self, dim: int) -> tuple[Tensor, Tensor]:
        """Return the sign and the bucket of every entry, [R·C], for gradients that are not one outer product."""
        rows, columns = self.matrix
        place = torch.arange(min(rows, columns), device=self.bucket_n.device)
        row_bucket, column_bucket = (place, self.bucket_n) if self._rows_shorter else (self.bucket_n, place)
        bucket = (row_bucket.unsqueeze(1) + column_bucket) % dim
        return (self.signs_R.unsqueeze(1) * self.signs_C).flatten(), bucket.flatten()


def is_rank_one(form: Form) -> TypeGuard[Outer]:
    """Return whether the gradient of each example is one outer product."""
    return isinstance(form, Outer) and form.left_BTR.shape[1] == 1


def make_tensor_sketch(
    key: ParameterKey, dim: int, device: torch.device, dtype: torch.dtype, scratch: Scratch
) -> TensorSketch:
    """Return the TensorSketch of a parameter, with its random numbers on the device."""
    rows, columns = key.matrix
    left = array_to_device(key.stream("left").signs(0, rows), device).to(dtype)
    right = array_to_device(key.stream("right").signs(0, columns), device).to(dtype)
    bucket = array_to_device(key.stream("bucket").integers(0, max(rows, columns), dim), device)
    return TensorSketch(key.matrix, left, right, bucket, scratch)
