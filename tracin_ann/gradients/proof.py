"""The proof of per-example gradients: what a step of the ladder gives, held against autograd, and is it finite."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from tracin_ann.errors import NonFiniteError, problem
from tracin_ann.gradients import factors
from tracin_ann.gradients.factors import Form, Outer

_RELATIVE = {torch.float64: 1e-6, torch.float32: 5e-4}
# Two kernels for the backward of attention in bfloat16 give gradients that differ by up to 12%.
_RELATIVE_HALF = 0.15
_ABSOLUTE = 1e-2
_MANY = 2
_DRAWS = 2


def proof_weights(batch: int, seed: int, *, half: bool) -> Tensor:
    """Return the weights of the losses whose gradients a proof compares, [K, B], float64: Gaussians.

    A gradient that goes to another example than its own changes a sum with random weights, and not the plain sum.
    In half precision ones come as well: terms cancel in a random sum, their rounding does not, and is to be
    compared with the plain sum.
    """
    random = np.random.Generator(np.random.Philox(seed))
    weights_KB = random.standard_normal((_DRAWS, batch))
    return torch.from_numpy(np.concatenate([weights_KB, np.ones((1, batch))]) if half else weights_KB)


class ProofSink:
    """Adds up what a step gives: the gradients [K, P] of the losses' weighted sums, by parameter."""

    def __init__(self, weights_KB: Tensor) -> None:
        self._weights_KB = weights_KB
        self.sums: dict[str, Tensor] = {}
        self._positions: dict[str, int] = defaultdict(int)

    @property
    def rank_one(self) -> frozenset[str]:
        """Return the parameters whose gradients came as one outer product an example."""
        return frozenset(name for name, positions in self._positions.items() if positions == 1)

    def __call__(self, name: str, form: Form, rows: slice) -> None:
        """Take one use of a parameter by some rows of the batch."""
        self._positions[name] += form.left_BTR.shape[1] if isinstance(form, Outer) else _MANY
        total = factors.weighted_sums(form, self._weights_KB[:, rows])
        self.sums[name] = self.sums[name] + total if name in self.sums else total


@dataclass(frozen=True)
class Truth:
    """Autograd's own gradients on a batch, of the losses' weighted sums.

    Attributes:
        weights_KB: the weights.
        sums: by parameter, [K, P].
        unreached: parameters that no loss depends on.
        half: forward and backward ran in half precision, whatever the dtype of the parameters.
    """

    weights_KB: Tensor
    sums: Mapping[str, Tensor]
    unreached: tuple[str, ...]
    half: bool = False
    scale: float = field(init=False)

    def __post_init__(self) -> None:
        """Take the whole gradient's size as the measure of rounding in a gradient whose true value is zero."""
        squares = [float(sum_KP.double().square().sum()) for sum_KP in self.sums.values()]
        object.__setattr__(self, "scale", sum(squares) ** 0.5)

    def disagreement(self, name: str, sink: ProofSink) -> str:
        """Return how the step's gradients of a parameter differ from autograd's, or nothing."""
        true_KP, given_KP = self.sums[name].double(), sink.sums.get(name)
        tolerance = _RELATIVE_HALF if self.half else _RELATIVE.get(self.sums[name].dtype, _RELATIVE_HALF)
        noise = _ABSOLUTE * tolerance * self.scale
        error_K = (true_KP if given_KP is None else given_KP.double() - true_KP).norm(dim=1)
        norm_K = true_KP.norm(dim=1)
        if self.half:
            norm_K = norm_K.amax().expand_as(norm_K)
        if bool((error_K <= tolerance * norm_K + noise).all()):
            return ""
        worst = float((error_K / norm_K.clamp_min(1e-300)).amax())
        return f"gives gradients of the examples off by {worst:.2g} of their norm"


def check_finite(losses: Tensor, ids: Sequence[int], checkpoint: int) -> None:
    """Refuse losses that are NaN or infinite, naming the row.

    Raises:
        NonFiniteError: a loss is NaN or infinite.
    """
    bad = (~torch.isfinite(losses)).nonzero().flatten().tolist()
    if bad:
        raise NonFiniteError(describe_nonfinite("loss", ids[bad[0]], checkpoint, float(losses[bad[0]])))


def describe_nonfinite(what: str, row: int, checkpoint: int, got: object) -> str:
    """Return the message for a row's loss or gradient that is NaN or infinite."""
    return problem(
        f"the {what} of row {row} at checkpoint {checkpoint} is not finite",
        got=got,
        expected="finite numbers",
        remedy="look at this row and this checkpoint's weights",
    )


def describe_misplaced(why: str, ids: Sequence[int]) -> str:
    """Return the message for a layer whose input came batch first when it was proven, and now does not."""
    return problem(
        "the examples lie otherwise in a layer's input than when its gradients were proven",
        got=f"{why}, in the batch of row {ids[0]}",
        expected="the batch's examples in the first dimension, in order, in every batch",
        remedy="pass --batch-size 1, or let the model keep the examples in order",
    )


def describe_unproven(failed: Mapping[str, str]) -> str:
    """Return the message for parameters that no step of the ladder serves, each with the reason."""
    name, why = next(iter(failed.items()))
    return problem(
        f"the gradients of {', '.join(list(failed)[:4])} cannot be proven",
        got=f"{name}: {why}",
        expected="per-example gradients that add up to the gradient of the summed loss",
        remedy="make each loss a function of its own example, or leave these out with Task.parameters",
    )


def describe_unsettled(why: str, ids: Sequence[int]) -> str:
    """Return the message for a batch whose gradients fail again however often they are proven."""
    return problem(
        f"the gradients of rows {ids[0]} to {ids[-1]} fail each time after they are proven",
        got=why,
        expected="a loss that does the same each time it is computed",
        remedy="mend the loss, or leave these parameters out with Task.parameters; --debug shows the trace",
    )


def describe_unusable_loss(values: object, batch: int) -> str:
    """Return the message for a loss that is not one floating-point number an example, "" for one that is."""
    shape = list(values.shape) if isinstance(values, Tensor) else None
    if isinstance(values, Tensor) and shape == [batch]:
        return "" if values.is_floating_point() else _no_floats(values.dtype)
    remedy = "return per-example losses (reduction='none', and the mean over positions of each example)"
    return problem(
        "the loss is not one number an example",
        got=type(values).__name__ if shape is None else f"a tensor of shape {shape}",
        expected=f"a tensor of shape [{batch}]",
        remedy="return losses.squeeze(1)" if shape == [batch, 1] else remedy,
    )


def _no_floats(dtype: torch.dtype) -> str:
    return problem(
        "the loss has no gradient",
        got=f"losses of {dtype}",
        expected="floating-point losses",
        remedy="leave out what has no derivative (argmax, comparisons, casts to integers), or take the real part",
    )


def describe_no_gradient(got: str = "", looked: int = 0) -> str:
    """Return the message for losses that autograd cannot follow back, in any of so many rows or with an error."""
    got = got or f"losses that depend on none of the chosen parameters, in any of {looked} rows"
    remedy = "compute the loss in PyTorch without .detach(), .item() or no_grad, or change Task.parameters"
    if "use_reentrant" in got:
        remedy = "checkpoint with use_reentrant=False, or not at all"
    return problem(
        "the loss has no gradient", got=got, expected="losses that autograd can follow back to them", remedy=remedy
    )
