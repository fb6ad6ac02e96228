"""Preconditioners from Adam's second moments: the weight of each entry of a gradient.

With D = diag(√v̂ + ε) at a checkpoint, `adam` multiplies the gradients of both sides by D^(-1/2), so that their inner
product is gᵀ D⁻¹ g′: Adam's update direction for g, with fixed moments, times g′ (LESS, Xia et al. 2024, section 3.1).
`trackstar` multiplies both sides by D⁻¹, the factor V^(-1/2) of TrackStar (Chang et al. 2024, section 3).

Shapes: P entries of a parameter.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping

from torch import Tensor, nn

from tracin_ann.choices import Preconditioner
from tracin_ann.features.rates import ParameterRates
from tracin_ann.gradients import GradientScales, form_dtype
from tracin_ann.task import SecondMoment


def compute_scales(
    kind: Preconditioner,
    rates: ParameterRates,
    moments: Mapping[str, SecondMoment],
    parameters: Mapping[str, nn.Parameter],
) -> GradientScales:
    """Return the factor of each entry: the preconditioner's weight times the root of the relative learning rate.

    Args:
        kind: `adam` or `trackstar`.
        rates: the learning rates.
        moments: the second moments of all parameters whose learning rate is not 0.
        parameters: the selected parameters.
    """
    dtype = form_dtype(parameters.values())
    factors: dict[str, float | Tensor] = {}
    for name, parameter in parameters.items():
        if name not in moments:
            factors[name] = 0.0
            continue
        denominator_P = moments[name].denominator(dtype, parameter.device)
        weight_P = denominator_P.rsqrt_() if kind == "adam" else denominator_P.reciprocal_()
        factors[name] = weight_P.mul_((rates.by_parameter[name] / rates.rate) ** 0.5)
    return GradientScales(factors)


class ScalesCache:
    """The scales of several checkpoints, on the model's device.

    The latest scales are kept, and earlier ones while all together fit the memory.

    Args:
        memory_bytes: largest number of bytes of the scales besides the latest.
    """

    def __init__(self, memory_bytes: int) -> None:
        self._memory_bytes = memory_bytes
        self._kept: OrderedDict[Hashable, GradientScales] = OrderedDict()

    def find(self, key: Hashable, compute: Callable[[], GradientScales]) -> GradientScales:
        """Return the scales of this key, computed if they are not kept."""
        if key not in self._kept:
            self._remove_first(self._memory_bytes)
            self._kept[key] = compute()
        self._kept.move_to_end(key)
        return self._kept[key]

    def _remove_first(self, most_bytes: int) -> None:
        while self._kept and sum(map(_count_bytes, self._kept.values())) > most_bytes:
            self._kept.popitem(last=False)


def _count_bytes(scales: GradientScales) -> int:
    return sum(factor.nbytes for factor in scales.factors.values() if isinstance(factor, Tensor))
