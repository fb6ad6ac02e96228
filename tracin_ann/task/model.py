"""The user's model in eval mode on a device, and the restoration of it and of global state afterwards."""

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
    """Yield `task.model()` in eval mode on `device`, and restore the model and global state when the block ends.

    A model with a part on the meta device is not moved. Restored are the model's weights, buffers, grads, modes,
    requires_grad flags and device (the user's function may return an object that the user still uses), the random
    state of torch, numpy and Python, grad mode, default dtype, and PyTorch's setting for fused attention.

    Raises:
        TaskError: `task.model` does not return a module, or one with uninitialized lazy layers.
    """
    with preserve_globals():
        model = task.model()
        if not isinstance(model, nn.Module):
            raise TaskError(
                problem(
                    "Task.model does not return a model",
                    got=type(model).__name__,
                    expected="a torch.nn.Module",
                    remedy="return the module itself",
                )
            )
        _reject_lazy_layers(model)
        with _preserve_model(model):
            model.eval()
            # Tensors on the meta device have no data to move. A checkpoint fills them, and its loader moves the model.
            if not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
                model.to(device)
            yield model


def _reject_lazy_layers(model: nn.Module) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise TaskError(
                problem(
                    "Task.model returns a model with unknown parameter shapes",
                    got=f"an uninitialized {name}",
                    expected="a model whose lazy layers are initialized",
                    remedy="run one forward pass in Task.model, or use layers with explicit sizes",
                )
            )


@contextlib.contextmanager
def preserve_globals() -> Iterator[None]:
    """Restore random states, grad mode, default dtype and the fused-attention setting when the block ends."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    dtype, fused = torch.get_default_dtype(), torch.backends.mha.get_fastpath_enabled()
    try:
        with (
            preserve_rng(),
            torch.inference_mode(False),
            torch.enable_grad(),
            disable_tf32(),
            _disable_reentrant_checkpointing(),
        ):
            torch.backends.mha.set_fastpath_enabled(False)
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_default_dtype(dtype)
        torch.backends.mha.set_fastpath_enabled(fused)


@contextlib.contextmanager
def _disable_reentrant_checkpointing() -> Iterator[None]:
    """Run reentrant gradient checkpointing as non-reentrant checkpointing in the block.

    Reentrant checkpointing raises an error in `torch.autograd.grad` and drops gradients if no input requires one.
    The values are the same.
    """
    reentrant = torch.utils.checkpoint.CheckpointFunction
    try:
        torch.utils.checkpoint.CheckpointFunction = _NonReentrantCheckpoint  # type: ignore[misc, assignment]
        yield
    finally:
        torch.utils.checkpoint.CheckpointFunction = reentrant  # type: ignore[misc]


class _NonReentrantCheckpoint:
    """Replacement for `torch.utils.checkpoint.CheckpointFunction`."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        return torch.utils.checkpoint.checkpoint(
            function, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state
        )


@contextlib.contextmanager
def preserve_registry(model: nn.Module) -> Iterator[None]:
    """Restore the parameters and buffers registered in every module when the block ends."""
    # TorchScript modules store these in objects that have only `items` and item access of a dict.
    registries: list[Any] = [owned for module in model.modules() for owned in (module._parameters, module._buffers)]
    saved = [(registry, dict(registry.items())) for registry in registries]
    try:
        yield
    finally:
        for registry, tensors in saved:
            for name, tensor in tensors.items():
                if name not in registry or registry[name] is not tensor:
                    registry[name] = tensor


@contextlib.contextmanager
def _preserve_model(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    # The same storage is filled again, because a state_dict that the user took shares it.
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
