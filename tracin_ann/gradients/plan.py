"""The gradient plan: the method that computes the gradients of each parameter, and the order of the methods."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

RULE, FORWARD, VMAP, LOOP, NONE = "layer rule", "forward mode", "vmap(grad)", "loop", "no gradient"
METHODS = (RULE, FORWARD, VMAP, LOOP)
_FEW_SCALARS = 4


@dataclass(frozen=True)
class Method:
    """The gradient method of a parameter.

    Attributes:
        name: `RULE`, `FORWARD`, `VMAP`, `LOOP` or `NONE`.
        reason: why the method before it is not used, or how it computes the gradients; may be empty.
    """

    name: str
    reason: str = ""


@dataclass(frozen=True)
class Plan:
    """The gradient methods of all parameters.

    Attributes:
        steps: the method of each parameter, in the model's order.
        sizes: the parameters' numbers of elements.
        rank_one: parameters whose layer was called once per example, at one position, in the verified batch.
    """

    steps: Mapping[str, Method]
    sizes: Mapping[str, int]
    rank_one: frozenset[str] = frozenset()

    def names(self, method: str) -> tuple[str, ...]:
        """Return the parameters that use a method, in the model's order."""
        return tuple(name for name, chosen in self.steps.items() if chosen.name == method)

    def next_methods(self, failed: Mapping[str, str]) -> dict[str, Method]:
        """Return the next method of each parameter whose method fails.

        Forward mode costs a forward for each parameter, and is used for parameters with one element only: before
        `vmap(grad)` if there are few of them, otherwise before the loop.

        Args:
            failed: why the method fails, by parameter.
        """
        scalars = sum(
            size == 1 and (name in failed or self.steps[name].name not in (RULE, NONE))
            for name, size in self.sizes.items()
        )
        is_forward_first = scalars <= _FEW_SCALARS
        following = {}
        for name, why in failed.items():
            order = [RULE, VMAP, LOOP]
            if self.sizes[name] == 1:
                order.insert(1 if is_forward_first else 2, FORWARD)
            following[name] = Method(order[order.index(self.steps[name].name) + 1], why)
        return following

    def share(self, method: str) -> float:
        """Return the share of parameter elements whose gradients a method computes."""
        return sum(self.sizes[name] for name in self.names(method)) / sum(self.sizes.values())
