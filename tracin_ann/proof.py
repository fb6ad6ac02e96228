"""The proof of per-example gradients: what a step of the ladder gives, held against autograd, and is it finite."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tracin_ann import factors
from tracin_ann.errors import NonFiniteError, problem
from tracin_ann.factors import Form, Outer

_RELATIVE = {torch.float64: 1e-6, torch.float32: 5e-4}
_RELATIVE_HALF = 5e-2
_ABSOLUTE = 1e-2
_MANY = 2


class ProofSink:
    """Adds up what a step gives: the summed gradient, and those of the first few examples."""

    def __init__(self, few: int) -> None:
        self._few = few
        self.sums: dict[str, Tensor] = {}
        self.alone: dict[str, Tensor] = {}
        self._positions: dict[str, int] = defaultdict(int)

    @property
    def rank_one(self) -> frozenset[str]:
        """Return the parameters whose gradients came as one outer product an example."""
        return frozenset(name for name, positions in self._positions.items() if positions == 1)

    def __call__(self, name: str, form: Form, rows: slice) -> None:
        """Take one use of a parameter by some rows of the batch."""
        self._positions[name] += form.left_BTR.shape[1] if isinstance(form, Outer) else _MANY
        total = factors.summed(form)
        self.sums[name] = self.sums[name] + total if name in self.sums else total
        n_few = max(0, min(self._few - rows.start, rows.stop - rows.start))
        if n_few:
            alone = factors.materialised(form[:n_few])
            if name not in self.alone:
                self.alone[name] = alone.new_zeros(self._few, alone.shape[1])
            self.alone[name][rows.start : rows.start + n_few] += alone


@dataclass(frozen=True)
class Truth:
    """Autograd's own gradients on a batch: of the summed loss, and of the first few examples' losses.

    Attributes:
        summed: by parameter, flat.
        few: by parameter, [n, P].
        unreached: parameters that no loss depends on.
        half: forward and backward ran in half precision, whatever the dtype of the parameters.
    """

    summed: Mapping[str, Tensor]
    few: Mapping[str, Tensor]
    unreached: tuple[str, ...]
    half: bool = False
    scale: float = field(init=False)

    def __post_init__(self) -> None:
        """Take the whole gradient's size as the measure of rounding in a gradient whose true value is zero."""
        squares = [float(g.double().square().sum()) for g in (*self.summed.values(), *self.few.values())]
        object.__setattr__(self, "scale", sum(squares) ** 0.5)

    def disagreement(self, name: str, sink: ProofSink) -> str:
        """Return how the step's gradients of a parameter differ from autograd's, or nothing."""
        tolerance = _RELATIVE_HALF if self.half else _RELATIVE.get(self.summed[name].dtype, _RELATIVE_HALF)
        noise = _ABSOLUTE * tolerance * self.scale
        pairs = [("summed", sink.sums.get(name), self.summed[name])]
        pairs += [("one example's", sink.alone.get(name), self.few[name])]
        for what, given, true in pairs:
            off = true.double() if given is None else given.double() - true.double()
            norm, error = float(true.double().norm()), float(off.norm())
            if not error <= tolerance * norm + noise:
                return f"gives {what} gradient off by {error / max(norm, 1e-300):.2g} of its norm"
        return ""


def check_finite(losses: Tensor, ids: Sequence[int], checkpoint: int) -> None:
    """Refuse losses that are NaN or infinite, naming the row.

    Raises:
        NonFiniteError: a loss is NaN or infinite.
    """
    bad = (~torch.isfinite(losses)).nonzero().flatten().tolist()
    if bad:
        raise NonFiniteError(not_finite("loss", ids[bad[0]], checkpoint, float(losses[bad[0]])))


def not_finite(what: str, row: int, checkpoint: int, got: object) -> str:
    """Return the message for a row's loss or gradient that is NaN or infinite."""
    return problem(
        f"the {what} of row {row} at checkpoint {checkpoint} is not finite",
        got=got,
        expected="finite numbers",
        remedy="look at this row and this checkpoint's weights",
    )


def unproven(failed: Mapping[str, str]) -> str:
    """Return the message for parameters that no step of the ladder serves, each with the reason."""
    name, why = next(iter(failed.items()))
    return problem(
        f"the gradients of {', '.join(list(failed)[:4])} cannot be proven",
        got=f"{name}: {why}",
        expected="per-example gradients that add up to the gradient of the summed loss",
        remedy="make each loss a function of its own example, or leave these out with Task.parameters",
    )


def wrong_shape(values: object, batch: int) -> str:
    """Return the message for a loss that is not one number an example."""
    got = f"a tensor of shape {list(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
    return problem(
        "the loss is not one number an example",
        got=got,
        expected=f"a tensor of shape [{batch}]",
        remedy="return per-example losses (reduction='none', and the mean over positions of each example)",
    )


def no_gradient(got: str = "losses that depend on none of the chosen parameters") -> str:
    """Return the message for losses that autograd cannot follow back."""
    return problem(
        "the loss has no gradient",
        got=got,
        expected="losses that autograd can follow back to them",
        remedy="compute the loss in PyTorch without .detach(), .item() or no_grad, or change Task.parameters",
    )
