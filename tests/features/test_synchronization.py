"""Reads of the device during extraction: none per batch, because each waits for the kernels that are launched."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import models
from recorded_streams import use_streams
from tasks.toy import make_toy_task, save_checkpoints
from tracin_ann.features import RunOptions, TaskRunner
from tracin_ann.features.extractor import FeatureExtractor, FeatureOptions
from tracin_ann.sketch import SKETCHES, ParameterKey, make_sketch

READS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "is_nonzero")
"""Operators whose result, or whose shape, is read by the CPU."""
METHODS = ("item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "cpu")
FACTORIES = ("from_numpy", "tensor", "as_tensor")
"""Functions whose result is in main memory, and would be copied to the device."""
BY_ROWS = {"flattened positions", "sequence first"}
"""Models whose rows are matched with examples in each batch: how many rows an example has is read from the device."""
READS_ITSELF = {"branching"}
"""Models whose own forward reads the device."""
N_CHECKED = 5
"""Batches until the first one that is not checked; see `_is_check_due` of the engine."""


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
        is_indexing = name in ("index", "index_put", "index_put_")
        if name in READS or (is_indexing and any(a is not None and a.dtype == torch.bool for a in args[1])):
            self.note(name)
        return operator(*args, **(kwargs or {}))


@contextmanager
def record_reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Reads]:
    """Record reads of tensors, except those of results that are in main memory."""
    reads = Reads()
    with monkeypatch.context() as patch, reads:
        for name in METHODS:
            own = getattr(torch.Tensor, name)

            def read(tensor: torch.Tensor, *args: Any, own: Any = own, name: str = name) -> Any:
                if sys._getframe(1).f_code.co_name not in ("_collect", "<genexpr>"):
                    reads.note(name)
                return own(tensor, *args)

            patch.setattr(torch.Tensor, name, read)
        for name in FACTORIES:
            make = getattr(torch, name)

            def create(*args: Any, make: Any = make, name: str = name, **kwargs: Any) -> Any:
                caller = sys._getframe(1)
                if "/tracin_ann/" in caller.f_code.co_filename and caller.f_code.co_name != "array_to_device":
                    reads.note(name)
                return make(*args, **kwargs)

            patch.setattr(torch, name, create)
        yield reads


def compute_rows(case: str, options: FeatureOptions, device: torch.device, folder: Any) -> Iterator[Any]:
    """Yield the rows of 15 batches of a model."""
    model, chosen, rows = models.make_case(case, 0, 60)
    task = make_toy_task(
        folder, model, loss=chosen.loss, train_data=lambda: rows, checkpoints=save_checkpoints(model, folder)
    )
    runner = TaskRunner(task, RunOptions(device, 4))
    with runner.model() as loaded:
        loaded.load(0)
        extractor = FeatureExtractor(loaded, options)
        yield from extractor.stream("train", list(runner.read("train", range(60))))


def make_options(sketch: str = "factored", norms: Any = "sketch") -> FeatureOptions:
    return FeatureOptions(make_sketch(sketch, 64), 0, frozenset(), norms)


def find_reads(case: str, options: FeatureOptions, monkeypatch: pytest.MonkeyPatch, folder: Any) -> list[str]:
    """Return the reads of batches that are not checked: batches 1, 4 and 16 after the verified one, and each 64th."""
    use_streams(monkeypatch)
    stream = compute_rows(case, options, torch.device("cpu"), folder)
    first = [next(stream) for _ in range(N_CHECKED)]
    with record_reads(monkeypatch) as reads:
        later = list(stream)
    assert (len(first), len(later)) == (5, 10)
    return reads.found


@pytest.mark.parametrize("case", models.CASES)
def test_no_batch_reads_the_device(case: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All layer rules, vmap(grad), forward mode, and the loop over examples."""
    found = find_reads(case, make_options(), monkeypatch, tmp_path)
    assert bool(found) == (case in BY_ROWS | READS_ITSELF), found


def test_a_tensor_sketch_does_not_read_the_device(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    names = frozenset(name for name, _ in models.make_case("mlp")[0].named_parameters())
    options = FeatureOptions(make_sketch("factored", 2), 0, names)
    shapes = [(name, tuple(p.shape)) for name, p in models.make_case("mlp")[0].named_parameters()]
    methods = {options.sketch.method(ParameterKey(0, 0, name, shape, True)) for name, shape in shapes}
    assert "tensor" in methods
    assert find_reads("mlp", options, monkeypatch, tmp_path) == []


@pytest.mark.parametrize("norms", ["sketch", "exact"])
@pytest.mark.parametrize("sketch", SKETCHES)
@pytest.mark.parametrize("case", ["mlp", "conv2d", "gpt", "called twice"])
def test_no_sketch_reads_the_device(
    case: str, sketch: str, norms: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_reads(case, make_options(sketch, norms), monkeypatch, tmp_path) == []


def test_a_read_of_the_device_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    with record_reads(monkeypatch) as reads:
        values = torch.arange(3)
        assert bool(values[1] == 1)
        assert values[values > 1].tolist() == [2]
    assert reads.found == ["__bool__", "_local_scalar_dense", "index", "tolist"]


@pytest.mark.parametrize("sketch", SKETCHES)
@pytest.mark.parametrize("case", sorted(set(models.CASES) - BY_ROWS - READS_ITSELF))
def test_an_accelerator_is_read_by_no_batch(case: str, sketch: str, device: torch.device, tmp_path: Any) -> None:
    """PyTorch raises an error for each synchronizing operation."""
    if device.type == "cpu":
        pytest.skip("reads of a CPU do not synchronize")
    stream = compute_rows(case, make_options(sketch), device, tmp_path)
    for _ in range(N_CHECKED):
        next(stream)
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert len(list(stream)) == 10  # noqa: PLR2004
    finally:
        torch.cuda.set_sync_debug_mode("default")
