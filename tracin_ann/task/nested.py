"""Nested batches (dicts, tuples, lists, named tuples, mappings, dataclasses): traversal, device moves and sizes."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from tracin_ann.errors import TaskError, problem

# Types without nested values. They are tested first, because rows may be long lists of them.
_ATOMS = (int, float, str, bytes, type(None), Tensor, np.ndarray)


def default_batch(examples: list[Any]) -> Any:
    """Return the batch that PyTorch's default collate makes of a list of examples.

    Raises:
        TaskError: it fails on these examples.
    """
    try:
        return torch.utils.data.default_collate(examples)
    except (TypeError, RuntimeError) as error:
        raise TaskError(
            problem(
                "PyTorch's default collate cannot make a batch of these examples",
                got=f"{type(error).__name__}: {' '.join(str(error).split())[:160]}",
                expected="dense tensors of one shape, numbers, strings, or containers of these",
                remedy="pass Task.collate, a function that turns a list of examples into a batch",
            )
        ) from error


def map_leaves(function: Callable[[Any], Any], value: Any, is_leaf: Callable[[Any], bool] = lambda value: False) -> Any:
    """Return `value` with every leaf replaced by `function(leaf)`, in containers of the same types.

    Containers are dicts and other mappings, tuples, lists, dataclasses and attrs classes. A `PackedSequence` is a
    leaf, since its parts are not batches, and so is any value for which `is_leaf` returns True.
    """

    def visit(value: Any, above: tuple[int, ...]) -> Any:
        unpacked = None if is_leaf(value) else _unpack(value)
        if unpacked is None:
            return function(value)
        if id(value) in above:
            return value
        items, rebuild_container = unpacked
        return rebuild_container([visit(item, (*above, id(value))) for item in items])

    return visit(value, ())


def leaves(value: Any) -> list[Any]:
    """Return the leaves in depth-first order."""

    def visit(value: Any, above: tuple[int, ...]) -> Iterator[Any]:
        unpacked = _unpack(value)
        if unpacked is None:
            yield value
        elif id(value) not in above:
            inside = (*above, id(value))
            for item in unpacked[0]:
                if isinstance(item, _ATOMS):
                    yield item
                else:
                    yield from visit(item, inside)

    return list(visit(value, ()))


def _unpack(value: Any) -> tuple[list[Any], Callable[[list[Any]], Any]] | None:
    """Return a container's items and a function that makes a container of its type from items; None for a leaf."""
    if isinstance(value, _ATOMS):
        return None
    if isinstance(value, Mapping):
        return list(value.values()), lambda items: _mapping_like(value, dict(zip(value, items, strict=True)))
    if isinstance(value, list):
        return value, list
    if isinstance(value, tuple) and not isinstance(value, PackedSequence):
        return list(value), getattr(type(value), "_make", type(value))
    names = [name for name in _field_names(value) if hasattr(value, name)]
    if names or dataclasses.is_dataclass(value):
        return [getattr(value, name) for name in names], lambda items: _with_fields(
            value, zip(names, items, strict=True)
        )
    return None


