"""Learning rates of training runs: those of the Trainer's scheduler at checkpoints, or their sums between them."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from tracin_ann.errors import TaskError, first_line, problem
from tracin_ann.task.integrations.param_groups import (
    Rate,
    count_steps,
    is_optimizer_state,
    read_momentum,
    read_rate,
    strip_wrappers,
)

logger = logging.getLogger(__name__)
RateRule = Literal["at", "sum"]
_FOLDER = re.compile(r"checkpoint-(\d+)")
ADAPTER_CONFIG = "adapter_config.json"
_STATE, _SCHEDULER, _OPTIMIZER = "trainer_state.json", "scheduler.pt", "optimizer.pt"


@dataclass(frozen=True)
class TrainerCheckpoint:
    """A checkpoint folder of the Trainer.

    Attributes:
        path: the folder.
        step: the number of updates of the weights before it was saved.
        second_moments: the file of Adam's second moments: the optimizer's state, or one of a record; None without one.
    """

    path: Path
    step: int
    second_moments: Path | None = None


def list_trainer_checkpoints(run: str | os.PathLike[str]) -> list[TrainerCheckpoint]:
    """Return the folders `checkpoint-STEP` of a run in the order of their steps, or the run itself if it is one.

    Raises:
        TaskError: the folder does not exist, or has no checkpoints.
    """
    path = Path(run)
    found = [
        TrainerCheckpoint(folder, int(match.group(1)))
        for folder in (path.iterdir() if path.is_dir() else ())
        if folder.is_dir() and (match := _FOLDER.fullmatch(folder.name))
    ]
    if not found and any((path / name).is_file() for name in ("config.json", ADAPTER_CONFIG)):
        match = _FOLDER.fullmatch(path.resolve().name)
        found = [TrainerCheckpoint(path, int(match.group(1)) if match else _read_state(path).get("global_step", 0))]
    if not found:
        raise TaskError(
            problem(
                f"{path} has no checkpoints",
                got="no folder checkpoint-STEP" if path.is_dir() else "no such folder",
                expected="the output_dir of a Trainer with save_strategy 'steps' or 'epoch'",
                remedy="correct the path, or save checkpoints while training",
            )
        )
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def find_optimizer(folder: Path) -> Path | None:
    """Return the file of the optimizer's state in a checkpoint folder; None without one (`save_only_model`)."""
    path = folder / _OPTIMIZER
    return path if path.is_file() else None


def read_trainer_rates(run: str | os.PathLike[str], rates: RateRule = "at") -> list[Rate]:
    """Return the learning rate of each of a run's checkpoints, in the order of `list_trainer_checkpoints`.

    "at" is the rate that the scheduler had when the checkpoint was saved, that of the next update: η_c of TracInCP
    (Pruthi et al. 2020, section 3.3). It is exact if the checkpoint has `scheduler.pt`. Otherwise it is interpolated
    linearly between the rates in the `log_history` of `trainer_state.json`, where an entry of step s has the rate of
    update s; before the first entry and after the last one the nearest is used. A schedule that decays to 0 has rate 0
    at the last checkpoint, which then adds nothing to scores.

    "sum" is the sum of the rates of all updates since the checkpoint before, or since the start. It is exact if every
    update was logged (`logging_steps=1`) or if the schedule is linear or constant between the known rates; otherwise it
    is the sum of interpolated rates. Known are the entries of `log_history` and the rates in `scheduler.pt`.

    If parameter groups have different rates, "at" is a mapping of parameter names to rates if the optimizer's state
    has the names of its parameters (an optimizer made from `named_parameters`); otherwise, and for "sum", it is the
    rate of the first group, which is the one that the Trainer logs.

    Raises:
        TaskError: there are no checkpoints, or neither file has rates.
    """
    checkpoints = list_trainer_checkpoints(run)
    schedulers = [_read_scheduler(checkpoint.path) for checkpoint in checkpoints]
    known = _read_logged(Path(run), checkpoints)
    known.update({c.step + 1: group[0] for c, group in zip(checkpoints, schedulers, strict=True) if group})
    if not known:
        raise TaskError(
            problem(
                f"the learning rates of {Path(run)} are unknown",
                got=f"no {_SCHEDULER}, and no learning_rate in the log_history of {_STATE}",
                expected="one of these, which the Trainer writes into checkpoints",
                remedy="pass rates=[...], one learning rate for each checkpoint",
            )
        )
    if rates == "sum":
        starts = [0, *(checkpoint.step for checkpoint in checkpoints[:-1])]
        return [
            float(np.sum(_interpolate(known, np.arange(start + 1, checkpoint.step + 1))))
            for start, checkpoint in zip(starts, checkpoints, strict=True)
        ]
    return [
        _choose_rate_of_groups(checkpoint, group)
        if group
        else float(_interpolate(known, np.array([checkpoint.step + 1]))[0])
        for checkpoint, group in zip(checkpoints, schedulers, strict=True)
    ]


