"""The installed FAISS, and the GPUs that it can use."""

from __future__ import annotations

import functools
import os
import threading
from dataclasses import dataclass, field
from functools import cached_property
from types import ModuleType
from typing import TYPE_CHECKING, Any

from tracin_ann.device.memory import free_memory_bytes
from tracin_ann.errors import MissingPackageError, problem

if TYPE_CHECKING:
    import torch

_FAISS_PACKAGES = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cuvs")


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
