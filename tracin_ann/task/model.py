"""A model borrowed from the user: in eval mode on a device, and given back as it was, with all global state."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.utils.checkpoint
from torch import nn
from torch.nn.parameter import is_lazy

from tracin_ann.device import disable_tf32, preserve_rng
from tracin_ann.errors import TaskError, problem
from tracin_ann.task.task import Task


@contextlib.contextmanager
def borrow_model(task: Task, device: torch.device) -> Iterator[nn.Module]:
    """Yield `task.model()` in eval mode on `device`, or with a part on meta; on leaving, all is as it was before.

    Put back: the model's weights, buffers, grads, modes, requires_grad flags and device (the user's
    function may return an object that it keeps), torch's, numpy's and Python's random state, grad
    mode, default dtype, and PyTorch's switch for fused attention.

    Raises:
        TaskError: `task.model` returns no module, or one with uninitialized lazy layers.
    """
    with preserve_globals():
        model = task.model()
        if not isinstance(model, nn.Module):
            raise TaskError(
                problem(
                    "Task.model returns no model",
                    got=type(model).__name__,
                    expected="a torch.nn.Module",
                    remedy="return the module itself",
                )
            )
        _refuse_lazy(model)
        with _preserved_model(model):
            model.eval()
            # What is on meta has nothing to move; a checkpoint fills it, and its loader moves it.
            if not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
                model.to(device)
            yield model


def _refuse_lazy(model: nn.Module) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise TaskError(
                problem(
                    "Task.model returns a model whose shapes are not known yet",
                    got=f"an uninitialized {name}",
                    expected="a model whose lazy layers have seen an input",
                    remedy="run one forward in Task.model, or give the layers their sizes",
                )
            )


@contextlib.contextmanager
def preserve_globals() -> Iterator[None]:
    """Put random states, grad mode, default dtype and the fused-attention switch back on leaving."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    dtype, fused = torch.get_default_dtype(), torch.backends.mha.get_fastpath_enabled()
    try:
        with (
            preserve_rng(),
            torch.inference_mode(False),
            torch.enable_grad(),
            disable_tf32(),
            _recomputed_without_reentry(),
        ):
            torch.backends.mha.set_fastpath_enabled(False)
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_default_dtype(dtype)
        torch.backends.mha.set_fastpath_enabled(fused)


@contextlib.contextmanager
def _recomputed_without_reentry() -> Iterator[None]:
    """Let gradient checkpointing that is reentrant run as that which is not.

    Reentrant checkpointing refuses `torch.autograd.grad` and drops gradients where no input requires one.
    The values are the same.
    """
    reentrant = torch.utils.checkpoint.CheckpointFunction
    try:
        torch.utils.checkpoint.CheckpointFunction = _Checkpoint  # type: ignore[misc, assignment]
        yield
    finally:
        torch.utils.checkpoint.CheckpointFunction = reentrant  # type: ignore[misc]


class _Checkpoint:
    """What stands in the place of reentrant checkpointing."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        return torch.utils.checkpoint.checkpoint(
            function, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state
        )


@contextlib.contextmanager
def preserve_registry(model: nn.Module) -> Iterator[None]:
    """Put every module's own parameters and buffers back on leaving."""
    # Of a dict, what TorchScript modules keep these in has only `items` and item access.
    owners: list[Any] = [own for module in model.modules() for own in (module._parameters, module._buffers)]
    held = [(own, dict(own.items())) for own in owners]
    try:
        yield
    finally:
        for own, tensors in held:
            for name, tensor in tensors.items():
                if name not in own or own[name] is not tensor:
                    own[name] = tensor


@contextlib.contextmanager
def _preserved_model(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    # The very storage is kept, and filled again: a state_dict that the user took shares it.
    saved = [(tensor, tensor.data, tensor.detach().clone()) for tensor in (*model.parameters(), *model.buffers())]
    grads = [(parameter, parameter.grad) for parameter in model.parameters()]
    hooks = [(module, copy.copy(module._forward_hooks)) for module in model.modules()]
    try:
        for parameter, _ in grads:
            parameter.grad = None
        with preserve_registry(model):
            yield
    finally:
        with torch.no_grad():
            for tensor, storage, values in saved:
                tensor.data = storage.copy_(values)
        for parameter, grad in grads:
            parameter.grad = grad
        for module, training in modes:
            module.training = training
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, registered in hooks:
            assert list(module._forward_hooks) == list(registered)
