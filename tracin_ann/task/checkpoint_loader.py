"""Checkpoints: loading their weights into the model, checks of `Task.load`, and digests."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import xxhash
from torch import Tensor, nn

from tracin_ann.errors import CheckpointError, problem
from tracin_ann.files import NotRegularFileError, file_digest, require_regular
from tracin_ann.task.checkpoint import Checkpoint
from tracin_ann.task.state_dicts import (
    fill_model,
    is_plain,
    join_complaints,
    load_strictly,
    named_tensors,
    read_content,
)
from tracin_ann.task.task import PartialLoad, Task

T = TypeVar("T")
logger = logging.getLogger(__name__)


def checkpoint_digest(checkpoint: Checkpoint) -> str:
    """Return a digest of the checkpoint: of its file and the key of its entry, or of all files in the directory.

    Raises:
        CheckpointError: it is missing.
    """
    path = Path(checkpoint.path)
    if path.is_file():
        return file_digest(path) + ("" if checkpoint.key is None else f"+{checkpoint.key}")
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file())
        return "+".join(f"{p.relative_to(path)}:{file_digest(p)}" for p in files)
    _reject_special_file(path)
    raise CheckpointError(
        problem(
            "a checkpoint is missing",
            got=f"no file {os.fspath(checkpoint.path)}",
            expected="the file that Task.checkpoints names",
            remedy="correct the path, or train first",
        )
    )


def _reject_special_file(path: Path) -> None:
    """Raise an error for a FIFO or a device, from which a reader could read forever."""
    try:
        require_regular(path)
    except IsADirectoryError:
        # Task.load may read a directory.
        return
    except NotRegularFileError as error:
        remedy = "name the file that holds the weights"
        raise CheckpointError(
            problem(f"checkpoint {path} is not a file", got=error, expected="a file or a directory", remedy=remedy)
        ) from error


class CheckpointLoader:
    """Loads a task's checkpoints into its model and checks `Task.load`.

    `Task.load` must change the model, must not set the same weights for files that differ, and must set the same
    parameters each time it loads a checkpoint, whatever the model contained before.
    """

    def __init__(self, task: Task) -> None:
        self._task = task
        self._read: dict[int, str] = {}
        self._weights: dict[int, _Weights] = {}

    @property
    def notes(self) -> tuple[str, ...]:
        """Return lines that say how files that are not a plain state_dict have been read so far."""
        names: dict[str, list[str]] = {}
        for checkpoint, read in sorted(self._read.items()):
            names.setdefault(read, []).append(os.path.basename(self._path(checkpoint)))
        return tuple(
            f"{files[0]}{f' and {len(files) - 1} more' if len(files) > 1 else ''}: weights read {read}"
            for read, files in names.items()
        )

    def load(self, model: nn.Module, checkpoint: int, device: torch.device) -> None:
        """Load a checkpoint into the model, by `Task.load` or as a state_dict (torch or safetensors).

        Tensors on the meta device get memory, tied tensors stay tied, and the default loader keeps the model's dtypes.

        Raises:
            CheckpointError: the file is missing, unreadable, or does not match the model, or a check of `Task.load`
                fails.
        """
        if self._task.load is None:
            self._fill(model, checkpoint)
        else:
            self._fill_and_check(model, checkpoint)
        model.to(device)
        model.eval()

    def _fill(self, model: nn.Module, checkpoint: int) -> None:
        """Load by `Task.load` or by default, restore ties, and check that nothing is left on the meta device."""
        before, path = named_tensors(model), self._path(checkpoint)
        _reject_special_file(Path(path))
        if self._task.load is None:
            self._load_state(model, checkpoint)
        else:
            returned = self._task.load(model, path)
            # A loader may also return the result of load_state_dict, or a part of the model.
            if isinstance(returned, nn.Module) and all(returned is not module for module in model.modules()):
                _copy_module(model, returned, path)
        _restore_ties(model, before, cast=self._task.load is None)
        _check_nothing_on_meta(model, path)

    def _fill_and_check(self, model: nn.Module, checkpoint: int) -> None:
        """Load by `Task.load` and compare the model's weights with those before and with those of earlier loads."""
        if checkpoint in self._weights:
            self._fill(model, checkpoint)
            self._check_repeatable(checkpoint, self._digest_weights(model))
            return
        on_meta = any(tensor.is_meta for tensor in named_tensors(model).values())
        unloaded = None if on_meta else self._digest_weights(model)
        self._fill(model, checkpoint)
        loaded = self._digest_weights(model)
        if loaded == unloaded:
            self._check_changes_model(model, checkpoint)
        self._check_weights_differ(checkpoint, loaded)
        self._weights[checkpoint] = loaded

    def _load_state(self, model: nn.Module, checkpoint: int) -> None:
        path = self._path(checkpoint)
        read = fill_model(model, read_content(Path(path)), path, self._task.checkpoints[checkpoint].key)
        if read and checkpoint not in self._read:
            self._read[checkpoint] = read
            logger.info("checkpoint %s: weights read %s", path, read)

    def _check_changes_model(self, model: nn.Module, checkpoint: int) -> None:
        """Check on other weights that `Task.load` changes the model: it may have had the checkpoint's weights before.

        Raises:
            CheckpointError: weights that are NaN remain NaN.
        """
        with _replace_by_nan(model, PartialLoad.list_written(self._task, model)):
            before = self._digest_weights(model)
            self._fill(model, checkpoint)
            changed = self._digest_weights(model) != before
        if not changed:
            raise CheckpointError(
                problem(
                    "Task.load does not change the model",
                    got=f"the same parameters and buffers after loading {self._path(checkpoint)} as before",
                    expected="the checkpoint's weights in the model that is passed to Task.load",
                    remedy="fill that model in place, or return a module of the same layers",
                )
            )

    def _check_weights_differ(self, checkpoint: int, loaded: _Weights) -> None:
        """Check that `Task.load` sets different weights for files that differ.

        Raises:
            CheckpointError: it sets the same weights.
        """
        for other, weights in self._weights.items():
            if weights == loaded and self._files_differ(checkpoint, other):
                raise CheckpointError(
                    problem(
                        "Task.load sets the same weights for two checkpoints",
                        got=f"{self._path(other)} and {self._path(checkpoint)}, whose bytes differ",
                        expected="different weights",
                        remedy="read the path that is passed to Task.load; if the weights are the same, use one "
                        "checkpoint with the sum of both learning rates",
                    )
                )

    def _check_repeatable(self, checkpoint: int, loaded: _Weights) -> None:
        """Check that `Task.load` sets the same parameters as when it first loaded the checkpoint.

        Raises:
            CheckpointError: the parameters differ.
        """
        if self._weights[checkpoint].parameters != loaded.parameters:
            raise CheckpointError(
                problem(
                    "Task.load sets different weights for one checkpoint on each call",
                    got=f"parameters from {self._path(checkpoint)} that differ from those of an earlier call",
                    expected="the checkpoint's weights, whatever the model contained before",
                    remedy="set weights in Task.load; do not add to them or draw them at random",
                )
            )

    def _files_differ(self, one: int, other: int) -> bool:
        """Return whether the files of two checkpoints differ, and neither learning rate is 0."""
        pair = [self._task.checkpoints[place] for place in (one, other)]
        return all(c.largest_rate for c in pair) and checkpoint_digest(pair[0]) != checkpoint_digest(pair[1])

    def _digest_weights(self, model: nn.Module) -> _Weights:
        names = PartialLoad.list_written(self._task, model)
        parameters, buffers = (
            [(name, tensor) for name, tensor in named if names is None or name in names]
            for named in (model.named_parameters(), model.named_buffers())
        )
        return _Weights(tensors_digest(parameters), tensors_digest(buffers))

    def _path(self, checkpoint: int) -> str:
        return os.fspath(self._task.checkpoints[checkpoint].path)


