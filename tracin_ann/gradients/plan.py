"""The plan of gradients: which step of the ladder serves which parameter, and why not a higher one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

RULE, FORWARD, VMAP, LOOP, NONE = "layer rule", "forward mode", "vmap(grad)", "loop", "no gradient"
STEPS = (RULE, FORWARD, VMAP, LOOP)
_FEW_NUMBERS = 4


@dataclass(frozen=True)
class Step:
    """Which step of the ladder serves a parameter, and why not the one above."""

    name: str
    reason: str = ""


@dataclass(frozen=True)
class Plan:
    """Which step serves which parameter.

    Attributes:
        steps: by parameter, in the model's order.
        sizes: the parameters' numbers of entries.
        rank_one: parameters whose layer the proof's batch called once an example, at one position.
    """

    steps: Mapping[str, Step]
    sizes: Mapping[str, int]
    rank_one: frozenset[str] = frozenset()

    def names(self, step: str) -> tuple[str, ...]:
        """Return the parameters that a step serves, in the model's order."""
        return tuple(name for name, chosen in self.steps.items() if chosen.name == step)

    def lower(self, failed: Mapping[str, str]) -> dict[str, Step]:
        """Return the next steps of parameters that theirs does not serve, by parameter and reason.

        Forward mode costs a forward for each parameter and is for those of one number: before a pass of
        `vmap(grad)` where they are few, else before the loop.
        """
        numbers = sum(
            size == 1 and (name in failed or self.steps[name].name not in (RULE, NONE))
            for name, size in self.sizes.items()
        )
        forward_first = numbers <= _FEW_NUMBERS
        lower = {}
        for name, why in failed.items():
            ladder = [RULE, VMAP, LOOP]
            if self.sizes[name] == 1:
                ladder.insert(1 if forward_first else 2, FORWARD)
            lower[name] = Step(ladder[ladder.index(self.steps[name].name) + 1], why)
        return lower

    def share(self, step: str) -> float:
        """Return the share of parameter entries that a step serves."""
        return sum(self.sizes[name] for name in self.names(step)) / sum(self.sizes.values())
