"""The layer rule of convolutions: `nn.Conv1d`, `nn.Conv2d` and `nn.Conv3d`.

The gradient of the weight is Σ_t δ_t ⊗ a_t over output positions t, with δ the output gradient and a_t the patch of the
input under position t; that of the bias is Σ_t δ_t. A call has one image per example, or the same number of several.
"""

from __future__ import annotations

import itertools
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from tracin_ann.gradients.convolution_factor import Convolution, Geometry
from tracin_ann.gradients.factors import Dense, Form
from tracin_ann.gradients.layers.base import WEIGHT_AND_BIAS, Call, LayerRule, group_by_example


def _convolution(call: Call, requested: frozenset[str]) -> dict[str, Form]:
    module: Any = call.module
    x, delta = call.input, call.grad_output
    if _n_batch_dimensions(module, x) == 0:
        x, delta = x.unsqueeze(0), delta.unsqueeze(0)
    has_several_images = len(delta) != call.batch
    if has_several_images:
        delta = _stack_images(delta, call.batch)
    forms: dict[str, Form] = {}
    if "weight" in requested:
        x, padding = _padding(module, x)
        geometry = Geometry(module.kernel_size, module.stride, module.dilation, module.groups, padding)
        if has_several_images:
            x, geometry = _stack_images(x, call.batch), geometry.with_image_dimension()
        forms["weight"] = Convolution(delta, x, geometry)
    if "bias" in requested:
        forms["bias"] = Dense(delta.flatten(2).sum(2))
    return forms


def _stack_images(tensor: Tensor, batch: int) -> Tensor:
    """Return the images of an example [B·n, C, ...] along one more spatial dimension, [B, C, n, ...]."""
    return group_by_example(tensor, batch).transpose(1, 2)


def _padding(module: Any, x: Tensor) -> tuple[Tensor, tuple[tuple[int, int], ...]]:
    """Return the input and its zero padding; for another padding mode, the padded input and no padding."""
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


def _n_batch_dimensions(module: Any, x: Tensor) -> int:
    """Return the number of dimensions before the channels: 1, or 0 for one unbatched image."""
    return x.dim() - 1 - len(module.kernel_size)


CONVOLUTION = LayerRule(WEIGHT_AND_BIAS, _convolution, n_leading=_n_batch_dimensions)
