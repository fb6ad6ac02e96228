"""Derivatives of all losses of a batch along one direction of the parameters.

The product of the Jacobian of the losses [B, T] by the parameters with a direction v, J·v, by one of three methods:
forward mode in one forward pass; two backward passes, because J·v is the derivative of ⟨Jᵀ·u, v⟩ by the weights u; a
loop with one backward pass per loss. The first two compute attention by `SDPBackend.MATH`: fused kernels have no
forward mode, and their backward pass cannot be differentiated.

Shapes: B batch, T positions.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from tracin_ann.gradients.autograd import plain_gradients, require_grad, weighted_sum
from tracin_ann.gradients.functional import Losses, LossModule
from tracin_ann.task import preserve_registry


class Derivatives(NamedTuple):
    """Losses [B, T] and their derivatives [B, T] along a direction."""

    loss_BT: Tensor
    derivative_BT: Tensor


Direction = Mapping[str, Tensor]
"""A vector of the space of the parameters, by parameter; each part has the shape and dtype of its parameter."""
Differentiate = Callable[[nn.Module, Losses, Mapping[str, Tensor], Direction, Any], Derivatives]
"""(model, losses, parameters, direction, batch) -> the losses and their derivatives."""


def differentiate_forward(
    model: nn.Module, losses: Losses, parameters: Mapping[str, Tensor], direction: Direction, inputs: Any
) -> Derivatives:
    """Return losses and their derivatives along a direction by forward mode.

    Forward mode ignores `torch.no_grad`: it differentiates what the loss computes in such a block.

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
        loss_BT, derivative_BT = forward_ad.unpack_dual(values)  # type: ignore[no-untyped-call]
        if derivative_BT is None:
            derivative_BT = torch.zeros_like(loss_BT)
        return Derivatives(loss_BT.detach(), derivative_BT.detach())


def differentiate_backward_twice(
    model: nn.Module, losses: Losses, parameters: Mapping[str, Tensor], direction: Direction, inputs: Any
) -> Derivatives:
    """Return losses and their derivatives along a direction by differentiating the backward pass.

    Raises:
        Exception: the backward pass cannot be differentiated; any type that PyTorch raises.
    """
    chosen = [parameters[name] for name in direction]
    with require_grad(chosen), sdpa_kernel(SDPBackend.MATH):
        loss_BT = losses(model, inputs)
        derivative_BT = torch.zeros_like(loss_BT)
        # The products are linear in the weights, so their derivative is the same for all weights.
        weight_BT = torch.ones_like(loss_BT, requires_grad=True)
        grads: tuple[Tensor | None, ...] = ()
        if loss_BT.requires_grad:
            total = weighted_sum(loss_BT, weight_BT)
            grads = torch.autograd.grad(total, chosen, create_graph=True, allow_unused=True)
        products = [(g * v).sum() for g, v in zip(grads, direction.values(), strict=False) if g is not None]
        products = [product for product in products if product.requires_grad]
        if products:
            (derivative_BT,) = torch.autograd.grad(torch.stack(products).sum(), weight_BT)
        return Derivatives(loss_BT.detach(), derivative_BT.detach())


def differentiate_one_by_one(
    model: nn.Module, losses: Losses, parameters: Mapping[str, Tensor], direction: Direction, inputs: Any
) -> Derivatives:
    """Return losses and their derivatives along a direction by one forward and backward pass per loss."""
    chosen = [parameters[name] for name in direction]
    loss_BT = losses(model, inputs).detach()
    derivative_BT = torch.zeros_like(loss_BT)
    for b, t in torch.ones_like(loss_BT, dtype=torch.bool).nonzero().tolist():
        grads = plain_gradients(lambda b=b, t=t: losses(model, inputs)[b, t], chosen).gradients  # type: ignore[misc]
        products = [(g * v).sum() for g, v in zip(grads, direction.values(), strict=True)]
        derivative_BT[b, t] = torch.stack(products).sum()
    return Derivatives(loss_BT, derivative_BT)


DIFFERENTIATE: dict[str, Differentiate] = {
    "forward mode": differentiate_forward,
    "two backward passes": differentiate_backward_twice,
    "one backward pass per position": differentiate_one_by_one,
}
"""The methods by name, the fastest first."""
