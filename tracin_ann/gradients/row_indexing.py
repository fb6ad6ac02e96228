"""Detection of forwards that select rows by index.

A layer that runs on selected positions, or on examples sorted by length, may be batch first in the verified batch and
not in the next one. Shapes do not show this; the operation that selected the rows does.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
# Operations that compute indices or orders from data.
_ORDERS = {_aten.nonzero, _aten.sort, _aten.argsort, _aten.topk, _aten.unique_dim, _aten._unique2}
# Operations that always select rows.
_SELECTIONS = {_aten.masked_select, _aten._pack_padded_sequence}


class RowIndexingMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records in `seen` whether rows of activations or of the batch's own tensors have been selected so far.

    Args:
        own: the batch's tensors.
    """

    def __init__(self, own: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._own = {tensor.untyped_storage().data_ptr() for tensor in own if tensor.layout is torch.strided}
        self._has_order = False
        self.seen = False

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the operation, and record whether it selects rows."""
        return self._run(func, args, kwargs)

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None) -> Any:
        packet: Callable[..., Any] = func.overloadpacket
        self._has_order |= packet in _ORDERS
        self.seen |= packet in _SELECTIONS or self._selects_rows(packet, args)
        return func(*args, **(kwargs or {}))

    def _selects_rows(self, packet: Any, args: tuple[Any, ...]) -> bool:
        if packet is _aten.index:
            source, index = args[0], args[1][0]
        elif packet in (_aten.index_select, _aten.gather) and args[1] == 0:
            source, index = args[0], args[2]
        else:
            return False
        if index is None or not self._may_have_examples(source):
            return False
        return index.dtype is torch.bool or self._has_order or not _is_in_order(index, len(source))

    def _may_have_examples(self, source: Tensor) -> bool:
        """Return whether a tensor's rows may be examples: activations or the batch, not tables such as positions."""
        return source.requires_grad or source.untyped_storage().data_ptr() in self._own


class _UncompiledMode(RowIndexingMode):  # type: ignore[no-untyped-call]
    """The same mode for a process without PyTorch's compiler.

    PyTorch wraps `__torch_dispatch__` so that the compiler skips it; the first call of the wrapper imports the compiler
    (`torch._dynamo`, 0.8 s). This class has the method without the wrapper.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the operation, and record whether it selects rows."""
        return self._run(func, args, kwargs)


def detect_row_indexing(own: Iterable[Tensor]) -> RowIndexingMode:
    """Return a mode that records whether rows are selected; it does not import PyTorch's compiler.

    Args:
        own: the batch's tensors.
    """
    return RowIndexingMode(own) if "torch._dynamo" in sys.modules else _UncompiledMode(own)


def _is_in_order(index: Tensor, n_rows: int) -> bool:
    """Return whether an index selects every row once, in order."""
    return index.numel() == n_rows and bool((index.flatten() == torch.arange(n_rows, device=index.device)).all())
