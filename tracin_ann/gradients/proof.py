"""Verification of per-example gradients: comparison of a method's gradients with autograd, and error messages."""

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
# The gradients of two kernels for the backward of attention in bfloat16 differ by up to 12%.
_RELATIVE_HALF = 0.15
_ABSOLUTE = 1e-2
_SEVERAL = 2
_DRAWS = 2


def proof_weights(batch: int, seed: int, *, half: bool) -> Tensor:
    """Return the weights of the losses whose gradients are compared, [K, B], float64: Gaussian.

    A gradient that is assigned to the wrong example changes a sum with random weights, but not the plain sum. In half
    precision, weights of one are added: the terms of a random sum cancel and their rounding errors do not, so errors
    are compared with the plain sum.

    Args:
        batch: B.
        seed: of the weights.
        half: whether the losses are computed in half precision.
    """
    random = np.random.Generator(np.random.Philox(seed))
    weights_KB = random.standard_normal((_DRAWS, batch))
    return torch.from_numpy(np.concatenate([weights_KB, np.ones((1, batch))]) if half else weights_KB)


class ProofSink:
    """Sums a method's gradients to those of the losses' weighted sums, [K, P] by parameter."""

    def __init__(self, weights_KB: Tensor) -> None:
        self._weights_KB = weights_KB
        self.sums: dict[str, Tensor] = {}
        self._positions: dict[str, int] = defaultdict(int)

    @property
    def rank_one(self) -> frozenset[str]:
        """Return the parameters whose gradients are one outer product per example."""
        return frozenset(name for name, positions in self._positions.items() if positions == 1)

    def __call__(self, name: str, form: Form, rows: slice) -> None:
        """Add the form of one use of a parameter by some rows of the batch."""
        self._positions[name] += form.left_BTR.shape[1] if isinstance(form, Outer) else _SEVERAL
        total = factors.weighted_sums(form, self._weights_KB[:, rows])
        self.sums[name] = self.sums[name] + total if name in self.sums else total


@dataclass(frozen=True)
class Truth:
    """Autograd's gradients of a batch's weighted sums of losses.

    Attributes:
        weights_KB: the weights.
        sums: the gradients by parameter, [K, P].
        unreached: parameters that no loss depends on.
        half: whether forward or backward runs in half precision, whatever the dtype of the parameters.
        scale: the norm of all gradients, which bounds the rounding of gradients whose true value is zero.
    """

    weights_KB: Tensor
    sums: Mapping[str, Tensor]
    unreached: tuple[str, ...]
    half: bool = False
    scale: float = field(init=False)

    def __post_init__(self) -> None:
        """Compute the scale."""
        squares = [float(sum_KP.double().square().sum()) for sum_KP in self.sums.values()]
        object.__setattr__(self, "scale", sum(squares) ** 0.5)

    def describe_disagreement(self, name: str, sink: ProofSink) -> str:
        """Return how a method's gradients of a parameter differ from autograd's, or ""."""
        true_KP, computed_KP = self.sums[name].double(), sink.sums.get(name)
        tolerance = _RELATIVE_HALF if self.half else _RELATIVE.get(self.sums[name].dtype, _RELATIVE_HALF)
        noise = _ABSOLUTE * tolerance * self.scale
        error_K = (true_KP if computed_KP is None else computed_KP.double() - true_KP).norm(dim=1)
        norm_K = true_KP.norm(dim=1)
        if self.half:
            norm_K = norm_K.amax().expand_as(norm_K)
        if bool((error_K <= tolerance * norm_K + noise).all()):
            return ""
        worst = float((error_K / norm_K.clamp_min(1e-300)).amax())
        return f"computes gradients of the examples with errors of {worst:.2g} of their norm"


def check_finite(losses: Tensor, ids: Sequence[int], checkpoint: int) -> None:
    """Check that losses are finite.

    Raises:
        NonFiniteError: a loss is NaN or infinite; the message names the row.
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
        remedy="inspect this row and the weights of this checkpoint",
    )


def describe_misplaced(why: str, ids: Sequence[int]) -> str:
    """Return the message for a layer whose input was batch first in the verified batch, and is not now."""
    return problem(
        "the order of examples in a layer's input differs from the batch whose gradients were verified",
        got=f"{why}, in the batch of row {ids[0]}",
        expected="the batch's examples in the first dimension, in order, in every batch",
        remedy="pass --batch-size 1, or change the model to keep the order of the examples",
    )


def describe_unverified(failed: Mapping[str, str]) -> str:
    """Return the message for parameters for which no method is correct, with the reason for the first one."""
    name, why = next(iter(failed.items()))
    return problem(
        f"the gradients of {', '.join(list(failed)[:4])} do not agree with autograd",
        got=f"{name}: {why}",
        expected="per-example gradients that sum to the gradient of the summed loss",
        remedy="make each loss a function of its own example, or exclude these parameters with Task.parameters",
    )


def describe_unstable(why: str, ids: Sequence[int]) -> str:
    """Return the message for a batch that fails after every verification."""
    return problem(
        f"the gradients of rows {ids[0]} to {ids[-1]} fail after every verification",
        got=why,
        expected="a loss that is computed in the same way each time",
        remedy="change the loss, or exclude these parameters with Task.parameters; --debug shows the traceback",
    )


def describe_unusable_loss(values: object, batch: int) -> str:
    """Return the message for a loss that is not one floating-point number per example, "" for a valid loss."""
    shape = list(values.shape) if isinstance(values, Tensor) else None
    if isinstance(values, Tensor) and shape == [batch]:
        if values.is_floating_point():
            return ""
        return problem(
            "the loss has no gradient",
            got=f"losses of {values.dtype}",
            expected="floating-point losses",
            remedy="remove what has no derivative (argmax, comparisons, casts to integers), or take the real part",
        )
    remedy = "return per-example losses (reduction='none', and the mean over positions of each example)"
    return problem(
        "the loss is not one number per example",
        got=type(values).__name__ if shape is None else f"a tensor of shape {shape}",
        expected=f"a tensor of shape [{batch}]",
        remedy="return losses.squeeze(1)" if shape == [batch, 1] else remedy,
    )


def describe_no_gradient(got: str = "", n_rows: int = 0) -> str:
    """Return the message for losses that autograd cannot differentiate.

    Args:
        got: the error; "" if the losses of all examined rows depend on none of the parameters.
        n_rows: number of rows that were examined.
    """
    got = got or f"losses that depend on none of the chosen parameters, in any of {n_rows} rows"
    remedy = "compute the loss in PyTorch without .detach(), .item() or no_grad, or change Task.parameters"
    if "use_reentrant" in got:
        remedy = "use checkpointing with use_reentrant=False, or no checkpointing"
    return problem(
        "the loss has no gradient", got=got, expected="losses that autograd can differentiate", remedy=remedy
    )
