"""Where weights come from: reading checkpoints into the model, and their digests."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import xxhash
from torch import Tensor, nn

from tracin_ann.errors import CheckpointError, problem
from tracin_ann.files import NotPlainError, file_digest, require_regular
from tracin_ann.task.state_dicts import (
    fill_model,
    is_plain,
    join_complaints,
    load_strictly,
    named_tensors,
    read_content,
)
from tracin_ann.task.task import Checkpoint, Task

T = TypeVar("T")
logger = logging.getLogger(__name__)


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
    _refuse_irregular(path)
    raise CheckpointError(
        problem(
            "a checkpoint is missing",
            got=f"no file {os.fspath(checkpoint.path)}",
            expected="the file that Task.checkpoints names",
            remedy="correct the path, or train first",
        )
    )


def _refuse_irregular(path: Path) -> None:
    """Refuse a FIFO or a device, which the readers would wait for or read on and on."""
    try:
        require_regular(path)
    except IsADirectoryError:
        # Task.load may read a folder.
        return
    except NotPlainError as error:
        remedy = "name the file that holds the weights"
        raise CheckpointError(
            problem(f"checkpoint {path} is no file", got=error, expected="a file or a folder", remedy=remedy)
        ) from error


class CheckpointLoader:
    """Reads a task's checkpoints into its model, and refuses a `Task.load` that does not.

    `Task.load` must fill something, must not make the same weights of files that differ, and must make the same
    parameters whenever it loads a checkpoint, whatever the model held before.
    """

    def __init__(self, task: Task) -> None:
        self._task = task
        self._read: dict[int, str] = {}
        self._weights: dict[int, _Weights] = {}

    @property
    def notes(self) -> tuple[str, ...]:
        """Return a line for every way in which files were read so far that are no state_dict as they are."""
        names: dict[str, list[str]] = {}
        for checkpoint, read in sorted(self._read.items()):
            names.setdefault(read, []).append(os.path.basename(self._path(checkpoint)))
        return tuple(
            f"{found[0]}{f' and {len(found) - 1} more' if len(found) > 1 else ''}: weights read {read}"
            for read, found in names.items()
        )

    def load(self, model: nn.Module, checkpoint: int, device: torch.device) -> None:
        """Read a checkpoint into the model, by `task.load` or as a state_dict (torch or safetensors).

        What is on meta gets memory; tied tensors stay tied, and the default loader keeps the model's dtypes.

        Raises:
            CheckpointError: it is missing, unreadable, or does not match the model, or `task.load` does not load it.
        """
        if self._task.load is None:
            self._fill(model, checkpoint)
        else:
            self._fill_watched(model, checkpoint)
        model.to(device)
        model.eval()

    def _fill(self, model: nn.Module, checkpoint: int) -> None:
        """Load, by the task or by default, and leave no tie undone and nothing on meta."""
        before, path = named_tensors(model), self._path(checkpoint)
        _refuse_irregular(Path(path))
        if self._task.load is None:
            self._load_state(model, checkpoint)
        else:
            returned = self._task.load(model, path)
            # A loader may also return what load_state_dict does, or a part of the model.
            if isinstance(returned, nn.Module) and all(returned is not module for module in model.modules()):
                _adopt(model, returned, path)
        _tie_again(model, before, cast=self._task.load is None)
        _refuse_meta(model, path)

    def _fill_watched(self, model: nn.Module, checkpoint: int) -> None:
        """Load by `Task.load` and compare what the model holds then with what it held before and at other times."""
        if checkpoint in self._weights:
            self._fill(model, checkpoint)
            self._refuse_other(checkpoint, _weights_of(model))
            return
        on_meta = any(tensor.is_meta for tensor in named_tensors(model).values())
        unloaded = None if on_meta else _weights_of(model)
        self._fill(model, checkpoint)
        loaded = _weights_of(model)
        if loaded == unloaded:
            self._refuse_idle(model, checkpoint)
        self._refuse_same(checkpoint, loaded)
        self._weights[checkpoint] = loaded

    def _load_state(self, model: nn.Module, checkpoint: int) -> None:
        path = self._path(checkpoint)
        read = fill_model(model, read_content(Path(path)), path)
        if read and checkpoint not in self._read:
            self._read[checkpoint] = read
            logger.info("checkpoint %s: weights read %s", path, read)

    def _refuse_idle(self, model: nn.Module, checkpoint: int) -> None:
        """Refuse a `Task.load` after which the model is as it was, unless it had the checkpoint's weights before.

        Raises:
            CheckpointError: other weights stay as well.
        """
        with _spoiled(model):
            spoiled = _weights_of(model)
            self._fill(model, checkpoint)
            fills = _weights_of(model) != spoiled
        if not fills:
            raise CheckpointError(
                problem(
                    "Task.load fills nothing",
                    got=f"the same parameters and buffers after loading {self._path(checkpoint)} as before",
                    expected="the checkpoint's weights in the model that Task.load is given",
                    remedy="fill that model in place, or return a module of the same layers",
                )
            )

    def _refuse_same(self, checkpoint: int, loaded: _Weights) -> None:
        """Refuse a `Task.load` that makes the same weights of files that differ.

        Raises:
            CheckpointError: it does.
        """
        for other, weights in self._weights.items():
            if weights == loaded and self._unlike(checkpoint, other):
                raise CheckpointError(
                    problem(
                        "Task.load makes the same weights of two checkpoints",
                        got=f"{self._path(other)} and {self._path(checkpoint)}, whose bytes differ",
                        expected="different weights",
                        remedy="let Task.load read the path that it is given; if the weights are the same, keep one "
                        "checkpoint with the sum of both learning rates",
                    )
                )

    def _refuse_other(self, checkpoint: int, loaded: _Weights) -> None:
        """Refuse a `Task.load` that made other parameters when it last loaded the checkpoint.

        Raises:
            CheckpointError: it did.
        """
        if self._weights[checkpoint].parameters != loaded.parameters:
            raise CheckpointError(
                problem(
                    "Task.load makes other weights of a checkpoint each time",
                    got=f"parameters from {self._path(checkpoint)} that differ from those of the call before",
                    expected="the checkpoint's weights, whatever the model held",
                    remedy="let Task.load set weights, not add to them, and draw none at random",
                )
            )

    def _unlike(self, one: int, other: int) -> bool:
        """Return whether the files of two checkpoints differ, and both count."""
        pair = [self._task.checkpoints[place] for place in (one, other)]
        return all(c.learning_rate for c in pair) and checkpoint_digest(pair[0]) != checkpoint_digest(pair[1])

    def _path(self, checkpoint: int) -> str:
        return os.fspath(self._task.checkpoints[checkpoint].path)


@dataclass(frozen=True)
class _Weights:
    """Digests of a model's parameters, and of its buffers: a forward may change those."""

    parameters: str
    buffers: str