def _mapping_like(value: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    if type(value) is dict:
        return items
    if isinstance(value, MutableMapping):
        # A copy keeps state that is not in the items, such as constructor arguments (defaultdict, HF's BatchEncoding).
        other = copy.copy(value)
        other.update(items)
        return other
    return type(value)(items)  # type: ignore[call-arg]


def _field_names(value: Any) -> list[str]:
    """Return the field names of an instance of a dataclass or attrs class; empty for other values."""
    if isinstance(value, type):
        return []
    if dataclasses.is_dataclass(value):
        return [field.name for field in dataclasses.fields(value)]
    return [attribute.name for attribute in getattr(type(value), "__attrs_attrs__", ())]


def _with_fields(value: Any, fields: Iterable[tuple[str, Any]]) -> Any:
    """Return a copy with new field values; `__init__` and `__post_init__` do not run, and it may be frozen."""
    other = copy.copy(value)
    for name, item in fields:
        object.__setattr__(other, name, item)
    return other


def is_instance_of(value: Any, module: str, *names: str) -> bool:
    """Return whether a value is an instance of one of a module's types; False if the module is not imported."""
    imported = sys.modules.get(module)
    return imported is not None and any(isinstance(value, getattr(imported, name, ())) for name in names)


def to_device(value: Any, device: torch.device, *, channels_last: bool = False) -> Any:
    """Return `value` with its tensors on `device`, and 4-D floating-point tensors in channels-last format if selected.

    For an object with a method `to(device)`, that method is called: it may leave tensors such as lengths on the CPU.

    Raises:
        TaskError: the method of such an object fails.
    """

    def move(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return _call_to_method(leaf, device) if _has_to_method(leaf) else leaf
        are_images = channels_last and leaf.dim() == 4 and leaf.is_floating_point()  # noqa: PLR2004
        memory_format = torch.channels_last if are_images else torch.preserve_format
        # From a GPU, the CPU would read the copy before it is complete.
        return leaf.to(device, non_blocking=device.type != "cpu", memory_format=memory_format)

    return map_leaves(move, value, _has_to_method)


def _has_to_method(value: Any) -> bool:
    return callable(getattr(type(value), "to", None))


def _has_non_blocking(value: Any) -> bool:
    """Return whether the method `to` of an object has the argument `non_blocking`, as in many libraries."""
    if isinstance(value, PackedSequence):
        return True
    try:
        return "non_blocking" in inspect.signature(value.to).parameters
    except (TypeError, ValueError):
        return False


def _call_to_method(value: Any, device: torch.device) -> Any:
    try:
        # A copy, since many objects move in place, and collate may return objects of the user's data set.
        copied = copy.copy(value)
        may_wait = device.type == "cpu" or not _has_non_blocking(copied)
        moved = copied.to(device) if may_wait else copied.to(device, non_blocking=True)
    except Exception as error:
        raise TaskError(
            problem(
                f"a {type(value).__name__} in the batch cannot be moved to {device}",
                got=f"{type(error).__name__}: {error}",
                expected="an object whose to(device) returns it on the device",
                remedy="correct its method `to`, or do not return the object from Task.collate",
            )
        ) from error
    return copied if moved is None else moved


def pin_memory(value: Any, pin_tensor: Callable[[Tensor], Tensor]) -> Any:
    """Return `value` with its tensors, and objects with a method `pin_memory`, in page-locked memory.

    Args:
        value: a batch.
        pin_tensor: returns a tensor in page-locked memory, or the tensor itself if that is not possible.
    """

    def pin(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return pin_tensor(leaf)
        is_on_host = all(tensor.device.type == "cpu" for tensor in tensors_within([leaf]))
        if not hasattr(type(leaf), "pin_memory") or not is_on_host:
            return leaf
        # A copy, since some objects pin in place, and collate may return objects of the user's data set.
        copied = copy.copy(leaf)
        pinned = copied.pin_memory()
        return copied if pinned is None else pinned

    return map_leaves(pin, value)


def length(value: Any) -> int:
    """Return the size of a value: the number of its numbers, pixels and characters."""
    return sum(map(_leaf_size, leaves(value)))


def _leaf_size(leaf: Any) -> int:
    if isinstance(leaf, Tensor):
        return leaf.numel()
    if isinstance(leaf, np.ndarray):
        return leaf.size
    if isinstance(leaf, _ATOMS):
        return len(leaf) if isinstance(leaf, (str, bytes)) else 1
    if is_instance_of(leaf, "PIL.Image", "Image"):
        return int(leaf.width * leaf.height)
    return max(
        1,
        sum(_leaf_size(item) for item in _attribute_leaves(leaf) if isinstance(item, (Tensor, np.ndarray, str, bytes))),
    )


def tensors_within(value: Any) -> list[Tensor]:
    """Return all tensors of a batch, including those in packed sequences and in attributes of objects."""
    found = leaves(value)
    found += [inner for leaf in found if not isinstance(leaf, _ATOMS) for inner in _attribute_leaves(leaf)]
    return [leaf for leaf in found if isinstance(leaf, Tensor)]


def _attribute_leaves(leaf: Any) -> list[Any]:
    """Return the leaves in the attributes of an object, one level deep: an attribute may refer to the data set."""
    return leaves(list(leaf) if isinstance(leaf, PackedSequence) else list(getattr(leaf, "__dict__", {}).values()))


def batched_tensors(value: Any, batch: int) -> list[Tensor] | str:
    """Return the tensors of a batch if each has `batch` rows, or else the reason why the batch cannot be split."""
    tensors: list[Tensor] = []
    for leaf in leaves(value):
        if isinstance(leaf, Tensor):
            if leaf.layout is not torch.strided:
                return f"a batch that holds a tensor of layout {leaf.layout} cannot be split into examples"
            if leaf.dim() == 0 or leaf.shape[0] != batch:
                return f"a tensor of shape {list(leaf.shape)} in a batch of {batch} is not batch-first"
            tensors.append(leaf)
        elif not (leaf is None or isinstance(leaf, (bool, int, float))):
            return f"a batch that holds {type(leaf).__name__} cannot be split into examples"
    return tensors or "a batch without tensors cannot be split into examples"


def rebuild(value: Any, tensors: list[Tensor]) -> Any:
    """Return `value` with its tensors replaced by `tensors`, in depth-first order."""
    replacements = iter(tensors)
    return map_leaves(lambda leaf: next(replacements) if isinstance(leaf, Tensor) else leaf, value)
