"""Weights in folders of Hugging Face models: safetensors or PyTorch files, one or several shards, loaded strictly."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tracin_ann.errors import CheckpointError, first_line, problem
from tracin_ann.task.state_dicts import join_complaints, load_strictly, named_tensors

SINGLE = ("model.safetensors", "pytorch_model.bin")
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def find_weights(folder: str | os.PathLike[str]) -> Path:
    """Return the path of a folder's weights: the file that has all of them, or the folder if there are several shards.

    This is the path of a checkpoint: a single file has a digest that does not depend on the other files of the folder,
    such as the state of the optimizer.

    Raises:
        CheckpointError: the folder has no weights, or a shard is missing.
    """
    path = Path(folder)
    single = next((path / name for name in SINGLE if (path / name).is_file()), None)
    if single is not None:
        return single
    if any((path / name).is_file() for name in INDEXES):
        list_shards(path)
        return path
    raise CheckpointError(
        problem(
            f"{path} has no weights",
            got="no such file" if path.is_dir() else "no such folder",
            expected=" or ".join((SINGLE[0], INDEXES[0])),
            remedy="correct the path, or copy the weights there",
        )
    )


def list_shards(path: str | os.PathLike[str]) -> list[Path]:
    """Return the files with the weights of a path that `find_weights` returns.

    Raises:
        CheckpointError: the folder has no weights, or a shard is missing.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    index = next((path / name for name in INDEXES if (path / name).is_file()), None)
    if index is None:
        return [find_weights(path)]
    try:
        names = sorted({str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            problem(
                f"{index} cannot be read",
                got=first_line(error),
                expected="JSON with a weight_map",
                remedy="copy the file again from where the model was saved",
            )
        ) from error
    missing = [name for name in names if not (path / name).is_file()]
    if missing:
        raise CheckpointError(
            problem(
                f"weights of {path} are missing",
                got=f"no {join_complaints(missing)}",
                expected=f"the {len(names)} files that {index.name} names",
                remedy="copy the missing files from where the model was saved",
            )
        )
    return [path / name for name in names]


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Copy the weights of a folder, or of its file, into a model; they are converted to the model's dtypes.

    Every parameter and persistent buffer must be in the files, except that a name may be missing if the model ties it
    to one that is present; the files must contain nothing else. One tensor is read at a time. If the names differ from
    the model's, transformers loads the folder, because it converts the names and layouts of some architectures; its
    report must name nothing missing or unexpected either.

    Raises:
        CheckpointError: a file is missing or damaged, or names or shapes differ from those of the model.
    """
    path = Path(path)
    shards = list_shards(path)
    own = model.state_dict(keep_vars=True)
    names = {name for shard in shards for name in _read_names(shard)}
    unknown = sorted(names - own.keys())
    missing = _list_missing(model, own, names)
    if unknown or missing:
        complaints = [f"missing {name}" for name in missing] + [f"unknown {name}" for name in unknown]
        _load_by_transformers(model, path, complaints)
        return
    complaints, filled = [], set()
    with torch.no_grad():
        for shard in shards:
            for name, tensor in _read_tensors(shard):
                if own[name].shape != tensor.shape:
                    complaints.append(f"{name} of shape {list(tensor.shape)} instead of {list(own[name].shape)}")
                elif id(own[name]) in filled and not _equal(own[name], tensor):
                    complaints.append(_describe_untied(name))
                else:
                    own[name].copy_(tensor)
                    filled.add(id(own[name]))
    if complaints:
        raise CheckpointError(_mismatch_message(path, complaints))


def _equal(own: Tensor, tensor: Tensor) -> bool:
    """Return whether a tensor of the model has the values of one of a file."""
    return torch.equal(own, tensor.to(own.device, own.dtype))


def _describe_untied(name: str) -> str:
    return f"other values of {name} than of the weights to which config.json ties it"


def _list_missing(model: nn.Module, own: Mapping[str, Any], names: set[str]) -> list[str]:
    """Return the names of the model that are not in the files and not tied to a name that is."""
    tensors = named_tensors(model)
    present = {id(tensors[name]) for name in names if name in tensors}
    return [
        name for name in own if name not in names and name in tensors and id(tensors[name]) not in present
    ]  # Extra state of layers is not a tensor.


def _read_names(shard: Path) -> list[str]:
    if shard.suffix == ".safetensors":
        try:
            with safe_open(shard, framework="pt") as file:
                return list(file.keys())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(_unreadable_message(shard, error)) from error
    return list(_read_pickled(shard))


def _read_tensors(shard: Path) -> Iterator[tuple[str, Tensor]]:
    if shard.suffix != ".safetensors":
        yield from _read_pickled(shard).items()
        return
    with safe_open(shard, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - the file has no iterator
            yield name, file.get_tensor(name)


def _read_pickled(shard: Path) -> dict[str, Tensor]:
    try:
        content: dict[str, Tensor] = torch.load(shard, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise CheckpointError(_unreadable_message(shard, error)) from error
    return content


def _load_by_transformers(model: Any, path: Path, complaints: list[str]) -> None:
    """Load a folder by `from_pretrained`, and copy the result.

    Args:
        model: a model of transformers.
        path: the folder, or its file.
        complaints: names that differ, for the error.

    Raises:
        CheckpointError: the names or shapes of the files differ from those of the model.
    """
    if not hasattr(type(model), "from_pretrained"):
        raise CheckpointError(_mismatch_message(path, complaints))
    folder = path if path.is_dir() else path.parent
    try:
        other, report = type(model).from_pretrained(
            folder, config=model.config, dtype=model.dtype, local_files_only=True, output_loading_info=True
        )
    except Exception as error:
        raise CheckpointError(_mismatch_message(path, [*complaints, first_line(error)])) from error
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    left = [f"missing {name}" for name in sorted(set(report["missing_keys"]) - tied)]
    left += [f"unknown {name}" for name in sorted(report["unexpected_keys"])]
    left += [f"another shape of {entry[0]}" for entry in sorted(report["mismatched_keys"])]
    left = left or load_strictly(model, other.state_dict())
    if not left:
        own = named_tensors(model)
        values = [(name, value) for name, value in other.state_dict().items() if isinstance(value, Tensor)]
        left = [_describe_untied(name) for name, value in values if name in own and not _equal(own[name], value)]
    if left:
        raise CheckpointError(_mismatch_message(path, left))


def _mismatch_message(path: Path, complaints: list[str]) -> str:
    return problem(
        f"checkpoint {path} does not match the model of its {'config.json'}",
        got=join_complaints(complaints),
        expected="the names and shapes of the model's parameters",
        remedy="use the config.json with which the model was trained",
    )


def _unreadable_message(shard: Path, error: Exception) -> str:
    return problem(
        f"weights {shard} cannot be read",
        got=first_line(error),
        expected="a complete file of safetensors or PyTorch",
        remedy="copy the file again from where the model was saved",
    )
