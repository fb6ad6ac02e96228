"""Interface of a sketch: one random linear map to D dimensions for each (checkpoint, parameter).

E⟨S g, S g'⟩ = ⟨g, g'⟩ over the random numbers. The maps of different checkpoints, parameters and seeds
are independent, so the sketches of all parameters of a checkpoint can be added into one row of D numbers.

Shapes: B batch, D sketch dimension, R × C a parameter as a matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tracin_ann.gradients import Form, Scratch
from tracin_ann.sketch.generator import Stream


@dataclass(frozen=True)
class ParameterKey:
    """The parameter and checkpoint of a gradient; the random numbers of its map depend on this key alone.

    Attributes:
        seed: seed of the index.
        checkpoint: position of the checkpoint in the task.
        name: name of the parameter in the model.
        shape: shape of the parameter.
        rank_one: whether its layer is called once per example at one position, so that each gradient is one
            outer product. The index records this, because a sketch may use another map for such parameters.
    """

    seed: int
    checkpoint: int
    name: str
    shape: tuple[int, ...]
    rank_one: bool = False

    @property
    def matrix(self) -> tuple[int, int]:
        """Return (R, C): the first dimension and the product of the others; (R, 1) for a vector."""
        rows = self.shape[0] if self.shape else 1
        columns = 1
        for size in self.shape[1:]:
            columns *= size
        return rows, columns

    def stream(self, role: str) -> Stream:
        """Return the random stream for one role (such as "left") in the map of this parameter."""
        return Stream(self.seed, self.checkpoint, self.name, role)


class ParameterSketch(Protocol):
    """The map of one parameter at one checkpoint, with its random numbers on a device."""

    def add(self, out_BD: Tensor, form: Form) -> None:
        """Add the sketch of the per-example gradients to `out_BD`."""


class Sketch(Protocol):
    """A kind of sketch: creates the maps of all parameters."""

    @property
    def name(self) -> str:
        """Return the value of `--sketch` that selects it."""

    @property
    def version(self) -> int:
        """Return the version; it is increased whenever the same key gives different numbers."""

    @property
    def dim(self) -> int:
        """Return D."""

    def parameter(
        self, key: ParameterKey, device: torch.device, dtype: torch.dtype, scratch: Scratch | None = None
    ) -> ParameterSketch:
        """Return the map of one parameter; `scratch` holds work buffers that several maps may share."""

    def describe(self, key: ParameterKey) -> str:
        """Return a short description of the map of a parameter, for reports."""
