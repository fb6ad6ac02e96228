"""Runs that trained adapters: the base model, the learning rates and the task of a run folder or of adapter folders."""

from __future__ import annotations

import copy
import json
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from tracin_ann.errors import CheckpointError, TaskError, UsageError, first_line, problem
from tracin_ann.task.checkpoint import Checkpoint
from tracin_ann.task.integrations.adapter_folders import find_adapter_weights, read_adapter_config, read_adapter_weights
from tracin_ann.task.integrations.architectures import Kind, find_class, find_kind, load_config, make_model_from_config
from tracin_ann.task.integrations.param_groups import Rate
from tracin_ann.task.integrations.peft import make_adapter_task
from tracin_ann.task.integrations.rates import TrainerCheckpoint, read_trainer_rates
from tracin_ann.task.integrations.transformers import (
    RunOptions,
    assemble_task,
    check_rates,
    make_encoder,
    read_rates,
    read_steps,
)
from tracin_ann.task.integrations.weights import find_weights, load_weights
from tracin_ann.task.state_dicts import join_complaints
from tracin_ann.task.task import Task

# The kind of task of PEFT's task types; others have that of the base model.
_KINDS: dict[str, Kind] = {
    "SEQ_CLS": "sequence-classification",
    "TOKEN_CLS": "token-classification",
    "CAUSAL_LM": "causal-lm",
    "SEQ_2_SEQ_LM": "seq2seq",
}
# Names of the last matrix of a classification head.
_HEAD = re.compile(r"(score|classifier|out_proj)\.(\w+\.)?weight$")
logger = logging.getLogger(__name__)


def make_run_task(
    runs: Sequence[str | os.PathLike[str]],
    checkpoints: Sequence[TrainerCheckpoint],
    data: tuple[Any, Any],
    options: RunOptions,
) -> Task:
    """Return the task of a run of the Trainer that trained an adapter, or of a list of adapter folders.

    Args:
        runs: the run, or the adapter folders.
        checkpoints: the adapters.
        data: the training data and the query data, as for `Task.from_transformers`.
        options: of the task.

    Raises:
        UsageError: an option has a value that it cannot have.
        TaskError: the base model, the learning rates or the data cannot be used.
        CheckpointError: the base model or an adapter is missing, or they do not fit each other.
        MissingPackageError: peft or transformers is not installed.
    """
    folders = [checkpoint.path for checkpoint in checkpoints]
    base = find_base(folders, options.base)
    content = read_adapter_config(folders[-1])
    kind = options.kind or _KINDS.get(str(content.get("task_type")))
    config = _adapt_config(load_config(base), kind, folders[-1])
    rates = _read_rates(runs, checkpoints, options)
    # Between the checkpoints of a list of folders, the rates are unknown.
    steps = read_steps(runs[0], options.rates, rates) if len(runs) == 1 else [None] * len(rates)
    found = [
        Checkpoint(find_adapter_weights(each.path), rate, second_moments=each.second_moments, steps=count)
        for each, rate, count in zip(checkpoints, rates, steps, strict=True)
    ]
    check_rates(runs[0], options.rates, found)
    # The tokenizer may be in the folder of the run only.
    places = [Path(runs[0]), *reversed(folders), folders[-1].resolve().parent, base]
    encoder = make_encoder(config, places, replace(options, kind=kind))
    model = _BaseModel(encoder.config, encoder.kind, base, options, tuple(content.get("modules_to_save") or ()))
    task = assemble_task(encoder, options, data, model=model, load=_load_nothing, checkpoints=found)
    return make_adapter_task(task, quantization=options.quantization)


def _load_nothing(model: nn.Module, path: str) -> None:
    """Load nothing: `make_adapter_task` replaces this function."""


def _read_rates(
    runs: Sequence[str | os.PathLike[str]], checkpoints: Sequence[TrainerCheckpoint], options: RunOptions
) -> list[Rate]:
    """Return the learning rate of each adapter.

    Raises:
        UsageError: the number of given rates is not that of the adapters, or sums are requested for a list of folders.
        TaskError: the rates are unknown.
    """
    if len(runs) == 1 or not isinstance(options.rates, str):
        rates = read_rates(runs[0], options.rates, len(checkpoints))
    elif options.rates == "at":
        rates = [rate for run in runs for rate in read_trainer_rates(run)]
    else:
        raise UsageError(
            problem(
                "the rates between the checkpoints are unknown",
                got=f"rates={options.rates!r} for a list of adapter folders",
                expected="rates='at', or one rate for each folder",
                remedy="name the output_dir of the run, or pass rates=[...]",
            )
        )
    return rates


