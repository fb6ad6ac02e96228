"""Parameter groups of optimizers: learning rates, momentum, and second moments by parameter name."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tracin_ann.errors import CheckpointError, UsageError, problem

Rate = float | Mapping[str, float]
"""The learning rate of a checkpoint, or rates by parameter name."""

# Prefixes that DDP and torch.compile add to every name of the module that they wrap.
_WRAPPERS = ("module.", "_orig_mod.")
_N_SHOWN = 4


@dataclass(frozen=True)
class SavedGroup:
    """A parameter group in the state dict of an optimizer.

    Attributes:
        rate: its learning rate.
        indices: the numbers that the state dict gives to its parameters, in the order of the group.
        names: the names of these parameters, if the optimizer was made from named parameters (`param_names`).
    """

    rate: float
    indices: tuple[int, ...]
    names: tuple[str, ...] | None = None


@dataclass(frozen=True)
class SavedOptimizer:
    """The state dict of an optimizer.

    Attributes:
        groups: its parameter groups.
        shapes: shapes of parameters by their numbers, where the optimizer keeps tensors of the same shape.
    """

    groups: tuple[SavedGroup, ...]
    shapes: Mapping[int, tuple[int, ...]]


def is_optimizer_state(value: object) -> bool:
    """Return whether a value has the form of an optimizer's state dict."""
    return (
        isinstance(value, Mapping)
        and isinstance(value.get("param_groups"), list)
        and isinstance(value.get("state"), Mapping)
    )


def read_optimizer_state(state: Mapping[str, Any], where: str) -> SavedOptimizer:
    """Return the groups of an optimizer's state dict.

    Args:
        state: the state dict.
        where: where it was found, for messages.

    Raises:
        CheckpointError: it has no groups, or a group lacks a learning rate or its parameters.
    """
    groups = []
    for i, group in enumerate(state["param_groups"]):
        rate = read_rate(group.get("lr")) if isinstance(group, Mapping) else None
        indices = group.get("params") if isinstance(group, Mapping) else None
        if rate is None or not isinstance(indices, list) or not all(isinstance(index, int) for index in indices):
            raise CheckpointError(
                problem(
                    f"{where} has an unusable parameter group {i}",
                    got=f"lr {group.get('lr')!r}" if isinstance(group, Mapping) else type(group).__name__,
                    expected="a finite learning rate, 0 or more, and the numbers of the group's parameters",
                    remedy="give the learning rates as an argument",
                )
            )
        names = group.get("param_names")
        named = isinstance(names, list) and len(names) == len(indices) and all(isinstance(n, str) for n in names)
        groups.append(SavedGroup(rate, tuple(indices), tuple(names) if named else None))
    if not groups:
        remedy = "give the learning rates as an argument"
        raise CheckpointError(problem(f"{where} is empty", got="no parameter group", expected="one", remedy=remedy))
    return SavedOptimizer(tuple(groups), dict(_list_shapes(state["state"])))


