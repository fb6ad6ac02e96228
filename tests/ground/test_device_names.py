"""Names of devices: those that exist, and errors for others."""

from __future__ import annotations

import pytest
import torch

from tracin_ann.device import resolve_device, split_devices
from tracin_ann.errors import UsageError


@pytest.mark.parametrize("name", ["", "gpu", "cuda:x", "mps", "meta", "xpu", "cpu:0", "cpu:3"])
def test_other_devices_than_cpu_and_gpus_are_rejected(name: str) -> None:
    """PyTorch has names of devices on which float64 or copies to the CPU are missing."""
    with pytest.raises(UsageError, match=rf"unknown device: got '{name}', expected auto, cpu, cuda or cuda:N; change"):
        resolve_device(name)


def test_a_gpu_that_is_missing_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="no such GPU: got 'cuda', expected a GPU, but torch sees none; use --device"):
        resolve_device("cuda")
    with pytest.raises(UsageError, match="--device all: got no GPU that torch sees"):
        split_devices("all")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(UsageError, match="no such GPU: got 'cuda:2', expected cuda:0 to cuda:1; use --device cpu"):
        resolve_device("cuda:2")
    assert split_devices("all") == ("cuda:0", "cuda:1")
    assert split_devices("cuda:1, cpu") == ("cuda:1", "cpu")


@pytest.mark.parametrize("names", ["all,cpu", "cpu,", ",", "cpu,mps"])
def test_a_list_with_another_name_is_rejected(names: str) -> None:
    with pytest.raises(UsageError, match="unknown device"):
        split_devices(names)
