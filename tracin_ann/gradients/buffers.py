"""Reusable buffers for large temporary tensors.

On a CPU, each new large tensor is mapped and faulted in. In the sketches of a small CNN this cost more than all their
arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod

import torch
from torch import Tensor

# (shape, a tensor with the requested dtype and device) -> an uninitialised contiguous tensor.
Allocator = Callable[[Sequence[int], Tensor], Tensor]


def allocate(shape: Sequence[int], like: Tensor) -> Tensor:
    """Return an uninitialised tensor in new memory: the Allocator of callers that store the result."""
    return like.new_empty(tuple(shape))


class Scratch:
    """One buffer per role, as large as its largest use; its content is valid until the next use of the role."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def __getitem__(self, role: str) -> Allocator:
        """Return the Allocator of a role."""
        return partial(self._take, role)

    def _take(self, role: str, shape: Sequence[int], like: Tensor) -> Tensor:
        key, size = (role, like.dtype, like.device), prod(shape)
        if key not in self._buffers or self._buffers[key].numel() < size:
            self._buffers.pop(key, None)
            self._buffers[key] = like.new_empty(size)
        return self._buffers[key][:size].view(tuple(shape))
