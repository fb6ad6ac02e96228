"""The one seam to accelerators: which device torch computes on, which FAISS is installed.

This is the only module that may name an accelerator's API. Devices are resolved once, at the
edge (`resolve_device`), and passed down as `torch.device`. torch is imported where it is used: commands read
the names of devices for their `--help`, which is not to wait for it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from tracin_ann.errors import MissingPackageError, UsageError, problem

if TYPE_CHECKING:
    import torch

DEVICES = ("auto", "cpu", "cuda")
DEVICE_NAMES = "auto, cpu, cuda or cuda:N"
_FAISS_WHEELS = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cuvs")


def resolve_device(name: str = "auto") -> torch.device:
    """Return the device for a name: `auto` (GPU where there is one), `cpu`, `cuda`, `cuda:1`.

    Raises:
        UsageError: the name is no device, or that device is not on this machine.
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
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise UsageError(
                problem(
                    "no such GPU",
                    got=repr(name),
                    expected=f"one of the {count} that torch sees",
                    remedy="use --device cpu",
                )
            )
    return device


def device_name(device: torch.device) -> str:
    """Return a name for people: the GPU's model, or the number of CPU threads."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def devices() -> list[torch.device]:
    """Return the kinds of device on this machine, the CPU first."""
    import torch

    return [torch.device("cpu")] + ([torch.device("cuda")] if torch.cuda.is_available() else [])


def free_memory_bytes(device: torch.device) -> int:
    """Return the bytes now free on the device."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min(_available_bytes(), container_memory_bytes())


def _available_bytes() -> int:
    """Return what the machine can give without swapping: on Linux, what it keeps of files counts as free."""
    with contextlib.suppress(OSError, KeyError, ValueError):
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    return int(os.sysconf("SC_AVPHYS_PAGES")) * int(os.sysconf("SC_PAGE_SIZE"))


def container_memory_bytes(group: Path = Path("/sys/fs/cgroup")) -> int:
    """Return what a container may still take by its control group (version 2), or more than any machine has.

    What it keeps of files that nobody reads at the moment counts as free.
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
    """Return what waits until all work launched on the device so far is done; on a CPU it is."""
    import torch

    if device.type != "cuda":
        return lambda: None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event.synchronize


def refuse_slow_bf16(device: torch.device) -> None:
    """Refuse bfloat16 where it is emulated and so slower than float32.

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
    """Put torch's random state (CPU and every GPU) back as it was on leaving."""
    import torch

    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_available() else []):
        yield


@contextlib.contextmanager
def allow_recurrent_backward() -> Iterator[None]:
    """Let recurrent layers in eval mode run backward: cuDNN's kernels refuse, torch's own do not."""
    import torch

    with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
        yield


@functools.cache
def import_faiss() -> ModuleType:
    """Return the `faiss` module, or say which package is missing or which two collide.

    Raises:
        MissingPackageError: no FAISS wheel is installed, or more than one (all own the module
            `faiss`: the later install wins, and removing one leaves an empty module).
    """
    found = [name for name in _FAISS_WHEELS if _installed(name)]
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
        raise _no_faiss() from error
    if not hasattr(faiss, "IndexFlatIP"):
        raise _no_faiss()
    _single_threaded_after_fork(faiss)
    return faiss


@functools.cache
def _single_threaded_after_fork(faiss: ModuleType) -> None:
    """Let forked processes search and multiply in one thread: this one's threads are gone there, and waited for."""
    import torch

    def alone() -> None:
        faiss.omp_set_num_threads(1)
        torch.set_num_threads(1)

    os.register_at_fork(after_in_child=alone)


def faiss_gpu_resources(device: torch.device) -> Any | None:
    """Return FAISS GPU resources for the device, or None where FAISS has no GPU or the device is a CPU."""
    if device.type != "cuda":
        return None
    faiss = import_faiss()
    if not hasattr(faiss, "StandardGpuResources") or faiss.get_num_gpus() == 0:
        return None
    return faiss.StandardGpuResources()


def _installed(wheel: str) -> bool:
    try:
        importlib.metadata.version(wheel)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _no_faiss() -> MissingPackageError:
    return MissingPackageError(
        problem(
            "FAISS is not installed",
            got="no working module faiss",
            expected="one of the packages " + ", ".join(_FAISS_WHEELS),
            remedy="pip install 'tracin-ann[cpu]' (or 'tracin-ann[gpu]' on Linux with an NVIDIA GPU)",
        )
    )