@dataclass(frozen=True)
class _Weights:
    """Digests of a model's parameters and of its buffers, which a forward pass may change."""

    parameters: str
    buffers: str


def tensors_digest(named: Iterable[tuple[str, Tensor]]) -> str:
    """Return a digest of the names, dtypes, shapes and values of tensors."""
    digest = xxhash.xxh3_128()
    for name, tensor in named:
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(_tensor_bytes(tensor.detach().cpu()))
    return digest.hexdigest()


def _tensor_bytes(tensor: Tensor) -> memoryview | bytes:
    if is_plain(tensor):
        return tensor.contiguous().flatten().view(torch.uint8).numpy().data
    # Sparse tensors, and tensor subclasses that store their values in other tensors.
    file = io.BytesIO()
    torch.save(tensor, file)
    return file.getvalue()


@contextmanager
def _replace_by_nan(model: nn.Module, names: Collection[str] | None) -> Iterator[None]:
    """Set floating-point tensors of a model to NaN in the block; restore the tensors of these names after it.

    Args:
        model: the model.
        names: of the tensors; None: all.
    """
    saved = {
        name: tensor.data
        for name, tensor in named_tensors(model).items()
        if (names is None or name in names)
        and is_plain(tensor)
        and tensor.is_floating_point()
        and tensor.element_size() > 1
    }
    # New memory, since the loader may have assigned tensors to the model that it uses again.
    for name, tensor in named_tensors(model).items():
        if name in saved:
            tensor.data = torch.full_like(saved[name], torch.nan)
    try:
        yield
    finally:
        for name, tensor in named_tensors(model).items():
            if name in saved:
                tensor.data = saved[name]


