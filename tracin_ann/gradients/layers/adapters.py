"""The layer rules of adapters (PEFT): the vectors of IA3, the magnitudes of DoRA, and LoRA of embeddings.

The matrices of LoRA are ordinary linear layers. With δ the gradient of a layer's output y:

- IA3 (Liu et al. 2022, section 3.3) computes y = l · f(x), with f the frozen layer, or y = f(l · x). The gradient of l
  is Σ_t δ_t · y_t / l. In the second form, δ and y are those of the input of the frozen layer.
- DoRA (Liu et al. 2024, eq. 5, with the norm as a constant, section 4.3) computes y = m · v(x) + b, with m the
  magnitudes and b the frozen bias. The gradient of m is Σ_t δ_t · (y_t - b) / m.
- LoRA of an embedding computes y = f(i) + s · B A_i, with A_i the column of index i. The gradient of B is
  Σ_t s δ_t ⊗ A_i(t), and that of A is Σ_t s Bᵀδ_t ⊗ e_i(t).

Layers are recognised by the names that PEFT gives to their parameters, so that this module does not import it. As for
every layer, the gradients are verified on the first batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.nn import functional as F

from tracin_ann.gradients.factors import Dense, Form, Outer
from tracin_ann.gradients.layers.base import (
    Call,
    LayerRule,
    LayoutError,
    flatten_positions,
    group_by_example,
    sum_product,
    widen,
)

_PACKAGE = "peft."
_DORA_MODULE = "peft.tuners.lora.dora"
_EMBEDDING = ("lora_embedding_A", "lora_embedding_B")
# By layer and adapter: the version of a factor that contains no zero.
_without_zeros: WeakKeyDictionary[nn.Module, dict[str, tuple[int, int]]] = WeakKeyDictionary()


def is_adapter(module: nn.Module) -> bool:
    """Return whether the module is one of PEFT."""
    return type(module).__module__.startswith(_PACKAGE)


def is_part_of_adapter(module: nn.Module) -> bool:
    """Return whether the module belongs to an adapter layer, whose rule covers its parameters."""
    return type(module).__module__ == _DORA_MODULE


def find_adapter_rule(module: Any) -> LayerRule | None:
    """Return the rule of a layer of PEFT, or None."""
    if _find_ia3_vectors(module):
        return _IA3_OF_INPUT if module.is_feedforward else _IA3_OF_OUTPUT
    if _find_dora_magnitudes(module):
        return _DORA
    return _LORA_OF_EMBEDDING if _find_embedding_factors(module) else None


def _find_ia3_vectors(module: nn.Module) -> Mapping[str, nn.Parameter]:
    """Return the vectors [1, in] or [out, 1] of an IA3 layer by adapter."""
    vectors = module._modules.get("ia3_l")
    if not isinstance(vectors, nn.ParameterDict) or not all(vector.dim() == 2 for vector in vectors.values()):  # noqa: PLR2004
        return {}
    return dict(vectors.items())


def _ia3(call: Call, requested: frozenset[str]) -> dict[str, Form]:
    # Several adapters scale the same output, one after another; the rule holds for each of them.
    return _divide_by_factors(call, requested, _find_ia3_vectors(call.module), _compute_output_product(call))


def _find_dora_magnitudes(module: nn.Module) -> Mapping[str, nn.Parameter]:
    """Return the magnitudes [out] of a linear DoRA layer by adapter; nothing for other layers or several adapters."""
    layers: Any = module._modules.get("lora_magnitude_vector")
    if not isinstance(layers, nn.ModuleDict) or len(layers) != 1:
        return {}
    found: dict[str, Any] = dict(layers.items())
    return {name: layer.weight for name, layer in found.items() if type(layer).__name__ == "DoraLinearLayer"}


def _dora(call: Call, requested: frozenset[str]) -> dict[str, Form]:
    module: Any = call.module
    bias: Tensor | None = getattr(module.get_base_layer(), "bias", None)
    return _divide_by_factors(call, requested, _find_dora_magnitudes(module), _compute_output_product(call, bias))


def _compute_output_product(call: Call, bias: Tensor | None = None) -> Tensor:
    """Return Σ_t δ_t · (y_t - b), [B, C]."""
    assert call.output is not None
    output, delta = (flatten_positions(widen(tensor), call.batch) for tensor in (call.output, call.grad_output))
    if output.shape != delta.shape:
        raise LayoutError(f"an output of shape {list(output.shape)} with a gradient of shape {list(delta.shape)}")
    product = sum_product(delta, output)
    return product if bias is None else product - delta.sum(1) * widen(bias.detach())


def _divide_by_factors(
    call: Call, requested: frozenset[str], factors: Mapping[str, nn.Parameter], product_BC: Tensor
) -> dict[str, Form]:
    """Return the product divided by the factor of each adapter.

    Raises:
        LayoutError: a factor contains a zero, or its size differs.
    """
    forms: dict[str, Form] = {}
    checked = _without_zeros.setdefault(call.module, {})
    for name in requested:
        factor_C = widen(factors[name].detach()).flatten()
        if product_BC.shape[1] != len(factor_C):
            raise LayoutError(f"a vector of {len(factor_C)} numbers over an output of {product_BC.shape[1]}")
        version = id(factors[name]), factors[name]._version
        if checked.get(name) != version:
            if not bool(factor_C.all()):
                raise LayoutError("a factor of the adapter is zero")
            checked[name] = version
        forms[name] = Dense(product_BC / factor_C)
    return forms


def _find_embedding_factors(module: nn.Module) -> Mapping[str, nn.Parameter]:
    """Return the matrices A [r, rows] and B [columns, r] of LoRA of an embedding; nothing for DoRA or two adapters."""
    factors = [module._modules.get(name) for name in _EMBEDDING]
    if not all(isinstance(each, nn.ParameterDict) and len(each) == 1 for each in factors):
        return {}
    magnitudes: Any = module._modules.get("lora_magnitude_vector")
    if magnitudes is not None and len(magnitudes):
        return {}
    found: Any = factors
    return {name: next(iter(each.values())) for name, each in zip(_EMBEDDING, found, strict=True)}


def _lora_of_embedding(call: Call, requested: frozenset[str]) -> dict[str, Form]:
    module: Any = call.module
    factors = _find_embedding_factors(module)
    a_rN, b_Cr = (widen(factors[name].detach()) for name in _EMBEDDING)
    index_BT = group_by_example(call.input, call.batch).reshape(call.batch, -1).long()
    scale = module.scaling[next(iter(module._modules["lora_embedding_A"]))]
    delta_BTC = flatten_positions(widen(call.grad_output), call.batch) * scale
    embed_scale: Tensor | None = getattr(module.get_base_layer(), "embed_scale", None)
    if embed_scale is not None:
        delta_BTC = delta_BTC * embed_scale
    forms: dict[str, Form] = {}
    if "lora_embedding_B" in requested:
        forms["lora_embedding_B"] = Outer(delta_BTC, F.embedding(index_BT, a_rN.T))
    if "lora_embedding_A" in requested:
        value_BTr = delta_BTC @ b_Cr
        if module.get_base_layer().padding_idx is not None:
            value_BTr = value_BTr * (index_BT != module.get_base_layer().padding_idx).unsqueeze(2)
        grad_BrN = value_BTr.new_zeros(call.batch, *a_rN.shape)
        index_BrT = index_BT.unsqueeze(1).expand(-1, len(a_rN), -1)
        forms["lora_embedding_A"] = Dense(grad_BrN.scatter_add_(2, index_BrT, value_BTr.mT).flatten(1))
    return forms


def _find_frozen_layer(module: Any) -> nn.Module:
    layer: nn.Module = module.base_layer
    return layer


_IA3_OF_OUTPUT = LayerRule((), _ia3, needs_output=lambda module: True, find=_find_ia3_vectors)
_IA3_OF_INPUT = LayerRule(
    (), _ia3, needs_output=lambda module: True, find=_find_ia3_vectors, scaled_input=_find_frozen_layer
)
_DORA = LayerRule((), _dora, needs_output=lambda module: True, find=_find_dora_magnitudes)
_LORA_OF_EMBEDDING = LayerRule(
    (), _lora_of_embedding, n_leading=lambda module, x: x.dim(), find=_find_embedding_factors
)
