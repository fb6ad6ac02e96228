"""The user's model in eval mode on a device, and the restoration of it and of global state afterwards."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from tracin_ann.device import disable_tf32, preserve_rng, run_rnns_without_cudnn
from tracin_ann.errors import TaskError, problem
from tracin_ann.task.state_dicts import named_tensors
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
    dtype = torch.get_default_dtype()
    try:
        with _change_settings_once(), preserve_rng(), torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_default_dtype(dtype)


_settings_lock = threading.Lock()
_n_blocks = 0
_settings = contextlib.ExitStack()


@contextlib.contextmanager
def _change_settings_once() -> Iterator[None]:
    """Change settings of the process when the first thread enters such a block, and restore them when the last leaves.

    If each thread restored them, one would restore what another has set.
    """
    global _n_blocks  # noqa: PLW0603 - the settings are those of the process
    with _settings_lock:
        if _n_blocks == 0:
            _settings.enter_context(_change_settings())
        _n_blocks += 1
    try:
        yield
    finally:
        with _settings_lock:
            _n_blocks -= 1
            if _n_blocks == 0:
                _settings.close()


@contextlib.contextmanager
def _change_settings() -> Iterator[None]:
    fused = torch.backends.mha.get_fastpath_enabled()
    try:
        with disable_tf32(), _disable_reentrant_checkpointing():
            torch.backends.mha.set_fastpath_enabled(False)
            yield
    finally:
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
    saved = _list_registered(model.modules())
    try:
        yield
    finally:
        _restore_registries(saved)


def find_registries(modules: Iterable[nn.Module]) -> list[Any]:
    """Return the dicts in which modules hold their parameters and buffers."""
    # TorchScript modules store these in objects that have only `items` and item access of a dict.
    return [owned for module in modules for owned in (module._parameters, module._buffers)]


def _list_registered(modules: Iterable[nn.Module]) -> list[tuple[Any, str, Tensor | None]]:
    """Return the dict, name and value of every registered parameter and buffer."""
    return [(registry, name, tensor) for registry in find_registries(modules) for name, tensor in registry.items()]


def _restore_registries(saved: Sequence[tuple[Any, str, Tensor | None]]) -> None:
    for registry, name, tensor in saved:
        if name not in registry or registry[name] is not tensor:
            registry[name] = tensor


class OriginalModel:
    """The state of a user's model when it was borrowed.

    The model's tensors may be given other memory (`tensor.data = ...`) without preparation. `prepare_overwrite` is
    called before something writes into their memory, because a state_dict that the user took shares it.

    Args:
        model: the model.
        modules: its modules.
        written: names of the tensors into whose memory something may write; None: all.
    """

    def __init__(self, model: nn.Module, modules: Sequence[nn.Module], written: Collection[str] | None = None) -> None:
        self._model = model
        self._registered = _list_registered(modules)
        tensors = {id(tensor): tensor for *_, tensor in self._registered if tensor is not None}
        named = {} if written is None else named_tensors(model)
        chosen = None if written is None else {id(named[name]) for name in written if name in named}
        self._memory = [(tensor, tensor.data) for tensor in tensors.values()]
        self._is_written = [chosen is None or key in chosen for key in tensors]
        self._values: list[Tensor | None] | None = None

    def prepare_overwrite(self, device: torch.device) -> None:
        """Copy the values of the original tensors, which are in the model, and move the model to the device."""
        if self._values is None:
            self._values = [
                memory.detach().clone() if is_written else None
                for (_, memory), is_written in zip(self._memory, self._is_written, strict=True)
            ]
        # Tensors on the meta device have no data to move. A checkpoint fills them, and its loader moves the model.
        if not any(memory.is_meta for _, memory in self._memory):
            self._model.to(device)

    def attach(self) -> None:
        """Put the original tensors with their own memory into the model."""
        _restore_registries(self._registered)
        for tensor, memory in self._memory:
            tensor.data = memory

    def restore(self) -> None:
        """Put the original tensors with their original values into the model."""
        _restore_registries(self._registered)
        with torch.no_grad():
            for place, (tensor, memory) in enumerate(self._memory):
                # The same memory is filled again, because a state_dict that the user took shares it.
                value = None if self._values is None else self._values[place]
                tensor.data = memory if value is None else memory.copy_(value)


@contextlib.contextmanager
def preserve_model(model: nn.Module, written: Collection[str] | None = None) -> Iterator[OriginalModel]:
    """Put a model into eval mode, and restore it when the block ends.

    Restored are weights, buffers, grads, modes, requires_grad flags and device: the user's function may return an
    object that the user still uses.

    Args:
        model: the model.
        written: names of the tensors into whose memory something may write in the block; None: all.
    """
    # Modules are listed once, and states without a tuple each: both take long in models of many layers.
    modules = list(model.modules())
    parameters = list({id(p): p for module in modules for _, p in module._parameters.items() if p is not None}.values())
    modes = [module.training for module in modules]
    hooks = [tuple(module._forward_hooks) for module in modules]
    flags = [parameter.requires_grad for parameter in parameters]
    grads = [parameter.grad for parameter in parameters]
    original = OriginalModel(model, modules, written)
    try:
        for parameter, grad in zip(parameters, grads, strict=True):
            if grad is not None:
                parameter.grad = None
        model.eval()
        with run_rnns_without_cudnn(modules):
            yield original
    finally:
        original.restore()
        for parameter, grad, flag in zip(parameters, grads, flags, strict=True):
            if parameter.grad is not grad:
                parameter.grad = grad
            if parameter.requires_grad is not flag:
                parameter.requires_grad_(flag)
        for module, training, registered in zip(modules, modes, hooks, strict=True):
            if module.training is not training:
                module.training = training
            assert tuple(module._forward_hooks) == registered
