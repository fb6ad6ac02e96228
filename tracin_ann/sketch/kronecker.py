"""The Kronecker sketch: Gaussian matrices on both sides of each layer, all layers summed into one D.

LoGra's projection (Choe et al. 2024) without splitting D among the layers. For rank-one gradients
δxᵀ, δ'x'ᵀ with α = ⟨δ,δ'⟩, β = ⟨x,x'⟩ the variance of the sketched inner product is
(α² + (‖δ‖²‖δ'‖² + α²)/k₁)(β² + (‖x‖²‖x'‖² + β²)/k₂) − α²β².
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from tracin_ann.errors import UsageError, problem
from tracin_ann.gradients import Scratch
from tracin_ann.sketch.base import ParameterKey
from tracin_ann.sketch.sides import Untouched, projected
from tracin_ann.sketch.twosided import Plain, TwoSided

_WORST_RATIO = 4


@dataclass(frozen=True)
class KroneckerSketch:
    """Project rows to k₁ and columns to k₂ with k₁·k₂ = D, as near to square as D allows."""

    dim: int
    name: str = "kronecker"
    version: int = 1
    sides: tuple[int, int] = field(init=False)

    def __post_init__(self) -> None:
        """Factor D.

        Raises:
            UsageError: D has no two factors within a ratio of 4.
        """
        small = max(k for k in range(1, int(self.dim**0.5) + 1) if self.dim % k == 0)
        if self.dim > _WORST_RATIO * small * small:
            raise UsageError(
                problem(
                    "the kronecker sketch cannot use this dimension",
                    got=f"{self.dim}, whose most even factors are {small} and {self.dim // small}",
                    expected="a product of two factors within a ratio of 4, such as 256, 1024 or 4096",
                    remedy="change --dim, or use --sketch factored",
                )
            )
        object.__setattr__(self, "sides", (small, self.dim // small))

    def parameter(
        self, key: ParameterKey, device: torch.device, dtype: torch.dtype, scratch: Scratch | None = None
    ) -> TwoSided:
        """Return the map of one parameter; a vector is projected straight to D."""
        scratch = scratch or Scratch()
        rows, columns = key.matrix
        if columns == 1:
            left = projected(key.stream("left"), rows, self.dim, device, dtype)
            return TwoSided(key.matrix, left, Untouched(1), Plain(), scratch=scratch)
        return TwoSided(
            key.matrix,
            projected(key.stream("left"), rows, self.sides[0], device, dtype),
            projected(key.stream("right"), columns, self.sides[1], device, dtype),
            Plain(),
            scratch=scratch,
        )

    def describe(self, key: ParameterKey) -> str:
        """Return what the map does with a parameter."""
        rows, columns = key.matrix
        if columns == 1:
            return f"{rows} projected to {self.dim}"
        return f"{rows}x{columns} projected to {self.sides[0]}x{self.sides[1]}"
