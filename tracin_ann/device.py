"""Compute devices: choice of the torch device, free memory, device-specific settings, and the installed FAISS.

No other module names an accelerator's API. A device is resolved once, in the command or function that a user calls
(`resolve_device`), and passed down as `torch.device`. torch and importlib.metadata are imported inside functions, so
that `--help`, which lists the names of devices, does not wait for them.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from tracin_ann.errors import MissingPackageError, UsageError, problem

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch
    from torch import Tensor, nn

T = TypeVar("T")

DEVICES = ("auto", "cpu", "cuda")
DEVICE_NAMES = "auto, cpu, cuda or cuda:N"
_FAISS_PACKAGES = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cuvs")


def resolve_device(name: str = "auto") -> torch.device:
    """Return the device for a name: `auto` (GPU where there is one), `cpu`, `cuda`, `cuda:1`.

    Raises:
        UsageError: the name is not a device, or the machine does not have that device.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(
            problem("unknown device", got=repr(name), expected=DEVICE_NAMES, remedy="change --device")
        ) from error
    if device.type not in DEVICES or (device.type == "cpu" and device.index is not None):
        raise UsageError(problem("unknown device", got=repr(name), expected=DEVICE_NAMES, remedy="change --device"))
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            seen = f"cuda:0 to cuda:{count - 1}" if count else "a GPU, but torch sees none"
            raise UsageError(problem("no such GPU", got=repr(name), expected=seen, remedy="use --device cpu"))
    return device


def split_devices(names: str) -> tuple[str, ...]:
    """Return the names of a list such as `cuda:0,cuda:1`; for `all`, the names of all GPUs.

    Raises:
        UsageError: a name is not a device, the machine does not have that device, or it has no GPU at all.
    """
    import torch

    if names == "all":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            raise UsageError(
                problem("--device all", got="no GPU that torch sees", expected="one or more", remedy="use --device cpu")
            )
        return tuple(f"cuda:{i}" for i in range(count))
    found = tuple(name.strip() for name in names.split(","))
    for name in found:
        resolve_device(name)
    return found


def find_local_device(environment: Mapping[str, str] = os.environ) -> str:
    """Return the name of the GPU of this process if `torchrun` has started it and there are GPUs, otherwise `auto`."""
    import torch

    rank = environment.get("LOCAL_RANK", "")
    if not rank.isdecimal() or not torch.cuda.is_available():
        return "auto"
    # Some schedulers let each process see its own GPU only.
    return f"cuda:{int(rank) % torch.cuda.device_count()}"


def device_name(device: torch.device) -> str:
    """Return a name to display: the GPU's model, or the number of CPU threads."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def free_memory_bytes(device: torch.device) -> int:
    """Return the number of bytes that are free on the device now."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min(_available_bytes(), container_memory_bytes())


def _available_bytes() -> int:
    """Return the bytes of main memory available without swapping; on Linux, the page cache counts as free."""
    with contextlib.suppress(OSError, KeyError, ValueError):
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    return int(os.sysconf("SC_AVPHYS_PAGES")) * int(os.sysconf("SC_PAGE_SIZE"))