def _list_shapes(state: object) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Yield the shapes of parameters by number, from the tensors that Adam and SGD keep for each parameter."""
    for index, kept in state.items() if isinstance(state, Mapping) else ():
        for key in ("exp_avg_sq", "exp_avg", "momentum_buffer"):
            value = kept.get(key) if isinstance(kept, Mapping) else None
            if isinstance(value, Tensor) and isinstance(index, int):
                yield index, tuple(value.shape)
                break


def read_rate(value: object) -> float | None:
    """Return a learning rate as a float; None if it is not a finite number of 0 or more."""
    if isinstance(value, Tensor):
        value = value.item() if value.numel() == 1 else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return abs(float(value)) if 0 <= value < math.inf else None


def read_momentum(state: Mapping[str, Any]) -> float | None:
    """Return the momentum β of gradient descent from an optimizer's state dict, 0 without momentum.

    None for other optimizers, such as Adam and RMSprop, whose updates are not the learning rate times a mean of
    gradients; also with dampening, or if β differs between parameter groups.
    """
    groups = [group if isinstance(group, Mapping) else {} for group in state["param_groups"]]
    kept = {name for own in state["state"].values() if isinstance(own, Mapping) for name in own}
    # RMSprop and Muon have momentum too.
    if kept - {"momentum_buffer"} or any("eps" in group or group.get("dampening") != 0 for group in groups):
        return None
    momenta = {read_rate(group.get("momentum")) for group in groups}
    momentum = momenta.pop() if len(momenta) == 1 else None
    return momentum if momentum is not None and momentum < 1 else None


def find_largest_rate(rate: Rate) -> float:
    """Return the rate, or the largest one of a mapping."""
    return max(rate.values()) if isinstance(rate, Mapping) else rate


def count_steps(
    rates: Sequence[Rate], sums: Sequence[Rate | None], momenta: Sequence[float | None]
) -> list[float | None]:
    """Return `Checkpoint.steps` of the checkpoints of a run of gradient descent: Σ_i S_i / (1 − β_i) / η_c.

    With momentum β, a constant gradient moves the weights by η / (1 − β) per step. Of several rates of parameters, the
    largest is used.

    Args:
        rates: η_c.
        sums: S_i, the sum of the rates of the steps since the checkpoint before; None: not known.
        momenta: β_i, as of `read_momentum`.

    Returns:
        None where η_c is 0; None for all checkpoints if a sum or a momentum is not known.
    """
    parts = [
        find_largest_rate(own) / (1 - momentum)
        for own, momentum in zip(sums, momenta, strict=True)
        if own is not None and momentum is not None
    ]
    total = sum(parts) if len(parts) == len(rates) else 0.0
    largest = [find_largest_rate(rate) for rate in rates]
    return [total / rate if total and rate else None for rate in largest]


def find_common_rate(optimizers: Sequence[SavedOptimizer]) -> float | None:
    """Return the learning rate of all groups that have parameters, or None if they differ."""
    rates = {group.rate for optimizer in optimizers for group in optimizer.groups if group.indices}
    return rates.pop() if len(rates) == 1 else None


def map_saved_names(optimizer: SavedOptimizer) -> dict[int, str] | None:
    """Return the names of parameters by number that the state dict itself contains; None if one is missing."""
    named: dict[int, str] = {}
    for group in optimizer.groups:
        if group.names is None:
            return None
        named.update(zip(group.indices, strip_wrappers(group.names), strict=True))
    return named


def match_names_in_order(
    optimizer: SavedOptimizer, names: Sequence[str], shapes: Mapping[str, tuple[int, ...]], where: str
) -> dict[int, str]:
    """Return the names of parameters by number; the names are given in the order of the optimizer's groups.

    Args:
        optimizer: the state dict.
        names: the name of each parameter, group by group.
        shapes: the shapes of the model's parameters by name.
        where: where the state dict was found, for messages.

    Raises:
        CheckpointError: the number of names differs from that of parameters, or a shape differs.
    """
    indices = [index for group in optimizer.groups for index in group.indices]
    remedy = "give one name per parameter, in the order in which the optimizer got them, group by group"
    if len(indices) != len(names) or len(set(names)) != len(names):
        raise CheckpointError(
            problem(
                f"the parameter names do not match {where}",
                got=f"{len(names)} names, {len(set(names))} of them different",
                expected=f"{len(indices)}, one for each parameter of the optimizer",
                remedy=remedy,
            )
        )
    named = dict(zip(indices, names, strict=True))
    for index, name in named.items():
        kept, own = optimizer.shapes.get(index), shapes.get(name)
        if own is None or (kept is not None and kept != own):
            raise CheckpointError(
                problem(
                    f"the parameter names do not match {where}",
                    got=f"{name} of shape {None if own is None else list(own)} for parameter {index}",
                    expected="a parameter of the model" if own is None else f"shape {list(kept or ())}",
                    remedy=remedy,
                )
            )
    return named


def collect_rates(
    optimizers: Sequence[SavedOptimizer], named: Sequence[Mapping[int, str]], names: Iterable[str]
) -> dict[str, float]:
    """Return the learning rate of each parameter in these optimizers, and 0 for each other one of `names`."""
    rates = dict.fromkeys(names, 0.0)
    for optimizer, name_of in zip(optimizers, named, strict=True):
        for group in optimizer.groups:
            rates.update({name_of[index]: group.rate for index in group.indices})
    return rates


def compact_rates(rates: Mapping[str, float]) -> Rate:
    """Return one rate if all parameters have the same one, else the rates by name."""
    values = set(rates.values())
    return values.pop() if len(values) == 1 else dict(rates)


def strip_wrappers(names: Sequence[str]) -> list[str]:
    """Return parameter names without the prefixes that DDP and torch.compile add to all of them."""
    names = list(names)
    while prefix := next((p for p in _WRAPPERS if names and all(name.startswith(p) for name in names)), ""):
        names = [name.removeprefix(prefix) for name in names]
    return [name.replace(f".{_WRAPPERS[1]}", ".") for name in names]


def name_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the model's parameters by name, without the prefixes of DDP and torch.compile."""
    named = dict(model.named_parameters())
    return dict(zip(strip_wrappers(list(named)), named.values(), strict=True))


