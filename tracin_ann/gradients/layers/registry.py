"""The registry of layer rules: the rule of each kind of layer, and the rule that applies to a given layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tracin_ann.gradients.layers.adapters import find_adapter_rule, is_adapter, is_part_of_adapter
from tracin_ann.gradients.layers.base import LayerRule
from tracin_ann.gradients.layers.convolution import CONVOLUTION
from tracin_ann.gradients.layers.embedding import EMBEDDING, LOOKUP
from tracin_ann.gradients.layers.linear import CUSTOM_LINEAR, LINEAR, is_linear
from tracin_ann.gradients.layers.norm import BATCH_NORM, CUSTOM_NORM, GROUP_NORM, LAYER_NORM, RMS_NORM, is_norm

RULES: dict[type[nn.Module], LayerRule] = {
    nn.Linear: LINEAR,
    nn.Conv1d: CONVOLUTION,
    nn.Conv2d: CONVOLUTION,
    nn.Conv3d: CONVOLUTION,
    nn.Embedding: EMBEDDING,
    nn.LayerNorm: LAYER_NORM,
    nn.GroupNorm: GROUP_NORM,
    nn.BatchNorm1d: BATCH_NORM,
    nn.BatchNorm2d: BATCH_NORM,
    nn.BatchNorm3d: BATCH_NORM,
}
if hasattr(torch.nn, "RMSNorm"):
    RULES[nn.RMSNorm] = RMS_NORM


def find_rule(module: nn.Module) -> LayerRule | None:
    """Return the rule that applies to a layer, or None.

    A subclass uses the rule of its parent if it keeps the parent's `forward`. With a forward of its own, an embedding
    uses the rule of the lookup inside it, and a linear layer that of linear layers of other libraries. A layer that is
    not a PyTorch layer is recognised by its parameters: one vector (LlamaRMSNorm and similar layers) or one matrix
    (Hugging Face's Conv1D). Adapter layers of PEFT have rules of their own. As for every layer, the gradients are
    verified on the first batch.
    """
    if is_adapter(module):
        if is_part_of_adapter(module):
            return None
        if (adapter := find_adapter_rule(module)) is not None:
            return adapter
    for kind in type(module).__mro__:
        rule = RULES.get(kind)
        if rule is not None:
            inherited: Any = kind
            own = rule if type(module).forward is inherited.forward else _find_rule_of_forward(rule, module)
            return own if own is not None and own.applies(module) else None
    if isinstance(module, torch.jit.ScriptModule) or type(module).__module__.startswith("torch.nn."):
        # TorchScript calls its layers without their hooks.
        return None
    return CUSTOM_NORM if is_norm(module) else CUSTOM_LINEAR if is_linear(module) else None


def _find_rule_of_forward(rule: LayerRule, module: nn.Module) -> LayerRule | None:
    """Return the rule of a subclass with a forward of its own, or None.

    Args:
        rule: that of the parent.
        module: the layer.
    """
    if rule is LINEAR and is_linear(module):
        return CUSTOM_LINEAR
    return LOOKUP if rule is EMBEDDING else None
