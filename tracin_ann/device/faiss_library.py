"""The installed FAISS, and the GPUs that it can use."""

from __future__ import annotations

import functools
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from tracin_ann.device.memory import free_memory_bytes
from tracin_ann.errors import MissingPackageError, problem

if TYPE_CHECKING:
    import torch

_FAISS_PACKAGES = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cuvs")
_OPENBLAS_CORE = "OPENBLAS_CORETYPE"
_CORES = {
    ("GenuineIntel", "AVX512"): "SKYLAKEX",
    ("GenuineIntel", "AVX2"): "HASWELL",
    ("AuthenticAMD", "AVX512"): "ZEN",
    ("AuthenticAMD", "AVX2"): "ZEN",
}
"""By vendor and vector instructions: the name of the processor for OpenBLAS."""


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
        with _name_processor():
            import faiss  # noqa: PLC0415 - optional package, imported only here
    except ImportError as error:
        raise _missing_faiss() from error
    if not hasattr(faiss, "IndexFlatIP"):
        raise _missing_faiss()
    _use_one_thread_after_fork(faiss)
    return faiss


@contextmanager
def _name_processor() -> Iterator[None]:
    """Name a known processor for the OpenBLAS that FAISS's package contains, unless the user names one.

    It is of 2021, and multiplies matrices on processors that it does not know, such as Intel's since 2023, by
    instructions of 2004, at a quarter of the speed. The name is that of the kernels of a known processor with the same
    instructions, which OpenBLAS chooses for those that it knows.
    """
    name = _CORES.get((_read_vendor(), _read_instructions()))
    if name is None or _OPENBLAS_CORE in os.environ:
        yield
        return
    os.environ[_OPENBLAS_CORE] = name
    try:
        yield
    finally:
        # Not for other copies of OpenBLAS, such as SciPy's, which know more processors.
        del os.environ[_OPENBLAS_CORE]


def _read_vendor() -> str:
    """Return the vendor of the processor; "" if Linux does not tell it."""
    try:
        found = re.search(r"^vendor_id\s*:\s*(\S+)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return ""
    return found[1] if found else ""


def _read_instructions() -> str:
    """Return the vector instructions that PyTorch uses, such as AVX512."""
    import torch

    return torch.backends.cpu.get_cpu_capability()


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
