"""A checkpoint as a task names it: where it lies, and the learning rate in force when it was saved."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from numbers import Real

import numpy as np
from torch import Tensor

from tracin_ann.errors import TaskError, problem


@dataclass(frozen=True)
class Checkpoint:
    """A saved state of the model and the learning rate in force when it was saved.

    Attributes:
        path: a file that `torch.load(weights_only=True)` or safetensors reads, or whatever the
            task's own `load` reads (a directory too).
        learning_rate: η_c of TracInCP (Pruthi et al. 2020, section 3.3); a finite number, which a tensor or array of
            one number is too, kept as a float. With 0, as at the first step of a warm-up, the checkpoint adds nothing.
    """

    path: str | os.PathLike[str]
    learning_rate: float

    def __post_init__(self) -> None:
        """Keep the learning rate as a float.

        Raises:
            TaskError: the learning rate is negative, NaN, infinite or no number.
        """
        rate = _as_float(self.learning_rate)
        if rate is None or not 0 <= rate < math.inf:
            raise TaskError(
                problem(
                    f"checkpoint {os.fspath(self.path)} has a bad learning rate",
                    got=" ".join(repr(self.learning_rate).split())[:160],
                    expected="a finite number, 0 or more",
                    remedy="give the learning rate that training used at this checkpoint",
                )
            )
        # Without the sign of -0.0, which a manifest would keep.
        object.__setattr__(self, "learning_rate", abs(rate))


def _as_float(number: object) -> float | None:
    """Return a number, or the one number of a tensor or array, as a float; None for anything else."""
    try:
        if isinstance(number, Tensor | np.ndarray | np.generic):
            number = number.item()
        return float(number) if isinstance(number, Real) else None
    # An array of several numbers, one on meta, an int beyond all floats.
    except (RuntimeError, ValueError, OverflowError):
        return None
