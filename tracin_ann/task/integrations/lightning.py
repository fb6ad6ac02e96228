"""Runs of Lightning: the module from its hyper-parameters, `.ckpt` files in order, and their learning rates.

Files are read by PyTorch with `weights_only=True`; Lightning itself is not imported.
"""

from __future__ import annotations

import copy
import csv
import functools
import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tracin_ann.errors import CheckpointError, TaskError, first_line, problem
from tracin_ann.task.integrations.param_groups import (
    Rate,
    SavedGroup,
    SavedOptimizer,
    collect_rates,
    compact_rates,
    count_steps,
    find_common_rate,
    find_largest_rate,
    is_optimizer_state,
    map_saved_names,
    match_names_in_order,
    read_momentum,
    read_optimizer_state,
    read_rate,
)
from tracin_ann.task.integrations.run_record import RunCheckpoint, has_run_record, read_run_record
from tracin_ann.task.state_dicts import read_content, select_entry

STATE_DICT = "state_dict"
_HYPER_PARAMETERS, _HYPER_PARAMETERS_NAME = "hyper_parameters", "hparams_name"
_METRICS, _RATE = "metrics.csv", "lr-"
_REMEDY = "pass learning_rates=[...], one for each checkpoint"

# What configure_optimizers often reads of its trainer.
_TRAINER = SimpleNamespace(
    estimated_stepping_batches=1000,
    max_steps=1000,
    max_epochs=10,
    num_training_batches=100,
    accumulate_grad_batches=1,
    world_size=1,
)

Module = type[nn.Module] | nn.Module | Callable[[], nn.Module]


@dataclass(frozen=True)
class LightningRun:
    """A run of Lightning: a function that returns the module, and its checkpoints in training order."""

    model: Callable[[], nn.Module]
    checkpoints: tuple[LightningCheckpoint, ...]


@dataclass(frozen=True)
class LightningCheckpoint:
    """A `.ckpt` file, its learning rates, the file of Adam's second moments, if they were saved, and its steps."""

    path: Path
    rates: Rate
    second_moments: Path | None
    steps: float | None


@dataclass(frozen=True)
class _Saved:
    """A `.ckpt` file.

    Attributes:
        path: the file.
        content: its entries; their tensors are mapped.
        step: number of optimizer steps.
        entry: its entry in the record of the run; None: not recorded.
        moments: the file of Adam's second moments, from the record of the run; None: not recorded.
    """

    path: Path
    content: Mapping[str, Any]
    step: int
    entry: RunCheckpoint | None = None
    moments: Path | None = None

    @property
    def states(self) -> list[Mapping[str, Any]]:
        """Return the states of optimizers; empty if the file was saved without them."""
        states = self.content.get("optimizer_states")
        return states if isinstance(states, list) and all(map(is_optimizer_state, states)) else []

    @property
    def momentum(self) -> float | None:
        """Return the momentum of gradient descent; None: another optimizer, or several, or not known."""
        if self.entry is not None:
            return self.entry.momentum
        return read_momentum(self.states[0]) if len(self.states) == 1 else None

    def with_rates(self, rates: Rate, steps: float | None) -> LightningCheckpoint:
        """Return the checkpoint with these learning rates and steps."""
        return LightningCheckpoint(self.path, rates, self.moments or (self.path if self.states else None), steps)


def read_lightning_run(
    module: Module,
    checkpoints: object,
    learning_rates: Sequence[float | Mapping[str, float]] | None,
    *,
    all_parameters: bool,
) -> LightningRun:
    """Return the module and the checkpoints of a run, in training order.

    Args:
        module: the class of the module, `functools.partial` of it, a module, or a function that returns one.
        checkpoints: `.ckpt` files, one such file, or a folder of them.
        learning_rates: one for each checkpoint; None: from the record of the run, the optimizers' states, or the
            logged metrics.
        all_parameters: the optimizers' parameters have to be those of the module that require a gradient.

    Raises:
        CheckpointError: a file is missing, unreadable or not a checkpoint of Lightning, or has no learning rates.
        TaskError: the module cannot be made.
    """
    saved = _find_checkpoints(checkpoints)
    model = _make_factory(module, saved[0])
    steps: list[float | None] = [None] * len(saved)
    if learning_rates is not None:
        if isinstance(learning_rates, str) or len(learning_rates) != len(saved):
            raise CheckpointError(
                problem(
                    "the learning rates do not match the checkpoints",
                    got=f"{len(learning_rates)} learning rates",
                    expected=f"{len(saved)}, one for each of {', '.join(each.path.name for each in saved)}",
                    remedy="pass one rate, or one mapping of parameter names to rates, for each checkpoint",
                )
            )
        rates = list(learning_rates)
    else:
        reader = _RateReader(model, all_parameters)
        rates = [reader.read(each) if each.entry is None else each.entry.learning_rates for each in saved]
        steps = count_steps(rates, _sum_rates(saved, rates), [each.momentum for each in saved])
    found = [each.with_rates(rate, count) for each, rate, count in zip(saved, rates, steps, strict=True)]
    return LightningRun(model, tuple(found))