def read_trainer_steps(run: str | os.PathLike[str], rates: Sequence[Rate]) -> list[float | None]:
    """Return `Checkpoint.steps` of each of a run's checkpoints with these learning rates, by either rule.

    They are known if every checkpoint has an `optimizer.pt` of gradient descent; see `count_steps`.

    Raises:
        TaskError: there are no checkpoints, or neither file has rates.
    """
    momenta = [_read_momentum(checkpoint.path) for checkpoint in list_trainer_checkpoints(run)]
    if None in momenta:
        return [None] * len(momenta)
    # Sums are those of the first parameter group, as is the first rate of a mapping.
    first = [next(iter(rate.values())) if isinstance(rate, Mapping) else rate for rate in rates]
    return count_steps(first, read_trainer_rates(run, "sum"), momenta)


def _read_momentum(folder: Path) -> float | None:
    """Return the momentum of gradient descent in optimizer.pt; None for another optimizer or an unreadable file."""
    path = find_optimizer(folder)
    try:
        state = {} if path is None else _load_state(path)
    except TaskError as error:
        logger.info("the number of steps is not known: %s", error)
        return None
    return read_momentum(state) if is_optimizer_state(state) else None


def _interpolate(known: Mapping[int, float], updates: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the rates of updates, linear between the known ones."""
    steps = sorted(known)
    interpolated: np.ndarray[Any, Any] = np.interp(updates, steps, [known[step] for step in steps])
    return interpolated


def _read_logged(run: Path, checkpoints: list[TrainerCheckpoint]) -> dict[int, float]:
    """Return the rates of logged updates, by number of the update from 1; later files take precedence."""
    logged: dict[int, float] = {}
    for folder in (*(checkpoint.path for checkpoint in checkpoints), run):
        history = _read_state(folder).get("log_history")
        for entry in history if isinstance(history, list) else []:
            rate = read_rate(entry.get("learning_rate")) if isinstance(entry, dict) else None
            if rate is not None and type(entry.get("step")) is int:
                logged[entry["step"]] = rate
    return logged


def _read_state(folder: Path) -> dict[str, Any]:
    """Return the content of trainer_state.json, empty if there is no such file.

    Raises:
        TaskError: the file cannot be read.
    """
    path = folder / _STATE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise TaskError(_unreadable_message(path, error, "a JSON object that the Trainer wrote")) from error
    return content if isinstance(content, dict) else {}


def _read_scheduler(folder: Path) -> list[float]:
    """Return the rate of each parameter group in scheduler.pt, empty if there is none.

    Raises:
        TaskError: the file cannot be read.
    """
    path = folder / _SCHEDULER
    if not path.is_file():
        return []
    saved = _load_state(path).get("_last_lr")
    rates = [read_rate(rate) for rate in saved] if isinstance(saved, list) else []
    if None in rates:
        raise TaskError(
            problem(
                f"{path} cannot be read",
                got=f"_last_lr {saved}"[:160],
                expected="learning rates, finite and 0 or more",
                remedy="copy the file again, or pass rates=[...]",
            )
        )
    return [rate for rate in rates if rate is not None]


def _choose_rate_of_groups(checkpoint: TrainerCheckpoint, rates: list[float]) -> Rate:
    """Return one rate if all groups have the same; otherwise by names, or that of the first group."""
    if len(set(rates)) == 1:
        return rates[0]
    path = checkpoint.path / _OPTIMIZER
    groups = _load_state(path).get("param_groups", []) if path.is_file() else []
    if len(groups) == len(rates) and all(group.get("param_names") for group in groups):
        found = {name: rate for group, rate in zip(groups, rates, strict=True) for name in group["param_names"]}
        return dict(zip(strip_wrappers(list(found)), found.values(), strict=True))
    logger.warning(
        "%s has parameter groups with learning rates %s without names of parameters; the first is used for all",
        checkpoint.path,
        ", ".join(f"{rate:g}" for rate in rates),
    )
    return rates[0]


def _load_state(path: Path) -> dict[str, Any]:
    """Return a state that the Trainer saved by torch.save.

    Raises:
        TaskError: the file cannot be read.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    # torch raises errors of several types for damaged files.
    except Exception as error:
        raise TaskError(_unreadable_message(path, error, "a state that the Trainer saved")) from error
    return state if isinstance(state, dict) else {}


def _unreadable_message(path: Path, error: Exception, expected: str) -> str:
    return problem(f"{path} cannot be read", got=first_line(error), expected=expected, remedy="copy the file again")
