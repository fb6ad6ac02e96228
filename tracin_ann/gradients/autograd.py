"""Plain autograd: gradients of losses, the leaves that they reach, and the precision of the graph behind a tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)
Weighting = Callable[[bool], Tensor]
"""Whether the losses are computed in half precision -> weights of the losses [K, B]."""


@contextmanager
def require_grad(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Let leaves require a gradient in the block; after it, no leaf requires one."""
    leaves = list(tensors)
    try:
        for leaf in leaves:
            leaf.requires_grad_(True)
        yield
    finally:
        for leaf in leaves:
            leaf.requires_grad_(False)


@dataclass(frozen=True)
class PlainGradients:
    """Autograd's gradients of a scalar or of weighted sums of losses.

    Attributes:
        value: the scalar or the losses, detached.
        gradients: by parameter, of a scalar, or [K, ...] of weighted sums; zeros for a parameter that is not reached.
        reached: by parameter, whether the values depend on it.
        half: whether the values were computed in half precision.
    """

    value: Tensor
    gradients: list[Tensor]
    reached: list[bool]
    half: bool


def plain_gradients(
    values: Callable[[], Tensor], parameters: Sequence[Tensor], weighting: Weighting | None = None
) -> PlainGradients:
    """Return autograd's gradients of a scalar, or of weighted sums of losses.

    Args:
        values: computes the scalar or the losses.
        parameters: the leaves to differentiate by.
        weighting: the weights of the losses; None for a scalar.

    Raises:
        RuntimeError: of weighted sums, if a backward inside the backward leaves a gradient in a parameter's `grad`.
    """
    rounds: list[tuple[Tensor | None, ...]] = []
    with require_grad(parameters):
        value = values()
        half = is_half_precision(value)
        weights = [None] if weighting is None else list(weighting(half).to(value))
        # Backward runs to every leaf, to detect nodes that run another backward pass inside.
        inputs = [*parameters, *([] if weighting is None else other_leaves(value, parameters))]
        for k, weights_B in enumerate(weights):
            grads: tuple[Tensor | None, ...] = (None,) * len(parameters)
            if value.requires_grad:
                more = k + 1 < len(weights)
                total = value if weights_B is None else weighted_sum(value, weights_B)
                grads = torch.autograd.grad(total, inputs, retain_graph=more, allow_unused=True)
            rounds.append(grads[: len(parameters)])
        if any(parameter.grad is not None for parameter in parameters):
            for parameter in parameters:
                parameter.grad = None
            raise RuntimeError("a backward runs inside backward, as reentrant checkpointing does (use_reentrant=True)")
    dense = [
        [torch.zeros_like(p) if g is None else (g.to_dense() if g.is_sparse else g).detach() for g in each]
        for p, each in zip(parameters, zip(*rounds, strict=True), strict=True)
    ]
    gradients = [each[0] if weighting is None else torch.stack(each) for each in dense]
    return PlainGradients(value.detach(), gradients, [grad is not None for grad in rounds[0]], half)


def weighted_sum(values: Tensor, weights: Tensor) -> Tensor:
    """Return the sum of values times weights, a scalar; its gradient by the values is the weights, without rounding.

    `torch.autograd.grad` with `grad_outputs` imports sympy (0.5 s) to compare shapes; a scalar needs no comparison.
    """
    return (values * weights).sum()


def detach_graph(value: Any) -> Any:
    """Return a tensor as a leaf that requires a gradient if the tensor did; other values unchanged."""
    return value.detach().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


def nodes(tensor: Tensor) -> Iterator[Any]:
    """Yield every node of the graph behind a tensor once."""
    waiting: list[Any] = [tensor.grad_fn]
    seen = {None}
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            yield node
            waiting += [above for above, _ in node.next_functions]


def other_leaves(tensor: Tensor, known: Iterable[Tensor]) -> list[Tensor]:
    """Return the leaves that backward from a tensor reaches, except the known ones."""
    own = {id(leaf) for leaf in known}
    return [node.variable for node in nodes(tensor) if hasattr(node, "variable") and id(node.variable) not in own]


def is_half_precision(tensor: Tensor) -> bool:
    """Return whether a tensor, or a tensor of the graph behind it, has a half-precision dtype."""
    return tensor.dtype in HALF or any(made.dtype in HALF for node in nodes(tensor) for made in node._input_metadata)
