"""Choice of the torch device by its name, and what a device can do."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from tracin_ann.errors import UsageError, problem

if TYPE_CHECKING:
    import torch

DEVICES = ("auto", "cpu", "cuda")
DEVICE_NAMES = "auto, cpu, cuda or cuda:N"


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
