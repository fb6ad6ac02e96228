"""The Kronecker sketch: Gaussian matrices on both sides of each gradient matrix, summed over layers into one row of D.

It is the projection of LoGra (Choe et al. 2024), but every layer uses all D dimensions instead of a part of
them. For rank-one gradients δxᵀ, δ'x'ᵀ with α = ⟨δ,δ'⟩, β = ⟨x,x'⟩ the variance of the sketched inner product is
(α² + (‖δ‖²‖δ'‖² + α²)/k₁)(β² + (‖x‖²‖x'‖² + β²)/k₂) − α²β².
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from tracin_ann.errors import UsageError, problem
from tracin_ann.gradients import Scratch
from tracin_ann.sketch.base import ParameterKey
from tracin_ann.sketch.sides import Identity, make_projection
from tracin_ann.sketch.twosided import PlainSum, TwoSided

_WORST_RATIO = 4


@dataclass(frozen=True)
class KroneckerSketch:
    """Projection of rows to k₁ and of columns to k₂, where k₁·k₂ = D is the most even factorization of D."""

    dim: int
    name: str = "kronecker"
    version: int = 1
    sides: tuple[int, int] = field(init=False)

    def __post_init__(self) -> None:
        """Factorize D.

        Raises:
            UsageError: D is not a product of two factors within a ratio of 4.
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
        """Return the map of one parameter; a vector is projected to D directly."""
        scratch = scratch or Scratch()
        rows, columns = key.matrix
        if columns == 1:
            left = make_projection(key.stream("left"), rows, self.dim, device, dtype)
            return TwoSided(key.matrix, left, Identity(1), PlainSum(), scratch=scratch)
        return TwoSided(
            key.matrix,
            make_projection(key.stream("left"), rows, self.sides[0], device, dtype),
            make_projection(key.stream("right"), columns, self.sides[1], device, dtype),
            PlainSum(),
            scratch=scratch,
        )

    def describe(self, key: ParameterKey) -> str:
        """Return a short description of the map of a parameter."""
        rows, columns = key.matrix
        if columns == 1:
            return f"{rows} projected to {self.dim}"
        return f"{rows}x{columns} projected to {self.sides[0]}x{self.sides[1]}"
