"""A random rotation of sketches: random signs and Hadamard transforms, the same for all examples of a checkpoint.

A sketch can have few large numbers: the fold of a small layer fills few of D numbers. A rotation spreads them, so that
the numbers of a row are close to normal and codes of few bits have the error of normal numbers. Inner products remain
the same.

For D = 2^k, the rotation is a Hadamard transform after random signs (Ailon and Chazelle 2006), twice: after one
transform, the error of the codes of a row with few large numbers is not independent of them. Other D have transforms of
the first and of the last 2^k numbers, also twice.

Shapes: B rows, D sketch dimension, H = 2^k numbers of a transform.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tracin_ann.sketch.generator import Stream

_WIDEST = 64
"""Numbers of the matrix of a transform: larger transforms are products with several of them."""
_ROUNDS = 2


@dataclass(frozen=True, eq=False)
class Rotation:
    """The rotation of the sketches of a checkpoint.

    Attributes:
        sign_KD: the signs before each transform.
        starts: the first number of each transform.
        size: H.
    """

    sign_KD: Tensor
    starts: tuple[int, ...]
    size: int

    def apply(self, row_BD: Tensor) -> Tensor:
        """Return the rotated rows."""
        for sign_D, start in zip(self.sign_KD, self.starts, strict=True):
            row_BD = row_BD * sign_D
            part = slice(start, start + self.size)
            row_BD[:, part] = _transform(row_BD[:, part])
        return row_BD


def make_rotation(seed: int, checkpoint: int, dim: int, device: torch.device, dtype: torch.dtype) -> Rotation:
    """Return the rotation of the sketches of a checkpoint; equal arguments give equal rotations on every device."""
    size = 1 << (dim.bit_length() - 1)
    starts = ((0,) if size == dim else (0, dim - size)) * _ROUNDS
    stream = Stream(seed, checkpoint, "", "rotation")
    sign_KD = torch.from_numpy(stream.signs(0, len(starts) * dim)).view(len(starts), dim).to(device, dtype)
    return Rotation(sign_KD, starts, size)


def _transform(row_BH: Tensor) -> Tensor:
    """Return the Hadamard transforms of rows, divided by √H."""
    size, step = row_BH.shape[1], 1
    moved = row_BH.reshape(-1)
    while step < size:
        width = min(_WIDEST, size // step)
        matrix = _make_hadamard(width, row_BH)
        moved = moved.view(-1, width) @ matrix if step == 1 else matrix @ moved.view(-1, width, step)
        step *= width
    transformed_BH: Tensor = moved.view(row_BH.shape)
    return transformed_BH


def _make_hadamard(width: int, like: Tensor) -> Tensor:
    """Return the orthogonal matrix of a Hadamard transform, [width, width]."""
    matrix: Tensor = torch.ones(1, 1, device=like.device, dtype=like.dtype)
    while len(matrix) < width:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(width)
