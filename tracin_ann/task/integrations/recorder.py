"""Recording of a training run: checkpoints while the loss falls, learning rates, second moments, order of examples."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

import torch
from torch import Tensor, nn

from tracin_ann.errors import UsageError, problem
from tracin_ann.files import atomic_path, atomic_write, make_directory, remove_temporaries, sync_directory
from tracin_ann.task.integrations.param_groups import RateMeter, compact_rates
from tracin_ann.task.integrations.run_record import (
    RECORD,
    RunCheckpoint,
    RunRecord,
    has_run_record,
    read_run_record,
)

logger = logging.getLogger(__name__)
_FOLDER, _ORDER, _PARTIAL = "tracin", "tracin/order.jsonl", ".partial"


@dataclass(frozen=True)
class LossFall:
    """The rule that decides when a checkpoint is saved: at fractions of the fall of the smoothed loss.

    The smoothed loss is s_1 = ℓ_1 and s_t = β·s_(t-1) + (1 - β)·ℓ_t for the losses ℓ_t of the steps. Its fall is
    φ_t = (s_1 - min(s_1, ..., s_t)) / (s_1 - floor). A checkpoint is due at the first loss, and whenever φ_t reaches
    one of `fractions` for the first time. The end of the run is a checkpoint too.

    Attributes:
        fractions: the fractions of the fall, each in (0, 1].
        floor: the lowest loss that is expected; the fall is measured from the first loss to it.
        smoothing: β, in [0, 1).
    """

    fractions: Sequence[float] = (0.1, 0.2, 0.4, 0.6, 0.8)
    floor: float = 0.0
    smoothing: float = 0.9

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            UsageError: a fraction, the floor or the smoothing is out of range.
        """
        object.__setattr__(self, "fractions", tuple(sorted(float(fraction) for fraction in self.fractions)))
        right = all(0 < fraction <= 1 for fraction in self.fractions) and math.isfinite(self.floor)
        if not right or not 0 <= self.smoothing < 1:
            raise UsageError(
                problem(
                    "the rule for checkpoints cannot be used",
                    got=self,
                    expected="fractions in (0, 1], a finite floor, smoothing in [0, 1)",
                    remedy="correct LossFall",
                )
            )


class LossTracker:
    """The state of a `LossFall` rule during a run; `smoothed` is the smoothed loss, None before the first one."""

    def __init__(self, rule: LossFall) -> None:
        self._rule = rule
        self.smoothed: float | None = None
        self._first = self._lowest = math.nan
        self._reached = -1

    def resume(self, first: float, last: float) -> None:
        """Continue a run with these smoothed losses at its first and at its last checkpoint."""
        self._first, self.smoothed, self._lowest = first, last, min(first, last)
        self._reached = self._count_reached()

    def update(self, loss: float) -> bool:
        """Add the loss of a step, and return whether a checkpoint is due; a loss that is not finite is ignored.

        Raises:
            UsageError: the first loss is not above the floor of the rule.
        """
        if not math.isfinite(loss):
            logger.warning("the run recorder ignores a loss of %s", loss)
            return False
        if self.smoothed is None:
            if loss <= self._rule.floor:
                raise UsageError(
                    problem(
                        "the fall of the loss cannot be measured",
                        got=f"a first loss of {loss:g}",
                        expected=f"a loss above the floor {self._rule.floor:g}",
                        remedy="pass rule=LossFall(floor=...) with the lowest loss that you expect",
                    )
                )
            self._first = self._lowest = self.smoothed = loss
        else:
            self.smoothed = self._rule.smoothing * self.smoothed + (1 - self._rule.smoothing) * loss
            self._lowest = min(self._lowest, self.smoothed)
        before, self._reached = self._reached, self._count_reached()
        return self._reached > before

    def _count_reached(self) -> int:
        fall = (self._first - self._lowest) / (self._first - self._rule.floor)
        # The tolerance is for fractions such as 0.3 that a sum of rounded losses just misses.
        return sum(fall >= fraction - 1e-12 for fraction in self._rule.fractions)


@dataclass(frozen=True)
class WeightsFormat:
    """How the weights of a checkpoint are written.

    Attributes:
        write: writes them to a path.
        suffix: the suffix of the file's name.
        is_folder: `write` gets the path of an empty folder.
    """

    write: Callable[[Path], object]
    suffix: str = ".pt"
    is_folder: bool = False


