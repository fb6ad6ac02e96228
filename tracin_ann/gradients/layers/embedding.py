"""The layer rules of `nn.Embedding`: the gradient is Σ_t e_i(t) ⊗ δ_t, with i(t) the index at position t.

A subclass with a forward of its own (learned positions with an offset, as in OPT and BART; scaled word embeddings)
calls the lookup inside it. The rule is applied to that lookup, so that what the forward does before and after it is
part of the model around the layer.

A relative position bias, as in T5, is a table of buckets × heads that is looked up for every pair of positions; its
gradient is first added up for each bucket.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from tracin_ann.gradients.factors import Form, Rows
from tracin_ann.gradients.layers.base import Call, LayerRule, flatten_positions, group_by_example


def _embedding(call: Call, requested: frozenset[str]) -> dict[str, Form]:
    module: Any = call.module
    index = group_by_example(call.input, call.batch).reshape(call.batch, -1).long()
    value = flatten_positions(call.grad_output, call.batch)
    if module.padding_idx is not None:
        value = value * (index != module.padding_idx).unsqueeze(2)
    return {"weight": Rows(index, value, module.num_embeddings)}


def _add_up_by_bucket(call: Call, requested: frozenset[str]) -> dict[str, Form]:
    """Return the gradient of every row of a small table, whose number of lookups is large."""
    module: Any = call.module
    index_BT = group_by_example(call.input, call.batch).reshape(call.batch, -1).long()
    value_BTC = flatten_positions(call.grad_output, call.batch)
    rows_BRC = value_BTC.new_zeros(call.batch, module.num_embeddings, value_BTC.shape[2])
    rows_BRC.scatter_add_(1, index_BT.unsqueeze(2).expand_as(value_BTC), value_BTC)
    every_R = torch.arange(module.num_embeddings, device=index_BT.device)
    return {"weight": Rows(every_R.expand(call.batch, -1), rows_BRC, module.num_embeddings)}


def _is_plain_lookup(module: Any) -> bool:
    """Return whether the layer only looks up rows: no renormalisation, no scaling by frequency in the batch."""
    return module.max_norm is None and not module.scale_grad_by_freq


EMBEDDING = LayerRule(("weight",), _embedding, _is_plain_lookup, n_leading=lambda module, x: x.dim())
LOOKUP = replace(EMBEDDING, is_lookup=True)
RELATIVE_BIAS = replace(EMBEDDING, forms=_add_up_by_bucket)
