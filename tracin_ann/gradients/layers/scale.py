"""The rule of norm layers that are not PyTorch's: any layer that scales, and shifts, what it makes of its input.

LlamaRMSNorm and its like, a LayerNorm of one's own: y = w · f(x) + b over the last dimension, whatever f. With
δ the gradient of y, that of w is Σ_t δ_t · f(x)_t. f(x) is y / w where that can be, else the layer's own
forward with other weights. That a layer is such a one is seen from what it holds, and proven on the first batch.
"""

from __future__ import annotations

from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from tracin_ann.gradients.factors import Dense, Form
from tracin_ann.gradients.layers.base import Call, LayerRule, LayoutError, flatten_positions, sum_product, widen

# How f(x) is had: y / w; forward with w = 1 (and b = 0); the same less forward with w = 0 (Gemma's 1 + w).
Way = Literal["divide", "ones", "difference"]
# By layer: the version of the weight for which the way was found.
_ways: WeakKeyDictionary[nn.Module, tuple[tuple[int, int], Way]] = WeakKeyDictionary()


def is_scale(module: nn.Module) -> bool:
    """Return whether a layer looks like a scale over features: it holds a vector, perhaps another, and no more."""
    held = {name: p for name, p in module._parameters.items() if p is not None}
    if not {"weight"} <= held.keys() <= {"weight", "bias"} or any(True for _ in module.children()):
        return False
    sizes = {tuple(p.shape) for p in held.values()}
    return len(sizes) == 1 and all(len(size) == 1 and size[0] > 1 for size in sizes)


def _scale(call: Call, wanted: frozenset[str]) -> dict[str, Form]:
    module: Any = call.module
    size = module.weight.numel()
    if call.input.dim() < 2 or call.input.shape[-1] != size or call.grad_output.shape != call.input.shape:  # noqa: PLR2004
        raise LayoutError(f"a scale of {size} numbers over an input of shape {list(call.input.shape)}")
    delta = flatten_positions(call.grad_output, call.batch)
    forms: dict[str, Form] = {}
    if "weight" in wanted:
        forms["weight"] = Dense(_weight_gradient(call, delta))
    if "bias" in wanted:
        forms["bias"] = Dense(delta.sum(1))
    return forms


def _weight_gradient(call: Call, delta_BTC: Tensor) -> Tensor:
    module: Any = call.module
    way = _way(call)
    if way == "divide":
        assert call.output is not None
        return sum_product(delta_BTC, flatten_positions(widen(call.output), call.batch)) / widen(module.weight.detach())
    scaled = _forward_with(module, call.input, 1.0)
    if way == "difference":
        scaled = scaled - _forward_with(module, call.input, 0.0)
    return sum_product(delta_BTC, flatten_positions(scaled, call.batch))


def _way(call: Call) -> Way:
    module: Any = call.module
    version = id(module.weight), module.weight._version
    if module not in _ways or _ways[module][0] != version:
        way: Way = "ones"
        if bool(_forward_with(module, call.input[:1], 0.0).count_nonzero()):
            way = "difference"
        elif module._parameters.get("bias") is None and bool(module.weight.all()):
            way = "divide"
        _ways[module] = version, way
    return _ways[module][1]


def _forward_with(module: Any, x: Tensor, weight: float) -> Tensor:
    """Return the layer's own forward with this weight and no bias."""
    held = dict(module._parameters)
    try:
        module._parameters["weight"] = torch.full_like(held["weight"], weight)
        if held.get("bias") is not None:
            module._parameters["bias"] = torch.zeros_like(held["bias"])
        return widen(module.forward(x))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise LayoutError(f"a layer whose forward takes more than its input ({error})") from error
    finally:
        module._parameters.update(held)


OWN_SCALE = LayerRule(("weight", "bias"), _scale, wants_output=lambda module: True)
