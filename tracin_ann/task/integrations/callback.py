"""TracInCallback: records a training run of the Hugging Face Trainer or of Lightning.

Neither library is imported here. The callback derives from the callback classes of those that the program imports.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tracin_ann.errors import UsageError, problem
from tracin_ann.task.integrations.recorder import LossFall, RunRecorder, WeightsFormat

logger = logging.getLogger(__name__)

# Modules that have the base class of a trainer's callbacks, with the name of the class.
_BASES = {"transformers": "TrainerCallback", "lightning.pytorch": "Callback", "pytorch_lightning": "Callback"}
# Strategies of Lightning that shard weights over processes.
_SHARDING = ("DeepSpeedStrategy", "FSDPStrategy", "ModelParallelStrategy")
IdsOf = str | Callable[[Any], Iterable[int | str] | Tensor]


class TracInCallback:
    """Records a run of the Hugging Face Trainer or of Lightning as `RunRecorder` does, in the run's folder.

        Trainer(model, arguments, callbacks=[TracInCallback()], ...)
        lightning.Trainer(callbacks=[TracInCallback()], ...)

    With the Trainer, the losses are those that it logs, so `logging_steps` decides how often a checkpoint can be due,
    and checkpoints are saved by `save_pretrained`. With Lightning, the losses are those of the batches, and checkpoints
    are `.ckpt` files without the states of optimizers.

    Args:
        rule: when checkpoints are saved; None: `LossFall()`.
        save_moments: also save Adam's second moments.
        ids: also record the order of examples: the key of a batch that contains the ids of its examples, or a function
            from a batch to them. With the Trainer, a key only: the data collator adds it, with
            `remove_unused_columns=False`, and the callback removes it from the arguments of the model.
        folder: the run's folder; None: `output_dir` of the Trainer, `log_dir` of Lightning.
        overwrite: replace the record of an earlier run in the folder, instead of raising an error. A run that is
            resumed continues the record.
    """

    def __new__(cls, **options: Any) -> Any:
        """Return an object that is also a callback of the libraries in use."""
        return object.__new__(_derive(tuple(_find_loaded_bases())))

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of a library's class that the program imported after the construction."""
        derived = _derive(tuple(_find_loaded_bases()))
        if name.startswith("_") or type(self) is derived:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        self.__class__ = derived
        return getattr(self, name)

    def __init__(
        self,
        *,
        rule: LossFall | None = None,
        save_moments: bool = False,
        ids: IdsOf | None = None,
        folder: str | os.PathLike[str] | None = None,
        overwrite: bool = False,
    ) -> None:
        super().__init__()
        self._options: dict[str, Any] = {
            "rule": rule,
            "save_moments": save_moments,
            "ids": ids,
            "folder": folder,
            "overwrite": overwrite,
        }
        self._recorder: RunRecorder | None = None
        self._hook: torch.utils.hooks.RemovableHandle | None = None
        self._step = 0

    def __reduce__(self) -> tuple[Any, ...]:
        """Return a new callback with the same options, for copies and other processes."""
        return _make_callback, (self._options,)

    def _start(
        self, folder: str | os.PathLike[str], model: nn.Module, optimizers: Iterable[Any], start_step: int
    ) -> RunRecorder:
        new = 0 if self._options["overwrite"] else None
        recorder = RunRecorder(
            self._options["folder"] or folder,
            model,
            [_unwrap_optimizer(optimizer) for optimizer in optimizers],
            rule=self._options["rule"],
            save_moments=self._options["save_moments"],
            start_step=start_step or new,
        )
        self._recorder = recorder
        return recorder

    def _finish(self, *, save_last: bool = True) -> None:
        recorder, self._recorder = self._recorder, None
        if recorder is not None:
            recorder.close(save_last=save_last)

    # Events of the Hugging Face Trainer: (args, state, control, **objects).

    def on_train_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Start the record of a Trainer's run.

        Raises:
            UsageError: the folder already has a record, the weights are sharded over processes, or `ids` is a function.
        """
        if args.deepspeed or args.fsdp:
            raise UsageError(_describe_sharding("DeepSpeed or FSDP"))
        self._step = state.global_step
        model, ids = objects["model"], self._options["ids"]
        if ids is not None and not isinstance(ids, str):
            raise UsageError(
                problem(
                    "TracInCallback cannot read the ids of examples",
                    got="ids=a function",
                    expected="the key of a batch, with the Trainer",
                    remedy="let the data collator add the ids under a key, and pass ids=KEY",
                )
            )
        if ids is not None and self._hook is None:
            # Also removes the key in evaluation, so the hook stays after training.
            self._hook = model.register_forward_pre_hook(self._take_ids, with_kwargs=True)
        if state.is_world_process_zero:
            recorder = self._start(args.output_dir, model, [objects["optimizer"]], state.global_step)
            recorder.weights = _choose_pretrained_format(model, objects.get("processing_class"), recorder.weights)

    def _take_ids(self, module: nn.Module, arguments: Any, batch: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Remove the ids from the arguments of the model, and record those of training batches."""
        ids = batch.pop(self._options["ids"], None)
        if self._recorder is not None and module.training and ids is not None:
            self._recorder.add_ids(ids, step=self._step + 1)
        return arguments, batch

    def on_step_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Count the optimizer steps of a Trainer's run."""
        self._step = state.global_step

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **objects: Any
    ) -> None:
        """Add the loss that the Trainer logs; `train_loss` is logged at the end of training."""
        logs = logs or {}
        if self._recorder is None:
            return
        if "loss" in logs and self._recorder.update(float(logs["loss"]), step=state.global_step, epoch=state.epoch):
            self._recorder.save()
        if "train_loss" in logs:
            # Before the Trainer loads the best weights, with load_best_model_at_end.
            self._finish()

    # Events of Lightning: (trainer, module, ...).

    def on_train_start(self, trainer: Any, module: Any) -> None:
        """Start the record of a run of Lightning, in the first process.

        Raises:
            UsageError: the folder already has a record, or the weights are sharded over processes.
        """
        if type(trainer.strategy).__name__ in _SHARDING:
            raise UsageError(_describe_sharding(type(trainer.strategy).__name__))
        # Every process has to ask for the folder.
        folder = trainer.log_dir or trainer.default_root_dir
        if trainer.is_global_zero:
            recorder = self._start(folder, module, trainer.optimizers, trainer.global_step)
            recorder.weights = WeightsFormat(lambda path: torch.save(_make_ckpt(trainer, module), path), ".ckpt")

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Add the loss of a batch of Lightning.

        Raises:
            UsageError: `training_step` returns no loss.
        """
        if self._recorder is None:
            return
        ids, recorder = self._options["ids"], self._recorder
        if ids is not None:
            recorder.add_ids(batch[ids] if isinstance(ids, str) else ids(batch), step=trainer.global_step)
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if loss is None and module.automatic_optimization:
            # training_step skipped the batch.
            return
        # Lightning divides the loss of each batch whose gradients it accumulates.
        scale = trainer.accumulate_grad_batches if module.automatic_optimization else 1
        epoch = trainer.current_epoch + (batch_idx + 1) / trainer.num_training_batches
        if recorder.update(_require_loss(loss) * scale, step=trainer.global_step, epoch=epoch):
            recorder.save()

    def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
        """End the record of a run of Lightning that an exception ends."""
        self._finish(save_last=False)

    # Both: (args, state, control, **objects) or (trainer, module).

    def on_train_end(self, *arguments: Any, **objects: Any) -> None:
        """End the record of the run; the last weights are saved, unless the Trainer replaced them by the best ones."""
        loads_best = bool(objects) and arguments[0].load_best_model_at_end
        self._finish(save_last=not loads_best)


def _find_loaded_bases() -> Iterable[type]:
    """Yield the callback classes of the libraries that the program has imported."""
    for module, name in _BASES.items():
        base = getattr(sys.modules.get(module), name, None)
        if isinstance(base, type):
            yield base


@lru_cache
def _derive(bases: tuple[type, ...]) -> type:
    """Return the class of callbacks of these libraries."""
    own = {"__module__": TracInCallback.__module__, "__doc__": TracInCallback.__doc__}
    return type(TracInCallback.__name__, (TracInCallback, *bases), own)


def _make_callback(options: dict[str, Any]) -> Any:
    return TracInCallback(**options)


def _unwrap_optimizer(optimizer: Any) -> Any:
    """Return the optimizer of PyTorch that a wrapper of accelerate or Lightning steps."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    return optimizer


