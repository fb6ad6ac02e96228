"""Derivatives of all losses of a batch along one direction of the parameters.

The product of the Jacobian of the losses [B, T] by the parameters with a direction v, J·v, by one of three methods:
forward mode in one forward pass; two backward passes, because J·v is the derivative of ⟨Jᵀ·u, v⟩ by the weights u;
a loop with one backward pass per loss. The first two run attention by its definition (`SDPBackend.MATH`): fused kernels
have no forward mode, and their backward cannot be differentiated.

Shapes: B batch, T positions.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from tracin_ann.gradients.autograd import plain_gradients, require_grad, weighted_sum
from tracin_ann.gradients.functional import Losses, LossModule
from tracin_ann.task import preserve_registry

Direction = Mapping[str, Tensor]
"""A vector of the parameters' space by parameter, each of its parameter's shape and dtype."""
Derivatives = Callable[[nn.Module, Losses, Mapping[str, Tensor], Direction, Any], Tensor]
"""(model, losses, parameters, direction, batch) -> the derivative of each loss along the direction, [B, T]."""


def differentiate_forward(
    model: nn.Module, losses: Losses, parameters: Mapping[str, Tensor], direction: Direction, inputs: Any
) -> Tensor:
    """Return the derivatives of the losses [B, T] along a direction by forward mode.

    Forward mode ignores `torch.no_grad`: values that the loss computes in such a block are not constants for it.

    Raises:
        Exception: an operation of the model has no forward mode; any type that PyTorch raises.
    """
    with (
        forward_ad.dual_level(),
        preserve_registry(model),
        sdpa_kernel(SDPBackend.MATH),
        warnings.catch_warnings(),
    ):
        # PyTorch itself emits this warning when forward mode is first used.
        warnings.filterwarnings("ignore", message="`torch.jit", category=DeprecationWarning)
        duals = {
            f"model.{name}": forward_ad.make_dual(parameters[name].detach(), tangent)  # type: ignore[no-untyped-call]
            for name, tangent in direction.items()
        }
        values = functional_call(LossModule(model, losses), duals, (inputs,))
        value_BT, derivative_BT = forward_ad.unpack_dual(values)  # type: ignore[no-untyped-call]
        return torch.zeros_like(value_BT) if derivative_BT is None else derivative_BT.detach()


def differentiate_backward_twice(
    model: nn.Module, losses: Losses, parameters: Mapping[str, Tensor], direction: Direction, inputs: Any
) -> Tensor:
    """Return the derivatives of the losses [B, T] along a direction by differentiating their backward pass.

    Raises:
        Exception: the backward pass cannot be differentiated; any type that PyTorch raises.
    """
    chosen = [parameters[name] for name in direction]
    with require_grad(chosen), sdpa_kernel(SDPBackend.MATH):
        value_BT = losses(model, inputs)
        # The derivative by the weights is the same for all weights, because the products are linear in them.
        weight_BT = torch.ones_like(value_BT, requires_grad=True)
        grads: tuple[Tensor | None, ...] = (None,) * len(chosen)
        if value_BT.requires_grad:
            total = weighted_sum(value_BT, weight_BT)
            grads = torch.autograd.grad(total, chosen, create_graph=True, allow_unused=True)
        products = [(g * v).sum() for g, v in zip(grads, direction.values(), strict=True) if g is not None]
        products = [product for product in products if product.requires_grad]
        if not products:
            return torch.zeros_like(value_BT).detach()
        (derivative_BT,) = torch.autograd.grad(torch.stack(products).sum(), weight_BT)
        return derivative_BT.detach()


def differentiate_in_loop(
    model: nn.Module, losses: Losses, parameters: Mapping[str, Tensor], direction: Direction, inputs: Any
) -> Tensor:
    """Return the derivatives of the losses [B, T] along a direction by one backward pass per loss."""
    chosen = [parameters[name] for name in direction]
    value_BT = losses(model, inputs).detach()
    derivative_BT = torch.zeros_like(value_BT)
    for b, t in torch.ones_like(value_BT, dtype=torch.bool).nonzero().tolist():
        grads = plain_gradients(lambda b=b, t=t: losses(model, inputs)[b, t], chosen).gradients  # type: ignore[misc]
        products = [(g * v).sum() for g, v in zip(grads, direction.values(), strict=True)]
        derivative_BT[b, t] = torch.stack(products).sum()
    return derivative_BT


FORWARD_MODE, TWO_BACKWARDS, ONE_BY_ONE = "forward mode", "two backward passes", "one backward pass per position"
DERIVATIVES: dict[str, Derivatives] = {
    FORWARD_MODE: differentiate_forward,
    TWO_BACKWARDS: differentiate_backward_twice,
    ONE_BY_ONE: differentiate_in_loop,
}
"""The methods by name, the fastest first."""
