"""The layer rules of norm layers: LayerNorm, RMSNorm, GroupNorm, BatchNorm, and the norm layers of other libraries.

A norm layer computes y = w · f(x) + b, with f its normalisation. With δ the gradient of y, the gradient of w is
Σ_t δ_t · f(x)_t, and that of b is Σ_t δ_t.

A layer of another library (LlamaRMSNorm, or a user's own class) is assumed to be such a layer over the last dimension
if it holds one vector, optionally a second one, and nothing else. f(x) is y / w where that is possible, otherwise the
layer's own forward with other weights. The gradients are verified on the first batch.
"""

from __future__ import annotations

from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tracin_ann.gradients.factors import Dense, Form
from tracin_ann.gradients.layers.base import (
    WEIGHT_AND_BIAS,
    Call,
    LayerRule,
    LayoutError,
    flatten_positions,
    group_by_example,
    sum_product,
    widen,
)

# How f(x) is computed: y / w; forward with w = 1 (and b = 0); the same minus forward with w = 0 (for Gemma's 1 + w).
_Formula = Literal["divide", "ones", "difference"]
# By layer: the formula, with the version of the weight for which it was chosen.
_formulas: WeakKeyDictionary[nn.Module, tuple[tuple[int, int], _Formula]] = WeakKeyDictionary()


def _layer_norm(call: Call, requested: frozenset[str]) -> dict[str, Form]:
    module: Any = call.module
    return _sum_over_positions(call, requested, F.layer_norm(call.input, module.normalized_shape, eps=module.eps))


def _rms_norm(call: Call, requested: frozenset[str]) -> dict[str, Form]:
    module: Any = call.module
    return _sum_over_positions(call, requested, F.rms_norm(call.input, list(module.normalized_shape), eps=module.eps))


def _sum_over_positions(call: Call, requested: frozenset[str], normalised: Tensor) -> dict[str, Form]:
    """Return the forms of a weight and bias over the last dimensions, summed over all dimensions between."""
    module: Any = call.module
    start = call.input.dim() - len(module.normalized_shape)
    delta = flatten_positions(call.grad_output.flatten(start), call.batch)
    forms: dict[str, Form] = {}
    if "weight" in requested:
        forms["weight"] = Dense(sum_product(delta, flatten_positions(normalised.flatten(start), call.batch)))
    if "bias" in requested:
        forms["bias"] = Dense(delta.sum(1))
    return forms


def _n_before_normalised(module: Any, x: Tensor) -> int:
    return x.dim() - len(module.normalized_shape)


def _group_norm(call: Call, requested: frozenset[str]) -> dict[str, Form]:
    module: Any = call.module
    return _sum_over_space(call, requested, F.group_norm(call.input, module.num_groups, eps=module.eps))


def _batch_norm(call: Call, requested: frozenset[str]) -> dict[str, Form]:
    module: Any = call.module
    normalised = F.batch_norm(call.input, widen(module.running_mean), widen(module.running_var), eps=module.eps)
    return _sum_over_space(call, requested, normalised)


def _sum_over_space(call: Call, requested: frozenset[str], normalised: Tensor) -> dict[str, Form]:
    """Return the forms of a weight and bias of the channels (dimension 1), summed over space."""
    delta = call.grad_output
    if delta.shape[0] != call.batch:
        delta, normalised = (group_by_example(t, call.batch).transpose(1, 2) for t in (delta, normalised))
    delta = delta.flatten(2) if delta.dim() > 2 else delta.unsqueeze(2)  # noqa: PLR2004
    forms: dict[str, Form] = {}
    if "weight" in requested:
        forms["weight"] = Dense((delta * normalised.reshape(delta.shape)).sum(2))
    if "bias" in requested:
        forms["bias"] = Dense(delta.sum(2))
    return forms


def _uses_running_statistics(module: Any) -> bool:
    """Return whether the layer normalises by stored statistics, so that examples do not mix."""
    return module.running_mean is not None and not module.training


def is_norm(module: nn.Module) -> bool:
    """Return whether a layer's parameters are those of a norm layer: a vector, optionally a second, nothing else."""
    parameters = {name: p for name, p in module._parameters.items() if p is not None}
    if not {"weight"} <= parameters.keys() <= {"weight", "bias"} or any(True for _ in module.children()):
        return False
    sizes = {tuple(p.shape) for p in parameters.values()}
    return len(sizes) == 1 and all(len(size) == 1 and size[0] > 1 for size in sizes)


def _custom_norm(call: Call, requested: frozenset[str]) -> dict[str, Form]:
    module: Any = call.module
    size = module.weight.numel()
    if call.input.dim() < 2 or call.input.shape[-1] != size or call.grad_output.shape != call.input.shape:  # noqa: PLR2004
        raise LayoutError(f"a scale of {size} numbers over an input of shape {list(call.input.shape)}")
    delta = flatten_positions(call.grad_output, call.batch)
    forms: dict[str, Form] = {}
    if "weight" in requested:
        forms["weight"] = Dense(_custom_weight_gradient(call, delta))
    if "bias" in requested:
        forms["bias"] = Dense(delta.sum(1))
    return forms


def _custom_weight_gradient(call: Call, delta_BTC: Tensor) -> Tensor:
    module: Any = call.module
    formula = _choose_formula(call)
    if formula == "divide":
        assert call.output is not None
        return sum_product(delta_BTC, flatten_positions(widen(call.output), call.batch)) / widen(module.weight.detach())
    normalised = _forward_with(module, call.input, 1.0)
    if formula == "difference":
        normalised = normalised - _forward_with(module, call.input, 0.0)
    return sum_product(delta_BTC, flatten_positions(normalised, call.batch))


def _choose_formula(call: Call) -> _Formula:
    module: Any = call.module
    version = id(module.weight), module.weight._version
    if module not in _formulas or _formulas[module][0] != version:
        formula: _Formula = "ones"
        if bool(_forward_with(module, call.input[:1], 0.0).count_nonzero()):
            formula = "difference"
        elif module._parameters.get("bias") is None and bool(module.weight.all()):
            formula = "divide"
        _formulas[module] = version, formula
    return _formulas[module][1]


def _forward_with(module: Any, x: Tensor, weight: float) -> Tensor:
    """Return the layer's own forward with every weight set to this number, and no bias."""
    parameters = dict(module._parameters)
    try:
        module._parameters["weight"] = torch.full_like(parameters["weight"], weight)
        if parameters.get("bias") is not None:
            module._parameters["bias"] = torch.zeros_like(parameters["bias"])
        return widen(module.forward(x))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise LayoutError(f"the layer's forward needs more than its input ({error})") from error
    finally:
        module._parameters.update(parameters)


LAYER_NORM = LayerRule(WEIGHT_AND_BIAS, _layer_norm, n_leading=_n_before_normalised)
RMS_NORM = LayerRule(("weight",), _rms_norm, n_leading=_n_before_normalised)
GROUP_NORM = LayerRule(WEIGHT_AND_BIAS, _group_norm, n_leading=lambda module, x: 1)
BATCH_NORM = LayerRule(WEIGHT_AND_BIAS, _batch_norm, _uses_running_statistics, n_leading=lambda module, x: 1)
CUSTOM_NORM = LayerRule(WEIGHT_AND_BIAS, _custom_norm, needs_output=lambda module: True)
