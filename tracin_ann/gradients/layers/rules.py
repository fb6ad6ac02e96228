"""The layer rules: Linear, convolutions, Embedding and the norm layers.

With a the layer's input and δ the gradient of its output: Linear Σ_t δ_t ⊗ a_t; convolution the
same over output positions with a_t the patch under position t; Embedding Σ_t e_{i_t} ⊗ δ_t; a norm
layer's weight Σ_t δ_t · x̂_t with x̂ its normalised input, a user's own norm layers too; every bias Σ_t δ_t.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tracin_ann.gradients.convolution import Convolution, Geometry
from tracin_ann.gradients.factors import Dense, Form, Outer, Rows
from tracin_ann.gradients.layers.base import Call, LayerRule, flatten_positions, group_by_example, sum_product, widen
from tracin_ann.gradients.layers.linear import OWN_LINEAR, is_linear
from tracin_ann.gradients.layers.scale import OWN_SCALE, is_scale

_AFFINE = ("weight", "bias")


def _linear(call: Call, wanted: frozenset[str]) -> dict[str, Form]:
    delta = flatten_positions(call.grad_output, call.batch)
    forms: dict[str, Form] = {}
    if "weight" in wanted:
        forms["weight"] = Outer(delta, flatten_positions(call.input, call.batch))
    if "bias" in wanted:
        forms["bias"] = Dense(delta.sum(1))
    return forms


def _convolution(call: Call, wanted: frozenset[str]) -> dict[str, Form]:
    module: Any = call.module
    x, delta = call.input, call.grad_output
    if _pictures(module, x) == 0:
        x, delta = x.unsqueeze(0), delta.unsqueeze(0)
    several = len(delta) != call.batch
    if several:
        delta = _pictures_as_depth(delta, call.batch)
    forms: dict[str, Form] = {}
    if "weight" in wanted:
        x, padding = _padding(module, x)
        geometry = Geometry(module.kernel_size, module.stride, module.dilation, module.groups, padding)
        if several:
            x, geometry = _pictures_as_depth(x, call.batch), geometry.deepened()
        forms["weight"] = Convolution(delta, x, geometry)
    if "bias" in wanted:
        forms["bias"] = Dense(delta.flatten(2).sum(2))
    return forms


def _pictures_as_depth(tensor: Tensor, batch: int) -> Tensor:
    """Return an example's pictures [B·n, C, ...] as one of n layers [B, C, n, ...]."""
    return group_by_example(tensor, batch).transpose(1, 2)


