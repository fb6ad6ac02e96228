"""Scales of gradients: factors for each parameter, by which an engine multiplies gradients before it passes them on.

With learning rates per parameter, TracInCP is Σ_c Σ_p η_cp ⟨g_p, g'_p⟩ = Σ_c η_c Σ_p ⟨s_p g_p, s_p g'_p⟩ with the
largest rate η_c and s_p = √(η_cp / η_c). Both sides have the same scales, so every formula with η_c stays valid. A
preconditioner multiplies the factor of each entry by a weight; see features/preconditioner.py.

Shapes: B batch, P entries of all parameters, or of one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tracin_ann.gradients.factors import Form, Scaled, Sink, scale


@dataclass(frozen=True)
class GradientScales:
    """The factors of some parameters; the gradients of all others stay unchanged.

    Attributes:
        factors: by parameter name, a number or a tensor [P] of one factor for each entry of the parameter, on its
            device. The gradients of a parameter with the number 0 are not passed on.
    """

    factors: Mapping[str, float | Tensor]

    def wrap(self, sink: Sink) -> Sink:
        """Return a sink that scales forms and passes them to `sink`."""

        def scaled(name: str, form: Form, rows: slice) -> None:
            assert not isinstance(form, Scaled)
            factor = self.factors.get(name, 1.0)
            if isinstance(factor, Tensor):
                sink(name, Scaled(form, factor), rows)
            elif factor:
                sink(name, form if factor == 1 else scale(form, factor), rows)

        return scaled

    def apply(self, name: str, grad: Tensor) -> Tensor:
        """Return gradients [..., P] of one parameter, scaled; zeros for the number 0, also if they are NaN."""
        factor = self.factors.get(name, 1.0)
        if isinstance(factor, Tensor):
            return grad * factor
        if factor == 1:
            return grad
        return grad * factor if factor else torch.zeros_like(grad)

    def apply_flat(self, grad_BP: Tensor, sizes: Mapping[str, int]) -> Tensor:
        """Return gradients of all parameters [B, P], or of one example [P], scaled.

        Args:
            grad_BP: flattened in the order of `sizes`.
            sizes: number of entries by parameter name.
        """
        parts = torch.split(grad_BP, list(sizes.values()), dim=-1)
        return torch.cat([self.apply(name, part) for name, part in zip(sizes, parts, strict=True)], dim=-1)