def _describe_sharding(what: str) -> str:
    return problem(
        "TracInCallback cannot save this model",
        got=f"weights that {what} shards over processes",
        expected="a process that holds all weights",
        remedy="save checkpoints by the trainer itself",
    )


def _require_loss(loss: Any) -> float:
    """Return the loss that `training_step` of Lightning returned.

    Raises:
        UsageError: there is none.
    """
    if loss is None:
        raise UsageError(
            problem(
                "TracInCallback gets no loss from training_step",
                got="manual optimization without a returned loss",
                expected="a loss, or a dict with the key 'loss'",
                remedy="return the loss from training_step",
            )
        )
    return float(loss)


def _make_ckpt(trainer: Any, module: Any) -> dict[str, Any]:
    """Return the entries of a `.ckpt` file that describe the module: weights, hyper-parameters and progress."""
    content = {
        "epoch": trainer.current_epoch,
        "global_step": trainer.global_step,
        "pytorch-lightning_version": sys.modules[type(trainer).__module__.partition(".")[0]].__version__,
        "state_dict": module.state_dict(),
    }
    if module.hparams:
        content["hparams_name"] = module._hparams_name
        content["hyper_parameters"] = dict(module.hparams)
    module.on_save_checkpoint(content)
    return content


def _choose_pretrained_format(model: nn.Module, tokenizer: Any, plain: WeightsFormat) -> WeightsFormat:
    """Return the format of `save_pretrained` for models that have it, with the tokenizer beside the weights."""
    save = getattr(model, "save_pretrained", None)
    if save is None:
        return plain

    def write(path: Path) -> None:
        save(path)
        if tokenizer is not None:
            tokenizer.save_pretrained(path)

    return WeightsFormat(write, "", is_folder=True)
