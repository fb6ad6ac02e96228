"""Buffers that are used again and again, because fresh memory of that size is dear to touch.

On a CPU every large tensor is mapped and faulted in anew; in the sketches of a small CNN that cost
more than all their arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod

import torch
from torch import Tensor

# (shape, a tensor of the dtype and device wanted) -> an uninitialised contiguous tensor.
Room = Callable[[Sequence[int], Tensor], Tensor]


def allocate(shape: Sequence[int], like: Tensor) -> Tensor:
    """Return new memory: the Room of callers that keep what they get."""
    return like.new_empty(tuple(shape))


class Scratch:
    """One buffer a role, grown to the largest need; what lies in it lasts until the role is taken again."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def __getitem__(self, role: str) -> Room:
        """Return the room of a role."""
        return partial(self._take, role)

    def _take(self, role: str, shape: Sequence[int], like: Tensor) -> Tensor:
        key, size = (role, like.dtype, like.device), prod(shape)
        if key not in self._held or self._held[key].numel() < size:
            self._held.pop(key, None)
            self._held[key] = like.new_empty(size)
        return self._held[key][:size].view(tuple(shape))