def _padding(module: Any, x: Tensor) -> tuple[Tensor, tuple[tuple[int, int], ...]]:
    """Return the input and the zeros it is to be padded with; padded already where the mode is another."""
    n = len(module.kernel_size)
    if module.padding == "valid":
        return x, ()
    if module.padding == "same":
        total = [module.dilation[i] * (module.kernel_size[i] - 1) for i in range(n)]
        pairs = tuple((t // 2, t - t // 2) for t in total)
    else:
        pairs = tuple((p, p) for p in module.padding)
    if module.padding_mode == "zeros":
        return x, pairs
    return F.pad(x, list(itertools.chain.from_iterable(reversed(pairs))), mode=module.padding_mode), ()


def _embedding(call: Call, wanted: frozenset[str]) -> dict[str, Form]:
    module: Any = call.module
    index = group_by_example(call.input, call.batch).reshape(call.batch, -1).long()
    value = flatten_positions(call.grad_output, call.batch)
    if module.padding_idx is not None:
        value = value * (index != module.padding_idx).unsqueeze(2)
    return {"weight": Rows(index, value, module.num_embeddings)}


def _layer_norm(call: Call, wanted: frozenset[str]) -> dict[str, Form]:
    module: Any = call.module
    return _over_last(call, wanted, F.layer_norm(call.input, module.normalized_shape, eps=module.eps))


def _rms_norm(call: Call, wanted: frozenset[str]) -> dict[str, Form]:
    module: Any = call.module
    return _over_last(call, wanted, F.rms_norm(call.input, list(module.normalized_shape), eps=module.eps))


def _over_last(call: Call, wanted: frozenset[str], normalised: Tensor) -> dict[str, Form]:
    """Return the forms of an affine over the last dimensions, summed over all between."""
    module: Any = call.module
    start = call.input.dim() - len(module.normalized_shape)
    delta = flatten_positions(call.grad_output.flatten(start), call.batch)
    forms: dict[str, Form] = {}
    if "weight" in wanted:
        forms["weight"] = Dense(sum_product(delta, flatten_positions(normalised.flatten(start), call.batch)))
    if "bias" in wanted:
        forms["bias"] = Dense(delta.sum(1))
    return forms


def _group_norm(call: Call, wanted: frozenset[str]) -> dict[str, Form]:
    module: Any = call.module
    return _over_channels(call, wanted, F.group_norm(call.input, module.num_groups, eps=module.eps))


def _batch_norm(call: Call, wanted: frozenset[str]) -> dict[str, Form]:
    module: Any = call.module
    normalised = F.batch_norm(call.input, widen(module.running_mean), widen(module.running_var), eps=module.eps)
    return _over_channels(call, wanted, normalised)


def _over_channels(call: Call, wanted: frozenset[str], normalised: Tensor) -> dict[str, Form]:
    """Return the forms of an affine a channel (dimension 1), summed over space."""
    delta = call.grad_output
    if delta.shape[0] != call.batch:
        delta, normalised = (group_by_example(t, call.batch).transpose(1, 2) for t in (delta, normalised))
    delta = delta.flatten(2) if delta.dim() > 2 else delta.unsqueeze(2)  # noqa: PLR2004
    forms: dict[str, Form] = {}
    if "weight" in wanted:
        forms["weight"] = Dense((delta * normalised.reshape(delta.shape)).sum(2))
    if "bias" in wanted:
        forms["bias"] = Dense(delta.sum(2))
    return forms


def _pictures(module: Any, x: Tensor) -> int:
    """Return the dimensions of a convolution's input before the channels: 1, or 0 for one picture alone."""
    return x.dim() - 1 - len(module.kernel_size)


def _before_normalised(module: Any, x: Tensor) -> int:
    return x.dim() - len(module.normalized_shape)


def _plain_embedding(module: Any) -> bool:
    """Return whether forward is a pure look-up: no renormalising, no scaling by batch frequency."""
    return module.max_norm is None and not module.scale_grad_by_freq


def _running_statistics(module: Any) -> bool:
    """Return whether eval mode normalises by stored statistics, so that examples do not mix."""
    return module.running_mean is not None and not module.training


RULES: dict[type[nn.Module], LayerRule] = {
    nn.Linear: LayerRule(_AFFINE, _linear),
    **{kind: LayerRule(_AFFINE, _convolution, n_leading=_pictures) for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d)},
    nn.Embedding: LayerRule(("weight",), _embedding, _plain_embedding, n_leading=lambda module, x: x.dim()),
    nn.LayerNorm: LayerRule(_AFFINE, _layer_norm, n_leading=_before_normalised),
    nn.GroupNorm: LayerRule(_AFFINE, _group_norm, n_leading=lambda module, x: 1),
    **{
        kind: LayerRule(_AFFINE, _batch_norm, _running_statistics, n_leading=lambda module, x: 1)
        for kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    },
}
if hasattr(torch.nn, "RMSNorm"):
    RULES[nn.RMSNorm] = LayerRule(("weight",), _rms_norm, n_leading=_before_normalised)


def rule_for(module: nn.Module) -> LayerRule | None:
    """Return the rule that serves this layer, or None.

    A subclass is served by its parent's rule where it keeps the parent's `forward`; a layer that is no
    PyTorch layer but holds just a vector to scale by (LlamaRMSNorm and its like) or a matrix to multiply
    by (Hugging Face's Conv1D) by what it does with it. That the rule is right for it is proven on the first
    batch, as for every layer.
    """
    for kind in type(module).__mro__:
        rule = RULES.get(kind)
        if rule is not None:
            inherited: Any = kind
            return rule if type(module).forward is inherited.forward and rule.applies(module) else None
    if isinstance(module, torch.jit.ScriptModule) or type(module).__module__.startswith("torch.nn."):
        # TorchScript calls its layers without their hooks.
        return None
    return OWN_SCALE if is_scale(module) else OWN_LINEAR if is_linear(module) else None
