"""The extraction pipeline: feature rows do not depend on batch size, order, workers or lengths of the examples."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import oracle
from recorded_streams import use_streams
from tasks import texts
from tracin_ann import BuildConfig, InfluenceIndex, Task, build
from tracin_ann.errors import TaskError, UsageError
from tracin_ann.features import autotune as tuning
from tracin_ann.features.pipeline import reading_costs_more
from tracin_ann.store import StoreLayout
from tracin_ann.task.batches import BatchOptions, differ_in_length, make_batches

BUILD = sys.modules["tracin_ann.build_job"]
NAME = f"{Path(texts.__file__).resolve()}:task"
CONFIG = BuildConfig(
    dim=64, batch_size=8, device="cpu", dtype="float32", index="flat", partition_rows=40, yardstick=False
)


def build_rows(task: Task | str, out: Path, folder: Path, **changes: Any) -> np.ndarray:
    """Build with changes of the config, and return the stored rows [N, F]."""
    named = isinstance(task, str)
    build(task, out, replace(CONFIG, **changes), arguments={"folder": str(folder)} if named else None)
    index = InfluenceIndex.open(out)
    return index.view().take(range(len(index)))


def assert_same_rows(found: np.ndarray, expected: np.ndarray, tolerance: float = 1e-5) -> None:
    error = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert error.max() <= tolerance


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("texts")


@pytest.fixture(scope="module")
def one_by_one(folder: Path) -> np.ndarray:
    """Return the rows of a build with batch size 1, in order."""
    return build_rows(texts.task(str(folder)), folder / "one", folder, batch_size=1)


@pytest.mark.parametrize("size", [7, 64, 1000])
def test_any_batch_size_gives_the_same_rows(size, folder, one_by_one, tmp_path):
    assert_same_rows(build_rows(texts.task(str(folder)), tmp_path / "i", folder, batch_size=size), one_by_one)


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_any_number_of_workers_gives_the_same_rows(workers, folder, one_by_one, tmp_path):
    assert_same_rows(build_rows(NAME, tmp_path / "i", folder, workers=workers), one_by_one)


def test_a_picklable_task_needs_no_name(folder, one_by_one, tmp_path):
    assert_same_rows(build_rows(texts.task(str(folder)), tmp_path / "i", folder, workers=1), one_by_one)


def test_a_task_that_cannot_be_sent_to_workers_is_rejected(folder, tmp_path):
    task = replace(texts.task(str(folder)), train_data=lambda: [*texts.train_data()])
    with pytest.raises(UsageError, match=r"cannot be sent to worker processes.*use 0 workers"):
        build(task, tmp_path / "i", replace(CONFIG, workers=1))
    assert not (tmp_path / "i").exists()


def test_a_worker_that_dies_is_reported_and_the_build_can_be_resumed(folder, one_by_one, tmp_path, monkeypatch):
    monkeypatch.delenv("TEXTS_MAKER", raising=False)
    arguments = {"folder": str(folder), "deadly": "yes"}
    with pytest.raises(TaskError, match="a worker process that reads data died"):
        build(NAME, tmp_path / "i", replace(CONFIG, workers=1), arguments=arguments)
    assert list((tmp_path / "i" / "features").glob("*.h5"))
    build(NAME, tmp_path / "i", CONFIG, arguments=arguments)
    index = InfluenceIndex.open(tmp_path / "i")
    assert_same_rows(index.view().take(range(len(index))), one_by_one)


def test_rows_that_workers_collated_are_read_again_where_a_loop_needs_them(folder, tmp_path, monkeypatch):
    """Without layer rules and vmap, the loop computes every gradient, from examples that only the worker has read."""
    monkeypatch.setattr("tracin_ann.gradients.engine.find_covered_layers", lambda model, names: {})
    monkeypatch.setattr("tracin_ann.gradients.engine.batched_tensors", lambda value, batch: "refused by the test")
    expected = build_rows(texts.task(str(folder)), tmp_path / "a", folder)
    assert_same_rows(build_rows(NAME, tmp_path / "b", folder, workers=1), expected)


def test_batches_have_rows_of_similar_length(folder):
    task = texts.task(str(folder))
    examples = texts.train_data()
    batches = make_batches(task, range(64), examples[:64], BatchOptions(16, by_length=True))
    lengths = [[len(examples[i][0]) for i in batch.ids] for batch in batches]
    assert sorted(i for batch in batches for i in batch.ids) == list(range(64))
    assert all(min(longer) >= max(shorter) for longer, shorter in zip(lengths, lengths[1:], strict=False))
    assert all(batch.inputs[0].shape == (16, max(given)) for batch, given in zip(batches, lengths, strict=True))
    assert differ_in_length(examples)
    assert not differ_in_length([(torch.zeros(3), 1)] * 20)


class Counted(list[Any]):
    """A list that counts how often its items are read."""

    reads = 0

    def __getitem__(self, place: Any) -> Any:
        Counted.reads += 1
        return super().__getitem__(place)


@pytest.mark.parametrize(("held", "readings"), [(False, len(texts.RATES)), (True, 1)])
def test_slow_data_is_read_once_for_all_checkpoints(held, readings, folder, one_by_one, tmp_path, monkeypatch):
    monkeypatch.setattr(BUILD, "reading_costs_more", lambda *given: held)
    data = Counted(texts.train_data())
    task = replace(texts.task(str(folder)), train_data=lambda: data)
    before = Counted.reads = 0
    rows = build_rows(task, tmp_path / "i", folder)
    assert_same_rows(rows, one_by_one)
    # Other reads: probes, digest, sampled lengths, tuning, and four canaries per checkpoint.
    extra = Counted.reads - before - readings * texts.N_TRAIN
    assert 0 <= extra < texts.N_TRAIN + 100


@pytest.mark.parametrize("by_partition", [False, True])
def test_rows_computed_ahead_of_their_fetch_are_the_same(by_partition, folder, one_by_one, tmp_path, monkeypatch):
    """On an accelerator, a batch must not use buffers that the next batch overwrites."""
    use_streams(monkeypatch)
    monkeypatch.setattr(BUILD, "reading_costs_more", lambda *given: by_partition)
    assert_same_rows(build_rows(texts.task(str(folder)), tmp_path / "i", folder), one_by_one)


@pytest.mark.parametrize(
    ("changes", "held"),
    [
        ({}, True),  # 2 x 1000 rows at 1 ms, 9 x 3 loads at 10 ms
        ({"load_seconds": 0.1}, False),
        ({"read_seconds": 1e-4}, False),
        ({"n_checkpoints": 1}, False),  # nothing is read twice
        ({"memory_bytes": 100 * 1000 * 2 - 1}, False),  # a partition takes more than half
    ],
)
def test_partitions_stay_in_memory_where_reading_costs_more_than_loading(changes, held):
    given = {"load_seconds": 0.01, "read_seconds": 1e-3, "n_checkpoints": 3, "memory_bytes": 100 * 1000 * 2} | changes
    layout = StoreLayout(1000, 100, 8, "float16", ("test",) * int(given["n_checkpoints"]))
    tuned = tuning.BatchSettings(8, False, given["read_seconds"], 1000, 10, int(given["memory_bytes"]))
    assert reading_costs_more(layout, tuned, given["load_seconds"]) == held


def test_an_interrupted_build_is_resumed_in_the_other_order(folder, one_by_one, tmp_path, monkeypatch):
    task = texts.task(str(folder))
    rows = build_rows(task, tmp_path / "i", folder)
    files = sorted((tmp_path / "i" / "features").glob("*.h5"))
    for file in (files[1], files[2], files[-1]):
        file.unlink()
    (tmp_path / "i" / "manifest.json").unlink()
    monkeypatch.setattr(BUILD, "reading_costs_more", lambda *given: True)
    report = build(task, tmp_path / "i", CONFIG)
    assert 0 < report.rows_extracted < len(rows) * len(texts.RATES)
    index = InfluenceIndex.open(tmp_path / "i")
    assert_same_rows(index.view().take(range(len(rows))), one_by_one)


@pytest.mark.usefixtures("emulated_bf16")
def test_bf16_scores_are_close_and_the_index_records_the_precision(folder, tmp_path):
    task = texts.task(str(folder))
    build_rows(task, tmp_path / "i", folder, precision="bf16", dim=4096)
    index = InfluenceIndex.open(tmp_path / "i", task)
    models = [texts.model() for _ in texts.RATES]
    for model, checkpoint in zip(models, task.checkpoints, strict=True):
        model.load_state_dict(torch.load(checkpoint.path))
    sides = [
        torch.stack([oracle.gradients(m, texts.loss, data) for m in models], 1)
        for data in (texts.query_data(), texts.train_data())
    ]
    true = oracle.tracin(*sides, texts.RATES)
    found = index.features("query", range(4)) @ index.view().take(range(texts.N_TRAIN)).T
    assert np.corrcoef(found.ravel(), true.ravel())[0, 1] > 0.97
    fp32 = build_rows(task, tmp_path / "j", folder, dim=4096)
    off = np.linalg.norm(index.view().take(range(texts.N_TRAIN)) - fp32, axis=1) / np.linalg.norm(fp32, axis=1)
    assert 1e-5 < off.max() < 0.05
    with pytest.raises(Exception, match="built with precision bf16"):
        build(task, tmp_path / "i", replace(CONFIG, dim=4096))


@pytest.mark.usefixtures("emulated_bf16")
@pytest.mark.parametrize(("slower", "warned"), [(1.2, True), (0.9, False)])
def test_slower_bf16_on_a_cpu_gives_a_warning(slower, warned, folder, tmp_path, monkeypatch, caplog):
    measured = lambda model, features: slower if model.runner.options.precision == "bf16" else 1.0  # noqa: E731
    monkeypatch.setattr(tuning, "measure_row_seconds", measured)
    result = build(texts.task(str(folder)), tmp_path / "i", replace(CONFIG, precision="bf16"))
    assert result.manifest.build.spec.precision == "bf16"
    message = "bf16 is slower than fp32 on this machine: 1200000 µs per row, fp32 1000000 µs; --precision fp32"
    assert (message in caplog.text) == warned


def test_bf16_is_rejected_where_it_would_be_slower(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    with pytest.raises(UsageError, match="bf16 would be slower than fp32 here"):
        build(texts.task(str(folder)), tmp_path / "i", replace(CONFIG, precision="bf16"))
    assert not (tmp_path / "i").exists()
