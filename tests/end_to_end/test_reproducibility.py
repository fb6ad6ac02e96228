"""Reproducibility: a build gives the same index whatever the measured times, interruptions and free memory."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.common.results import strip_times
from faults import Crash, Fault, Watch
from paths import ROOT
from tasks.toy import save_checkpoints
from tracin_ann import BuildConfig, InfluenceIndex, QueryOptions, Task, build, plan
from tracin_ann.errors import IndexMismatchError
from tracin_ann.features import autotune as tuning
from tracin_ann.operations.verification import repair, restore_config
from tracin_ann.search import calibration as calibrate
from tracin_ann.store.generations import generation_folder
from tracin_ann.store.manifest import BUILD_RECORD, FEATURES, MANIFEST, read_build_record

BUILD = importlib.import_module("tracin_ann.build_job")
N_ROWS = 700
CONFIG = BuildConfig(dim=32, device="cpu", index="ivf", target_recall=0.8, partition_rows=128, yardstick=False)
SEARCHES = ("lists", "scan")


class SmallCnn(nn.Module):
    """A convolution with pooling, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4 * 9, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.max_pool2d(torch.relu(self.first(x)), 2).flatten(1))


@pytest.fixture
def task(tmp_path: Path) -> Callable[[int], Task]:
    """Return a function that makes the task with the first n rows."""
    model, generator = SmallCnn(), torch.Generator().manual_seed(5)
    pictures, checkpoints = torch.randn(N_ROWS + 120, 1, 8, 8, generator=generator), save_checkpoints(model, tmp_path)

    def make_task(n_rows: int = N_ROWS) -> Task:
        return Task(
            model=lambda: model,
            loss=lambda net, batch: F.cross_entropy(net(batch[0]), batch[1], reduction="none"),
            train_data=lambda: [(pictures[i], i % 3) for i in range(n_rows)],
            query_data=lambda: [(pictures[-1 - i], i % 3) for i in range(120)],
            checkpoints=checkpoints,
        )

    return make_task


