"""A checkpoint of a training run: the file of its weights, its learning rates and steps (`Checkpoint`)."""

from __future__ import annotations

import fnmatch
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Literal

import numpy as np
from torch import Tensor

from tracin_ann.errors import TaskError, UsageError, problem
from tracin_ann.task.integrations.param_groups import find_largest_rate

_MAX_SHOWN = 6


@dataclass(frozen=True)
class Checkpoint:
    """A saved state of the model and the learning rate, or rates, at which training saved it.

    Attributes:
        path: a file that `torch.load(weights_only=True)` or safetensors reads, or a file or directory that
            `Task.load` reads.
        learning_rate: η_c of TracInCP (Pruthi et al. 2020, section 3.3), a finite number or a tensor or array with one
            number; stored as a float. With 0, as at the first step of a warm-up, the checkpoint adds nothing to scores.
            An optimizer with parameter groups has one rate per group: a mapping from globs of parameter names to
            rates, `{"head.*": 1e-3, "body.*": 1e-4}`. Exactly one glob has to match each selected parameter.
        second_moments: where a build with a preconditioner reads Adam's second moments: a file with the state of the
            optimizer (`optimizer.pt`) or with moments by parameter name (safetensors), or a function that returns such
            a state, or {parameter name: v̂}.
        key: the entry of the file that contains the state dict; None: the file is the state dict, or contains it under
            `model`, `state_dict` or `model_state_dict`.
        steps: the number of optimizer updates of the whole run (not only those before the checkpoint), from which the
            damping of scores with a curvature matrix follows. With a learning-rate schedule, Σ_t η_t / η_c, the
            number of updates at this checkpoint's rate with the same sum of rates; with momentum β, divided by 1 − β.
            None: not known.
        run: the name of the training run, if the checkpoints are of several runs.
    """

    path: str | os.PathLike[str]
    learning_rate: float | Mapping[str, float] = field(hash=False)
    second_moments: str | os.PathLike[str] | Callable[[], Mapping[str, Any]] | None = None
    key: str | None = None
    steps: float | None = None
    run: str = ""

    def __post_init__(self) -> None:
        """Convert the learning rates to floats.

        Raises:
            TaskError: a learning rate is negative, NaN, infinite or not a number, a mapping is empty or has a key that
                is not a str, or `steps` is not a number above 0.
        """
        if self.steps is not None:
            object.__setattr__(self, "steps", self._convert_steps(self.steps))
        given: object = self.learning_rate
        if not isinstance(given, Mapping):
            object.__setattr__(self, "learning_rate", self._convert_rate(given))
            return
        if not given or not all(isinstance(pattern, str) for pattern in given):
            raise TaskError(
                problem(
                    f"checkpoint {os.fspath(self.path)} has bad learning rates",
                    got=" ".join(repr(given).split())[:160],
                    expected="a learning rate for each glob of parameter names",
                    remedy='pass, for example, learning_rate={"head.*": 1e-3, "body.*": 1e-4}',
                )
            )
        rates = {pattern: self._convert_rate(rate, f" for {pattern!r}") for pattern, rate in given.items()}
        object.__setattr__(self, "learning_rate", rates)

    def _convert_rate(self, given: object, where: str = "") -> float:
        rate = _as_float(given)
        if rate is None or not 0 <= rate < math.inf:
            raise TaskError(
                problem(
                    f"checkpoint {os.fspath(self.path)} has a bad learning rate{where}",
                    got=" ".join(repr(given).split())[:160],
                    expected="a finite number, 0 or more",
                    remedy="give the learning rate that training used at this checkpoint",
                )
            )
        # abs() removes the sign of -0.0, which would be written to the manifest.
        return abs(rate)

    def _convert_steps(self, given: object) -> float:
        steps = _as_float(given)
        if steps is None or not 0 < steps < math.inf:
            raise TaskError(
                problem(
                    f"checkpoint {os.fspath(self.path)} has a bad number of steps",
                    got=" ".join(repr(given).split())[:160],
                    expected="a finite number above 0",
                    remedy="give the number of optimizer updates of the training run",
                )
            )
        return steps

    @property
    def largest_rate(self) -> float:
        """Return the learning rate, or the largest one of a mapping."""
        return find_largest_rate(self.learning_rate)

    def rates_of(self, parameter_names: Iterable[str]) -> dict[str, float]:
        """Return the learning rate of each of these parameters, by name.

        A key of the mapping matches the parameter of exactly that name, or as a glob.

        Raises:
            TaskError: a parameter matches none or several of the mapping's globs.
        """
        if not isinstance(self.learning_rate, Mapping):
            return dict.fromkeys(parameter_names, self.learning_rate)
        globs = [pattern for pattern in self.learning_rate if any(character in pattern for character in "*?[")]
        rates: dict[str, float] = {}
        for name in parameter_names:
            found = [pattern for pattern in globs if fnmatch.fnmatchcase(name, pattern) and pattern != name]
            found += [name] * (name in self.learning_rate)
            if len(found) != 1:
                raise TaskError(self._describe_ambiguity(name, found))
            rates[name] = self.learning_rate[found[0]]
        return rates

    def _describe_ambiguity(self, name: str, found: Sequence[str]) -> str:
        """Return the message for a parameter that matches none or several globs."""
        assert isinstance(self.learning_rate, Mapping)
        shown = [repr(pattern) for pattern in found or self.learning_rate][:_MAX_SHOWN]
        more = ", ..." if len(found or self.learning_rate) > _MAX_SHOWN else ""
        return problem(
            f"checkpoint {os.fspath(self.path)} has {'several' if found else 'no'} learning rates for parameter {name}",
            got=f"{'matches' if found else 'no match'} of {', '.join(shown)}{more}",
            expected="exactly one glob of Checkpoint.learning_rate that matches it",
            remedy="change the globs" if found else "add a glob for it, or exclude it with Task.parameters",
        )

    @classmethod
    def from_file(
        cls,
        path: str | os.PathLike[str],
        key: str = "model",
        learning_rate: float | Mapping[str, float] | None = None,
        *,
        optimizer_key: str | None = None,
        parameter_names: Sequence[str] | None = None,
    ) -> Checkpoint:
        """Return a checkpoint whose weights, and by default whose learning rate, are in a dictionary of `torch.save`.

        The rate is that of the optimizer's state dict in the file. If the rates of parameter groups differ, the names
        of their parameters are those in the state dict (of an optimizer that was made from `model.named_parameters()`),
        or `parameter_names`.

        Args:
            path: the file.
            key: the entry that contains `model.state_dict()`.
            learning_rate: the rate, or rates by parameter name; None: from the optimizer's state dict.
            optimizer_key: the entry that contains `optimizer.state_dict()`; None: `optimizer`, or the only such entry.
            parameter_names: the names of the optimizer's parameters, in the order of its groups.

        Raises:
            CheckpointError: the file is missing or unreadable, it has no such entries, or the names of parameters are
                unknown or do not match.
            TaskError: the learning rate cannot be used.
        """
        from tracin_ann.task.integrations.saved_rates import (  # noqa: PLC0415 - only for such files
            check_entry,
            read_saved_rates,
        )

        if learning_rate is None:
            return cls(path, read_saved_rates(path, key, optimizer_key, parameter_names), path, key)
        check_entry(path, key)
        return cls(path, learning_rate, key=key)

    @classmethod
    def from_run(cls, folder: str | os.PathLike[str], *, rates: Literal["at", "sum"] = "at") -> list[Checkpoint]:
        """Return the checkpoints of a run that `RunRecorder` recorded, in training order, with their learning rates.

        Args:
            folder: the folder that contains `tracin.json`.
            rates: "at": the learning rates of the last step before the checkpoint; "sum": the sums of the rates of the
                steps since the checkpoint before, which are η_i of all steps that the checkpoint represents (Pruthi et
                al. 2020, section 3.3).

        Raises:
            CheckpointError: there is no record, it is damaged, one of its files is missing, or it has no sums.
            UsageError: `rates` has another value.
        """
        from tracin_ann.task.integrations.run_record import (  # noqa: PLC0415 - only for such runs
            derive_steps,
            read_run_record,
            select_rates,
        )

        if rates not in ("at", "sum"):
            raise UsageError(problem("bad rates", got=repr(rates), expected="'at' or 'sum'", remedy="change rates"))
        record = read_run_record(folder)
        selected = select_rates(record, summed=rates == "sum")
        return [
            cls(record.folder / each.path, rate, each.optimizer and record.folder / each.optimizer, steps=steps)
            for each, rate, steps in zip(record.checkpoints, selected, derive_steps(record, selected), strict=True)
        ]


def _as_float(number: object) -> float | None:
    """Return a number, or the one number of a tensor or array, as a float; None for anything else."""
    try:
        if isinstance(number, Tensor | np.ndarray | np.generic):
            number = number.item()
        return float(number) if isinstance(number, Real) else None
    # An array of several numbers, a tensor on the meta device, or an int too large for a float.
    except (RuntimeError, ValueError, OverflowError):
        return None
