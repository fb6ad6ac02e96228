"""Free memory of a device."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


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
