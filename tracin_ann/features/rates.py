"""Learning rates of the selected parameters at each checkpoint, and the scales of gradients that they require."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from tracin_ann.errors import TaskError, problem
from tracin_ann.gradients import GradientScales
from tracin_ann.task import Task


@dataclass(frozen=True)
class ParameterRates:
    """The learning rates of the selected parameters at one checkpoint.

    Attributes:
        by_parameter: η_cp by parameter name.
    """

    by_parameter: Mapping[str, float]

    @cached_property
    def rate(self) -> float:
        """Return η_c, the largest of the rates."""
        return max(self.by_parameter.values())

    @cached_property
    def differ(self) -> bool:
        """Return whether two parameters have different rates."""
        return min(self.by_parameter.values()) < self.rate

    @cached_property
    def scales(self) -> GradientScales | None:
        """Return √(η_cp / η_c) of each parameter; None if all parameters have the same rate."""
        rate = self.rate
        if not self.differ:
            return None
        return GradientScales({name: (own / rate) ** 0.5 for name, own in self.by_parameter.items()})


def compute_rates(task: Task, names: Iterable[str]) -> tuple[ParameterRates, ...]:
    """Return the learning rates of these parameters at each checkpoint.

    Raises:
        TaskError: a parameter matches none or several globs of a checkpoint, or every parameter has rate 0 at every
            checkpoint.
    """
    names = tuple(names)
    rates = tuple(ParameterRates(checkpoint.rates_of(names)) for checkpoint in task.checkpoints)
    if not any(each.rate for each in rates):
        raise TaskError(
            problem(
                "every selected parameter has learning rate 0 at every checkpoint",
                got=f"{len(names)} parameters at {len(rates)} checkpoints with learning rate 0",
                expected="a learning rate above 0 for at least one",
                remedy="correct Checkpoint.learning_rate, or select other parameters with Task.parameters",
            )
        )
    return rates
