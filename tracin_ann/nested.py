"""Batches of any nesting (dicts, tuples, lists, named tuples, mappings): walk, move, slice, compare."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def map_leaves(function: Callable[[Any], Any], value: Any) -> Any:
    """Return `value` with every leaf replaced by `function(leaf)`, containers of the same kinds."""
    if isinstance(value, Mapping):
        mapped = {key: map_leaves(function, item) for key, item in value.items()}
        if type(value) is dict:
            return mapped
        if isinstance(value, MutableMapping):
            # A copy keeps what its constructor needs and its items don't tell (defaultdict, HF's BatchEncoding).
            other = copy.copy(value)
            other.update(mapped)
            return other
        return type(value)(mapped)  # type: ignore[call-arg]
    if isinstance(value, tuple):
        items = [map_leaves(function, item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, list):
        return [map_leaves(function, item) for item in value]
    return function(value)


def leaves(value: Any) -> list[Any]:
    """Return the leaves in the order of a walk."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return [leaf for item in value for leaf in leaves(item)]
    return [value]


def to_device(value: Any, device: torch.device, *, channels_last: bool = False) -> Any:
    """Return `value` with its tensors on `device`; pictures (4-D, floating) with their channels last if asked for."""

    def moved(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        pictures = channels_last and leaf.dim() == 4 and leaf.is_floating_point()  # noqa: PLR2004
        form = torch.channels_last if pictures else torch.preserve_format
        return leaf.to(device, non_blocking=True, memory_format=form)

    return map_leaves(moved, value)


def pinned(value: Any) -> Any:
    """Return `value` with its tensors in page-locked memory."""
    return map_leaves(lambda leaf: leaf.pin_memory() if isinstance(leaf, Tensor) else leaf, value)


def leaf_size(leaf: Any) -> int:
    """Return the numbers that a tensor or array holds, the characters of a text, 1 for other leaves."""
    if isinstance(leaf, Tensor):
        return leaf.numel()
    if isinstance(leaf, np.ndarray):
        return leaf.size
    return len(leaf) if isinstance(leaf, (str, bytes)) else 1


def batched_tensors(value: Any, batch: int) -> list[Tensor] | str:
    """Return the tensors of a batch whose every tensor has `batch` rows, or why there is none such."""
    tensors: list[Tensor] = []
    for leaf in leaves(value):
        if isinstance(leaf, Tensor):
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


def same(left: Any, right: Any) -> bool:
    """Return whether two nested values hold the same leaves, bit for bit (NaN equals NaN)."""
    left_leaves, right_leaves = leaves(left), leaves(right)
    return len(left_leaves) == len(right_leaves) and all(map(_same_leaf, left_leaves, right_leaves))


def leaf_bytes(leaf: Any) -> bytes:
    """Return bytes that stand for a leaf's content, for digests."""
    array = _array(leaf)
    if array is not None:
        return repr((array.shape, str(array.dtype))).encode() + np.ascontiguousarray(array).tobytes()
    if leaf is None or isinstance(leaf, (bool, int, float, str, bytes)):
        return repr(leaf).encode()
    return type(leaf).__qualname__.encode()


def _same_leaf(left: Any, right: Any) -> bool:
    a, b = _array(left), _array(right)
    if a is not None and b is not None:
        return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()
    if type(left) is not type(right):
        return False
    return leaf_bytes(left) == leaf_bytes(right)


def _array(leaf: Any) -> np.ndarray[Any, Any] | None:
    if isinstance(leaf, Tensor):
        tensor = leaf.detach().cpu()
        return tensor.float().numpy() if tensor.dtype is torch.bfloat16 else tensor.numpy()
    if isinstance(leaf, (np.ndarray, np.generic)):
        return np.asarray(leaf)
    return None
