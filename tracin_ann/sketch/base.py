"""What a sketch is: for each (checkpoint, parameter) a linear map of its gradient into the shared D.

E⟨S g, S g'⟩ = ⟨g, g'⟩ over the random numbers; maps of different checkpoints, parameters and seeds
are independent, so the sketches of all parameters of a checkpoint are added into one row of D.
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
    """Whose gradient is sketched: the random numbers depend on this and on nothing else.

    Attributes:
        seed: the index's seed.
        checkpoint: position of the checkpoint in the task.
        name: the parameter's name in the model.
        shape: the parameter's shape.
        rank_one: its layer is called once an example at one position, so that each gradient is an
            outer product; recorded with the index, since a sketch may map such a parameter in another way.
    """

    seed: int
    checkpoint: int
    name: str
    shape: tuple[int, ...]
    rank_one: bool = False

    @property
    def matrix(self) -> tuple[int, int]:
        """Return (R, C): the shape read as a matrix, (R, 1) for a vector."""
        rows = self.shape[0] if self.shape else 1
        columns = 1
        for size in self.shape[1:]:
            columns *= size
        return rows, columns

    def stream(self, role: str) -> Stream:
        """Return the random stream of one role in this parameter's map."""
        return Stream(self.seed, self.checkpoint, self.name, role)


class ParameterSketch(Protocol):
    """The map of one parameter at one checkpoint, its random numbers already on a device."""

    def add(self, out_BD: Tensor, form: Form) -> None:
        """Add the sketch of the per-example gradients to `out_BD`."""


class Sketch(Protocol):
    """A family of maps."""

    @property
    def name(self) -> str:
        """Return the name that `--sketch` takes."""

    @property
    def version(self) -> int:
        """Return a number that is raised whenever the same key gives other numbers than before."""

    @property
    def dim(self) -> int:
        """Return D."""

    def parameter(
        self, key: ParameterKey, device: torch.device, dtype: torch.dtype, scratch: Scratch | None = None
    ) -> ParameterSketch:
        """Return the map of one parameter, which works in buffers that it may share with other maps."""

    def describe(self, key: ParameterKey) -> str:
        """Return in a few words what the map does with a parameter."""
