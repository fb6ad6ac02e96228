"""Batches of any nesting (dicts, tuples, lists, named tuples, mappings, dataclasses): walk, move, slice, measure."""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from tracin_ann.errors import TaskError, problem

# What holds no other values: found first, as rows may be long lists of them.
_ATOMS = (int, float, str, bytes, type(None), Tensor, np.ndarray)


def default_batch(examples: list[Any]) -> Any:
    """Return the batch that PyTorch's default collate makes of a list of examples.

    Raises:
        TaskError: it makes none of such examples.
    """
    try:
        return torch.utils.data.default_collate(examples)
    except (TypeError, RuntimeError) as error:
        raise TaskError(
            problem(
                "PyTorch's default collate cannot make a batch of these examples",
                got=f"{type(error).__name__}: {' '.join(str(error).split())[:160]}",
                expected="dense tensors of one shape, numbers, texts, or containers of these",
                remedy="pass Task.collate, a function that makes a batch of a list of examples",
            )
        ) from error


def map_leaves(function: Callable[[Any], Any], value: Any, is_leaf: Callable[[Any], bool] = lambda value: False) -> Any:
    """Return `value` with every leaf replaced by `function(leaf)`, containers of the same kinds.

    Containers are dicts and other mappings, tuples, lists, dataclasses and attrs classes. A `PackedSequence` is a
    leaf, since its parts by themselves are no batch, and so is whatever `is_leaf` says.
    """

    def mapped(value: Any, above: tuple[int, ...]) -> Any:
        opened = None if is_leaf(value) else _open(value)
        if opened is None:
            return function(value)
        if id(value) in above:
            return value
        items, made = opened
        return made([mapped(item, (*above, id(value))) for item in items])

    return mapped(value, ())


def leaves(value: Any) -> list[Any]:
    """Return the leaves in the order of a walk."""

    def walked(value: Any, above: tuple[int, ...]) -> Iterator[Any]:
        opened = _open(value)
        if opened is None:
            yield value
        elif id(value) not in above:
            inside = (*above, id(value))
            for item in opened[0]:
                if isinstance(item, _ATOMS):
                    yield item
                else:
                    yield from walked(item, inside)

    return list(walked(value, ()))


def _open(value: Any) -> tuple[list[Any], Callable[[list[Any]], Any]] | None:
    """Return a container's items, and what makes a container of its kind of others; None of a leaf."""
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
        # A copy keeps what its constructor needs and its items don't tell (defaultdict, HF's BatchEncoding).
        other = copy.copy(value)
        other.update(items)
        return other
    return type(value)(items)  # type: ignore[call-arg]


def _field_names(value: Any) -> list[str]:
    """Return the names of the fields of a dataclass's or attrs class's instance; none of other values."""
    if isinstance(value, type):
        return []
    if dataclasses.is_dataclass(value):
        return [field.name for field in dataclasses.fields(value)]
    return [attribute.name for attribute in getattr(type(value), "__attrs_attrs__", ())]


def _with_fields(value: Any, fields: Iterable[tuple[str, Any]]) -> Any:
    """Return a copy with other fields; neither __init__ nor __post_init__ runs again, and it may be frozen."""
    other = copy.copy(value)
    for name, item in fields:
        object.__setattr__(other, name, item)
    return other


def is_instance_of(value: Any, module: str, *names: str) -> bool:
    """Return whether a value is of one of a module's types; a module that is not imported has no values."""
    home = sys.modules.get(module)
    return home is not None and any(isinstance(value, getattr(home, name, ())) for name in names)


def to_device(value: Any, device: torch.device, *, channels_last: bool = False) -> Any:
    """Return `value` with its tensors on `device`; pictures (4-D, floating) with their channels last if asked for.

    An object that has a method `to(device)` moves itself: it may keep on the CPU what belongs there, such as lengths.

    Raises:
        TaskError: such an object cannot.
    """

    def moved(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return _moved_by_itself(leaf, device) if _moves_itself(leaf) else leaf
        pictures = channels_last and leaf.dim() == 4 and leaf.is_floating_point()  # noqa: PLR2004
        form = torch.channels_last if pictures else torch.preserve_format
        return leaf.to(device, non_blocking=True, memory_format=form)

    return map_leaves(moved, value, _moves_itself)


def _moves_itself(value: Any) -> bool:
    return callable(getattr(type(value), "to", None))


def _moved_by_itself(value: Any, device: torch.device) -> Any:
    try:
        # A copy, as many move in place, and what collate returns may be the user's own rows.
        own = copy.copy(value)
        moved = own.to(device)
    except Exception as error:
        raise TaskError(
            problem(
                f"a {type(value).__name__} in the batch cannot be moved to {device}",
                got=f"{type(error).__name__}: {error}",
                expected="an object whose to(device) returns it there",
                remedy="mend its method `to`, or leave the object out of what Task.collate returns",
            )
        ) from error
    return own if moved is None else moved


def pin_memory(value: Any) -> Any:
    """Return `value` with its tensors, and the objects that know how, in page-locked memory."""

    def locked(leaf: Any) -> Any:
        known = leaf.layout is torch.strided if isinstance(leaf, Tensor) else hasattr(type(leaf), "pin_memory")
        made = leaf.pin_memory() if known else leaf
        return leaf if made is None else made

    return map_leaves(locked, value)


def length(value: Any) -> int:
    """Return how long a value is: its numbers and pixels, and the characters of its texts."""
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
    return max(1, sum(_leaf_size(item) for item in _held(leaf) if isinstance(item, (Tensor, np.ndarray, str, bytes))))


def tensors_within(value: Any) -> list[Tensor]:
    """Return all tensors of a batch: its own, and those that its packed sequences and objects hold."""
    found = leaves(value)
    found += [held for leaf in found if not isinstance(leaf, _ATOMS) for held in _held(leaf)]
    return [leaf for leaf in found if isinstance(leaf, Tensor)]


def _held(leaf: Any) -> list[Any]:
    """Return the leaves of an object's own attributes and no further: one may lead to all of the data set."""
    return leaves(list(leaf) if isinstance(leaf, PackedSequence) else list(getattr(leaf, "__dict__", {}).values()))


def batched_tensors(value: Any, batch: int) -> list[Tensor] | str:
    """Return the tensors of a batch whose every tensor has `batch` rows, or why there is none such."""
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
    """Return `value` with its tensors replaced, in walk order, by `tensors`."""
    supply = iter(tensors)
    return map_leaves(lambda leaf: next(supply) if isinstance(leaf, Tensor) else leaf, value)
