"""Copies of batches to a device with streams, and of results from it: their order, their memory, and errors."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import models
from recorded_streams import COMPUTE, FETCHING, SENDING, RecordedStreams, use_streams
from tasks.toy import make_toy_task, save_checkpoints
from tracin_ann.device import DeviceCopies, make_copies
from tracin_ann.errors import NonFiniteError, TaskError
from tracin_ann.features import RunOptions, TaskRunner
from tracin_ann.features.autotune import TuningOptions, tune
from tracin_ann.features.extractor import FeatureExtractor, FeatureOptions, FeatureRows
from tracin_ann.features.pipeline import Extraction
from tracin_ann.sketch import make_sketch
from tracin_ann.store import FeatureStore, StoreLayout
from tracin_ann.task import Task, pin_memory, to_device

CPU = torch.device("cpu")
N, SIZE, DIM = 24, 4, 32
OPTIONS = FeatureOptions(make_sketch("factored", DIM), 0, frozenset())
EXACT = FeatureOptions(make_sketch("factored", DIM), 0, frozenset(), "exact")


def make_task(folder: Path, case: str = "mlp", n: int = N, **changes: Any) -> Task:
    model, chosen, rows = models.make_case(case, 0, n)
    folder.mkdir(exist_ok=True)
    given = {"loss": chosen.loss, "train_data": lambda: rows, "checkpoints": save_checkpoints(model, folder)}
    return make_toy_task(folder, model, **(given | changes))


def iter_rows(task: Task, options: FeatureOptions = OPTIONS, **run: Any) -> Iterator[FeatureRows]:
    runner = TaskRunner(task, RunOptions(CPU, SIZE, **run))
    with runner.model() as loaded:
        loaded.load(0)
        extractor = FeatureExtractor(loaded, options)
        yield from extractor.stream("train", runner.read("train", range(runner.n_rows("train"))))


def assert_same(found: list[FeatureRows], expected: list[FeatureRows]) -> None:
    assert len(found) == len(expected)
    for own, other in zip(found, expected, strict=True):
        for name, values in vars(own).items():
            assert np.array_equal(values, getattr(other, name), equal_nan=True), name


@pytest.mark.parametrize("options", [OPTIONS, EXACT], ids=["sketch", "exact"])
@pytest.mark.parametrize("case", models.CASES)
def test_rows_have_the_bits_of_a_device_without_streams(
    case: str, options: FeatureOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task(tmp_path, case)
    expected = list(iter_rows(task, options))
    streams = use_streams(monkeypatch)
    assert_same(list(iter_rows(task, options)), expected)
    assert streams.n_waits == len(expected) == N // SIZE


def test_each_batch_is_copied_computed_and_fetched_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copy, record, computation waits, fetch waits for the computation, release: with the streams' own events."""
    streams = use_streams(monkeypatch)
    log: list[tuple[object, ...]] = streams.log
    task = make_task(tmp_path)
    own = task.loss

    def loss(model: nn.Module, batch: Any) -> Tensor:
        log.append(("compute", streams.used))
        return own(model, batch)

    for number, _ in enumerate(iter_rows(make_task(tmp_path, loss=loss))):
        log.append(("rows", number))
    # The first batch also verifies the gradients.
    log = [entry for i, entry in enumerate(log) if entry[0] != "compute" or log[i - 1][0] != "compute"]
    sends = [i for i, entry in enumerate(log) if entry == ("use", SENDING)]
    fetches = [i for i, entry in enumerate(log) if entry == ("use", FETCHING)]
    rows = [i for i, entry in enumerate(log) if entry[0] == "rows"]
    assert len(sends) == len(fetches) == len(rows) == N // SIZE
    for batch, (send, fetch, row) in enumerate(zip(sends, fetches, rows, strict=True)):
        name, stream, sent = log[send + 1]
        assert (name, stream) == ("record", SENDING)
        begin = log.index(("delay", COMPUTE, sent))
        assert send < begin < fetch
        assert log[begin + 1] == ("compute", COMPUTE)
        computed = log[fetch - 2][2]
        assert log[fetch - 2 : fetch] == [("record", COMPUTE, computed), ("delay", FETCHING, computed)]
        name, stream, fetched = log[fetch + 1]
        assert (name, stream) == ("record", FETCHING)
        assert log[row - 1] == ("wait", fetched)
        # Before the rows of a batch are here, the next one is launched, and the one after it is copied; no others.
        assert sum(f < row for f in fetches) == min(batch + 2, N // SIZE)
        assert sum(s < row for s in sends) == min(batch + 3, N // SIZE)


def test_the_memory_of_a_batch_is_kept_for_the_streams_that_use_it() -> None:
    streams = RecordedStreams()
    copies = DeviceCopies(streams)
    value = torch.arange(3.0)
    sent = copies.send(lambda: {"x": value}, lambda batch: batch.values())
    assert streams.kept == []
    assert copies.receive(sent)["x"] is value
    assert streams.kept == [(value.data_ptr(), COMPUTE)]
    fetched = copies.fetch([value])
    assert streams.kept[1:] == [(value.data_ptr(), FETCHING)]
    assert fetched.host[0].isnan().all()
    fetched.wait()
    assert fetched.host[0].tolist() == [0, 1, 2]


def test_a_batch_that_is_on_the_device_is_converted_after_it_is_made() -> None:
    streams = RecordedStreams()
    copies = DeviceCopies(streams)
    copies.send(lambda: 0, lambda value: ())
    assert streams.log == [("use", SENDING), ("record", SENDING, 1)]
    streams.log.clear()
    copies.send(lambda: 0, lambda value: (), after=True)
    assert streams.log[:3] == [("record", COMPUTE, 2), ("delay", SENDING, 2), ("use", SENDING)]


@pytest.mark.parametrize("place", ["cpu", "meta"])
def test_inputs_on_the_device_are_found(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    streams = use_streams(monkeypatch)
    runner = TaskRunner(make_task(tmp_path), RunOptions(CPU, SIZE))
    read = next(runner.read("train", range(SIZE)))
    given = to_device(read.inputs, torch.device(place))
    with runner.model() as loaded:
        # A tensor of the device "meta" cannot be copied to the CPU.
        monkeypatch.setattr(loaded, "batch", lambda side, pinned: pinned)
        loaded.send("train", type(read)(read.ids, given))
    assert (streams.log[0] == ("record", COMPUTE, 1)) == (place == "meta")


def test_at_most_three_batches_are_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that is computed, the one launched after it, and the one that is copied."""
    use_streams(monkeypatch)
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    class Batch:
        def __init__(self, x: Tensor, y: Tensor) -> None:
            self.x, self.y = x, y

        def to(self, device: torch.device) -> Batch:
            moved = Batch(self.x.clone(), self.y.clone())
            alive.append(weakref.ref(moved.x))
            return moved

    task = make_task(tmp_path, n=40)
    own = task.loss

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return own(model, (batch.x, batch.y))

    def collate(rows: list[Any]) -> Batch:
        return Batch(*torch.utils.data.default_collate(rows))

    rows = iter_rows(make_task(tmp_path, n=40, loss=loss, collate=collate), EXACT)
    next(rows)
    for _ in rows:
        most = max(most, sum(ref() is not None for ref in alive))
    # The one whose rows were returned last is free.
    assert most == 2  # noqa: PLR2004


class Reused:
    """A data set of vectors and numbers whose collate function fills the same memory for each batch."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows
        self.memory = [torch.empty_like(t) for t in torch.utils.data.default_collate(rows[:SIZE])]

    def collate(self, rows: list[Any]) -> list[Tensor]:
        for memory, values in zip(self.memory, torch.utils.data.default_collate(rows), strict=True):
            memory[: len(values)] = values
        return [memory[: len(rows)] for memory in self.memory]


def test_a_task_may_fill_the_same_memory_for_each_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = make_task(tmp_path)
    expected = list(iter_rows(task))
    use_streams(monkeypatch)
    reused = Reused(models.make_case("mlp", 0, N)[2])
    assert_same(list(iter_rows(make_task(tmp_path, collate=reused.collate))), expected)


class FailsAt(list[Any]):
    """A data set with a row that cannot be read."""

    def __getitem__(self, place: Any) -> Any:
        if place == 2 * SIZE + 1:
            raise OSError("no such row")
        return super().__getitem__(place)


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("where", ["reading", "moving", "computing"])
def test_an_error_comes_after_the_rows_of_earlier_batches(
    where: str, streams: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if it occurs while a later batch is copied or launched ahead."""
    rows = models.make_case("mlp", 0, N)[2]
    bad = rows[2 * SIZE + 1][0]
    own = make_task(tmp_path).loss

    class Moved:
        def __init__(self, value: Any) -> None:
            self.value = value

        def to(self, device: torch.device) -> Moved:
            if (self.value[0] == bad).all(1).any():
                raise OSError("no such row")
            return self

    def loss(model: nn.Module, batch: Any) -> Tensor:
        if where == "computing" and (batch[0] == bad).all(1).any():
            raise OSError("no such row")
        return own(model, batch.value if isinstance(batch, Moved) else batch)

    def collate(rows: list[Any]) -> Any:
        batch = torch.utils.data.default_collate(rows)
        return Moved(batch) if where == "moving" else batch

    data = FailsAt(rows) if where == "reading" else rows
    task = make_task(tmp_path, loss=loss, collate=collate, train_data=lambda: data)
    if streams:
        use_streams(monkeypatch)
    found = iter_rows(task)
    assert [next(found).ids_N.tolist() for _ in range(2)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(Exception, match="no such row"):
        next(found)


def test_a_row_that_is_not_finite_is_reported_in_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = models.make_case("mlp", 0, N)[2]
    rows[2 * SIZE + 1] = (torch.full_like(rows[0][0], torch.nan), rows[0][1])
    task = make_task(tmp_path, train_data=lambda: rows)
    skipped = list(iter_rows(task, on_nonfinite="skip"))
    use_streams(monkeypatch)
    found = iter_rows(task)
    assert [next(found).ids_N.tolist() for _ in range(2)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(NonFiniteError, match=f"row {2 * SIZE + 1} "):
        next(found)
    assert_same(list(iter_rows(task, on_nonfinite="skip")), skipped)


def test_an_error_of_the_device_names_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU reports an index out of range after the operation, when a result is waited for."""
    streams = use_streams(monkeypatch)
    streams.failures[2] = RuntimeError("CUDA error: device-side assert triggered\nCompile with ...")
    found = iter_rows(make_task(tmp_path))
    next(found)
    with pytest.raises(
        TaskError, match=r"batch of 4 rows that begins with row 4, or in the next batch: got .*CUDA err"
    ):
        next(found)


@pytest.mark.parametrize("factor", [1e-25, 1e25])
def test_exact_norms_outside_of_float32_are_corrected_when_rows_are_fetched(
    factor: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = make_task(tmp_path).loss
    task = make_task(tmp_path, loss=lambda model, batch: own(model, batch) * factor)
    plain = np.concatenate([rows.sqnorm_N for rows in iter_rows(make_task(tmp_path), EXACT)])
    expected = list(iter_rows(task, EXACT, on_nonfinite="skip"))
    np.testing.assert_allclose(np.concatenate([r.sqnorm_N for r in expected]), plain * factor**2, rtol=1e-4)
    use_streams(monkeypatch)
    assert_same(list(iter_rows(task, EXACT, on_nonfinite="skip")), expected)


def test_the_device_does_not_wait_between_partitions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first batch of a partition is launched before the rows of the partition before it are complete."""
    streams = use_streams(monkeypatch)
    task = make_task(tmp_path)
    layout = StoreLayout(N, SIZE, DIM, "float32", ("a",))
    store = FeatureStore(tmp_path / "features", layout)
    with TaskRunner(task, RunOptions(CPU, SIZE)).model() as loaded:
        extraction = Extraction(loaded, store, OPTIONS)
        files = [(partition, 0) for partition in range(layout.n_partitions)]
        launched = []
        for _ in extraction.write(files, by_partition=False):
            launched.append(sum(entry == ("use", FETCHING) for entry in streams.log))
    assert launched == [2, 3, 4, 5, 6, 6]
    assert len(list((tmp_path / "features").glob("*.h5"))) == layout.n_partitions


def test_the_plan_counts_the_batches_that_are_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(options: FeatureOptions = OPTIONS) -> int:
        with TaskRunner(make_task(tmp_path), RunOptions(CPU, SIZE)).model() as loaded:
            loaded.load(0)
            chosen = tune(loaded, options, TuningOptions(batch_size=SIZE))
            return chosen.batch_bytes // chosen.batch_size

    plain = choose()
    use_streams(monkeypatch)
    x, y = models.make_case("mlp", 0, 1)[2][0]
    inputs = sum(t.numel() * t.element_size() for t in map(torch.as_tensor, (x, y)))
    # The inputs of two batches, and the features of one.
    assert choose() == plain + 2 * inputs + 4 * DIM
    assert choose(EXACT) == 2 * plain + 2 * inputs + 4 * DIM, "and the gradient factors of one, for exact norms"


def test_inputs_are_pinned_by_a_copy() -> None:
    copies = DeviceCopies(RecordedStreams())
    expanded = torch.arange(3).expand(2, 3)
    sparse = torch.eye(2).to_sparse()
    on_device = torch.zeros(2, device="meta")
    batch = {"x": torch.arange(6.0), "e": expanded, "s": sparse, "d": on_device, "n": 3}
    pinned = pin_memory(batch, copies.pin)
    assert pinned["x"] is not batch["x"] and pinned["x"].equal(batch["x"])
    assert pinned["e"].equal(expanded)
    assert pinned["s"] is sparse and pinned["d"] is on_device and pinned["n"] == 3  # noqa: PLR2004
    assert pin_memory(batch, make_copies(CPU).pin)["x"] is batch["x"]


def test_an_accelerator_computes_rows_as_a_cpu_does(device: torch.device, tmp_path: Path) -> None:
    """With the streams of the GPU itself."""
    if device.type == "cpu":
        pytest.skip("a CPU has no streams")
    task = make_task(tmp_path, "conv2d", n=60)
    expected = np.concatenate([rows.feature_ND for rows in iter_rows(task)])
    runner = TaskRunner(task, RunOptions(device, SIZE))
    with runner.model() as loaded:
        loaded.load(0)
        found = FeatureExtractor(loaded, OPTIONS).rows("train", range(60)).feature_ND
    assert np.linalg.norm(found - expected) < 1e-3 * np.linalg.norm(expected)