def container_memory_bytes(group: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the bytes left under the memory limit of the control group (version 2), or `sys.maxsize` without a limit.

    The inactive page cache counts as free.
    """
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        if limit == "max":
            return sys.maxsize
        cached = 0
        with contextlib.suppress(OSError, KeyError):
            counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            cached = int(counts["inactive_file"])
        return max(0, int(limit) - max(0, int(used) - cached))
    except (OSError, ValueError):
        return sys.maxsize


def record_event(device: torch.device) -> Callable[[], None]:
    """Return a function that waits for all work launched on the device so far; on a CPU it returns at once."""
    import torch

    if device.type != "cuda":
        return lambda: None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event.synchronize


class Streams(Protocol):
    """The streams of a device: queues of work that run beside each other; one of them is current in a thread."""

    def open(self) -> Any:
        """Return a new stream."""

    def current(self) -> Any:
        """Return the current stream, in which models compute."""

    def use(self, stream: Any) -> contextlib.AbstractContextManager[Any]:
        """Make a stream the current one in a block."""

    def record(self, stream: Any) -> Any:
        """Return an event that occurs when the work that the stream has now is done."""

    def delay(self, stream: Any, event: Any) -> None:
        """Let the work that is added to the stream from now on begin after the event."""

    def wait(self, event: Any) -> None:
        """Wait in this thread until the event has occurred."""

    def keep(self, tensor: Tensor, stream: Any) -> None:
        """Keep the memory of a tensor, once it is unused here, until the stream has done the work that it has then."""

    def pin(self, tensor: Tensor) -> Tensor:
        """Return a copy in page-locked memory; only copies from and to such memory run beside computation."""

    def copy_to_host(self, tensor: Tensor) -> Tensor:
        """Start to copy a tensor to page-locked memory, in the current stream."""


class _GpuStreams:
    """The streams of a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def open(self) -> Any:
        import torch

        return torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def current(self) -> Any:
        import torch

        return torch.cuda.current_stream(self._device)

    def use(self, stream: Any) -> contextlib.AbstractContextManager[Any]:
        import torch

        return torch.cuda.stream(stream)

    def record(self, stream: Any) -> Any:
        return stream.record_event()

    def delay(self, stream: Any, event: Any) -> None:
        stream.wait_event(event)

    def wait(self, event: Any) -> None:
        event.synchronize()

    def keep(self, tensor: Tensor, stream: Any) -> None:
        import torch

        if tensor.device.type == self._device.type and tensor.layout is torch.strided:
            tensor.record_stream(stream)

    def pin(self, tensor: Tensor) -> Tensor:
        import torch

        # Not `pin_memory`: for page-locked memory it returns the tensor itself, which the task may overwrite.
        return torch.empty_like(tensor, pin_memory=True).copy_(tensor)

    def copy_to_host(self, tensor: Tensor) -> Tensor:
        import torch

        return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)


@dataclass(frozen=True)
class Sent(Generic[T]):
    """A value whose copy to a device has begun; `DeviceCopies.receive` returns it.

    Attributes:
        value: on the device.
        tensors: the tensors of the value.
        event: when the copy is complete; None: it is.
    """

    value: T
    tensors: tuple[Tensor, ...] = ()
    event: Any = None


@dataclass(frozen=True)
class Fetched:
    """Tensors whose copy to main memory has begun.

    Attributes:
        host: the tensors in main memory, valid after `wait`.
        wait: blocks until the copy is complete, and with it all work that was launched before the copy.
    """

    host: tuple[Tensor, ...]
    wait: Callable[[], None]


class DeviceCopies:
    """Copies of batches to a device, and of results from it.

    With streams, copies run beside the computation: batches in one stream, results in another. No function waits for
    the device, except `Fetched.wait`. Without streams, everything runs at once.

    Args:
        streams: the streams of the device; None for a device without streams, such as a CPU.

    Attributes:
        n_ahead: how many batches to send before a batch is computed, and to compute before its results are fetched.
    """

    def __init__(self, streams: Streams | None) -> None:
        self._streams = streams
        self.n_ahead = 0 if streams is None else 1
        self._lanes = None if streams is None else (streams.open(), streams.open())

    def pin(self, tensor: Tensor) -> Tensor:
        """Return a copy of a dense CPU tensor in page-locked memory, if the device copies beside computation."""
        import torch

        is_dense = type(tensor) is torch.Tensor and tensor.layout is torch.strided and not tensor.is_nested
        if self._streams is None or tensor.device.type != "cpu" or not is_dense:
            return tensor
        return self._streams.pin(tensor)

    def send(
        self, copy: Callable[[], T], find_tensors: Callable[[T], Iterable[Tensor]], *, after: bool = False
    ) -> Sent[T]:
        """Start a copy to the device.

        Args:
            copy: returns the value on the device; its sources are in page-locked memory, see `pin`.
            find_tensors: value -> its tensors.
            after: begin after the work that is launched now, because the source is on the device already.
        """
        if self._streams is None or self._lanes is None:
            return Sent(copy())
        lane = self._lanes[0]
        if after:
            self._streams.delay(lane, self._streams.record(self._streams.current()))
        with self._streams.use(lane):
            value = copy()
        return Sent(value, tuple(find_tensors(value)), self._streams.record(lane))

    def receive(self, sent: Sent[T]) -> T:
        """Return a value for work that is launched from now on, in the current stream; this work waits for the copy."""
        if self._streams is not None and sent.event is not None:
            current = self._streams.current()
            self._streams.delay(current, sent.event)
            for tensor in sent.tensors:
                self._streams.keep(tensor, current)
        return sent.value

    def fetch(self, tensors: Sequence[Tensor]) -> Fetched:
        """Start to copy results of the work that is launched now to main memory."""
        if self._streams is None or self._lanes is None:
            return Fetched(tuple(tensor.cpu() for tensor in tensors), lambda: None)
        lane = self._lanes[1]
        self._streams.delay(lane, self._streams.record(self._streams.current()))
        with self._streams.use(lane):
            host = tuple(self._streams.copy_to_host(tensor) for tensor in tensors)
        for tensor in tensors:
            self._streams.keep(tensor, lane)
        return Fetched(host, functools.partial(self._streams.wait, self._streams.record(lane)))


