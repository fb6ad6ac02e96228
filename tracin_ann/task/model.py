"""The user's model in eval mode on a device, and the restoration of it and of global state afterwards."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from tracin_ann.device import disable_tf32, preserve_rng
from tracin_ann.errors import TaskError, problem
from tracin_ann.task.task import Task


def make_model(task: Task) -> nn.Module:
    """Return `task.model()`.

    Raises:
        TaskError: `task.model` does not return a module, or one with uninitialized lazy layers.
    """
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
    return model


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
    saved = [(registry, dict(registry.items())) for registry in find_registries(model)]
    try:
        yield
    finally:
        _restore_registries(saved)


def find_registries(model: nn.Module) -> list[Any]:
    """Return the dicts in which the modules of a model hold their parameters and buffers."""
    # TorchScript modules store these in objects that have only `items` and item access of a dict.
    return [owned for module in model.modules() for owned in (module._parameters, module._buffers)]


def _restore_registries(saved: Sequence[tuple[Any, dict[str, Any]]]) -> None:
    for registry, tensors in saved:
        for name, tensor in tensors.items():
            if name not in registry or registry[name] is not tensor:
                registry[name] = tensor


class OriginalModel:
    """The state of a user's model when it was borrowed.

    The model's tensors may be given other memory (`tensor.data = ...`) without preparation. `prepare_overwrite` is
    called before something writes into their memory, because a state_dict that the user took shares it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._registries = [(registry, dict(registry.items())) for registry in find_registries(model)]
        self._memory = [(tensor, tensor.data) for tensor in (*model.parameters(), *model.buffers())]
        self._values: list[Tensor] | None = None

    def prepare_overwrite(self, device: torch.device) -> None:
        """Copy the values of the original tensors, which are in the model, and move the model to the device."""
        if self._values is None:
            self._values = [memory.detach().clone() for _, memory in self._memory]
        # Tensors on the meta device have no data to move. A checkpoint fills them, and its loader moves the model.
        if not any(memory.is_meta for _, memory in self._memory):
            self._model.to(device)

    def attach(self) -> None:
        """Put the original tensors with their own memory into the model."""
        _restore_registries(self._registries)
        for tensor, memory in self._memory:
            tensor.data = memory

    def restore(self) -> None:
        """Put the original tensors with their original values into the model."""
        _restore_registries(self._registries)
        with torch.no_grad():
            for place, (tensor, memory) in enumerate(self._memory):
                # The same memory is filled again, because a state_dict that the user took shares it.
                tensor.data = memory if self._values is None else memory.copy_(self._values[place])


@contextlib.contextmanager
def preserve_model(model: nn.Module) -> Iterator[OriginalModel]:
    """Put a model into eval mode, and restore it when the block ends.

    Restored are weights, buffers, grads, modes, requires_grad flags and device: the user's function may return an
    object that the user still uses.
    """
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    grads = [(parameter, parameter.grad) for parameter in model.parameters()]
    hooks = [(module, copy.copy(module._forward_hooks)) for module in model.modules()]
    original = OriginalModel(model)
    try:
        for parameter, grad in grads:
            if grad is not None:
                parameter.grad = None
        model.eval()
        yield original
    finally:
        original.restore()
        for parameter, grad in grads:
            parameter.grad = grad
        for module, training in modes:
            module.training = training
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, registered in hooks:
            assert list(module._forward_hooks) == list(registered)
