"""Lookups inside functions: the indices and outputs of an embedding that is called within another function.

The hooks of a layer show the arguments and the result of its forward. A lookup in the middle of a forward, or in a
method that is not a layer, is observed where PyTorch's `embedding` function is called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Follow = Callable[[Tensor, Tensor], Tensor]
"""Receives the indices and the output of a lookup, and returns the output that the function continues with."""
_BIAS_METHOD = "compute_bias"


class _LookupMode(TorchFunctionMode):
    """Passes the lookups in one table to a function.

    Args:
        table: the weight of the embedding.
        follow: called after each lookup in it.
    """

    def __init__(self, table: Tensor, follow: Follow) -> None:
        super().__init__()
        self._table, self._follow = table, follow

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the function, and pass a lookup in the table on."""
        output = func(*args, **(kwargs or {}))
        if func is torch.nn.functional.embedding and len(args) > 1 and args[1] is self._table:
            return self._follow(args[0], output)
        return output


def follow_lookups(module: Any, follow: Follow) -> Callable[..., Any]:
    """Return an embedding's forward that passes its lookups to a function."""
    forward = module.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        with _LookupMode(module.weight, follow):
            return forward(*args, **kwargs)

    return run


def find_bias_owner(model: nn.Module, path: str) -> nn.Module | None:
    """Return the module that computes a relative position bias from the embedding at a path, or None.

    It is the parent of the embedding if it has a method `compute_bias`, as the attention of T5 and of models like it.
    """
    owner = model.get_submodule(path.rpartition(".")[0])
    is_owner = isinstance(model.get_submodule(path), nn.Embedding) and callable(getattr(owner, _BIAS_METHOD, None))
    return owner if is_owner else None


def follow_bias(owner: Any, embedding: Any, follow: Follow) -> tuple[str, Callable[..., Any]]:
    """Return a method and a replacement that computes the bias with a batch dimension.

    The method looks up buckets [T, S] and returns the result [T, S, H] as [1, H, T, S], for all examples. The
    replacement passes buckets [1, T, S] and result [1, T, S, H] to `follow`, which repeats the result as [B, T, S, H],
    and returns that as [B, H, T, S]. A method that returns something else is left as it is.

    Args:
        owner: the module with the method.
        embedding: the table of buckets × heads.
        follow: receives buckets and result.
    """
    compute = getattr(owner, _BIAS_METHOD)

    def run(*args: Any, **kwargs: Any) -> Any:
        seen: list[tuple[Tensor, Tensor]] = []

        def store(index: Tensor, output: Tensor) -> Tensor:
            seen.append((index, output))
            return output

        with _LookupMode(embedding.weight, store):
            bias = compute(*args, **kwargs)
        if len(seen) != 1 or not torch.is_grad_enabled() or not isinstance(bias, Tensor):
            return bias
        index, output = seen[0]
        if index.dim() != 2 or not _is_same(bias, output.permute(2, 0, 1).unsqueeze(0)):  # noqa: PLR2004
            return bias
        shared = output.unsqueeze(0)
        repeated = follow(index.unsqueeze(0), shared)
        return bias if repeated is shared else repeated.permute(0, 3, 1, 2)

    return _BIAS_METHOD, run


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)