class RateMeter:
    """The learning rates of a model's parameters at the last optimizer step, and their sums over steps.

    A hook of the optimizer reads its parameter groups directly before each step, so a scheduler may step before or
    after `RunRecorder.step`.

    Args:
        model: the model.
        optimizers: the optimizers that update it.

    Attributes:
        n_steps: number of steps of the first optimizer.
        latest: the rate of each parameter at the last step of its optimizer, by name. Before any step: the present one.
        sums: the sum of the rates of each parameter over the steps since `restart`, by name.

    Raises:
        UsageError: an optimizer does not update parameters of the model, or two optimizers update the same one.
    """

    def __init__(self, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self._optimizers = tuple(optimizers)
        parameters = name_parameters(model)
        self._name_of = {id(parameter): name for name, parameter in parameters.items()}
        owned = [name for optimizer in optimizers for name, _, _ in self._walk(optimizer)]
        self._check(owned)
        self.n_steps = 0
        self.latest = {name: 0.0 for name, p in parameters.items() if p.requires_grad or name in set(owned)}
        self.sums = dict.fromkeys(self.latest, 0.0)
        for optimizer in self._optimizers:
            self._read(optimizer)
        self._handles = [optimizer.register_step_pre_hook(self._observe) for optimizer in self._optimizers]

    def _check(self, owned: list[str]) -> None:
        twice = next((name for name in owned if owned.count(name) > 1), None) if len(self._optimizers) > 1 else None
        empty = any(not any(self._walk(optimizer)) for optimizer in self._optimizers)
        if twice or empty or not self._optimizers:
            raise UsageError(
                problem(
                    "the optimizers do not match the model",
                    got=f"two optimizers of {twice}" if twice else "an optimizer without parameters of the model",
                    expected="optimizers that update different parameters of the model",
                    remedy="pass the model and the optimizer that trains it",
                )
            )

    def _walk(self, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
        """Yield name, parameter and group of each parameter of the model in an optimizer."""
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) in self._name_of:
                    yield self._name_of[id(parameter)], parameter, group

    def _read(self, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        read = {name: float(group["lr"]) for name, _, group in self._walk(optimizer)}
        # A group that was added after the construction.
        self.sums.update({name: 0.0 for name in read if name not in self.sums})
        self.latest.update(read)
        return read

    def _observe(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        self.n_steps += optimizer is self._optimizers[0]
        for name, rate in self._read(optimizer).items():
            self.sums[name] += rate

    def read_momentum(self) -> float | None:
        """Return the momentum of gradient descent; None for other optimizers, or if it differs between optimizers."""
        momenta = {read_momentum({"param_groups": o.param_groups, "state": o.state}) for o in self._optimizers}
        return momenta.pop() if len(momenta) == 1 else None

    def restart(self) -> None:
        """Set the sums to 0."""
        self.sums = dict.fromkeys(self.sums, 0.0)

    def close(self) -> None:
        """Remove the hooks from the optimizers."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def read_moments(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return Adam's second moments `exp_avg_sq` by parameter name, on the CPU, and their metadata.

        The metadata is text: `format`, `version` and `groups`, the JSON list of `beta2`, `eps`, `step` and `names` of
        the parameters that share them.

        Raises:
            UsageError: no optimizer keeps second moments.
        """
        moments: dict[str, Tensor] = {}
        groups: dict[tuple[float, float, float], list[str]] = {}
        for optimizer in self._optimizers:
            for name, parameter, group in self._walk(optimizer):
                kept = optimizer.state.get(parameter, {})
                if isinstance(kept.get("exp_avg_sq"), Tensor) and kept["exp_avg_sq"].shape == parameter.shape:
                    moments[name] = kept["exp_avg_sq"].detach().to("cpu", copy=True).contiguous()
                    key = (float(group.get("betas", (0, 0))[1]), float(group.get("eps", 0)), float(kept.get("step", 0)))
                    groups.setdefault(key, []).append(name)
        if not moments:
            names = ", ".join(type(optimizer).__name__ for optimizer in self._optimizers[:_N_SHOWN])
            raise UsageError(
                problem(
                    "second moments cannot be saved",
                    got=f"an optimizer without exp_avg_sq ({names})",
                    expected="Adam, AdamW or another optimizer that keeps exp_avg_sq",
                    remedy="leave out save_moments=True",
                )
            )
        described = [{"beta2": b, "eps": e, "step": s, "names": names} for (b, e, s), names in groups.items()]
        return moments, {"format": "tracin-moments", "version": "1", "groups": json.dumps(described)}
