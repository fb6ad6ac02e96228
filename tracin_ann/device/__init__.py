"""Compute devices: choice of the torch device, free memory, copies, settings of arithmetic, and the installed FAISS.

No other package names an accelerator's API. A device is resolved once, in the command or function that a user calls
(`resolve_device`), and passed down as `torch.device`. torch and importlib.metadata are imported inside functions, so
that `--help`, which lists the names of devices, does not wait for them.
"""

from tracin_ann.device.arithmetic import disable_tf32, preserve_rng, run_rnns_without_cudnn
from tracin_ann.device.choice import (
    DEVICE_NAMES,
    DEVICES,
    device_name,
    find_local_device,
    require_native_bf16,
    resolve_device,
    split_devices,
)
from tracin_ann.device.copies import (
    DeviceCopies,
    Fetched,
    Sent,
    Streams,
    array_to_device,
    make_copies,
    record_event,
)
from tracin_ann.device.faiss_library import Gpu, import_faiss, list_gpus
from tracin_ann.device.memory import container_memory_bytes, free_memory_bytes

__all__ = [
    "DEVICES",
    "DEVICE_NAMES",
    "DeviceCopies",
    "Fetched",
    "Gpu",
    "Sent",
    "Streams",
    "array_to_device",
    "container_memory_bytes",
    "device_name",
    "disable_tf32",
    "find_local_device",
    "free_memory_bytes",
    "import_faiss",
    "list_gpus",
    "make_copies",
    "preserve_rng",
    "record_event",
    "require_native_bf16",
    "resolve_device",
    "run_rnns_without_cudnn",
    "split_devices",
]
