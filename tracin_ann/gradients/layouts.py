"""Layouts of layer inputs: how the examples of a batch are arranged in the input of a layer's call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from tracin_ann.gradients.row_indexing import RowIndexingMode

Layout = Literal["batch first", "rows", "shared"]
"""The layout of a call's input: its first dimension is the batch; it has rows whose examples have to be determined; or
one input is shared by all examples."""

# A layer, the rank of its input, whether the first dimension is the outermost in memory, and the layout.
_Signature = tuple[int, int, bool, Layout]

OUTPUTS, PARAMETERS = "outputs of layers", "parameters"


@dataclass(frozen=True)
class Layouts:
    """The layouts of layer inputs that were verified, common to all captures of an engine.

    A layer may be called once for all examples of a batch, as position embeddings are: on one row `[1, ...]`, or on
    indices `[T]`. Its output is then repeated for each example, so that each example has its own gradient. The same is
    done for a parameter `[1, ...]` that belongs to no layer (the class token and positions of a vision transformer).

    If the first dimension of a layer's input is not the batch, the example of each row is determined in every batch.

    Attributes:
        verified: the layouts of inputs in verified batches.
        repeated: what is repeated for each example; a model that fails with it runs unchanged.
        shared: embeddings whose indices `[T]` are shared by all examples, for any T.
        by_rows: layers whose rows are matched with examples in every batch, even if there are as many rows as examples:
            rows were selected by index before them, or their input was not batch first in some batch.
    """

    verified: frozenset[_Signature] = frozenset()
    repeated: frozenset[str] = frozenset({OUTPUTS, PARAMETERS})
    shared: frozenset[int] = frozenset()
    by_rows: frozenset[int] = frozenset()


class LayoutReader:
    """Determines the layouts of layer inputs during a forward.

    Args:
        layouts: the layouts that are known.

    Attributes:
        layouts: the known layouts, with those that a verification added.
        repeated: what was repeated for each example in the last forward.
        ambiguous: by parameter, the embeddings whose indices `[T]` were treated as batch first and may be shared.
        batch_first: by parameter, the layers whose first input dimension was treated as the batch.
    """

    def __init__(self, layouts: Layouts) -> None:
        self.layouts = layouts
        self.start(1)

    def start(self, batch: int, indexing: RowIndexingMode | None = None) -> None:
        """Start a forward.

        Args:
            batch: B.
            indexing: detects the selection of rows, in a batch that is verified; None in other batches.
        """
        self._batch, self._indexing = batch, indexing
        self.repeated: frozenset[str] = frozenset()
        self.ambiguous: dict[str, frozenset[int]] = {}
        self.batch_first: dict[str, frozenset[int]] = {}

    def read(self, module: nn.Module, x: Tensor, output: Tensor, names: Mapping[str, str]) -> Layout:
        """Return the layout of a call's input.

        Args:
            module: the layer.
            x: its input.
            output: its output.
            names: its captured parameters by attribute.
        """
        if self._batch == 1:
            return "batch first"
        if isinstance(module, nn.Embedding) and x.dim() == 1 and id(module) not in self.layouts.shared:
            _add_layer(self.ambiguous, names, module)
        elif self._is_shared(module, x, output):
            self.repeated |= {OUTPUTS}
            return "shared"
        is_selected = self._indexing is not None and self._indexing.seen
        if is_selected or id(module) in self.layouts.by_rows or x.shape[:1] != (self._batch,):
            return "rows"
        _add_layer(self.batch_first, names, module)
        return "batch first"

    def is_verified(self, module: nn.Module, x: Tensor, layout: Layout) -> bool:
        """Return whether the layer's input had this layout in a verified batch, or the batch has one example.

        In a batch that is being verified, the layout is added to the known ones.
        """
        if self._batch == 1:
            return True
        is_outermost = x.dim() == 0 or x.layout != torch.strided or x.stride(0) == max(x.stride())
        signature = (id(module), x.dim(), is_outermost, layout)
        if self._indexing is not None:
            self.layouts = replace(self.layouts, verified=self.layouts.verified | {signature})
        return signature in self.layouts.verified

    def keep_rows(self, module: nn.Module) -> None:
        """Match the rows of a layer with examples from now on; called when a gradient reaches such rows.

        In a batch that is not being verified, nothing changes.
        """
        if self._indexing is not None and id(module) not in self.layouts.by_rows:
            self.layouts = replace(self.layouts, by_rows=self.layouts.by_rows | {id(module)})

    def repeat(self, x: Tensor, tensor: Tensor) -> Tensor:
        """Return the input or output of a shared call for each example.

        Args:
            x: the input: indices `[T]`, whose tensors `[T, ...]` become `[B, T, ...]`, or one row `[1, ...]`, whose
                tensors become `[B, ...]`.
            tensor: the input or the output.
        """
        return tensor.expand(self._batch, *tensor.shape[x.dim() > 1 :])

    def _is_shared(self, module: nn.Module, x: Tensor, output: Tensor) -> bool:
        if x.dim() == 0 or output.shape[:1] != x.shape[:1] or OUTPUTS not in self.layouts.repeated:
            return False
        return isinstance(module, nn.Embedding) if x.dim() == 1 else len(x) == 1


def _add_layer(layers: dict[str, frozenset[int]], names: Mapping[str, str], module: nn.Module) -> None:
    """Add a layer to those of each of its parameters."""
    for name in names.values():
        layers[name] = layers.get(name, frozenset()) | {id(module)}
