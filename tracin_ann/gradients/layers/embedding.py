"""The layer rule of `nn.Embedding`: the gradient is Σ_t e_i(t) ⊗ δ_t, with i(t) the index at position t."""

from __future__ import annotations

from typing import Any

from tracin_ann.gradients.factors import Form, Rows
from tracin_ann.gradients.layers.base import Call, LayerRule, flatten_positions, group_by_example


def _embedding(call: Call, requested: frozenset[str]) -> dict[str, Form]:
    module: Any = call.module
    index = group_by_example(call.input, call.batch).reshape(call.batch, -1).long()
    value = flatten_positions(call.grad_output, call.batch)
    if module.padding_idx is not None:
        value = value * (index != module.padding_idx).unsqueeze(2)
    return {"weight": Rows(index, value, module.num_embeddings)}


def _is_plain_lookup(module: Any) -> bool:
    """Return whether the layer only looks up rows: no renormalisation, no scaling by frequency in the batch."""
    return module.max_norm is None and not module.scale_grad_by_freq


EMBEDDING = LayerRule(("weight",), _embedding, _is_plain_lookup, n_leading=lambda module, x: x.dim())
