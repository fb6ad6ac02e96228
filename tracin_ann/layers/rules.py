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

from tracin_ann.convolution import Convolution, Geometry
from tracin_ann.factors import Dense, Form, Outer, Rows
from tracin_ann.layers.base import Call, LayerRule, LayoutError, by_example, positions, widened

_AFFINE = ("weight", "bias")


def _linear(call: Call, wanted: frozenset[str]) -> dict[str, Form]:
    delta = positions(call.grad_output, call.batch)
    forms: dict[str, Form] = {}
    if "weight" in wanted:
        forms["weight"] = Outer(delta, positions(call.input, call.batch))
    if "bias" in wanted:
        forms["bias"] = Dense(delta.sum(1))
    return forms


def _convolution(call: Call, wanted: frozenset[str]) -> dict[str, Form]:
    delta = by_example(call.grad_output, call.batch)
    forms: dict[str, Form] = {}
    if "weight" in wanted:
        module: Any = call.module
        x, padding = _padding(module, by_example(call.input, call.batch))
        geometry = Geometry(module.kernel_size, module.stride, module.dilation, module.groups, padding)
        forms["weight"] = Convolution(delta, x, geometry)
    if "bias" in wanted:
        forms["bias"] = Dense(delta.flatten(2).sum(2))
    return forms


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
    index = by_example(call.input, call.batch).reshape(call.batch, -1)
    value = positions(call.grad_output, call.batch)
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
    delta = positions(call.grad_output.flatten(start), call.batch)
    forms: dict[str, Form] = {}
    if "weight" in wanted:
        forms["weight"] = Dense((delta * positions(normalised.flatten(start), call.batch)).sum(1))
    if "bias" in wanted:
        forms["bias"] = Dense(delta.sum(1))
    return forms


def _group_norm(call: Call, wanted: frozenset[str]) -> dict[str, Form]:
    module: Any = call.module
    return _over_channels(call, wanted, F.group_norm(call.input, module.num_groups, eps=module.eps))


def _batch_norm(call: Call, wanted: frozenset[str]) -> dict[str, Form]:
    module: Any = call.module
    normalised = F.batch_norm(call.input, widened(module.running_mean), widened(module.running_var), eps=module.eps)
    return _over_channels(call, wanted, normalised)


def _over_channels(call: Call, wanted: frozenset[str], normalised: Tensor) -> dict[str, Form]:
    """Return the forms of an affine a channel (dimension 1), summed over space."""
    delta = call.grad_output
    if delta.shape[0] != call.batch:
        delta, normalised = (by_example(t, call.batch).transpose(1, 2) for t in (delta, normalised))
    delta = delta.flatten(2) if delta.dim() > 2 else delta.unsqueeze(2)  # noqa: PLR2004
    forms: dict[str, Form] = {}
    if "weight" in wanted:
        forms["weight"] = Dense((delta * normalised.reshape(delta.shape)).sum(2))
    if "bias" in wanted:
        forms["bias"] = Dense(delta.sum(2))
    return forms


def _plain_embedding(module: Any) -> bool:
    """Return whether forward is a pure look-up: no renormalising, no scaling by batch frequency."""
    return module.max_norm is None and not module.scale_grad_by_freq


def _running_statistics(module: Any) -> bool:
    """Return whether eval mode normalises by stored statistics, so that examples do not mix."""
    return module.running_mean is not None and not module.training


RULES: dict[type[nn.Module], LayerRule] = {
    nn.Linear: LayerRule(_AFFINE, _linear),
    **{kind: LayerRule(_AFFINE, _convolution) for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d)},
    nn.Embedding: LayerRule(("weight",), _embedding, _plain_embedding),
    nn.LayerNorm: LayerRule(_AFFINE, _layer_norm),
    nn.GroupNorm: LayerRule(_AFFINE, _group_norm),
    **{
        kind: LayerRule(_AFFINE, _batch_norm, _running_statistics)
        for kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    },
}
if hasattr(torch.nn, "RMSNorm"):
    RULES[nn.RMSNorm] = LayerRule(("weight",), _rms_norm)


def _affine(call: Call, wanted: frozenset[str]) -> dict[str, Form]:
    """Return the forms of any layer that scales (and shifts) what it makes of its input, over the last dimension.

    What it makes is read off its own forward, with ones for the weight and zeros for the bias.
    """
    module: Any = call.module
    size = module.weight.numel()
    if call.input.dim() < 2 or call.input.shape[-1] != size or call.grad_output.shape != call.input.shape:  # noqa: PLR2004
        raise LayoutError(f"a scale of {size} numbers over an input of shape {list(call.input.shape)}")
    delta = positions(call.grad_output, call.batch)
    forms: dict[str, Form] = {}
    if "weight" in wanted:
        scaled = _forward_with(module, call.input, 1.0)
        offset = _forward_with(module, call.input[:1], 0.0)
        if bool(offset.count_nonzero()):
            scaled = scaled - _forward_with(module, call.input, 0.0)
        forms["weight"] = Dense((delta * positions(scaled, call.batch)).sum(1))
    if "bias" in wanted:
        forms["bias"] = Dense(delta.sum(1))
    return forms


def _forward_with(module: Any, x: Tensor, weight: float) -> Tensor:
    """Return the layer's own forward with this weight and no bias."""
    held = dict(module._parameters)
    try:
        module._parameters["weight"] = torch.full_like(held["weight"], weight)
        if held.get("bias") is not None:
            module._parameters["bias"] = torch.zeros_like(held["bias"])
        return widened(module.forward(x))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise LayoutError(f"a layer whose forward takes more than its input ({error})") from error
    finally:
        module._parameters.update(held)


def _is_affine(module: nn.Module) -> bool:
    """Return whether a layer of unknown kind looks like a scale over features: a vector, perhaps another, no more."""
    held = {name: p for name, p in module._parameters.items() if p is not None}
    if not {"weight"} <= held.keys() <= {"weight", "bias"} or any(True for _ in module.children()):
        return False
    sizes = {tuple(p.shape) for p in held.values()}
    return len(sizes) == 1 and all(len(size) == 1 and size[0] > 1 for size in sizes)


_OWN_SCALE = LayerRule(_AFFINE, _affine)


def rule_for(module: nn.Module) -> LayerRule | None:
    """Return the rule that serves this layer, or None.

    A subclass is served by its parent's rule where it keeps the parent's `forward`; a layer that is no
    PyTorch layer but holds just a vector to scale by (LlamaRMSNorm and its like) by its own forward. That
    the rule is right for it is proven on the first batch, as for every layer.
    """
    for kind in type(module).__mro__:
        rule = RULES.get(kind)
        if rule is not None:
            inherited: Any = kind
            return rule if type(module).forward is inherited.forward and rule.applies(module) else None
    own = not type(module).__module__.startswith("torch.nn.")
    return _OWN_SCALE if own and _is_affine(module) else None
