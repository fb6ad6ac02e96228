"""The rule of linear layers that are not PyTorch's: Hugging Face's Conv1D (all of its GPT-2), a Linear of one's own.

A layer that holds one matrix, perhaps a bias, and nothing else, and whose output is input times matrix or
times its transpose (plus bias): which one is seen on the first example, and proven on the first batch.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from tracin_ann.gradients.factors import Dense, Form, Outer
from tracin_ann.gradients.layers.base import Call, LayerRule, LayoutError, flatten_positions, widen

_NEAR = 1e-3
_NEAR_HALF = 5e-2
# By layer: whether its weight is [in, out], as Conv1D has it, and not [out, in].
_in_first: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def is_linear(module: nn.Module) -> bool:
    """Return whether a layer looks like a linear map: it holds a matrix, perhaps a vector of its outputs, no more."""
    held = {name: p for name, p in module._parameters.items() if p is not None}
    if not {"weight"} <= held.keys() <= {"weight", "bias"} or any(True for _ in module.children()):
        return False
    weight, bias = held["weight"], held.get("bias")
    return weight.dim() == 2 and (bias is None or (bias.dim() == 1 and len(bias) in weight.shape))  # noqa: PLR2004


def _linear(call: Call, wanted: frozenset[str]) -> dict[str, Form]:
    module: Any = call.module
    if module not in _in_first:
        _in_first[module] = _sees_in_first(call)
    x, delta = flatten_positions(call.input, call.batch), flatten_positions(call.grad_output, call.batch)
    forms: dict[str, Form] = {}
    if "weight" in wanted:
        sides = (x, delta) if _in_first[module] else (delta, x)
        if (sides[0].shape[2], sides[1].shape[2]) != tuple(module.weight.shape):
            raise LayoutError(f"a matrix of {list(module.weight.shape)} over an input of {list(call.input.shape)}")
        forms["weight"] = Outer(*sides)
    if "bias" in wanted:
        forms["bias"] = Dense(delta.sum(1))
    return forms


def _sees_in_first(call: Call) -> bool:
    """Return which way the first example went.

    Raises:
        LayoutError: the output is neither of the two products.
    """
    module: Any = call.module
    assert call.output is not None
    x, made = call.input[:1], widen(call.output[:1])
    for in_first in (True, False):
        matrix: Tensor = widen(module.weight.detach())
        matrix = matrix if in_first else matrix.T
        if (x.shape[-1], made.shape[-1]) != tuple(matrix.shape) or x.shape[:-1] != made.shape[:-1]:
            continue
        product = x.to(matrix.dtype) @ matrix
        if module._parameters.get("bias") is not None:
            product = product + widen(module.bias.detach())
        near = _NEAR_HALF if call.output.dtype in (torch.float16, torch.bfloat16) else _NEAR
        if float((product - made).norm()) <= near * float(product.norm()):
            return in_first
    raise LayoutError("a layer that holds a matrix and is no linear map")


OWN_LINEAR = LayerRule(("weight", "bias"), _linear, wants_output=lambda module: module not in _in_first)
