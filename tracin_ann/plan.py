"""The plan of gradients: which step of the ladder serves which parameter, and why not a higher one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

RULE, VMAP, LOOP, NONE = "layer rule", "vmap(grad)", "loop", "no gradient"


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

    def share(self, step: str) -> float:
        """Return the share of parameter entries that a step serves."""
        return sum(self.sizes[name] for name in self.names(step)) / sum(self.sizes.values())
