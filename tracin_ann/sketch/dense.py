"""The dense sketch: one random matrix over the full gradient, made in blocks and never kept.

S = R/√D with independent entries of mean 0 and variance 1. For fixed u, v the variance of
⟨Su, Sv⟩ is (‖u‖²‖v‖² + ⟨u,v⟩²)/D with Gaussian entries and less by 2Σu_i²v_i²/D with signs
(Achlioptas 2003). The yardstick for the cheaper sketches: truest, and slowest by far.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tracin_ann.gradients import Form, Scratch, column_blocks
from tracin_ann.sketch.base import ParameterKey
from tracin_ann.sketch.generator import Stream

_PROJECTION_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class DenseSketch:
    """Rademacher (`dense`) or Gaussian (`dense-gaussian`) projection of every coordinate."""

    dim: int
    gaussian: bool = False
    version: int = 1

    @property
    def name(self) -> str:
        """Return the name that `--sketch` takes."""
        return "dense-gaussian" if self.gaussian else "dense"

    def parameter(
        self, key: ParameterKey, device: torch.device, dtype: torch.dtype, scratch: Scratch | None = None
    ) -> DenseParameter:
        """Return the map of one parameter; its numbers are made as they are needed."""
        return DenseParameter(key.stream("dense"), self.dim, self.gaussian, device, dtype)

    def describe(self, key: ParameterKey) -> str:
        """Return what the map does with a parameter."""
        return f"projected to {self.dim} by {'Gaussians' if self.gaussian else 'signs'}"


@dataclass(frozen=True)
class DenseParameter:
    """One parameter's columns of the projection; column p holds D numbers of the stream from p·D."""

    stream: Stream
    dim: int
    gaussian: bool
    device: torch.device
    dtype: torch.dtype

    def projection(self, start: int, stop: int) -> Tensor:
        """Return the projection of the flat coordinates start..stop, [stop − start, D]."""
        make = self.stream.gaussians if self.gaussian else self.stream.signs
        flat = make(start * self.dim, (stop - start) * self.dim)
        entries = torch.from_numpy(flat).to(self.device, self.dtype).view(-1, self.dim)
        return entries.mul_(self.dim**-0.5)

    def add(self, out_BD: Tensor, form: Form) -> None:
        """Add the sketch of the per-example gradients to `out_BD`."""
        width = max(1, _PROJECTION_ELEMENTS // self.dim)
        for start, grad in column_blocks(form):
            for offset in range(0, grad.shape[1], width):
                part = grad[:, offset : offset + width]
                out_BD += part @ self.projection(start + offset, start + offset + part.shape[1])