def _sum_rates(saved: Sequence[_Saved], rates: Sequence[Rate]) -> list[Rate | None]:
    """Return the sum of the rates since the checkpoint before: as recorded, or by the trapezoidal rule.

    Before the first checkpoint, its rate is used.
    """
    if saved[0].entry is not None:
        return [None if each.entry is None else each.entry.summed_learning_rates for each in saved]
    step_C, rate_C = [0, *(each.step for each in saved)], [find_largest_rate(rate) for rate in (rates[0], *rates)]
    return [
        (after - before) * (first + last) / 2
        for (before, after), (first, last) in zip(pairwise(step_C), pairwise(rate_C), strict=True)
    ]


def _find_checkpoints(given: object) -> list[_Saved]:
    """Return the checkpoints sorted by step, without copies such as `last.ckpt`."""
    if isinstance(given, str | os.PathLike):
        path = Path(given)
        if path.is_dir() and has_run_record(path):
            return [
                _open(path / entry.path, entry, None if entry.optimizer is None else path / entry.optimizer)
                for entry in read_run_record(path).checkpoints
            ]
        paths = _list_folder(path) if path.is_dir() else [path]
    elif isinstance(given, Sequence) and given and all(isinstance(path, str | os.PathLike) for path in given):
        paths = [Path(path) for path in given]
    else:
        raise CheckpointError(
            problem(
                "the checkpoints of the Lightning run cannot be used",
                got=f"{type(given).__name__} {given!r}"[:160],
                expected="a list of paths of .ckpt files, or a folder",
                remedy="pass the folder that contains the .ckpt files",
            )
        )
    return _drop_copies(sorted((_open(path) for path in paths), key=lambda each: (each.step, "last" in each.path.name)))


def _list_folder(folder: Path) -> list[Path]:
    for place in (folder, folder / "checkpoints"):
        if paths := sorted(place.glob("*.ckpt")):
            return paths
    below = sorted({str(path.parent.relative_to(folder)) for path in folder.rglob("*.ckpt")})
    raise CheckpointError(
        problem(
            f"the folder {folder} has no checkpoints of Lightning",
            got="no *.ckpt file in it or in its folder checkpoints",
            expected="one .ckpt file or more",
            remedy=f"pass one of its folders: {', '.join(below[:4])}" if below else "correct the path, or train first",
        )
    )


def _open(path: Path, entry: RunCheckpoint | None = None, moments: Path | None = None) -> _Saved:
    content = read_content(path, mapped=True)
    select_entry(content, STATE_DICT, os.fspath(path))
    step = content.get("global_step")
    if type(step) is not int:
        raise CheckpointError(
            problem(
                f"checkpoint {path} is not a checkpoint of Lightning",
                got=f"global_step {step!r}",
                expected="entries state_dict and global_step",
                remedy="use Checkpoint.from_file for files of another training loop",
            )
        )
    return _Saved(path, content, step, entry, moments)


def _drop_copies(saved: Sequence[_Saved]) -> list[_Saved]:
    """Return the first checkpoint of each step.

    Raises:
        CheckpointError: two checkpoints of one step have different weights.
    """
    kept: list[_Saved] = []
    for each in saved:
        if not kept or kept[-1].step != each.step:
            kept.append(each)
        elif not _have_equal_weights(kept[-1].content[STATE_DICT], each.content[STATE_DICT]):
            raise CheckpointError(
                problem(
                    f"two checkpoints of step {each.step} have different weights",
                    got=f"{kept[-1].path} and {each.path}",
                    expected="the checkpoints of one run",
                    remedy="pass the paths of one run's checkpoints",
                )
            )
    return kept


