"""The definition of a layer rule, and the tensor operations that rules share.

Shapes: B batch, T positions, C features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tracin_ann.gradients.factors import Form

WEIGHT_AND_BIAS = ("weight", "bias")
_BLOCK_ELEMENTS = 1 << 17


class LayoutError(Exception):
    """A call's tensors do not have the layout that the rule needs; the parameter uses the next method."""


@dataclass(frozen=True)
class Call:
    """One call of a layer in a forward over a batch, with the output gradient from backward.

    Attributes:
        module: the layer.
        input: its first argument, detached.
        grad_output: ∂Σℓ/∂output, of the output's shape.
        batch: B.
        output: the layer's output, detached, for rules that need it.
    """

    module: nn.Module
    input: Tensor
    grad_output: Tensor
    batch: int
    output: Tensor | None = None


@dataclass(frozen=True)
class LayerRule:
    """The rule that computes the gradients of the parameters of one kind of layer.

    Attributes:
        parameters: the attributes of the layer that the rule covers.
        forms: (call, requested attributes) -> gradient forms by attribute; may raise LayoutError.
        applies: whether the rule supports this layer with its settings.
        needs_output: whether calls of this layer have to store the output.
        n_leading: (layer, input) -> number of leading dimensions of the input whose entries the layer treats alike.
        is_lookup: whether the layer computes the indices of its lookup itself: input and output of a call are those of
            the lookup inside its forward (`lookups.py`).
        find: layer -> its parameters by attribute, if they belong to submodules; None: `parameters` of the layer.
        scaled_input: layer -> the submodule whose input is used as the layer's input and output; None: the layer's.
    """

    parameters: tuple[str, ...]
    forms: Callable[[Call, frozenset[str]], dict[str, Form]]
    applies: Callable[[Any], bool] = lambda module: True
    needs_output: Callable[[nn.Module], bool] = lambda module: False
    n_leading: Callable[[Any, Tensor], int] = lambda module, x: x.dim() - 1
    is_lookup: bool = False
    find: Callable[[nn.Module], Mapping[str, nn.Parameter]] | None = None
    scaled_input: Callable[[Any], nn.Module] | None = None

    def find_parameters(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """Return the parameters of a layer that the rule covers, by attribute."""
        if self.find is not None:
            return dict(self.find(module))
        return {name: p for name, p in module._parameters.items() if name in self.parameters and p is not None}


def group_by_example(tensor: Tensor, batch: int) -> Tensor:
    """Return a tensor with B as the first dimension: unchanged, or reshaped from [B·T, ...] to [B, T, ...].

    Raises:
        LayoutError: the first dimension is not a multiple of B.
    """
    if tensor.dim() and tensor.shape[0] == batch:
        return tensor
    if tensor.dim() == 0 or tensor.shape[0] % batch:
        raise LayoutError(f"a tensor of shape {list(tensor.shape)} in a batch of {batch} is not batch-first")
    return tensor.reshape(batch, -1, *tensor.shape[1:])


def flatten_positions(tensor: Tensor, batch: int) -> Tensor:
    """Return [B, T, features]: all dimensions between the first and the last flattened, T ≥ 1."""
    return group_by_example(tensor, batch).reshape(batch, -1, tensor.shape[-1])


def sum_product(left: Tensor, right: Tensor) -> Tensor:
    """Return Σ_t left · right, [B, T, C] twice -> [B, C].

    It is computed for a few examples at a time, so that the products fit the cache.
    """
    out = left.new_empty(left.shape[0], left.shape[2])
    step = max(1, _BLOCK_ELEMENTS // max(1, left.shape[1] * left.shape[2]))
    for start in range(0, len(out), step):
        rows = slice(start, start + step)
        torch.sum(left[rows] * right[rows], dim=1, out=out[rows])
    return out


def widen(tensor: Tensor) -> Tensor:
    """Return a dense tensor in float32 or wider; sketches accumulate half precision in float32."""
    tensor = tensor if tensor.layout is torch.strided else tensor.to_dense()
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