def find_base(folders: Sequence[str | os.PathLike[str]], base: str | os.PathLike[str] | None = None) -> Path:
    """Return the folder of the base model of adapters.

    Args:
        folders: the adapter folders.
        base: the folder that the user names; None: the `base_model_name_or_path` of the adapters.

    Raises:
        CheckpointError: the folder does not exist, or its `config.json` differs from that of the base model for which
            an adapter was trained, where that model is on this machine too.
    """
    recorded = [read_adapter_config(folder).get("base_model_name_or_path") or "" for folder in folders]
    if base is None:
        names = sorted({str(name) for name in recorded})
        if len(names) > 1 or not Path(names[0] or "?").is_dir():
            got = " and ".join(repr(name) for name in names)
            raise CheckpointError(
                problem(
                    "the base model of the adapter is not on this machine"
                    if len(names) == 1
                    else "the adapters have different base models",
                    got=f"base_model_name_or_path {got}",
                    expected="one folder with the config.json and the weights of the base model",
                    remedy="pass base= with the folder of the base model; nothing is downloaded",
                )
            )
        return Path(names[0])
    folder = Path(base)
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            problem(
                "the base model is missing",
                got=f"no file {folder / 'config.json'}",
                expected="a folder with the config.json and the weights of the base model",
                remedy="correct base=",
            )
        )
    for adapter, name in zip(folders, recorded, strict=True):
        _check_same_base(Path(adapter), Path(str(name)), folder)
    return folder


def _check_same_base(adapter: Path, recorded: Path, base: Path) -> None:
    """Compare the recorded base model with the given one, if both are on this machine; warn about another name.

    Raises:
        CheckpointError: the two have different architectures or sizes.
    """
    if recorded.name not in ("", base.name):
        logger.warning("%s was trained on %s; its base model is now %s", adapter, recorded, base)
    if not str(recorded) or not (recorded / "config.json").is_file():
        return
    trained, given = (_read_architecture(each) for each in (recorded, base))
    different = [name for name in {**trained, **given} if trained.get(name) != given.get(name)]
    if different:
        name = different[0]
        raise CheckpointError(
            problem(
                f"adapter {adapter} was trained on another base model",
                got=f"{base} with {name} = {given.get(name)}",
                expected=f"{recorded} with {name} = {trained.get(name)}",
                remedy="pass base= with the model on which the adapter was trained",
            )
        )


def _read_architecture(folder: Path) -> dict[str, Any]:
    """Return the entries of a config.json that describe the model's layers and sizes."""
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kept = ("architectures", "model_type")
    return {
        name: value
        for name, value in content.items()
        if name in kept or (isinstance(value, int) and ("size" in name or name.startswith(("n_", "num_"))))
    }


def _adapt_config(config: Any, kind: Kind | None, adapter: Path) -> Any:
    """Return the config of the base model for a kind of task: with another head if the base model has none for it."""
    try:
        if kind is None or find_kind(config) == kind:
            return config
    except TaskError:
        # The architecture of the base model has no kind, as that of a body without a head.
        logger.debug("the base model of %s has no head for %s", adapter, kind)
    config = copy.deepcopy(config)
    config.architectures = None
    n_labels = _count_labels(adapter)
    if n_labels:
        config.num_labels = n_labels
    return config


def _count_labels(adapter: Path) -> int:
    """Return the number of outputs of a classification head in an adapter's weights, 0 if there is none."""
    heads = [
        tensor.shape[0]
        for name, tensor in read_adapter_weights(os.fspath(adapter)).items()
        if _HEAD.search(name) and tensor.dim() == 2  # noqa: PLR2004
    ]
    return heads[-1] if heads else 0


@dataclass(frozen=True)
class _BaseModel:
    """Makes the base model with its weights.

    Attributes:
        config: of the model.
        kind: of the task.
        folder: of the base model.
        options: of the task.
        saved: names of modules that the adapter saves as a whole: the base model may not have them.
    """

    config: Any
    kind: Kind
    folder: Path
    options: RunOptions
    saved: tuple[str, ...]

    def __call__(self) -> nn.Module:
        """Return the model in eval mode.

        Raises:
            CheckpointError: the weights are missing or do not match the architecture.
        """
        config = self.config
        # Quantised weights, and weights of another architecture with the same body, are loaded by transformers.
        if config.architectures is None or getattr(config, "quantization_config", None) is not None:
            return self._load_by_transformers().eval()
        dtype: Any = self.options.dtype
        model = make_model_from_config(config, dtype, kind=self.kind, attention=self.options.attention)
        load_weights(model, find_weights(self.folder))
        return model

    def _load_by_transformers(self) -> nn.Module:
        cls, dtype = find_class(self.config, self.kind), self.options.dtype or "auto"
        try:
            model: nn.Module
            model, report = cls.from_pretrained(
                self.folder,
                config=copy.deepcopy(self.config),
                dtype=dtype,
                attn_implementation=self.options.attention,
                local_files_only=True,
                output_loading_info=True,
            )
        # transformers raises errors of several types for damaged files.
        except Exception as error:
            raise CheckpointError(
                problem(
                    f"the base model {self.folder} cannot be loaded",
                    got=first_line(error),
                    expected=f"the weights of a {cls.__name__}",
                    remedy="correct base=",
                )
            ) from error
        missing = [name for name in sorted(report["missing_keys"]) if not set(name.split(".")) & set(self.saved)]
        if missing or report["mismatched_keys"]:
            raise CheckpointError(
                problem(
                    f"the base model {self.folder} does not match the adapter's task",
                    got=join_complaints([f"missing {name}" for name in missing] or ["other shapes"]),
                    expected=f"the weights of a {cls.__name__}, except those that the adapter saves",
                    remedy="pass base= with the model on which the adapter was trained",
                )
            )
        return model