def make_copies(device: torch.device) -> DeviceCopies:
    """Return the copies to and from a device."""
    return DeviceCopies(_GpuStreams(device) if device.type == "cuda" else None)


def array_to_device(values: npt.NDArray[Any], device: torch.device) -> Tensor:
    """Return an array as a tensor on a device; a GPU copies it without a wait for the work that is launched."""
    import torch

    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def require_native_bf16(device: torch.device) -> None:
    """Raise an error if bfloat16 is emulated on the device, which is slower than float32.

    Raises:
        UsageError: the device has no bfloat16 arithmetic.
    """
    import torch

    native = torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if not native:
        raise UsageError(
            problem(
                "bf16 would be slower than fp32 here",
                got=f"{device_name(device)} without bfloat16 arithmetic",
                expected="a GPU or CPU that has it",
                remedy="use --precision fp32",
            )
        )


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


@functools.cache
def import_faiss() -> ModuleType:
    """Return the `faiss` module.

    Raises:
        MissingPackageError: no FAISS package is installed, or more than one. All of them provide the module
            `faiss`: the last one installed overwrites the others, and removing one leaves an empty module.
    """
    found = [name for name in _FAISS_PACKAGES if _is_installed(name)]
    if len(found) > 1:
        raise MissingPackageError(
            problem(
                "several FAISS packages share one module",
                got=" and ".join(found),
                expected="exactly one",
                remedy=f"pip uninstall -y {' '.join(found)} and then pip install one of them",
            )
        )
    try:
        import faiss  # noqa: PLC0415 - optional package, imported only here
    except ImportError as error:
        raise _missing_faiss() from error
    if not hasattr(faiss, "IndexFlatIP"):
        raise _missing_faiss()
    _use_one_thread_after_fork(faiss)
    return faiss


@functools.cache
def _use_one_thread_after_fork(faiss: ModuleType) -> None:
    """Make FAISS and torch single-threaded in forked processes, which would wait forever for the parent's threads."""
    import torch

    def limit_threads() -> None:
        faiss.omp_set_num_threads(1)
        torch.set_num_threads(1)

    os.register_at_fork(after_in_child=limit_threads)


@dataclass(frozen=True)
class Gpu:
    """A GPU in whose memory FAISS can search. FAISS and PyTorch number GPUs in the same way.

    Attributes:
        number: of the GPU.
        lock: for `resources`, which one thread can use at a time.
    """

    number: int
    lock: threading.Lock = field(default_factory=threading.Lock, compare=False)

    @property
    def device(self) -> torch.device:
        """Return PyTorch's device."""
        import torch

        return torch.device("cuda", self.number)

    @property
    def free_bytes(self) -> int:
        """Return the bytes that are free in its memory now."""
        return free_memory_bytes(self.device)

    @cached_property
    def resources(self) -> Any:
        """Return FAISS's streams and temporary memory on it, allocated at the first use."""
        return import_faiss().StandardGpuResources()


@functools.cache
def list_gpus(device: torch.device) -> tuple[Gpu, ...]:
    """Return the GPUs that FAISS can use for a device: for `cuda`, all of them.

    There are none for a CPU and for FAISS without GPU indexes. The same objects are returned for the same device.
    """
    faiss = import_faiss()
    if device.type != "cuda" or not hasattr(faiss, "StandardGpuResources"):
        return ()
    numbers = range(faiss.get_num_gpus()) if device.index is None else [device.index]
    return tuple(_get_gpu(number) for number in numbers)


@functools.cache
def _get_gpu(number: int) -> Gpu:
    return Gpu(number)


def _is_installed(package: str) -> bool:
    import importlib.metadata

    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _missing_faiss() -> MissingPackageError:
    return MissingPackageError(
        problem(
            "FAISS is not installed",
            got="no usable module faiss",
            expected="one of the packages " + ", ".join(_FAISS_PACKAGES),
            remedy="pip install 'tracin-ann[cpu]' (or 'tracin-ann[gpu]' on Linux with an NVIDIA GPU)",
        )
    )
