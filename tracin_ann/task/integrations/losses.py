"""Losses per example of Hugging Face models, by kind of task; for sequences also the loss of each position.

Each is the loss that the model itself computes for a batch of one example, except that the losses of an example's
tokens can be added up instead of averaged.

Shapes: B batch, T positions, V vocabulary or classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tracin_ann.errors import TaskError, problem
from tracin_ann.task.integrations.architectures import Kind

Reduction = Literal["sum", "mean"]
IGNORED = -100
"""The label of a position without a loss."""
TOKEN_KINDS: tuple[Kind, ...] = ("causal-lm", "masked-lm", "seq2seq", "token-classification")
LABELS = "labels"


@dataclass(frozen=True)
class TokenLosses:
    """The loss at every position, [B, T]; their sum over T is the loss of an example.

    For a causal language model, position t has the loss of predicting token t, so that of position 0 is zero. For a
    sequence-to-sequence model, the positions are those of the labels. A position with label -100 has loss zero.

    Attributes:
        kind: one of `TOKEN_KINDS`.
        reduction: "sum"; "mean": divided by the number of the example's positions with a loss.
    """

    kind: Kind
    reduction: Reduction = "sum"

    def __call__(self, model: Any, batch: Any) -> Tensor:
        """Return the losses [B, T] of a batch, a mapping with `labels` and the model's inputs."""
        inputs, labels_BT = _split(batch)
        if self.kind == "seq2seq" and "decoder_input_ids" not in inputs:
            inputs |= _make_decoder_inputs(model, labels_BT)
        logits_BTV = widen(model(**inputs).logits)
        if self.kind == "causal-lm":
            logits_BTV, labels_BT = logits_BTV[:, :-1], labels_BT[:, 1:]
        labels_BT = labels_BT.long()
        losses_BT = F.cross_entropy(
            logits_BTV.flatten(0, 1), labels_BT.flatten(), ignore_index=IGNORED, reduction="none"
        ).view(labels_BT.shape)
        if self.reduction == "mean":
            losses_BT = losses_BT / (labels_BT != IGNORED).sum(1, keepdim=True).clamp(min=1)
        return F.pad(losses_BT, (1, 0)) if self.kind == "causal-lm" else losses_BT


@dataclass(frozen=True)
class SumOverTokens:
    """The loss of an example, [B]: the sum of the losses of its positions."""

    token_losses: TokenLosses

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the losses [B] of a batch."""
        return self.token_losses(model, batch).sum(1)


@dataclass(frozen=True)
class ClassLoss:
    """The loss of a classification or regression of whole examples, [B].

    For a single label of -100, as for a query without a label, the class is the one that the model predicts.

    Attributes:
        problem_type: of the config: "single_label_classification" (cross-entropy), "multi_label_classification" (mean
            binary cross-entropy of the labels), "regression" (mean squared error of the outputs), or None: regression
            if there is one output, otherwise one label if labels are integers, otherwise several labels.
    """

    problem_type: str | None = None

    def __call__(self, model: Any, batch: Any) -> Tensor:
        """Return the losses [B] of a batch, a mapping with `labels` and the model's inputs."""
        inputs, labels = _split(batch)
        logits_BV = widen(model(**inputs).logits)
        problem_type = self.problem_type or _guess_problem_type(logits_BV.shape[1], labels)
        if problem_type == "single_label_classification":
            labels_B = labels.long().view(-1)
            labels_B = torch.where(labels_B == IGNORED, logits_BV.detach().argmax(1), labels_B)
            return F.cross_entropy(logits_BV, labels_B, reduction="none")
        target_BV = labels.to(logits_BV.dtype).reshape(logits_BV.shape)
        if problem_type == "regression":
            return (logits_BV - target_BV).square().mean(1)
        return F.binary_cross_entropy_with_logits(logits_BV, target_BV, reduction="none").mean(1)

    def is_nll(self, n_outputs: int, row: Mapping[str, Any]) -> bool:
        """Return whether the loss is −log p of one label, for a model with this number of outputs and such a row."""
        problem_type = self.problem_type or _guess_problem_type(n_outputs, torch.as_tensor(row[LABELS]))
        return problem_type == "single_label_classification"


def make_loss(
    kind: Kind, config: Any = None, reduction: Reduction = "sum"
) -> tuple[SumOverTokens | ClassLoss, TokenLosses | None]:
    """Return the loss [B] of a kind of task, and for sequences the loss of each position [B, T].

    Args:
        kind: the kind of task.
        config: the model's config, whose `problem_type` selects the loss of a sequence classification.
        reduction: of an example's tokens.
    """
    if kind in TOKEN_KINDS:
        token_losses = TokenLosses(kind, reduction)
        return SumOverTokens(token_losses), token_losses
    return ClassLoss(getattr(config, "problem_type", None)), None


def widen(logits: Tensor) -> Tensor:
    """Return logits in float32 or wider."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _split(batch: Any) -> tuple[dict[str, Any], Tensor]:
    """Return the model's inputs and the labels of a batch.

    Raises:
        TaskError: it has no labels.
    """
    inputs = {name: value for name, value in batch.items() if name != LABELS}
    if LABELS not in batch:
        raise TaskError(
            problem(
                "a batch has no labels",
                got=", ".join(inputs),
                expected=f"{LABELS!r} in every row",
                remedy="add the labels to the data, or name their column with label=",
            )
        )
    return inputs, batch[LABELS]


def _make_decoder_inputs(model: Any, labels_BT: Tensor) -> dict[str, Tensor]:
    """Return the argument from which the decoder's inputs follow: the labels shifted by the model's own function.

    Without this function, the labels are passed, and the model shifts them in its forward.
    """
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    return {LABELS: labels_BT} if shift is None else {"decoder_input_ids": shift(labels=labels_BT)}


def _guess_problem_type(n_outputs: int, labels: Tensor) -> str:
    if n_outputs == 1:
        return "regression"
    return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
