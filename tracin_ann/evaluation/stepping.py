"""A model at a checkpoint that evaluation changes: gradient steps on single training rows, and losses of queries.

The model is in eval mode, and the user's model is unchanged afterwards.

Shapes: Q queries.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from tracin_ann.features import LoadedModel, RunOptions, TaskRunner
from tracin_ann.task import Checkpoint
from tracin_ann.types import Float64


class SteppedModel:
    """A model whose selected parameters are changed by gradient steps; made by `open_model`."""

    def __init__(self, model: LoadedModel) -> None:
        self._model = model

    def query_losses(self, query_ids: Sequence[int]) -> Float64:
        """Return the losses [Q] of rows of query_data."""
        engine = self._model.engine("query")
        losses = [engine.loss_values(batch).double().cpu() for batch in self._model.batches("query", query_ids)]
        return np.concatenate([loss_B.numpy() for loss_B in losses])

    def gradients(self, row: int) -> dict[str, Tensor]:
        """Return the gradients of the loss of a training row, by parameter."""
        parameters = self._model.parameters
        (batch,) = self._model.batches("train", [row])
        _, grad_P = self._model.engine("train").compute_alone(batch, 0)
        parts = torch.split(grad_P, [parameter.numel() for parameter in parameters.values()])
        return {name: part.view_as(parameters[name]) for name, part in zip(parameters, parts, strict=True)}

    def step(self, gradients: Mapping[str, Tensor], rates: Mapping[str, float]) -> None:
        """Subtract learning rate × gradient from each parameter."""
        for name, gradient in gradients.items():
            self._model.parameters[name].data.sub_(gradient, alpha=rates[name])

    def copy_weights(self) -> dict[str, Tensor]:
        """Return copies of the selected parameters."""
        return {name: parameter.data.clone() for name, parameter in self._model.parameters.items()}

    def set_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Set the selected parameters to these values."""
        for name, value in weights.items():
            self._model.parameters[name].data.copy_(value)

    def state(self) -> dict[str, Tensor]:
        """Return the state dict of the model, on the CPU."""
        return {name: value.detach().cpu().clone() for name, value in self._model.module.state_dict().items()}


@contextmanager
def open_model(runner: TaskRunner, checkpoint: Checkpoint | None) -> Iterator[SteppedModel]:
    """Yield the task's model at a checkpoint, or as `Task.model` returns it.

    Raises:
        CheckpointError: the file is unreadable or does not match the model.
    """
    task, train, query = runner.task, runner.data("train"), runner.data("query")
    # Another runner: the weights of the given one may be stored, and steps would change them. Data sets are shared.
    own = replace(
        task,
        train_data=lambda: train,
        query_data=lambda: query,
        checkpoints=task.checkpoints if checkpoint is None else [replace(checkpoint, learning_rate=1.0)],
    )
    options = RunOptions(runner.options.device, runner.options.batch_size, channels_last=runner.options.channels_last)
    with TaskRunner(own, options).model("fp32") as model:
        if checkpoint is None:
            model.module.requires_grad_(False)
        else:
            model.load(0)
        yield SteppedModel(model)