def _weights_of(model: nn.Module) -> _Weights:
    return _Weights(tensors_digest(model.named_parameters()), tensors_digest(model.named_buffers()))


def tensors_digest(named: Iterable[tuple[str, Tensor]]) -> str:
    """Return a digest of the names and the numbers of tensors."""
    digest = xxhash.xxh3_128()
    for name, tensor in named:
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(_content(tensor.detach().cpu()))
    return digest.hexdigest()


def _content(tensor: Tensor) -> memoryview | bytes:
    if is_plain(tensor):
        return tensor.contiguous().flatten().view(torch.uint8).numpy().data
    # Sparse tensors, and classes whose numbers lie in tensors of their own.
    file = io.BytesIO()
    torch.save(tensor, file)
    return file.getvalue()


@contextmanager
def _spoiled(model: nn.Module) -> Iterator[None]:
    """Let the floating tensors of a model be NaN meanwhile; on leaving, those of these names are as before."""
    kept = {
        name: tensor.data
        for name, tensor in named_tensors(model).items()
        if is_plain(tensor) and tensor.is_floating_point() and tensor.element_size() > 1
    }
    # Other memory, not the same filled: the loader may have put tensors there that it keeps.
    for name, tensor in named_tensors(model).items():
        if name in kept:
            tensor.data = torch.full_like(kept[name], torch.nan)
    try:
        yield
    finally:
        for name, tensor in named_tensors(model).items():
            if name in kept:
                tensor.data = kept[name]


