"""Per-example gradients by `torch.func` and forward mode, for parameters without a layer rule."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad_and_value, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from tracin_ann.task import preserve_registry, rebuild

Losses = Callable[[nn.Module, Any], Tensor]


def gradients_by_vmap(
    model: nn.Module, losses: Losses, parameters: Mapping[str, Tensor], inputs: Any, tensors: list[Tensor]
) -> dict[str, Tensor]:
    """Return per-example gradients [B, ...] by vmap(grad).

    Args:
        model: the model.
        losses: `(model, batch) -> Tensor[B]`.
        parameters: the parameters by name.
        inputs: a batch.
        tensors: replacements of the batch's tensors, in the order of a walk over the batch; B rows each.
    """
    wrapped = LossModule(model, losses)

    def one(parameters: dict[str, Tensor], *example: Tensor) -> Tensor:
        batch = rebuild(inputs, [t.unsqueeze(0) for t in example])
        return functional_call(wrapped, parameters, (batch,)).squeeze(0)  # type: ignore[no-any-return]

    own = {f"model.{name}": parameter.detach() for name, parameter in parameters.items()}
    # `functional_call` does not restore the tensors of a model that has one submodule twice.
    with preserve_registry(model), sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop", category=UserWarning)
        grads, _ = vmap(grad_and_value(one), in_dims=(None, *([0] * len(tensors))))(own, *tensors)
    return {name: grads[f"model.{name}"].detach() for name in parameters}


def derivatives_by_forward_mode(
    model: nn.Module, losses: Losses, name: str, parameter: Tensor, inputs: Any
) -> Tensor | None:
    """Return the losses' derivatives [B] by a parameter with one element, in one forward; None if there is no tangent.

    All examples use the same element, so one tangent gives the derivative of each example.
    """
    with (
        forward_ad.dual_level(),
        preserve_registry(model),
        sdpa_kernel(SDPBackend.MATH),
        warnings.catch_warnings(),
    ):
        # PyTorch itself emits this warning when forward mode is first used.
        warnings.filterwarnings("ignore", message="`torch.jit", category=DeprecationWarning)
        dual = forward_ad.make_dual(parameter.detach(), torch.ones_like(parameter))  # type: ignore[no-untyped-call]
        values = functional_call(LossModule(model, losses), {f"model.{name}": dual}, (inputs,))
        tangent: Tensor | None = forward_ad.unpack_dual(values).tangent  # type: ignore[no-untyped-call]
    return None if tangent is None else tangent.detach()


class LossModule(nn.Module):
    """The user's loss as a module, so that `functional_call` replaces parameters in all of it."""

    def __init__(self, model: nn.Module, losses: Losses) -> None:
        super().__init__()
        self.model = model
        self._losses = losses

    def forward(self, batch: Any) -> Tensor:
        """Return the losses of a batch."""
        return self._losses(self.model, batch)
