"""The baseline of the speed benchmarks: forward and backward in batches, as in training."""

from __future__ import annotations

import time

import torch

from benchmarks.common.models import Model
from tracin_ann.device import disable_tf32

CPU = torch.device("cpu")


def time_plain_step(
    model: Model, rows: list, size: int, *, channels_last: bool = False, device: torch.device = CPU
) -> float:
    """Return the seconds per row of batched forward and backward, with loading and collating, in full float32."""
    module = model.make().eval().to(device)
    if channels_last:
        module = module.to(memory_format=torch.channels_last)
    with disable_tf32():
        start_s = time.perf_counter()
        for start in range(0, len(rows), size):
            batch = torch.utils.data.default_collate(rows[start : start + size])
            if channels_last:
                batch[0] = batch[0].contiguous(memory_format=torch.channels_last)
            if device != CPU:
                batch = [part.to(device) for part in batch]
            module.zero_grad()
            model.loss(module, batch).sum().backward()
        if device != CPU:
            torch.accelerator.synchronize()
        return (time.perf_counter() - start_s) / len(rows)
