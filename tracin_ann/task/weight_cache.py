"""Weights of checkpoints that remain in memory, so that a checkpoint is loaded again without reading its file.

The parameters and buffers of a model are replaced by stored copies. A loader may also change what is not a tensor, and
a model may hold views of its parameters; `LoadedModel` therefore compares losses before it relies on this cache.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tracin_ann.task.checkpoint import Checkpoint
from tracin_ann.task.model import find_registries
from tracin_ann.task.state_dicts import is_plain, named_tensors

FileIdentity = tuple[tuple[str, int, int, int, int, int], ...]


def identify_checkpoint(checkpoint: Checkpoint) -> FileIdentity:
    """Return path, device, inode, size and times of the checkpoint's file, or of all files of a directory.

    The file of second moments is included.

    The result is empty if the path cannot be read. Equal identities mean that the files have not been replaced or
    written since.
    """
    path = Path(checkpoint.path)
    try:
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        if checkpoint.second_moments is not None and not callable(checkpoint.second_moments):
            files.append(Path(checkpoint.second_moments))
        found = [(os.fspath(file), file.stat()) for file in files]
    except OSError:
        return ()
    return tuple(
        (name, stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for name, stat in found
    )


@dataclass(frozen=True)
class _Slot:
    """A parameter or buffer of a model at a checkpoint: where it is registered, the object, and its memory.

    The memory is a copy, or that of the model if no checkpoint sets the tensor.
    """

    registry: Any
    name: str
    tensor: Tensor
    memory: Tensor
    is_copy: bool = True


def list_memory(model: nn.Module, written: Collection[str] | None) -> list[int]:
    """Return the addresses of the parameters and buffers that no checkpoint sets; their order is that of the modules.

    Stored weights share the memory of these tensors, and do not have the values of other memory that replaces it.

    Args:
        model: the model.
        written: names of the tensors that checkpoints set; None: all.
    """
    if written is None:
        return []
    named = named_tensors(model)
    chosen = {id(named[name]) for name in written if name in named}
    return [
        tensor.data_ptr()
        for registry in find_registries(model.modules())
        for tensor in registry.values()
        if tensor is not None and id(tensor) not in chosen and is_plain(tensor) and not tensor.is_meta
    ]


class WeightCache:
    """Copies of a model's parameters and buffers at several checkpoints.

    Tensors that are equal at several checkpoints, such as frozen layers, share one copy.

    Args:
        model: the model.
        memory_bytes: largest number of bytes of all copies.
        written: names of the tensors that checkpoints set; None: all. Other tensors are not copied.
    """

    def __init__(self, model: nn.Module, memory_bytes: int, written: Collection[str] | None = None) -> None:
        self._model, self._memory_bytes, self._written = model, memory_bytes, written
        self._stored: OrderedDict[int, list[_Slot]] = OrderedDict()
        self._recent: set[int] = set()
        self._attached: tuple[int, list[int]] | None = None

    def __contains__(self, checkpoint: int) -> bool:
        """Return whether the weights of a checkpoint are stored."""
        return checkpoint in self._stored

    @property
    def n_bytes(self) -> int:
        """Return the number of bytes of all copies."""
        slots = [slot for slots in self._stored.values() for slot in slots if slot.is_copy]
        return sum({id(slot.memory): slot.memory.nbytes for slot in slots}.values())

    def store(self, checkpoint: int) -> bool:
        """Copy the model's present parameters and buffers; return False if they are not plain or need too much memory.

        Weights that are not needed since the last `start_use` are removed for them, the least recently used ones first.
        """
        self.remove(checkpoint)
        registered = [
            (registry, name, tensor)
            for registry in find_registries(self._model.modules())
            for name, tensor in registry.items()
            if tensor is not None
        ]
        copied = self._find_written()
        written = [tensor for *_, tensor in registered if copied is None or id(tensor) in copied]
        if not all(is_plain(tensor) and not tensor.is_meta and not tensor.is_inference() for tensor in written):
            return False
        distinct = {
            id(tensor): (place, tensor)
            for place, (*_, tensor) in enumerate(registered)
            if copied is None or id(tensor) in copied
        }
        found = {key: self._find_equal(place, tensor) for key, (place, tensor) in distinct.items()}
        if not self._make_room(sum(distinct[key][1].nbytes for key, equal in found.items() if equal is None)):
            return False
        memory = {key: distinct[key][1].detach().clone() if equal is None else equal for key, equal in found.items()}
        self._stored[checkpoint] = [
            _Slot(*slot, memory[id(slot[2])]) if id(slot[2]) in memory else _Slot(*slot, slot[2].data, is_copy=False)
            for slot in registered
        ]
        self._recent.add(checkpoint)
        return True

    def _find_written(self) -> set[int] | None:
        """Return the tensors that checkpoints set, by identity; None: all."""
        if self._written is None:
            return None
        named = named_tensors(self._model)
        return {id(named[name]) for name in self._written if name in named}

    def _find_equal(self, place: int, tensor: Tensor) -> Tensor | None:
        """Return a stored copy of an equal parameter in the same place; buffers have their own copies."""
        if isinstance(tensor, nn.Parameter):
            for slots in self._stored.values():
                if place < len(slots):
                    memory = slots[place].memory
                    same = memory.shape == tensor.shape and memory.dtype == tensor.dtype
                    if same and memory.stride() == tensor.stride() and torch.equal(memory, tensor.detach()):
                        return memory
        return None

    def _make_room(self, n_bytes: int) -> bool:
        """Remove weights of earlier uses until so many more bytes fit; return whether they do."""
        for other in [c for c in self._stored if c not in self._recent]:
            if self.n_bytes + n_bytes <= self._memory_bytes:
                break
            del self._stored[other]
        return self.n_bytes + n_bytes <= self._memory_bytes

    def attach(self, checkpoint: int) -> bool:
        """Put the stored weights of a checkpoint into the model; return False if they are not stored."""
        self.detach()
        slots = self._stored.get(checkpoint)
        if slots is None:
            return False
        self._stored.move_to_end(checkpoint)
        self._recent.add(checkpoint)
        for slot in slots:
            if slot.name not in slot.registry or slot.registry[slot.name] is not slot.tensor:
                slot.registry[slot.name] = slot.tensor
            slot.tensor.data = slot.memory
        self._attached = checkpoint, [slot.tensor._version for slot in slots]
        return True

    def detach(self) -> bool:
        """Record that other weights replace those of `attach`; return whether there were any.

        Weights that were changed in place while they were attached are removed from the cache.
        """
        attached, self._attached = self._attached, None
        if attached is None:
            return False
        checkpoint, versions = attached
        slots = self._stored.get(checkpoint, [])
        changed = {id(slot.memory) for slot, old in zip(slots, versions, strict=False) if slot.tensor._version != old}
        for other in [c for c, others in self._stored.items() if any(id(slot.memory) in changed for slot in others)]:
            self.remove(other)
        return True

    def remove(self, checkpoint: int) -> None:
        """Remove the weights of a checkpoint."""
        self._stored.pop(checkpoint, None)

    def start_use(self) -> None:
        """Begin a use of the model; the weights that it needs are not removed before it ends."""
        self._recent = set()
