"""Where weights come from: reading checkpoints into the model, and their digests."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tracin_ann.errors import CheckpointError, problem
from tracin_ann.files import file_digest
from tracin_ann.task import Checkpoint, Task

_SHOWN = 4


def checkpoint_digest(checkpoint: Checkpoint) -> str:
    """Return a digest of the checkpoint's bytes: of the file, or of all files in the folder.

    Raises:
        CheckpointError: it is missing.
    """
    path = Path(checkpoint.path)
    if path.is_file():
        return file_digest(path)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file())
        return "+".join(f"{p.relative_to(path)}:{file_digest(p)}" for p in files)
    raise CheckpointError(
        problem(
            "a checkpoint is missing",
            got=f"no file {os.fspath(checkpoint.path)}",
            expected="the file that Task.checkpoints names",
            remedy="correct the path, or train first",
        )
    )


def load_checkpoint(task: Task, model: nn.Module, checkpoint: Checkpoint, device: torch.device) -> None:
    """Read a checkpoint into the model, by `task.load` or as a state_dict (torch or safetensors).

    Raises:
        CheckpointError: it is missing, unreadable, or does not match the model.
    """
    path = os.fspath(checkpoint.path)
    if task.load is not None:
        task.load(model, path)
        model.to(device)
    else:
        state = _read_state(Path(path))
        _check_keys(path, state, model)
        model.load_state_dict(state)
    model.eval()


def _read_state(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file  # noqa: PLC0415 - only for such files

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(
            problem("a checkpoint is missing", got=f"no file {path}", expected="a file", remedy="correct the path")
        ) from error
    except Exception as error:
        raise CheckpointError(
            problem(
                f"checkpoint {path} cannot be read",
                got=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
                expected="a state_dict of tensors, saved by torch.save or safetensors",
                remedy="save model.state_dict(), or give Task a load(model, path)",
            )
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        got = f"a dict with {', '.join(map(str, list(state)[:_SHOWN]))}" if isinstance(state, Mapping) else type(state)
        raise CheckpointError(
            problem(
                f"checkpoint {path} is no plain state_dict",
                got=got,
                expected="names mapped to tensors",
                remedy="give Task a load(model, path) that reads it",
            )
        )
    return dict(state)


def _check_keys(path: str, state: Mapping[str, Tensor], model: nn.Module) -> None:
    own = model.state_dict()
    complaints = [f"missing {name}" for name in own if name not in state]
    complaints += [f"unknown {name}" for name in state if name not in own]
    complaints += [
        f"{name} of shape {list(state[name].shape)} instead of {list(tensor.shape)}"
        for name, tensor in own.items()
        if name in state and isinstance(tensor, Tensor) and state[name].shape != tensor.shape
    ]
    if complaints:
        more = f" and {len(complaints) - _SHOWN} more" if len(complaints) > _SHOWN else ""
        raise CheckpointError(
            problem(
                f"checkpoint {path} does not match the model",
                got="; ".join(complaints[:_SHOWN]) + more,
                expected=f"the {len(own)} entries of the model's state_dict",
                remedy="correct Task.model or the path, or give Task a load(model, path)",
            )
        )
