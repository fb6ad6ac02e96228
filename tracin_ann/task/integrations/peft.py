"""PEFT adapters: a task whose checkpoints are adapter folders over one frozen base model.

The base model is created once; a checkpoint sets the tensors of its adapter only.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tracin_ann.errors import CheckpointError, MissingPackageError, TaskError, first_line, problem
from tracin_ann.packages import make_missing_package_error
from tracin_ann.task.integrations.adapter_folders import (
    check_same_config,
    describe_config_error,
    find_adapter_folder,
    read_adapter_config,
    read_adapter_weights,
)
from tracin_ann.task.integrations.rates import ADAPTER_CONFIG
from tracin_ann.task.state_dicts import error_lines, join_complaints
from tracin_ann.task.task import PartialLoad, Task

_ADAPTER = "default"
_PREFIX = "base_model.model."
_NO_TARGETS = re.compile(r"[Tt]arget modules? .* not found in the base model")


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
    folders = [find_adapter_folder(checkpoint.path) for checkpoint in task.checkpoints]
    configs = [read_adapter_config(folder) for folder in folders]
    for folder, config in zip(folders[1:], configs[1:], strict=True):
        check_same_config(folders[0], configs[0], folder, config)
    _import_peft()
    adapters = _Adapters(task.model, folders[0], quantization)
    load = PartialLoad(adapters.load, adapters.find_written)
    return replace(task, model=adapters.make_model, load=load)


def _import_peft() -> Any:
    try:
        import peft  # noqa: PLC0415 - only for adapters
    except ImportError as error:
        raise make_missing_package_error("peft", "peft", "adapters", "peft") from error
    return peft


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
        kept, state = self._kept or self._make_base(), read_adapter_weights(self.folder)
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
            raise CheckpointError(
                describe_config_error(Path(self.folder) / ADAPTER_CONFIG, first_line(error))
            ) from error
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
        path = find_adapter_folder(path)
        if path != self.folder:
            check_same_config(self.folder, read_adapter_config(self.folder), path, read_adapter_config(path))
        written = self._fill(model, read_adapter_weights(path), path)
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
            expected=f"a model with the target modules of {ADAPTER_CONFIG}",
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
