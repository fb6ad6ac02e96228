"""Adapter folders of PEFT: their configuration and their weights.

A folder holds `adapter_config.json` and `adapter_model.safetensors` (or `adapter_model.bin`), as
`PeftModel.save_pretrained` and the Trainer write them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tracin_ann.errors import CheckpointError, first_line, problem
from tracin_ann.task.integrations.rates import ADAPTER_CONFIG
from tracin_ann.task.state_dicts import read_content

_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# Fields of a configuration that do not change what an adapter computes.
_IRRELEVANT = ("base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version", "lora_dropout")


def read_adapter_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the content of the `adapter_config.json` of an adapter folder.

    Raises:
        CheckpointError: it is missing or is not a JSON object.
    """
    path = Path(folder) / ADAPTER_CONFIG
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        remedy = "name a folder that PeftModel.save_pretrained or the Trainer wrote"
        raise CheckpointError(
            problem("a checkpoint is not an adapter folder", got=f"no file {path}", expected="a file", remedy=remedy)
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(describe_config_error(path, first_line(error))) from error
    if not isinstance(content, dict) or not isinstance(content.get("peft_type"), str):
        raise CheckpointError(describe_config_error(path, "no entry peft_type"))
    return content


def describe_config_error(path: Path, got: str) -> str:
    """Return the message for a configuration that cannot be read."""
    remedy = "save the adapter again"
    return problem(f"{path} cannot be read", got=got, expected="the configuration of an adapter", remedy=remedy)


def check_same_config(first: str, expected: Mapping[str, Any], folder: str, got: Mapping[str, Any]) -> None:
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


def find_adapter_folder(path: str | os.PathLike[str]) -> str:
    """Return the folder of an adapter, given by itself or by its file of weights."""
    return os.path.dirname(path) or "." if os.path.basename(path) in _WEIGHTS else os.fspath(path)


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


def read_adapter_weights(folder: str) -> dict[str, Tensor]:
    """Return the tensors of an adapter folder by name.

    Raises:
        CheckpointError: the file is missing or cannot be read.
    """
    content = read_content(find_adapter_weights(folder))
    return {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