def _copy_module(model: nn.Module, returned: nn.Module, path: str) -> None:
    """Copy parameters, buffers and extra state of a module that `Task.load` returned into the model.

    Raises:
        CheckpointError: its layers, their settings, or its tensors differ from the model's.
    """
    complaints = [f"{name} on meta" for name, tensor in named_tensors(returned).items() if tensor.is_meta]
    complaints = complaints or load_strictly(model, returned.state_dict()) or _copy_buffers(model, returned)
    # Compared last: some layers show values of their buffers as settings.
    complaints = complaints or [
        f"layer {name or '(the model)'} {theirs} instead of {mine}"
        for name, mine, theirs in _pair_by_name(_describe_layers(model), _describe_layers(returned))
        if mine != theirs
    ]
    if complaints:
        raise CheckpointError(
            problem(
                f"the module that Task.load returned for {path} does not match that of Task.model",
                got=join_complaints(complaints),
                expected="the same layers, settings, parameters and buffers",
                remedy="return the same module from Task.model, or fill the model that is passed to Task.load",
            )
        )


def _copy_buffers(model: nn.Module, returned: nn.Module) -> list[str]:
    """Copy all buffers, including those that are not in the state_dict, and return a line for each mismatch."""
    complaints = []
    for name, mine, theirs in _pair_by_name(dict(model.named_buffers()), dict(returned.named_buffers())):
        if mine is None or theirs is None or mine.shape != theirs.shape:
            there, here = (None if tensor is None else list(tensor.shape) for tensor in (theirs, mine))
            complaints.append(f"buffer {name} of shape {there} instead of {here}")
        elif mine.is_meta:
            _set_tensor(model, name, theirs.detach().clone())
        else:
            mine.detach().copy_(theirs.detach())
    return complaints


def _describe_layers(model: nn.Module) -> dict[str, str]:
    return {name: f"{type(module).__qualname__}({module.extra_repr()})" for name, module in model.named_modules()}


def _pair_by_name(mine: Mapping[str, T], theirs: Mapping[str, T]) -> Iterator[tuple[str, T | None, T | None]]:
    for name in {**mine, **theirs}:
        yield name, mine.get(name), theirs.get(name)


def _restore_ties(model: nn.Module, before: dict[str, Tensor], *, cast: bool) -> None:
    """Tie equal tensors again that were tied before a loader replaced them.

    Args:
        model: the model after loading.
        before: its tensors by name before loading.
        cast: convert tensors to the dtypes that they had before.
    """
    filled: dict[int, Tensor] = {}
    for name, tensor in named_tensors(model).items():
        if name in before and not tensor.is_meta:
            first = filled.setdefault(id(before[name]), tensor)
            if cast and tensor.dtype is not before[name].dtype:
                tensor.data = tensor.data.to(before[name].dtype)
            if tensor is not first and torch.equal(tensor, first):
                _set_tensor(model, name, first)
    for name, tensor in named_tensors(model).items():
        if tensor.is_meta and name in before and id(before[name]) in filled:
            _set_tensor(model, name, filled[id(before[name])])


def _check_nothing_on_meta(model: nn.Module, path: str) -> None:
    """Check that every parameter and buffer has values.

    Raises:
        CheckpointError: one is on the meta device.
    """
    left = [name for name, tensor in named_tensors(model).items() if tensor.is_meta]
    if left:
        states = model.state_dict()
        raise CheckpointError(
            problem(
                f"checkpoint {path} leaves a part of the model on the meta device",
                got=join_complaints(
                    [name if name in states else f"{name}, a buffer that is not in the state_dict" for name in left]
                ),
                expected="values for every parameter and buffer",
                remedy="create these on the CPU in Task.model, or fill them in Task.load",
            )
        )


def _set_tensor(model: nn.Module, name: str, tensor: Tensor) -> None:
    place, _, own = name.rpartition(".")
    setattr(model.get_submodule(place), own, tensor)
