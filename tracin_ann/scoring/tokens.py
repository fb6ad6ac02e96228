"""Exact scores of sequences, split over the target positions.

The loss of an example is a sum over positions, ℓ(z) = Σ_t ℓ_t(z) (`Task.token_losses`). The part of position t in the
score of z for a query q is Σ_c η_c ⟨∇ℓ_t(w_c, z), ∇ℓ(w_c, q)⟩: the derivative of ℓ_t(z) along the gradient of the
query. One directional derivative gives the parts of all positions of a batch. The parts sum to the score.

Every result is compared with the inner product of the whole gradients, which autograd computes.

Shapes: B batch, T positions, P parameters.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tracin_ann.choices import SideName
from tracin_ann.errors import NonFiniteError, TaskError, UsageError, first_line, problem
from tracin_ann.features import LoadedModel, squared_norms
from tracin_ann.gradients import DIFFERENTIATE, FORWARD_MODE, Batch, Derivatives, Form, Sink, inner_where
from tracin_ann.scoring.exact import Directions, ExactScorer
from tracin_ann.task import LossFunction, Task
from tracin_ann.types import Float64


@dataclass(frozen=True)
class _Tolerances:
    """The largest differences by rounding.

    Attributes:
        loss: of Σ_t ℓ_t and ℓ, relative to Σ_t |ℓ_t|.
        forward: of the sum of the parts by forward mode and the inner product, relative to the sum of the absolute
            parts, and to ‖∇ℓ‖·‖v‖. Forward mode and autograd may differ, in operations under `no_grad` or in an
            embedding with `padding_idx`, so that it is small.
        backward: the same by the other methods, which have the semantics of autograd.
    """

    loss: float
    forward: tuple[float, float]
    backward: tuple[float, float]


_FULL = _Tolerances(1e-4, (1e-5, 1e-6), (1e-3, 5e-4))
_HALF = _Tolerances(2e-2, (2e-2, 5e-3), (5e-2, 0.15))
logger = logging.getLogger(__name__)


def require_token_losses(task: Task, side: SideName) -> LossFunction:
    """Return the function that splits the loss of a side's examples by position.

    Raises:
        UsageError: the task has none.
    """
    losses = task.find_token_losses(side)
    if losses is None:
        name = "token_losses" if side == "train" or task.query_loss is None else "query_token_losses"
        raise UsageError(
            problem(
                "scores cannot be split by token",
                got=f"a task without {name}",
                expected="a function (model, batch) -> Tensor[B, T] whose sum over T is the loss of each example",
                remedy=f"define Task.{name}, for example {name}=lambda model, batch: ...",
            )
        )
    return losses


class TokenSplitter:
    """Splits inner products of gradients of a side's examples with a direction, at the loaded checkpoint.

    It uses the first method of `DIFFERENTIATE` that works for the model and agrees with autograd.

    Raises:
        UsageError: the task has no function that splits the loss of this side.
    """

    def __init__(self, model: LoadedModel, side: SideName) -> None:
        self._model, self._side = model, side
        self._losses = require_token_losses(model.runner.task, side)
        is_own = side != "train" and model.runner.task.query_token_losses is not None
        self._name = "query_token_losses" if is_own else "token_losses"
        self._methods = list(DIFFERENTIATE)
        self._tolerances: _Tolerances | None = None

    def split(self, ids: Sequence[int], direction: Mapping[str, Tensor]) -> list[Float64]:
        """Return ⟨∇ℓ_t(z), v⟩ of each example and position, [T] each; T is that of the example in a batch of one.

        Args:
            ids: the examples.
            direction: v by parameter, flattened: a gradient, or a sum of gradients, as of `compute_full_gradients`.

        Raises:
            TaskError: the losses of the positions do not sum to the loss, or their gradients to its gradient.
            NonFiniteError: a gradient is NaN or infinite.
        """
        part_of: dict[int, Float64] = {}
        for places, batch in self._model.iterate_without_padding(self._side, ids):
            # Not -0.0, which a masked position may have.
            part_BT = self._split_batch(batch, direction) + 0.0
            part_of |= dict(zip(places, part_BT, strict=True))
        return [part_of[place] for place in range(len(ids))]

    def _split_batch(self, batch: Batch, direction: Mapping[str, Tensor]) -> Float64:
        engine = self._model.engine(self._side)
        if self._tolerances is None:
            self._tolerances = _HALF if engine.is_half_precision(batch) else _FULL
        loss_B, product_B, norm_B = self._multiply(batch, direction)
        if not torch.isfinite(product_B).all():
            raise NonFiniteError(self._describe_nonfinite(batch, product_B))
        while True:
            method = self._methods[0]
            try:
                found = engine.differentiate(method, batch, self._check_shape(len(batch)), direction)
            except (TaskError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                if len(self._methods) == 1:
                    raise
                why = first_line(error)
            else:
                self._check_losses(batch, found, loss_B)
                part_BT = found.derivative_BT.double()
                wrong = self._find_difference(part_BT, product_B, norm_B)
                if wrong is None:
                    return part_BT.cpu().numpy()
                if len(self._methods) == 1:
                    raise TaskError(self._describe_difference(batch.ids[wrong], part_BT[wrong], product_B[wrong]))
                why = "its parts do not sum to the product of the gradients"
            logger.info("%s is not used for the parts of tokens: %s", method, why)
            self._methods.pop(0)

    def _multiply(self, batch: Batch, direction: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the losses, their gradients' inner products with the direction, and ‖∇ℓ‖·‖v‖, [B] each."""
        forms: dict[tuple[str, int, int], list[Form]] = {}

        def start() -> Sink:
            forms.clear()
            return lambda name, form, rows: forms.setdefault((name, rows.start, rows.stop), []).append(form)

        loss_B = self._model.engine(self._side).run(batch, start).double()
        product_B = torch.zeros_like(loss_B)
        for (name, first, last), uses in forms.items():
            everything = torch.ones(last - first, 1, dtype=torch.bool)
            for form in uses:
                product_B[first:last] += inner_where(form, direction[name][None], everything)[:, 0]
        square_B = squared_norms(forms, len(batch), loss_B.device)
        square = torch.stack([part.double().square().sum() for part in direction.values()]).sum()
        return loss_B, product_B, (square_B * square).sqrt()

    def _check_shape(self, batch: int) -> LossFunction:
        """Return the function that computes the losses of the positions and checks their type and shape."""

        def losses(model: torch.nn.Module, inputs: object) -> Tensor:
            values: object = self._losses(model, inputs)
            is_tensor = isinstance(values, Tensor) and values.is_floating_point()
            if not isinstance(values, Tensor) or not is_tensor or values.shape[:1] != (batch,) or values.dim() != 2:  # noqa: PLR2004
                got = f"{tuple(values.shape)} {values.dtype}" if isinstance(values, Tensor) else type(values).__name__
                raise TaskError(
                    problem(
                        f"Task.{self._name} does not return one loss per example and position",
                        got=got,
                        expected=f"a floating-point tensor [B, T] with B = {batch}",
                        remedy=f"correct Task.{self._name}; reduction='none' keeps the losses apart",
                    )
                )
            return values

        return losses

    def _check_losses(self, batch: Batch, found: Derivatives, loss_B: Tensor) -> None:
        """Check that the losses of the positions sum to the loss of each example."""
        assert self._tolerances is not None
        loss_BT = found.loss_BT.double()
        size_B = torch.maximum(loss_BT.abs().sum(1), loss_B.abs())
        wrong = (~((loss_BT.sum(1) - loss_B).abs() <= self._tolerances.loss * size_B + 1e-12)).nonzero().flatten()
        if len(wrong):
            first = int(wrong[0])
            what = "query_loss" if self._side != "train" and self._model.runner.task.query_loss else "loss"
            raise TaskError(
                problem(
                    f"Task.{self._name} does not sum to Task.{what} over its positions",
                    got=f"{float(loss_BT[first].sum()):.6g} for row {batch.ids[first]} of {self._side}_data",
                    expected=f"{float(loss_B[first]):.6g}",
                    remedy="return the terms of the same sum; for a mean over tokens, divide by their number",
                )
            )

    def _find_difference(self, part_BT: Tensor, product_B: Tensor, norm_B: Tensor) -> int | None:
        """Return an example whose parts do not sum to its inner product, or None."""
        assert self._tolerances is not None
        is_forward = self._methods[0] == FORWARD_MODE
        relative, absolute = self._tolerances.forward if is_forward else self._tolerances.backward
        largest_B = relative * part_BT.abs().sum(1) + absolute * norm_B
        wrong = (~((part_BT.sum(1) - product_B).abs() <= largest_B)).nonzero().flatten()
        return int(wrong[0]) if len(wrong) else None

    def _describe_difference(self, row: int, part_T: Tensor, product: Tensor) -> str:
        return problem(
            f"the gradients of Task.{self._name} do not sum to the gradient of the loss",
            got=f"parts with the sum {float(part_T.sum()):.6g} for row {row} of {self._side}_data",
            expected=f"{float(product):.6g}",
            remedy="compute the losses of the positions and their sum by the same operations, without detach()",
        )

    def _describe_nonfinite(self, batch: Batch, product_B: Tensor) -> str:
        row = batch.ids[int((~torch.isfinite(product_B)).nonzero()[0])]
        return problem(
            f"the score of row {row} of {self._side}_data cannot be split by token",
            got=f"NaN or infinity at checkpoint {self._model.checkpoint}",
            expected="finite gradients",
            remedy="leave out this row",
        )


