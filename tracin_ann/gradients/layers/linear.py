"""The layer rules of linear layers: `nn.Linear`, and the linear layers of other libraries.

The gradient of the weight is Σ_t δ_t ⊗ a_t, with a the input and δ the output gradient; that of the bias is Σ_t δ_t.

A layer of another library (Hugging Face's Conv1D in GPT-2, or a user's own class) is assumed to be linear if it holds
one matrix, optionally a bias, and nothing else. Its output has to be the input times the matrix or its transpose, plus
the bias; which of the two is determined on the first example, and verified on the first batch.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from tracin_ann.gradients.factors import Dense, Form, Outer
from tracin_ann.gradients.layers.base import WEIGHT_AND_BIAS, Call, LayerRule, LayoutError, flatten_positions, widen

_TOLERANCE = 1e-3
_TOLERANCE_HALF = 5e-2
# By layer: whether its weight is [in, out], as in Conv1D, and not [out, in].
_is_in_first: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def _linear(call: Call, requested: frozenset[str]) -> dict[str, Form]:
    delta = flatten_positions(call.grad_output, call.batch)
    forms: dict[str, Form] = {}
    if "weight" in requested:
        forms["weight"] = Outer(delta, flatten_positions(call.input, call.batch))
    if "bias" in requested:
        forms["bias"] = Dense(delta.sum(1))
    return forms


def is_linear(module: nn.Module) -> bool:
    """Return whether a layer's parameters are those of a linear map: a matrix, optionally a bias, nothing else."""
    parameters = {name: p for name, p in module._parameters.items() if p is not None}
    if not {"weight"} <= parameters.keys() <= {"weight", "bias"} or any(True for _ in module.children()):
        return False
    weight, bias = parameters["weight"], parameters.get("bias")
    return weight.dim() == 2 and (bias is None or (bias.dim() == 1 and len(bias) in weight.shape))  # noqa: PLR2004


def _custom_linear(call: Call, requested: frozenset[str]) -> dict[str, Form]:
    module: Any = call.module
    if module not in _is_in_first:
        _is_in_first[module] = _detect_in_first(call)
    x, delta = flatten_positions(call.input, call.batch), flatten_positions(call.grad_output, call.batch)
    forms: dict[str, Form] = {}
    if "weight" in requested:
        sides = (x, delta) if _is_in_first[module] else (delta, x)
        if (sides[0].shape[2], sides[1].shape[2]) != tuple(module.weight.shape):
            raise LayoutError(f"a matrix of {list(module.weight.shape)} over an input of {list(call.input.shape)}")
        forms["weight"] = Outer(*sides)
    if "bias" in requested:
        forms["bias"] = Dense(delta.sum(1))
    return forms


def _detect_in_first(call: Call) -> bool:
    """Return whether the weight is [in, out], determined on the first example.

    Raises:
        LayoutError: the output is neither of the two products.
    """
    module: Any = call.module
    assert call.output is not None
    x, output = call.input[:1], widen(call.output[:1])
    for in_first in (True, False):
        matrix: Tensor = widen(module.weight.detach())
        matrix = matrix if in_first else matrix.T
        if (x.shape[-1], output.shape[-1]) != tuple(matrix.shape) or x.shape[:-1] != output.shape[:-1]:
            continue
        product = x.to(matrix.dtype) @ matrix
        if module._parameters.get("bias") is not None:
            product = product + widen(module.bias.detach())
        tolerance = _TOLERANCE_HALF if call.output.dtype in (torch.float16, torch.bfloat16) else _TOLERANCE
        if float((product - output).norm()) <= tolerance * float(product.norm()):
            return in_first
    raise LayoutError("the layer holds a matrix and is not a linear map")


LINEAR = LayerRule(WEIGHT_AND_BIAS, _linear)
CUSTOM_LINEAR = LayerRule(WEIGHT_AND_BIAS, _custom_linear, needs_output=lambda module: module not in _is_in_first)