def disturb(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Replace clocks and the amount of free memory by random values."""
    random = np.random.default_rng(seed)

    def clock() -> float:
        return float(random.exponential(10.0 ** random.integers(-6, 3)))

    for module in (time, tuning, BUILD):
        monkeypatch.setattr(module, "perf_counter", clock)
    monkeypatch.setattr(tuning, "free_memory_bytes", lambda device: int(random.integers(10**10, 10**12)))


def read_content(out: Path) -> dict[str, bytes]:
    """Return the contents of all files of an index, without the times in its manifests."""
    return {
        str(path.relative_to(out)): strip_times(path.read_bytes()) if path.name == MANIFEST else path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file()
    }


def read_answers(out: Path, task: Task) -> list[list[tuple[Any, float]]]:
    index = InfluenceIndex.open(out, task, device="cpu")
    found = [index.query(range(30), options=QueryOptions(search=search)) for search in SEARCHES]  # type: ignore[arg-type]
    return [[(hit.id, hit.score) for hit in (*a.proponents, *a.opponents)] for each in found for a in each]


def test_builds_are_bit_identical_for_any_measured_times_and_free_memory(task, tmp_path, monkeypatch):
    build(task(), tmp_path / "plain", CONFIG)
    expected, message = read_content(tmp_path / "plain"), read_answers(tmp_path / "plain", task())
    times = set()
    for seed in range(4):
        out = tmp_path / str(seed)
        with monkeypatch.context() as patched:
            disturb(patched, seed)
            manifest = build(task(), out, CONFIG).manifest
        assert manifest.index.calibration is not None
        times.add(manifest.index.calibration.scan)
        found = read_content(out)
        assert found.keys() == expected.keys()
        assert [path for path in found if found[path] != expected[path]] == []
        assert read_answers(out, task()) == message
    assert len(times) == 4, "the clock was not disturbed"


def test_appends_give_the_same_index_as_one_build(task, tmp_path, monkeypatch):
    build(task(), tmp_path / "fresh", CONFIG)
    message, settings = read_answers(tmp_path / "fresh", task()), []
    for seed, begun_with in enumerate((N_ROWS, 5, 300, 650)):
        out = tmp_path / str(seed)
        with monkeypatch.context() as patched:
            disturb(patched, seed)
            build(task(begun_with), out, replace(CONFIG, index="auto" if begun_with < 300 else "ivf"))
            manifest = build(task(), out, replace(CONFIG, append=True)).manifest
        content = json.loads(strip_times((out / MANIFEST).read_bytes()))
        settings.append(content | {"generation": 0})
        assert read_answers(out, task()) == message
        assert manifest.index.kind == "ivf"
    assert settings == settings[:1] * 4


def test_the_settings_that_a_calibration_tries_do_not_depend_on_times(task, tmp_path, monkeypatch):
    tried: list[list[tuple[int, int, float]]] = []
    measure = calibrate._measure_setting

    def noted(index: Any, setting: Any, *rest: Any) -> Any:
        tried[-1].append((setting.codes, setting.centroids, setting.alpha))
        return replace(measure(index, setting, *rest), seconds=float(len(tried)) ** 20)

    monkeypatch.setattr(calibrate, "_measure_setting", noted)
    for seed in range(3):
        tried.append([])
        disturb(monkeypatch, seed)
        build(task(), tmp_path / str(seed), CONFIG)
    assert tried[0] and tried == tried[:1] * 3


def test_either_order_of_reading_gives_the_same_files(task, tmp_path, monkeypatch):
    for held in (False, True):
        monkeypatch.setattr(BUILD, "reading_costs_more", lambda *given, held=held: held)
        build(task(), tmp_path / str(held), CONFIG)
    assert read_content(tmp_path / "False") == read_content(tmp_path / "True")


def test_the_batch_size_is_recorded_before_the_first_row_and_reused_after_a_kill(task, tmp_path, monkeypatch):
    build(task(), tmp_path / "plain", CONFIG)
    out = tmp_path / "killed" / "index"
    with Watch(out.parent) as watch:
        build(task(), out, CONFIG)
    calls = [call.path for call in watch.calls if call.kind in ("link", "replace")]
    first = next(call.number for call in watch.calls if call.kind == "replace" and "/features/" in call.path)
    assert calls.index(f"index/{BUILD_RECORD}") < next(n for n, path in enumerate(calls) if "/features/" in path)
    for later in (first, first + 20):
        folder = tmp_path / str(later)
        folder.mkdir()
        with Watch(folder, fault=Fault(later)), pytest.raises(Crash):
            build(task(), folder / "index", CONFIG)
        remaining = read_build_record(folder / "index")
        assert (remaining.batch_size, remaining.channels_last) == (512, True)
        with monkeypatch.context() as patched:
            patched.setattr(tuning, "_ON_CPU", tuning._SizeRule(1, 16, 16))
            patched.setattr(tuning._Tuning, "_selects_channels_last", lambda self: False)
            assert plan(task(), tmp_path / "other", CONFIG).tuned.batch_size == 16
            build(task(), folder / "index", CONFIG)
        assert read_content(folder / "index") == read_content(tmp_path / "plain")


@pytest.mark.parametrize("changes", [{"batch_size": 16}, {"memory_format": "contiguous"}])
def test_new_feature_files_have_the_batch_settings_of_existing_ones(changes, task, tmp_path):
    out, config = tmp_path / "index", replace(CONFIG, index="flat")
    build(task(), out, config)
    lost = sorted((out / FEATURES).iterdir())[1]
    before = lost.read_bytes()
    lost.unlink()
    match = r"with batch size 512 and memory format channels-last, this build asks for .*leave out --batch"
    for asked in (build, plan):
        with pytest.raises(IndexMismatchError, match=match):
            asked(task(), out, replace(config, **changes))
    with pytest.raises(IndexMismatchError, match=match):
        build(task(N_ROWS + 10), out, replace(config, append=True, **changes))
    pinned: dict[str, Any] = {"batch_size": 512, "memory_format": "channels-last"}
    build(task(), out, replace(config, **pinned))
    assert lost.read_bytes() == before
    # Without existing files, other settings are accepted, for example a smaller batch.
    for path in (out / FEATURES).iterdir():
        path.unlink()
    build(task(), out, replace(config, **changes))
    record = read_build_record(out)
    assert (record.batch_size, record.channels_last) == ((16, True) if "batch_size" in changes else (512, False))


def test_a_repaired_index_has_the_rounding_of_its_build(task, tmp_path, monkeypatch):
    out = tmp_path / "index"
    manifest = build(task(), out, replace(CONFIG, index="flat", batch_size=24, memory_format="channels-last")).manifest
    config = restore_config(manifest)
    assert (config.batch_size, config.memory_format) == (24, "channels-last")
    path = sorted((out / FEATURES).iterdir())[0]
    before = path.read_bytes()
    middle = len(before) // 2
    path.write_bytes(before[:middle] + bytes(byte ^ 1 for byte in before[middle : middle + 9]) + before[middle + 9 :])
    disturb(monkeypatch, 1)
    repair(out, task())
    assert path.read_bytes() == before
    assert generation_folder(out, 2).exists()


@pytest.mark.slow
def test_separate_processes_build_the_same_index_with_or_without_kills() -> None:
    words = [
        sys.executable,
        "-m",
        "benchmarks.reliability.repeat",
        "--builds",
        "2",
        "--appends",
        "1",
        "--rows",
        "900",
        "--print",
    ]
    root = ROOT
    done = subprocess.run(words, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    different = json.loads(done.stdout)["different"]
    assert {number for what, number in different.items() if what != "auto"} == {1}