class RunRecorder:
    """Saves what attribution needs while a model is trained: checkpoints, learning rates and `tracin.json`.

        recorder = RunRecorder("runs/mine", model, optimizer)
        for batch in loader:
            ...  # loss.backward(), optimizer.step(), scheduler.step()
            recorder.step(loss)
        recorder.close()

    It may also be used in a `with` statement. Checkpoints are saved when `rule` requires it and at the end. A
    checkpoint has the learning rates of the last step, of each parameter: of the optimizer's parameter groups directly
    before that step. `Checkpoint.from_run("runs/mine")` reads the run. If training is interrupted, the record contains
    the checkpoints that are complete. In distributed training, create one recorder, in the first process.

    Args:
        folder: the run's folder; `tracin.json` and the folder `tracin` are written in it.
        model: the model; its `state_dict()` is saved.
        optimizer: the optimizer that trains it, or several.
        rule: when checkpoints are saved.
        save_moments: also save Adam's second moments `exp_avg_sq` by parameter name, as safetensors.
        start_step: number of steps before this one, if a run is resumed: later checkpoints are removed from the record.
            0: a new run, which replaces a record in the folder. None: a new run in a folder without a record.

    Attributes:
        weights: how weights are written.

    Raises:
        UsageError: the folder already has a record and `start_step` is None, or the optimizer does not train the model.
        CheckpointError: the run is resumed, and its record is damaged.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        *,
        rule: LossFall | None = None,
        save_moments: bool = False,
        start_step: int | None = None,
    ) -> None:
        optimizers = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer)
        self._folder, self._save_moments, self._start = Path(folder), save_moments, start_step or 0
        self._loss = LossTracker(rule or LossFall())
        self.weights = WeightsFormat(lambda path: torch.save(model.state_dict(), path))
        self._step, self._saved_step, self._due = self._start, 0, False
        self._epoch: float | None = None
        self._order: IO[bytes] | None = None
        self._meter = RateMeter(model, optimizers)
        self._record = self._open_record(start_step)
        # The rates of steps between the last checkpoint and a resumed run are unknown.
        self._sums_known = self._saved_step == self._start
        self._closed = False

    def _open_record(self, start_step: int | None) -> RunRecord:
        """Return the record of the run so far; removes what interrupted writers left."""
        exists = has_run_record(self._folder)
        if exists and start_step is None:
            raise UsageError(
                problem(
                    f"{self._folder} already contains the record of a run",
                    got=RECORD,
                    expected="a folder without a record",
                    remedy="choose another folder, or pass start_step: 0 replaces the record, N resumes at step N",
                )
            )
        place = self._folder / _FOLDER
        make_directory(place)
        remove_temporaries(place)
        for left in place.glob(f".*{_PARTIAL}"):
            shutil.rmtree(left)
        if not exists or not start_step:
            return self._start_record()
        before = read_run_record(self._folder)
        kept = tuple(checkpoint for checkpoint in before.checkpoints if checkpoint.step <= start_step)
        if not kept:
            return self._start_record()
        losses = [checkpoint.loss for checkpoint in kept if checkpoint.loss is not None]
        if losses:
            self._loss.resume(losses[0], losses[-1])
        self._saved_step = kept[-1].step
        record = RunRecord(self._folder, kept, before.order)
        record.write()
        self._cut_order(start_step)
        return record

    def _start_record(self) -> RunRecord:
        """Remove the record of an earlier run; its files of weights stay until new ones replace them."""
        (self._folder / RECORD).unlink(missing_ok=True)
        (self._folder / _ORDER).unlink(missing_ok=True)
        sync_directory(self._folder)
        return RunRecord(self._folder, ())

    def _cut_order(self, start_step: int) -> None:
        """Remove the steps after `start_step`, and an incomplete last line, from the order of examples."""
        path = self._folder / _ORDER
        if path.is_file():
            lines = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
            with atomic_write(path) as file:
                file.writelines(line for line in lines if json.loads(line)["step"] <= start_step)

    def __enter__(self) -> RunRecorder:
        """Return the recorder."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the recorder; the last weights are saved if no exception was raised."""
        self.close(save_last=kind is None)

    def step(
        self, loss: float | Tensor, ids: Iterable[int | str] | Tensor | None = None, *, epoch: float | None = None
    ) -> None:
        """Add the loss of a step, after `optimizer.step()`; save a checkpoint if one is due.

        Args:
            loss: the training loss of the batch: a number, or a tensor with one.
            ids: the ids of the batch's examples, if their order is to be recorded.
            epoch: the present epoch, for the record.

        Raises:
            UsageError: the recorder is closed, or the first loss is not above the floor of the rule.
            OSError: the system cannot write.
        """
        if ids is not None:
            self.add_ids(ids)
        if self.update(loss, epoch=epoch):
            self.save()

    def update(self, loss: float | Tensor, *, step: int | None = None, epoch: float | None = None) -> bool:
        """Add the loss of a step, and return whether a checkpoint is due; `step` counts optimizer steps.

        Raises:
            UsageError: as for `step`.
        """
        if self._closed:
            remedy = "create a new RunRecorder with start_step"
            raise UsageError(
                problem("the run recorder is closed", got="another step", expected="no more steps", remedy=remedy)
            )
        self._step = self._start + self._meter.n_steps if step is None else step
        self._epoch = epoch
        # Weights that are already saved, or were not trained yet, are due after the next optimizer step.
        self._due |= self._loss.update(float(loss.detach()) if isinstance(loss, Tensor) else float(loss))
        return self._due and self._step > self._saved_step

    def add_ids(self, ids: Iterable[int | str] | Tensor, *, step: int | None = None) -> None:
        """Add the ids of a batch to the order of examples, under the present step or another one."""
        listed = ids.tolist() if isinstance(ids, Tensor) else [i.item() if isinstance(i, Tensor) else i for i in ids]
        if self._order is None:
            self._order = open(self._folder / _ORDER, "ab")
        line = {"step": self._start + self._meter.n_steps if step is None else step, "ids": listed}
        self._order.write(json.dumps(line).encode() + b"\n")

    def save(self) -> None:
        """Save a checkpoint of the present weights, and then the record that contains it.

        Raises:
            UsageError: second moments are to be saved, and the optimizer has none.
            OSError: the system cannot write.
        """
        name = f"{_FOLDER}/step-{self._step}"
        optimizer = self._write_moments(f"{name}.moments.safetensors") if self._save_moments else None
        path = f"{name}{self.weights.suffix}"
        if self.weights.is_folder:
            _write_folder(self._folder / path, self.weights.write)
        else:
            with atomic_path(self._folder / path) as temporary:
                self.weights.write(temporary)
        self._sync_order()
        entry = RunCheckpoint(
            path,
            self._step,
            self._epoch,
            self._loss.smoothed,
            compact_rates(self._meter.latest),
            compact_rates(self._meter.sums) if self._sums_known else None,
            optimizer,
            self._meter.read_momentum(),
        )
        has_order = (self._folder / _ORDER).is_file()
        earlier = tuple(checkpoint for checkpoint in self._record.checkpoints if checkpoint.step < self._step)
        self._record = RunRecord(self._folder, (*earlier, entry), _ORDER if has_order else None)
        self._record.write()
        self._meter.restart()
        self._saved_step, self._due, self._sums_known = self._step, False, True
        logger.info("saved %s with loss %s", self._folder / path, self._loss.smoothed)

    def _write_moments(self, name: str) -> str:
        from safetensors.torch import save_file  # noqa: PLC0415 - only if second moments are saved

        moments, metadata = self._meter.read_moments()
        with atomic_path(self._folder / name) as temporary:
            save_file(moments, temporary, metadata)
        return name

    def _sync_order(self) -> None:
        if self._order is not None:
            self._order.flush()
            os.fsync(self._order.fileno())

    def close(self, *, save_last: bool = True) -> None:
        """End the run: save the last weights, if they are newer than the last checkpoint, and release the optimizer.

        Raises:
            OSError: the system cannot write.
        """
        if self._closed:
            return
        self._closed = True
        try:
            if save_last and self._loss.smoothed is not None:
                self._step = max(self._step, self._start + self._meter.n_steps)
                if self._step > self._saved_step:
                    self.save()
        finally:
            self._sync_order()
            if self._order is not None:
                self._order.close()
            self._meter.close()


def _write_folder(path: Path, write: Callable[[Path], object]) -> None:
    """Write a folder under a temporary name, and rename it when all its files are on disk."""
    temporary = path.with_name(f".{path.name}{_PARTIAL}")
    for old in (temporary, path):
        if old.is_dir():
            shutil.rmtree(old)
    temporary.mkdir()
    write(temporary)
    for file in sorted(temporary.rglob("*")):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    os.replace(temporary, path)
    sync_directory(path.parent)