def _adopt(model: nn.Module, returned: nn.Module, path: str) -> None:
    """Copy parameters, buffers and extra state of a module that `Task.load` returned into the model.

    Raises:
        CheckpointError: its layers, their settings, or its tensors are not the model's.
    """
    complaints = [f"{name} on meta" for name, tensor in named_tensors(returned).items() if tensor.is_meta]
    complaints = complaints or load_strictly(model, returned.state_dict()) or _copy_buffers(model, returned)
    # Compared last: some layers' settings are numbers of their buffers.
    complaints = complaints or [
        f"layer {name or '(the whole)'} {theirs} instead of {mine}"
        for name, mine, theirs in _paired(_layers(model), _layers(returned))
        if mine != theirs
    ]
    if complaints:
        raise CheckpointError(
            problem(
                f"Task.load returned for {path} a module that is not like that of Task.model",
                got=join_complaints(complaints),
                expected="the same layers, settings, parameters and buffers",
                remedy="let Task.model build such a module, or let Task.load fill the one that it is given",
            )
        )


def _copy_buffers(model: nn.Module, returned: nn.Module) -> list[str]:
    """Copy all buffers, those that no state_dict holds as well, and return what does not fit."""
    complaints = []
    for name, mine, theirs in _paired(dict(model.named_buffers()), dict(returned.named_buffers())):
        if mine is None or theirs is None or mine.shape != theirs.shape:
            there, here = (None if tensor is None else list(tensor.shape) for tensor in (theirs, mine))
            complaints.append(f"buffer {name} of shape {there} instead of {here}")
        elif mine.is_meta:
            _put(model, name, theirs.detach().clone())
        else:
            mine.detach().copy_(theirs.detach())
    return complaints


def _layers(model: nn.Module) -> dict[str, str]:
    return {name: f"{type(module).__qualname__}({module.extra_repr()})" for name, module in model.named_modules()}


def _paired(mine: Mapping[str, T], theirs: Mapping[str, T]) -> Iterator[tuple[str, T | None, T | None]]:
    for name in {**mine, **theirs}:
        yield name, mine.get(name), theirs.get(name)


def _tie_again(model: nn.Module, before: dict[str, Tensor], *, cast: bool) -> None:
    """Make one tensor again of equal ones that were one before others were put in their place.

    Args:
        model: just loaded.
        before: its tensors by name as they were.
        cast: give tensors the dtypes of those before.
    """
    filled: dict[int, Tensor] = {}
    for name, tensor in named_tensors(model).items():
        if name in before and not tensor.is_meta:
            first = filled.setdefault(id(before[name]), tensor)
            if cast and tensor.dtype is not before[name].dtype:
                tensor.data = tensor.data.to(before[name].dtype)
            if tensor is not first and torch.equal(tensor, first):
                _put(model, name, first)
    for name, tensor in named_tensors(model).items():
        if tensor.is_meta and name in before and id(before[name]) in filled:
            _put(model, name, filled[id(before[name])])


def _refuse_meta(model: nn.Module, path: str) -> None:
    """Refuse a model of which a part has no values.

    Raises:
        CheckpointError: a parameter or buffer is on meta.
    """
    left = [name for name, tensor in named_tensors(model).items() if tensor.is_meta]
    if left:
        states = model.state_dict()
        raise CheckpointError(
            problem(
                f"checkpoint {path} leaves a part of the model on meta",
                got=join_complaints(
                    [name if name in states else f"{name}, a buffer that no state_dict holds" for name in left]
                ),
                expected="values for every parameter and buffer",
                remedy="let Task.model make these on the CPU, or let Task.load fill them",
            )
        )


def _put(model: nn.Module, name: str, tensor: Tensor) -> None:
    place, _, own = name.rpartition(".")
    setattr(model.get_submodule(place), own, tensor)
