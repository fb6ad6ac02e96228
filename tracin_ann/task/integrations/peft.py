"""PEFT adapters: a task whose checkpoints are adapter folders over one frozen base model.

An adapter folder holds `adapter_config.json` and `adapter_model.safetensors` (or `adapter_model.bin`), as
`PeftModel.save_pretrained` and the Trainer write them. The base model is created once; a checkpoint sets the tensors of
its adapter only.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tracin_ann.errors import CheckpointError, MissingPackageError, TaskError, UsageError, first_line, problem
from tracin_ann.packages import make_missing_package_error
from tracin_ann.task.integrations.architectures import Kind, find_class, find_kind, load_config, make_model_from_config
from tracin_ann.task.integrations.param_groups import Rate
from tracin_ann.task.integrations.rates import (
    ADAPTER_CONFIG,
    TrainerCheckpoint,
    read_trainer_rates,
)
from tracin_ann.task.integrations.transformers import (
    RunOptions,
    assemble_task,
    check_rates,
    make_encoder,
    read_rates,
    read_steps,
)
from tracin_ann.task.integrations.weights import find_weights, load_weights
from tracin_ann.task.state_dicts import error_lines, join_complaints, read_content
from tracin_ann.task.task import Checkpoint, PartialLoad, Task

CONFIG = ADAPTER_CONFIG
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_ADAPTER = "default"
_PREFIX = "base_model.model."
# The kind of task of PEFT's task types; others have that of the base model.
_KINDS: dict[str, Kind] = {
    "SEQ_CLS": "sequence-classification",
    "TOKEN_CLS": "token-classification",
    "CAUSAL_LM": "causal-lm",
    "SEQ_2_SEQ_LM": "seq2seq",
}
# Fields of a configuration that do not change what an adapter computes.
_IRRELEVANT = ("base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version", "lora_dropout")
# Names of the last matrix of a classification head.
_HEAD = re.compile(r"(score|classifier|out_proj)\.(\w+\.)?weight$")
_NO_TARGETS = re.compile(r"[Tt]arget modules? .* not found in the base model")
logger = logging.getLogger(__name__)


def is_adapter_folder(folder: str | os.PathLike[str]) -> bool:
    """Return whether a folder holds an adapter of PEFT."""
    return (Path(folder) / CONFIG).is_file()


def read_adapter_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the content of the `adapter_config.json` of an adapter folder.

    Raises:
        CheckpointError: it is missing or is not a JSON object.
    """
    path = Path(folder) / CONFIG
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        remedy = "name a folder that PeftModel.save_pretrained or the Trainer wrote"
        raise CheckpointError(
            problem("a checkpoint is not an adapter folder", got=f"no file {path}", expected="a file", remedy=remedy)
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(_describe_config(path, first_line(error))) from error
    if not isinstance(content, dict) or not isinstance(content.get("peft_type"), str):
        raise CheckpointError(_describe_config(path, "no entry peft_type"))
    return content


def _describe_config(path: Path, got: str) -> str:
    remedy = "save the adapter again"
    return problem(f"{path} cannot be read", got=got, expected="the configuration of an adapter", remedy=remedy)


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


def make_adapter_task(task: Task, *, quantization: Literal["int8"] | None = None) -> Task:
    """Return the task of adapters over a base model.

    Gradients are those of the adapter's parameters: all that the configuration makes trainable, or those of them that
    `task.parameters` selects. The dtypes of these parameters are those of the files.

    Args:
        task: its model is the base model with weights; its checkpoints are adapter folders, or their files of weights,
            with learning rates.
        quantization: `int8`: see `quantize_base`; None: the base model is used as `task.model` returns it.

    Raises:
        CheckpointError: a folder has no configuration, or the configurations differ.
        TaskError: the adapter's method is not supported.
        MissingPackageError: peft, or for `int8` torchao, is not installed.
    """
    folders = [_find_folder(checkpoint.path) for checkpoint in task.checkpoints]
    configs = [read_adapter_config(folder) for folder in folders]
    for folder, config in zip(folders[1:], configs[1:], strict=True):
        _check_same_config(folders[0], configs[0], folder, config)
    _import_peft()
    adapters = _Adapters(task.model, folders[0], quantization)
    load = PartialLoad(adapters.load, adapters.find_written)
    return replace(task, model=adapters.make_model, load=load)


def _find_folder(path: str | os.PathLike[str]) -> str:
    """Return the folder of an adapter, given by itself or by its file of weights."""
    return os.path.dirname(path) or "." if os.path.basename(path) in _WEIGHTS else os.fspath(path)


def _import_peft() -> Any:
    try:
        import peft  # noqa: PLC0415 - only for adapters
    except ImportError as error:
        raise make_missing_package_error("peft", "peft", "adapters", "peft") from error
    return peft


def _check_same_config(first: str, expected: Mapping[str, Any], folder: str, got: Mapping[str, Any]) -> None:
    """Check that two adapters compute the same function of their weights: scales are in the configuration only.

    Raises:
        CheckpointError: their configurations differ.
    """
    for name in {**expected, **got}:
        one, other = (_sort_names(config.get(name)) for config in (expected, got))
        if name not in _IRRELEVANT and one != other:
            raise CheckpointError(
                problem(
                    "the adapters have different configurations",
                    got=f"{name} = {got.get(name)} in {folder}",
                    expected=f"{name} = {expected.get(name)}, as in {first}",
                    remedy="use the adapters of one training run as checkpoints",
                )
            )


def _sort_names(value: Any) -> Any:
    """Return a list of names in order: PEFT saves sets, in any order."""
    return sorted(value) if isinstance(value, list) and all(isinstance(item, str) for item in value) else value


@dataclass
class _Adapters:
    """The base model with the layers of an adapter, and the loader of adapter folders.

    The base model is created once. Models that `make_model` returns share the memory of its parameters, except those
    that an adapter sets (biases, or embeddings of a larger vocabulary).

    Attributes:
        base: returns the base model with its weights.
        folder: the first adapter folder, whose configuration and dtypes the model has.
        quantization: of the base model.
        written: names of the tensors that an adapter folder sets, known when a model is made.
    """

    base: Callable[[], nn.Module]
    folder: str
    quantization: Literal["int8"] | None
    written: frozenset[str] = field(default=frozenset(), init=False)
    _kept: nn.Module | None = field(default=None, init=False, repr=False)

    def make_model(self) -> nn.Module:
        """Return the base model with the layers of the adapter, which hold the weights of the first folder.

        Raises:
            CheckpointError: the adapter does not fit the base model.
            TaskError: the adapter's method is not supported.
        """
        peft, content = _import_peft(), read_adapter_config(self.folder)
        config = self._make_config(peft, content)
        kept, state = self._kept or self._make_base(), read_weights(self.folder)
        # Other values are initialisations that may change the base model.
        is_plain = content.get("init_lora_weights", True) in (True, False, "gaussian")
        self._kept = kept if is_plain else None
        base = _share_parameters(kept, {name.removeprefix(_PREFIX).replace(".base_layer.", ".") for name in state})
        try:
            with warnings.catch_warnings():
                # Advice for merging an adapter into an int8 model, and a function that transformers has renamed.
                warnings.filterwarnings("ignore", category=UserWarning, module="peft")
                warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
                model: nn.Module = peft.get_peft_model(base, config, adapter_name=_ADAPTER)
        except Exception as error:
            raise CheckpointError(self._describe_mismatch(base, content, _explain(error))) from error
        self.written = self._fill(model, state, self.folder)
        _set_dtypes(model, state)
        return model

    def _make_base(self) -> nn.Module:
        base = self.base()
        # The user may still use the model.
        return base if self.quantization is None else quantize_base(_share_parameters(base))

    def _make_config(self, peft: Any, content: Mapping[str, Any]) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", category=UserWarning, module="peft")
                config = peft.PeftConfig.from_pretrained(self.folder, local_files_only=True)
        except Exception as error:
            raise CheckpointError(_describe_config(Path(self.folder) / CONFIG, first_line(error))) from error
        # X-LoRA loads the adapters that it names, also from a server; Megatron's layers are in a module that the
        # configuration names.
        entry = next((name for name in ("adapters", "megatron_config") if content.get(name)), None)
        if config.is_prompt_learning or entry is not None:
            raise TaskError(
                problem(
                    f"adapter {self.folder} cannot be used",
                    got=f"peft_type {content['peft_type']}" + (f" with {entry}" if entry else ""),
                    expected="LoRA, DoRA, IA3 or another method whose parameters are parts of layers",
                    remedy="train such an adapter, or write Task.model and Task.load for this one",
                )
            )
        # With the recorded name, PEFT would warn that the base model has another one.
        config.base_model_name_or_path, config.inference_mode = None, False
        return config

    def load(self, model: nn.Module, path: str) -> None:
        """Set the tensors of the adapter from a folder, strictly.

        Raises:
            CheckpointError: a file is missing or unreadable, or does not fit the model.
        """
        path = _find_folder(path)
        if path != self.folder:
            _check_same_config(self.folder, read_adapter_config(self.folder), path, read_adapter_config(path))
        written = self._fill(model, read_weights(path), path)
        missing = sorted(self.written - written)
        if missing or written - self.written:
            unknown = sorted(written - self.written)
            complaints = [f"missing {name}" for name in missing] + [f"unknown {name}" for name in unknown]
            raise CheckpointError(
                problem(
                    f"adapter {path} sets other tensors than {self.folder}",
                    got=join_complaints(complaints),
                    expected=f"the same {len(self.written)} tensors",
                    remedy="save the embedding layers with all adapters or with none (save_embedding_layers)",
                )
            )

    def find_written(self, model: nn.Module) -> frozenset[str]:
        """Return the names of the tensors that `load` sets in a model that `make_model` returned."""
        return self.written

    def _fill(self, model: nn.Module, state: dict[str, Tensor], path: str) -> frozenset[str]:
        """Set the tensors of the adapter and return their names.

        Raises:
            CheckpointError: a tensor is missing, unexpected, or has another shape.
        """
        trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", category=UserWarning, module="peft")
                result = _import_peft().set_peft_model_state_dict(model, dict(state), adapter_name=_ADAPTER)
        except KeyError as error:
            # Of modules that are saved whole.
            complaints = [f"missing {error.args[0]}"]
        except RuntimeError as error:
            complaints = error_lines(error)
        else:
            missing = sorted(trainable.intersection(result.missing_keys))
            complaints = [f"missing {name}" for name in missing]
            complaints += [f"unknown {name}" for name in result.unexpected_keys]
            if not complaints:
                return frozenset(model.state_dict()).difference(result.missing_keys)
        remedy = "pass the base model on which the adapter was trained, or correct the path"
        raise CheckpointError(
            problem(
                f"adapter {path} does not match the model",
                got=join_complaints(complaints),
                expected=f"the {len(trainable)} tensors of an adapter of {_describe_base(model)}",
                remedy=remedy + _name_base(read_adapter_config(path)),
            )
        )

    def _describe_mismatch(self, base: nn.Module, content: Mapping[str, Any], why: str) -> str:
        return problem(
            f"adapter {self.folder} does not fit the base model",
            got=f"{_describe_base(base)}: {why}",
            expected=f"a model with the target modules of {CONFIG}",
            remedy=f"pass the base model on which the adapter was trained{_name_base(content)}",
        )


def _share_parameters(model: nn.Module, copied: Collection[str] = ()) -> nn.Module:
    """Return a copy of a model with parameters of their own that share the memory of the model's.

    Args:
        model: the model.
        copied: names of parameters whose memory is copied.
    """
    shared = {
        id(p): nn.Parameter(p.detach().clone() if name in copied else p.detach(), requires_grad=p.requires_grad)
        for name, p in model.named_parameters()
    }
    return copy.deepcopy(model, dict(shared))


def _explain(error: Exception) -> str:
    text = first_line(error)
    return text.partition(": ")[2] if _NO_TARGETS.search(text) else text


def _describe_base(model: nn.Module) -> str:
    get_base: Callable[[], nn.Module] = getattr(model, "get_base_model", lambda: model)
    base = get_base()
    return type(base).__name__


def _name_base(content: Mapping[str, Any]) -> str:
    name = content.get("base_model_name_or_path")
    return f" ({name})" if name else ""


def read_weights(folder: str) -> dict[str, Tensor]:
    """Return the tensors of an adapter folder by name.

    Raises:
        CheckpointError: the file is missing or cannot be read.
    """
    content = read_content(find_adapter_weights(folder))
    return {str(key): value for key, value in content.items() if isinstance(value, Tensor)}


def find_adapter_weights(folder: str | os.PathLike[str]) -> Path:
    """Return the file of weights of an adapter folder.

    Raises:
        CheckpointError: it is missing.
    """
    for name in _WEIGHTS:
        if (Path(folder) / name).is_file():
            return Path(folder) / name
    raise CheckpointError(
        problem(
            f"adapter {folder} has no weights",
            got=f"no file {_WEIGHTS[0]} or {_WEIGHTS[1]}",
            expected="one of them",
            remedy="correct the path, or save the adapter again",
        )
    )


def _set_dtypes(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give the trainable parameters the dtype of the file; PEFT creates them in float32."""
    dtypes = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    if len(dtypes) == 1 and (dtype := dtypes.pop()) in (torch.float16, torch.bfloat16):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)


def quantize_base(model: nn.Module) -> nn.Module:
    """Return a base model whose linear layers have weights in int8, changed in place.

    Each output channel has one scale (torchao's weight-only quantisation). The output layer is not changed.

    Raises:
        MissingPackageError: torchao is not installed.
    """
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_  # noqa: PLC0415 - only for int8
    except ImportError as error:
        raise MissingPackageError(
            problem(
                "the base model cannot be converted to int8",
                got=f"no package torchao ({error})",
                expected="an installed torchao",
                remedy="install torchao, or use a base model in bfloat16",
            )
        ) from error
    get_output: Callable[[], object] = getattr(model, "get_output_embeddings", lambda: None)
    output = get_output()
    quantize_(
        model, Int8WeightOnlyConfig(), filter_fn=lambda layer, _: isinstance(layer, nn.Linear) and layer is not output
    )
    return model


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
        for name, tensor in read_weights(os.fspath(adapter)).items()
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
