"""The dense sketch: one random matrix over the full gradient, generated in blocks and never stored.

S = R/√D, where the entries of R are independent with mean 0 and variance 1. For fixed u, v the variance of
⟨Su, Sv⟩ is (‖u‖²‖v‖² + ⟨u,v⟩²)/D with Gaussian entries; with signs it is smaller by 2Σu_i²v_i²/D
(Achlioptas 2003). It is the most accurate and by far the slowest sketch: the reference for the faster ones.

Shapes: B batch, P parameters, D sketch dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tracin_ann.device import array_to_device
from tracin_ann.gradients import Form, Scratch, column_blocks
from tracin_ann.sketch.base import ParameterKey
from tracin_ann.sketch.generator import Stream

_PROJECTION_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class DenseSketch:
    """Projection of every coordinate by random signs (`dense`) or Gaussians (`dense-gaussian`)."""

    dim: int
    gaussian: bool = False
    version: int = 1

    @property
    def name(self) -> str:
        """Return the value of `--sketch` that selects it."""
        return "dense-gaussian" if self.gaussian else "dense"

    def parameter(
        self, key: ParameterKey, device: torch.device, dtype: torch.dtype, scratch: Scratch | None = None
    ) -> DenseParameter:
        """Return the map of one parameter; it generates its random numbers when they are needed."""
        return DenseParameter(key.stream("dense"), self.dim, self.gaussian, device, dtype)

    def describe(self, key: ParameterKey) -> str:
        """Return a short description of the map of a parameter."""
        return f"projected to {self.dim} by {'Gaussians' if self.gaussian else 'signs'}"


@dataclass(frozen=True)
class DenseParameter:
    """The rows of the projection for one parameter: row p is the D numbers of the stream from position p·D."""

    stream: Stream
    dim: int
    gaussian: bool
    device: torch.device
    dtype: torch.dtype

    def projection(self, start: int, stop: int) -> Tensor:
        """Return the rows of the projection for the flat coordinates start .. stop − 1, [stop − start, D]."""
        make = self.stream.gaussians if self.gaussian else self.stream.signs
        flat = make(start * self.dim, (stop - start) * self.dim)
        entries = array_to_device(flat, self.device).to(self.dtype).view(-1, self.dim)
        return entries.mul_(self.dim**-0.5)

    def add(self, out_BD: Tensor, form: Form) -> None:
        """Add the sketch of the per-example gradients to `out_BD`."""
        width = max(1, _PROJECTION_ELEMENTS // self.dim)
        for start, grad in column_blocks(form):
            for offset in range(0, grad.shape[1], width):
                part = grad[:, offset : offset + width]
                out_BD += part @ self.projection(start + offset, start + offset + part.shape[1])
