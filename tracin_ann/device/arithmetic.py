"""Settings of the process on which results depend: precision, kernels and random state, restored after a block."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


@contextlib.contextmanager
def preserve_rng() -> Iterator[None]:
    """Restore torch's random state (CPU and every GPU) when the block ends."""
    import torch

    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_available() else []):
        yield


class _SharedSettings:
    """Settings of the process that are changed while at least one thread is in a block; then they are as before.

    If each thread restored them, one would restore what another has set.

    Args:
        change: a context manager that changes the settings and restores them.
    """

    def __init__(self, change: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
        self._change, self._lock, self._count = change, threading.Lock(), 0
        self._changed = contextlib.ExitStack()

    @contextlib.contextmanager
    def apply(self) -> Iterator[None]:
        """Change the settings in the block."""
        with self._lock:
            if self._count == 0:
                self._changed.enter_context(self._change())
            self._count += 1
        try:
            yield
        finally:
            with self._lock:
                self._count -= 1
                if self._count == 0:
                    self._changed.close()


def disable_tf32() -> contextlib.AbstractContextManager[None]:
    """Compute float32 matrix products, convolutions and recurrent layers in full precision in the block.

    TF32 and bfloat16 are turned off for them, on GPUs and CPUs, and cuDNN's benchmark mode, which chooses algorithms by
    measured times. Threads may enter such blocks at the same time. The settings are restored at the end, also those of
    `fp32_precision` of PyTorch 2.9.
    """
    return _full_precision.apply()


@contextlib.contextmanager
def _set_full_precision() -> Iterator[None]:
    import torch

    with contextlib.ExitStack() as restored:
        for owner in _list_fp32_precisions():
            restored.callback(_restore_fp32_precision, owner, owner.fp32_precision)
        cudnn = torch.backends.cudnn
        restored.callback(setattr, cudnn, "benchmark", cudnn.benchmark)
        cudnn.benchmark = False
        # The older functions fail if the task has used `fp32_precision` for some kinds of operators.
        with contextlib.suppress(RuntimeError):
            restored.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        with contextlib.suppress(RuntimeError):
            restored.callback(setattr, cudnn, "allow_tf32", cudnn.allow_tf32)
        torch.set_float32_matmul_precision("highest")
        cudnn.allow_tf32 = False
        for owner in _list_fp32_precisions():
            # Only then: the getters of the older functions, which models call, fail if kinds of operators differ.
            if owner.fp32_precision not in _FULL_PRECISION:
                owner.fp32_precision = "ieee"
        yield


_FULL_PRECISION = ("none", "ieee")
_full_precision = _SharedSettings(_set_full_precision)


def _list_fp32_precisions() -> list[Any]:
    """Return the objects whose attribute `fp32_precision` sets the precision of some operators; none before 2.9."""
    import torch

    backends: Any = torch.backends
    if not hasattr(backends.cuda.matmul, "fp32_precision"):
        return []
    matmuls = [backends.cuda.matmul, backends.mkldnn.matmul]
    return [*matmuls, backends.cudnn.conv, backends.cudnn.rnn, backends.mkldnn.conv, backends.mkldnn.rnn]


def _restore_fp32_precision(owner: Any, before: str) -> None:
    # "none" takes the setting of a group of operators, which the task may change later.
    owner.fp32_precision = "none"
    if owner.fp32_precision != before:
        owner.fp32_precision = before


class _CudnnPause:
    """cuDNN is off while at least one thread is between `begin` and `end`; then it is as before."""

    def __init__(self) -> None:
        self._lock, self._count, self._before = threading.Lock(), 0, True

    def begin(self, *_: object) -> None:
        """Turn cuDNN off."""
        import torch

        with self._lock:
            if self._count == 0:
                self._before = torch.backends.cudnn.enabled
                torch.backends.cudnn.enabled = False
            self._count += 1

    def end(self, *_: object) -> None:
        """Turn cuDNN on again if no other thread needs it off."""
        import torch

        with self._lock:
            self._count -= 1
            if self._count == 0:
                torch.backends.cudnn.enabled = self._before


_cudnn_pause = _CudnnPause()


@contextlib.contextmanager
def run_rnns_without_cudnn(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Run recurrent layers among the modules without cuDNN in the block.

    cuDNN differentiates them in train mode only, and neither twice nor in forward mode. PyTorch's own kernels support
    all of these, as on a CPU.
    """
    from torch.nn import RNNBase

    with contextlib.ExitStack() as hooks:
        for module in modules:
            if isinstance(module, RNNBase):
                hooks.callback(module.register_forward_pre_hook(_cudnn_pause.begin).remove)
                hooks.callback(module.register_forward_hook(_cudnn_pause.end, always_call=True).remove)
        yield