def _have_equal_weights(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    tensors = [{n: v for n, v in state.items() if isinstance(v, Tensor)} for state in (one, other)]
    return tensors[0].keys() == tensors[1].keys() and all(
        value.shape == tensors[1][name].shape and torch.equal(value, tensors[1][name])
        for name, value in tensors[0].items()
    )


def _make_factory(module: Module, saved: _Saved) -> Callable[[], nn.Module]:
    """Return a function that returns the module."""
    if isinstance(module, nn.Module):
        instance = module
        return lambda: instance
    overrides: dict[str, Any] = {}
    made_by: type | Callable[[], nn.Module] = module
    if isinstance(module, functools.partial) and isinstance(module.func, type):
        if module.args:
            raise TaskError(
                problem(
                    "hyper-parameters cannot be replaced",
                    got="a partial with arguments without names",
                    expected="arguments with names",
                    remedy=f"pass functools.partial({module.func.__name__}, name=value)",
                )
            )
        made_by, overrides = module.func, module.keywords
    if not isinstance(made_by, type):
        return made_by
    cls: type = made_by
    arguments = _select_arguments(cls, saved.content, overrides)

    def make() -> nn.Module:
        try:
            made: nn.Module = cls(**arguments)
            # Modules whose layers are made by configure_model have none before.
            configure = getattr(made, "configure_model", None)
            if configure is not None:
                configure()
        except Exception as error:
            raise TaskError(
                problem(
                    f"the module {cls.__name__} cannot be made",
                    got=f"{first_line(error)} with hyper-parameters {', '.join(arguments) or '(none)'}",
                    expected="a class that its saved hyper-parameters can make",
                    remedy="call save_hyperparameters() in its __init__, or pass a function that returns the module",
                )
            ) from error
        return made

    return make


def _select_arguments(cls: type, content: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of the class: its saved hyper-parameters, with replaced ones."""
    saved = dict(content.get(_HYPER_PARAMETERS) or {})
    accepted = inspect.signature(cls).parameters
    name = content.get(_HYPER_PARAMETERS_NAME)
    if (
        isinstance(name, str)
        and name in accepted
        and accepted[name].kind is not inspect.Parameter.VAR_KEYWORD
        and name not in saved
    ):
        # One argument takes all hyper-parameters.
        return {name: saved, **overrides}
    if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in accepted.values()):
        saved = {key: value for key, value in saved.items() if key in accepted}
    return {key: value for key, value in saved.items() if not key.startswith("_")} | dict(overrides)


class _RateReader:
    """Reads the learning rates of `.ckpt` files; the module and its optimizers are made once.

    Args:
        model: returns the module.
        all_parameters: as for `read_lightning_run`.
    """

    def __init__(self, model: Callable[[], nn.Module], all_parameters: bool) -> None:
        self._model, self._all_parameters = model, all_parameters

    @functools.cached_property
    def _module(self) -> nn.Module:
        return self._model()

    @functools.cached_property
    def _configured(self) -> list[SavedOptimizer] | str:
        """Return the groups of the optimizers that the module configures, with names, or why they are unknown."""
        try:
            module = copy.deepcopy(self._module)
            # Schedules depend on the trainer; only the groups are used here.
            vars(module)["_trainer"] = _TRAINER
            made = list(_list_optimizers(module.configure_optimizers()))  # type: ignore[operator]
        # Code of the user, which may need other attributes of a trainer.
        except Exception as error:
            return f"{first_line(error)} in configure_optimizers()"
        name_of = {id(parameter): name for name, parameter in module.named_parameters()}
        optimizers = []
        for optimizer in made:
            groups = []
            for group in optimizer.param_groups:
                names = [name_of.get(id(parameter), "") for parameter in group["params"]]
                groups.append(SavedGroup(float(group["lr"]), tuple(range(len(names))), tuple(names)))
            optimizers.append(SavedOptimizer(tuple(groups), {}))
        return optimizers or "configure_optimizers() returns no optimizer"

    def read(self, saved: _Saved) -> Rate:
        """Return the learning rates of a checkpoint.

        Raises:
            CheckpointError: the file and the logged metrics contain none, or the parameters of its groups are unknown.
        """
        if not saved.states:
            return self._read_logged(saved)
        optimizers = [
            read_optimizer_state(state, f"optimizer state {i} of {saved.path}") for i, state in enumerate(saved.states)
        ]
        rate = find_common_rate(optimizers)
        if rate is not None and (not self._all_parameters or self._covers(optimizers)):
            return rate
        return self._name_rates(saved, optimizers)

    def _covers(self, optimizers: Sequence[SavedOptimizer]) -> bool:
        """Return whether the optimizers have as many parameters as the module has with a gradient."""
        trained = sum(p.requires_grad for p in self._module.parameters())
        return sum(len(group.indices) for optimizer in optimizers for group in optimizer.groups) == trained

    def _name_rates(self, saved: _Saved, optimizers: Sequence[SavedOptimizer]) -> Rate:
        """Return the rates by parameter name, from names in the file or from `configure_optimizers`."""
        named = [map_saved_names(optimizer) for optimizer in optimizers]
        if any(name_of is None for name_of in named):
            configured = self._configured
            if isinstance(configured, str):
                raise CheckpointError(self._describe_unknown(saved, configured))
            sizes, own = (
                [[len(group.indices) for group in optimizer.groups] for optimizer in each]
                for each in (optimizers, configured)
            )
            if sizes != own:
                reason = f"configure_optimizers() makes groups of {own} parameters, the file has groups of {sizes}"
                raise CheckpointError(self._describe_unknown(saved, reason))
            shapes = {name: tuple(parameter.shape) for name, parameter in self._module.named_parameters()}
            named = [
                match_names_in_order(
                    optimizer,
                    [name for group in groups.groups for name in group.names or ()],
                    shapes,
                    f"optimizer state {i} of {saved.path}",
                )
                for i, (optimizer, groups) in enumerate(zip(optimizers, configured, strict=True))
            ]
        found = [name_of for name_of in named if name_of is not None]
        trained = [name for name, parameter in self._module.named_parameters() if parameter.requires_grad]
        return compact_rates(collect_rates(optimizers, found, trained))

    def _describe_unknown(self, saved: _Saved, reason: str) -> str:
        return problem(
            f"the parameters of the optimizer's groups in {saved.path} are unknown",
            got=reason,
            expected="the same groups as in training",
            remedy=f"{_REMEDY}, or make the optimizer from self.named_parameters()",
        )

    def _read_logged(self, saved: _Saved) -> Rate:
        """Return the rates that LearningRateMonitor logged last, at the checkpoint's step or before it."""
        logged = _read_metrics(saved)
        rates = set(logged.values())
        if len(rates) == 1:
            return rates.pop()
        configured = self._configured
        if isinstance(configured, str) or len(configured) != 1:
            reason = configured if isinstance(configured, str) else f"{len(configured)} optimizers"
            raise CheckpointError(self._describe_unknown(saved, reason))
        groups = configured[0].groups
        by_number = {name.rpartition("/pg")[2]: rate for name, rate in logged.items()}
        own = [by_number.get(str(i + 1)) for i in range(len(groups))]
        if len(logged) != len(groups) or None in own:
            reason = f"{len(groups)} groups in configure_optimizers(), logged are {', '.join(logged)}"
            raise CheckpointError(self._describe_unknown(saved, reason))
        trained = [name for name, parameter in self._module.named_parameters() if parameter.requires_grad]
        found = dict.fromkeys(trained, 0.0)
        for group, rate in zip(groups, own, strict=True):
            found.update({name: rate for name in group.names or () if rate is not None})
        return compact_rates(found)


def _list_optimizers(configured: object) -> Iterator[torch.optim.Optimizer]:
    """Yield the optimizers in a value of `configure_optimizers`."""
    if isinstance(configured, torch.optim.Optimizer):
        yield configured
    elif isinstance(configured, Mapping):
        # Dicts of schedulers have no optimizer.
        yield from _list_optimizers(configured.get("optimizer"))
    elif isinstance(configured, Sequence):
        for item in configured:
            yield from _list_optimizers(item)


def _read_metrics(saved: _Saved) -> dict[str, float]:
    """Return the last logged learning rates by column, up to the checkpoint's step.

    Raises:
        CheckpointError: there are none.
    """
    for folder in (saved.path.parent, saved.path.parent.parent):
        if (folder / _METRICS).is_file():
            found: dict[str, float] = {}
            # Names of other metrics that begin in the same way.
            other = ("-momentum", "-weight_decay")
            with open(folder / _METRICS, newline="", encoding="utf-8") as file:
                for row in csv.DictReader(file):
                    if (row.get("step") or "").isdecimal() and int(row["step"]) <= saved.step:
                        for name, text in row.items():
                            if name and name.startswith(_RATE) and not name.endswith(other) and text:
                                rate = read_rate(float(text))
                                found.update({} if rate is None else {name: rate})
            if found:
                return found
    raise CheckpointError(
        problem(
            f"checkpoint {saved.path} has no learning rate",
            got=f"neither optimizer_states in the file nor {_RATE}* in {_METRICS} beside it",
            expected="a checkpoint with the states of optimizers (save_weights_only=False), or logged learning rates",
            remedy=_REMEDY,
        )
    )