def split_scores(scorer: ExactScorer, rows: Sequence[Sequence[int]]) -> list[list[Float64]]:
    """Return the exact scores of training rows for each query of a scorer, split by position: [T] for each row.

    Args:
        scorer: of the queries.
        rows: the rows of each query.

    Raises:
        UsageError: the task has no `token_losses`.
        TaskError: they do not sum to the loss.
        NonFiniteError: a gradient is NaN or infinite.
    """
    splitter = TokenSplitter(scorer.model, "train")
    totals: list[list[Float64]] = [[np.zeros(1)] * len(each) for each in rows]
    done, n_rows = 0, len(scorer.checkpoints) * sum(map(len, rows))
    for rate, block, directions, exponent_Q in scorer.blocks():
        for at, (total, each, exponent) in enumerate(zip(totals[block], rows[block], exponent_Q, strict=True)):
            if each:
                parts = splitter.split(each, select_direction(directions, at))
                factors = rate * scorer.weigh_rows(each)
                total[:] = [
                    one + np.ldexp(factor * part_T, exponent)
                    for one, part_T, factor in zip(total, parts, factors, strict=True)
                ]
                done += len(each)
                scorer.progress.report("tokens", done, n_rows)
    return totals


def select_direction(directions: Directions, at: int) -> Directions:
    """Return one of several directions, [P] by parameter."""
    return {name: direction_QP[at].flatten() for name, direction_QP in directions.items()}
