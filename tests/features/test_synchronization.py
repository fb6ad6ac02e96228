"""Reads of the device during extraction: none per batch, because each waits for the kernels that are launched."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import models
from tasks.toy import make_toy_task, save_checkpoints
from tracin_ann.features import RunOptions, TaskRunner
from tracin_ann.features.extractor import FeatureExtractor, FeatureOptions
from tracin_ann.sketch import make_sketch

READS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "is_nonzero")
"""Operators whose result, or whose shape, is read by the CPU."""
METHODS = ("item", "tolist", "__bool__", "__int__", "__float__", "cpu")


class Reads(TorchDispatchMode):
    """Records the lines of the library that read the device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def note(self, what: str) -> None:
        own = [f for f in traceback.extract_stack() if "/tracin_ann/" in f.filename]
        self.found.append(f"{what}: {own[-1].filename}:{own[-1].lineno}" if own else what)

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operator.overloadpacket.__name__
        masks = [a for a in args[1] if a is not None and a.dtype == torch.bool] if name.startswith("index") else []
        if name in READS or (name in ("index", "index_put", "index_put_") and masks):
            self.note(name)
        return operator(*args, **(kwargs or {}))


@contextmanager
def record_reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Reads]:
    reads = Reads()
    with monkeypatch.context() as patch, reads:
        for name in METHODS:
            own = getattr(torch.Tensor, name)

            def read(tensor: torch.Tensor, *args: Any, own: Any = own, name: str = name) -> Any:
                reads.note(name)
                return own(tensor, *args)

            patch.setattr(torch.Tensor, name, read)
        yield reads


@pytest.mark.parametrize("case", ["mlp", "conv2d", "gpt", "attention", "places of a row"])
def test_no_batch_reads_the_device(case: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches 1, 4 and 16 after the verified one are checked, and each 64th; the batches between them are not."""
    model, chosen, rows = models.make_case(case, 0, 60)
    task = make_toy_task(
        tmp_path, model, loss=chosen.loss, train_data=lambda: rows, checkpoints=save_checkpoints(model, tmp_path)
    )
    # Batches run one ahead, as on a GPU.
    monkeypatch.setattr("tracin_ann.features.extractor._BATCHES_AHEAD", {})
    runner = TaskRunner(task, RunOptions(torch.device("cpu"), 4))
    with runner.model() as loaded:
        loaded.load(0)
        extractor = FeatureExtractor(loaded, FeatureOptions(make_sketch("factored", 32), 0, frozenset()))
        stream = extractor.stream("train", runner.read("train", range(60)))
        first = [next(stream) for _ in range(5)]
        with record_reads(monkeypatch) as reads:
            later = list(stream)
    assert (len(first), len(later)) == (5, 10)
    assert reads.found == []


def test_a_read_of_the_device_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    with record_reads(monkeypatch) as reads:
        values = torch.arange(3)
        assert bool(values[1] == 1)
        assert values[values > 1].tolist() == [2]
    assert reads.found == ["__bool__", "_local_scalar_dense", "index", "tolist"]


@pytest.mark.parametrize("case", ["mlp", "conv2d", "gpt"])
def test_an_accelerator_is_read_by_no_batch(case: str, device: torch.device, tmp_path: Any) -> None:
    """PyTorch raises an error for each synchronizing operation."""
    if device.type == "cpu":
        pytest.skip("reads of a CPU do not synchronize")
    model, chosen, rows = models.make_case(case, 0, 60)
    task = make_toy_task(
        tmp_path, model, loss=chosen.loss, train_data=lambda: rows, checkpoints=save_checkpoints(model, tmp_path)
    )
    runner = TaskRunner(task, RunOptions(device, 4))
    with runner.model() as loaded:
        loaded.load(0)
        extractor = FeatureExtractor(loaded, FeatureOptions(make_sketch("factored", 32), 0, frozenset()))
        stream = extractor.stream("train", runner.read("train", range(60)))
        for _ in range(5):
            next(stream)
        torch.cuda.set_sync_debug_mode("error")
        try:
            assert len(list(stream)) == 10  # noqa: PLR2004
        finally:
            torch.cuda.set_sync_debug_mode("default")
