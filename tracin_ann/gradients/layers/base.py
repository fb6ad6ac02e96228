"""What a layer rule is: from one call's input and output gradient to the parameters' gradient forms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tracin_ann.gradients.factors import Form

_BLOCK_ELEMENTS = 1 << 17


class LayoutError(Exception):
    """A call's tensors are not laid out as the rule needs; the parameter falls one step down."""


@dataclass(frozen=True)
class Call:
    """One call of a layer during a forward over a batch, with the gradient that backward brought.

    Attributes:
        module: the layer.
        input: its first argument, detached.
        grad_output: ∂Σℓ/∂output, of the output's shape.
        batch: B.
        output: what it returned, detached, for rules that want it.
    """

    module: nn.Module
    input: Tensor
    grad_output: Tensor
    batch: int
    output: Tensor | None = None


@dataclass(frozen=True)
class LayerRule:
    """How one kind of layer gives the gradients of its own parameters.

    Attributes:
        parameters: the attributes of the layer that the rule covers.
        forms: (call, attributes wanted) -> forms by attribute; may raise LayoutError.
        applies: whether this very layer, by its settings, is one that the rule understands.
        wants_output: whether this layer's calls are to hold its output.
        n_leading: (layer, input) -> how many leading dimensions of the input count rows that the layer treats alike.
    """

    parameters: tuple[str, ...]
    forms: Callable[[Call, frozenset[str]], dict[str, Form]]
    applies: Callable[[Any], bool] = lambda module: True
    wants_output: Callable[[nn.Module], bool] = lambda module: False
    n_leading: Callable[[Any, Tensor], int] = lambda module, x: x.dim() - 1


def group_by_example(tensor: Tensor, batch: int) -> Tensor:
    """Return the tensor with B in front: as it is, or unflattened from [B·T, ...].

    Raises:
        LayoutError: the first dimension is no multiple of B.
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
    """Return Σ_t left · right, [B, T, C] twice -> [B, C], a few examples at a time, so that it stays in cache."""
    out = left.new_empty(left.shape[0], left.shape[2])
    step = max(1, _BLOCK_ELEMENTS // max(1, left.shape[1] * left.shape[2]))
    for start in range(0, len(out), step):
        rows = slice(start, start + step)
        torch.sum(left[rows] * right[rows], dim=1, out=out[rows])
    return out


def widen(tensor: Tensor) -> Tensor:
    """Return what rules compute with: half precision as float32, in which sketches accumulate, and sparse as dense."""
    tensor = tensor if tensor.layout is torch.strided else tensor.to_dense()
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
