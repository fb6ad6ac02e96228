"""Sketches: random linear maps of gradients to D dimensions that preserve inner products in expectation.

Each sketch has a name, the value of the option `--sketch`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from tracin_ann.choices import SKETCH_NAMES
from tracin_ann.errors import UsageError, problem
from tracin_ann.sketch.base import ParameterKey, ParameterSketch, Sketch
from tracin_ann.sketch.dense import DenseSketch
from tracin_ann.sketch.factored import FactoredSketch
from tracin_ann.sketch.kronecker import KroneckerSketch
from tracin_ann.sketch.rotation import Rotation, make_rotation
from tracin_ann.sketch.tensorsketch import TensorSketch, is_rank_one

__all__ = [
    "ParameterKey",
    "ParameterSketch",
    "Rotation",
    "SKETCHES",
    "Sketch",
    "TensorSketch",
    "is_rank_one",
    "make_rotation",
    "make_sketch",
]

_CONSTRUCTORS = (FactoredSketch, KroneckerSketch, DenseSketch, partial(DenseSketch, gaussian=True))
SKETCHES: dict[str, Callable[[int], Sketch]] = dict(zip(SKETCH_NAMES, _CONSTRUCTORS, strict=True))


def make_sketch(name: str, dim: int) -> Sketch:
    """Return the sketch with this name and dimension D.

    Raises:
        UsageError: the name is unknown, or the sketch does not support this dimension.
    """
    if name not in SKETCHES:
        raise UsageError(
            problem("unknown sketch", got=repr(name), expected=" or ".join(SKETCHES), remedy="change --sketch")
        )
    if dim < 1:
        raise UsageError(
            problem("the sketch dimension is too small", got=dim, expected="1 or more", remedy="change --dim")
        )
    return SKETCHES[name](dim)
