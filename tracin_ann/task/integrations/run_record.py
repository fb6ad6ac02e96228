"""The record of a training run, `tracin.json`: which checkpoints it has, their learning rates and losses.

Format, version 1:

    {"format": "tracin-run", "version": 1, "order": "tracin/order.jsonl" or null, "checkpoints": [
        {"path": "tracin/step-10.pt", "step": 10, "epoch": 0.5, "loss": 1.2, "learning_rates": 0.1,
         "summed_learning_rates": 1.0, "optimizer": null, "momentum": 0.9}]}

Paths are relative to the folder of the record. `learning_rates` is one rate, or a rate for each parameter name.
`epoch`, `loss`, `summed_learning_rates`, `optimizer`, `momentum` and `order` may be missing or null. Other fields are
ignored.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from tracin_ann.errors import CheckpointError, DamagedIndexError, problem
from tracin_ann.files import read_json, write_json_atomic
from tracin_ann.task.integrations.param_groups import Rate, count_steps, read_rate

RECORD = "tracin.json"
_FORMAT, _VERSION = "tracin-run", 1
_REMEDY = "restore the file, or give the checkpoints and their learning rates yourself"


@dataclass(frozen=True)
class RunCheckpoint:
    """A checkpoint of a recorded run.

    Attributes:
        path: its file or folder, relative to the folder of the record.
        step: number of optimizer steps that led to its weights.
        epoch: number of epochs, may be a fraction; None: unknown.
        loss: the smoothed training loss; None: unknown.
        learning_rates: the rate of the last of these steps: one for all parameters, or one for each name.
        summed_learning_rates: the sum of the rates of the steps after the checkpoint before, in the same form.
        optimizer: the safetensors file of Adam's second moments, relative to the folder; None: not saved.
        momentum: that of gradient descent, 0 or more and below 1; None: another optimizer, or not recorded.
    """

    path: str
    step: int
    epoch: float | None
    loss: float | None
    learning_rates: Rate
    summed_learning_rates: Rate | None = None
    optimizer: str | None = None
    momentum: float | None = None


@dataclass(frozen=True)
class RunRecord:
    """A recorded run: its folder, its checkpoints in training order, and the file of the order of examples."""

    folder: Path
    checkpoints: tuple[RunCheckpoint, ...]
    order: str | None = None

    def write(self) -> None:
        """Replace `tracin.json` of the folder atomically."""
        write_json_atomic(
            self.folder / RECORD,
            {
                "format": _FORMAT,
                "version": _VERSION,
                "order": self.order,
                "checkpoints": [asdict(checkpoint) for checkpoint in self.checkpoints],
            },
        )


def has_run_record(folder: str | os.PathLike[str]) -> bool:
    """Return whether a folder contains the record of a run."""
    return (Path(folder) / RECORD).is_file()


def read_run_record(folder: str | os.PathLike[str]) -> RunRecord:
    """Return the record of the run in a folder; every file that it names exists.

    Raises:
        CheckpointError: there is no record, it is damaged or has another version, or one of its files is missing.
        OSError: the system cannot read it.
    """
    path = Path(folder) / RECORD
    if not path.is_file():
        raise CheckpointError(
            problem(
                "the run has no record",
                got=f"no file {path}",
                expected="the file that RunRecorder or TracInCallback writes",
                remedy="train with one of these, or give the checkpoints and their learning rates yourself",
            )
        )
    try:
        content = read_json(path, _REMEDY)
    except DamagedIndexError as error:
        raise CheckpointError(str(error)) from error
    try:
        return _parse(path.parent, content)
    except ValueError as error:
        message = problem(
            f"{path} is damaged", got=error, expected=f"the record of a run, version {_VERSION}", remedy=_REMEDY
        )
        raise CheckpointError(message) from error


def select_rates(record: RunRecord, *, summed: bool = False) -> list[Rate]:
    """Return the learning rates of each checkpoint, of its last step or summed since the checkpoint before.

    Raises:
        CheckpointError: sums are not recorded at a checkpoint.
    """
    if not summed:
        return [checkpoint.learning_rates for checkpoint in record.checkpoints]
    sums = [checkpoint.summed_learning_rates for checkpoint in record.checkpoints]
    known = [each for each in sums if each is not None]
    if len(known) < len(sums):
        step = record.checkpoints[sums.index(None)].step
        raise CheckpointError(
            problem(
                f"{record.folder / RECORD} has no sum of learning rates at step {step}",
                got="steps that were not recorded, for example before the run was resumed",
                expected="the sum of the rates since the checkpoint before",
                remedy="use the rates of the last steps (rates='at')",
            )
        )
    return known


def derive_steps(record: RunRecord, rates: Sequence[Rate]) -> list[float | None]:
    """Return `Checkpoint.steps` of each checkpoint with these learning rates; None where they are not known."""
    checkpoints = record.checkpoints
    return count_steps(
        rates, [each.summed_learning_rates for each in checkpoints], [each.momentum for each in checkpoints]
    )


def _parse(folder: Path, content: Mapping[str, Any]) -> RunRecord:
    """Return the record; ValueError: a field is missing, of another type, or out of range."""
    if content.get("format") != _FORMAT or content.get("version") != _VERSION:
        raise ValueError(f"format {content.get('format')!r}, version {content.get('version')!r}")
    entries = content.get("checkpoints")
    if not isinstance(entries, list) or not entries:
        raise ValueError("no checkpoints")
    checkpoints = tuple(_parse_entry(folder, i, entry) for i, entry in enumerate(entries))
    steps = [checkpoint.step for checkpoint in checkpoints]
    if any(later <= earlier for earlier, later in zip(steps, steps[1:], strict=False)):
        raise ValueError(f"checkpoints at steps {', '.join(map(str, steps))}, which do not increase")
    order = content.get("order")
    return RunRecord(folder, checkpoints, None if order is None else _parse_path(folder, order, "order"))


def _parse_entry(folder: Path, i: int, entry: object) -> RunCheckpoint:
    where = f"checkpoint {i}"
    if not isinstance(entry, Mapping):
        raise ValueError(f"{where} is a {type(entry).__name__}")
    step = entry.get("step")
    if type(step) is not int or step < 0:
        raise ValueError(f"{where} has step {step!r}")
    numbers = {name: entry.get(name) for name in ("epoch", "loss")}
    for name, value in numbers.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"{where} has {name} {value!r}")
    optimizer, summed = entry.get("optimizer"), entry.get("summed_learning_rates")
    given = entry.get("momentum")
    momentum = read_rate(given)
    if given is not None and (momentum is None or momentum >= 1):
        raise ValueError(f"{where} has momentum {given!r}")
    return RunCheckpoint(
        _parse_path(folder, entry.get("path"), where),
        step,
        **numbers,
        learning_rates=_parse_rates(entry.get("learning_rates"), where),
        summed_learning_rates=None if summed is None else _parse_rates(summed, where),
        optimizer=None if optimizer is None else _parse_path(folder, optimizer, where),
        momentum=momentum,
    )


def _parse_rates(value: object, where: str) -> Rate:
    if isinstance(value, Mapping):
        rates = {name: read_rate(rate) for name, rate in value.items()}
        if rates and all(rate is not None for rate in rates.values()):
            return {name: rate for name, rate in rates.items() if rate is not None}
    elif (rate := read_rate(value)) is not None:
        return rate
    raise ValueError(f"{where} has learning rates {str(value)[:80]}")


def _parse_path(folder: Path, value: object, where: str) -> str:
    """Return a path below the folder of the record, whose file exists."""
    if not isinstance(value, str) or not value or PurePosixPath(value).is_absolute() or ".." in Path(value).parts:
        raise ValueError(f"{where} has path {value!r}, which is not below the folder")
    if not (folder / value).exists():
        raise ValueError(f"{where} names {value}, which does not exist")
    return value


def read_order(folder: str | os.PathLike[str]) -> Iterator[tuple[int, list[int | str]]]:
    """Yield the step and the ids of its examples, for each batch of a recorded run, in training order.

    A last line that an interruption left incomplete is ignored.

    Raises:
        CheckpointError: the run has no record, or the record contains no order of examples.
    """
    record = read_run_record(folder)
    if record.order is None:
        raise CheckpointError(
            problem(
                f"{record.folder / RECORD} contains no order of examples",
                got="no ids",
                expected="the ids of the examples of each step",
                remedy="train with the ids of each batch: RunRecorder.step(loss, ids=...) or TracInCallback(ids=...)",
            )
        )
    with open(record.folder / record.order, encoding="utf-8") as lines:
        for line in lines:
            if line.endswith("\n"):
                entry = json.loads(line)
                yield entry["step"], entry["ids"]
