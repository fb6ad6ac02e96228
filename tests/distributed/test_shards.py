"""Shards of a build: the index of one process, bit for bit, in any order, with losses, and with clear refusals."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import sharing
from faults import Crash, Fault, Watch
from invocation import run
from paths import ROOT, SUPPORT
from sharing import CONFIG, N_FILES, NAME, OneProcess, assert_same_index
from tasks import flawed, texts
from tracin_ann import InfluenceIndex, Shard, Task, build, build_shard, finish_build
from tracin_ann.cli.build import main
from tracin_ann.device import find_local_device
from tracin_ann.errors import GradientProofError, IndexMismatchError, UsageError
from tracin_ann.features import autotune as tuning
from tracin_ann.store import FEATURES, agree_on_record, hold_writer_lock, read_build_record, write_build_record
from wrong_rows import swap_gradients

BUILD = sys.modules["tracin_ann.build_job"]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> OneProcess:
    return sharing.build_in_one_process(tmp_path_factory.mktemp("texts"))


def compute(one: OneProcess, out: Path, *shards: str, **changes: Any) -> int:
    """Run shards one after another, and return the number of rows × checkpoints that they computed."""
    config = replace(CONFIG, **changes)
    reports = [build_shard(NAME, out, Shard.parse(text), config, arguments=one.arguments) for text in shards]
    return sum(report.rows_extracted for report in reports)


def make_task(one: OneProcess, rows: list[Any]) -> Task:
    """Return the task with other training rows."""
    return replace(texts.task(**one.arguments), train_data=lambda: rows)


def finish(one: OneProcess, out: Path, **changes: Any) -> Any:
    return finish_build(NAME, out, replace(CONFIG, **changes), arguments=one.arguments)


@pytest.mark.parametrize("shards", ["0/1", "2/4 0/4 3/4 1/4 2/4"])
def test_shards_in_any_order_give_the_index_of_one_process(shards, one, tmp_path):
    assert compute(one, tmp_path / "i", *shards.split()) == 3 * texts.N_TRAIN
    assert finish(one, tmp_path / "i").rows_extracted == 0
    assert_same_index(tmp_path / "i", one)


def test_shards_that_die_run_again_by_another_number(one, tmp_path):
    out = tmp_path / "folder" / "i"
    compute(one, out, "0/4", "2/4")
    for shard in ("1/4", "3/4"):
        with Watch(out.parent) as watch:
            watch.fault = Fault(25)
            with pytest.raises(Crash):
                compute(one, out, shard)
    n_files = len(list((out / FEATURES).glob("*.h5")))
    assert N_FILES // 2 < n_files < N_FILES
    assert compute(one, out, "0/3", "1/3", "2/3") < 3 * texts.N_TRAIN // 2
    finish(one, out)
    assert_same_index(out, one)


def test_there_may_be_more_shards_than_files(one, tmp_path):
    task, config = make_task(one, texts.make_rows(30, 1)), replace(CONFIG, index="flat")
    reports = [build_shard(task, tmp_path / "i", Shard(i, 8), config) for i in range(8)]
    assert [report.files for report in reports] == [0, 1, 1, 1, 0, 1, 1, 1]
    finish_build(task, tmp_path / "i", config)
    assert len(InfluenceIndex.open(tmp_path / "i")) == 30


def test_a_plain_build_computes_what_the_shards_have_not(one, tmp_path):
    compute(one, tmp_path / "i", "1/4")
    report = build(NAME, tmp_path / "i", CONFIG, arguments=one.arguments)
    assert 0 < report.rows_extracted < 3 * texts.N_TRAIN
    assert_same_index(tmp_path / "i", one)


def test_shards_take_no_lock(one, tmp_path):
    compute(one, tmp_path / "i", "0/2")
    with hold_writer_lock(tmp_path / "i"):
        compute(one, tmp_path / "i", "1/2")
    finish(one, tmp_path / "i")
    assert_same_index(tmp_path / "i", one)


def test_finish_names_the_shards_that_are_missing(one, tmp_path):
    compute(one, tmp_path / "i", "0/4", "2/4")
    expected = r"got 12 of 24 files missing.*run this command with --shard 1/4, --shard 3/4 instead of --finish"
    with pytest.raises(UsageError, match=expected):
        finish(one, tmp_path / "i")
    (tmp_path / "i" / "generation-000001" / "shards.json").write_text("{")
    with pytest.raises(UsageError, match="with --shard 0/1 instead"):
        finish(one, tmp_path / "i")
    assert not (tmp_path / "i" / "manifest.json").exists()


def test_rows_that_are_not_finite_are_skipped_as_in_one_process(tmp_path):
    marks = {7: flawed.NAN_LOSS, 33: flawed.LATE_NAN_GRADIENT}
    task, skip = flawed.make_task(tmp_path, flawed.make_rows(60, marks=marks)), replace(CONFIG, on_nonfinite="skip")
    assert build(task, tmp_path / "one", skip).skipped.row_S.tolist() == [7, 33]
    build_shard(task, tmp_path / "i", Shard(0, 2), skip)
    # The policy is that of the record.
    build_shard(task, tmp_path / "i", Shard(1, 2), CONFIG)
    finish_build(task, tmp_path / "i", CONFIG)
    assert sharing.read_index(tmp_path / "i") == sharing.read_index(tmp_path / "one")


def test_the_manifest_has_the_versions_that_computed_the_rows(one, tmp_path, monkeypatch):
    compute(one, tmp_path / "i", "0/1")
    monkeypatch.setattr(BUILD, "library_versions", lambda: {"python": "3.0", "torch": "2.4.0", "numpy": "1.26.0"})
    finish(one, tmp_path / "i")
    assert_same_index(tmp_path / "i", one)


def test_finish_of_nothing_writes_nothing(one, tmp_path):
    with pytest.raises(UsageError, match="got 24 of 24 files missing.*--shard 0/1"):
        finish(one, tmp_path / "i")
    assert not (tmp_path / "i").exists()


def test_the_first_shard_decides_for_all(one, tmp_path, monkeypatch):
    compute(one, tmp_path / "i", "0/2")
    monkeypatch.setattr(tuning, "_ON_CPU", tuning._SizeRule(1, 16, 16))
    compute(one, tmp_path / "i", "1/2")
    finish(one, tmp_path / "i")
    assert_same_index(tmp_path / "i", one)


def test_of_shards_that_start_together_the_first_record_holds(one, tmp_path, monkeypatch):
    """Another shard writes its record after this one has looked for one and measured other values."""
    out, rule = tmp_path / "i", tuning._ON_CPU

    def choose_another_dim(job: Any, progress: Any) -> None:
        if job.config.dim == "auto":
            job.config = replace(job.config, dim=128)

    def agree_late(directory: Path, last_build: Any, record: Any) -> Any:
        assert (last_build, record.spec.sketch.dim, record.batch_size) == (None, 128, 16)
        monkeypatch.setattr(BUILD, "agree_on_record", agree_on_record)
        monkeypatch.setattr(tuning, "_ON_CPU", rule)
        compute(one, out, "1/2")
        return agree_on_record(directory, last_build, record)

    monkeypatch.setattr(BUILD.BuildJob, "choose_dim", choose_another_dim)
    monkeypatch.setattr(tuning, "_ON_CPU", tuning._SizeRule(1, 16, 16))
    monkeypatch.setattr(BUILD, "agree_on_record", agree_late)
    compute(one, out, "0/2", dim="auto")
    finish(one, out)
    assert_same_index(out, one)


def test_the_dimension_that_another_shard_records_during_a_pilot_holds(one, tmp_path, monkeypatch):
    out = tmp_path / "i"

    def choose_late(job: Any, progress: Any) -> None:
        if job.config.dim == "auto":
            compute(one, out, "1/2")
            job.config = replace(job.config, dim=128)

    monkeypatch.setattr(BUILD.BuildJob, "choose_dim", choose_late)
    compute(one, out, "0/2", dim="auto")
    finish(one, out)
    assert_same_index(out, one)


@pytest.mark.parametrize("has_links", [True, False])
def test_a_record_is_created_by_one_process_only(has_links, one, tmp_path, monkeypatch):
    if not has_links:
        monkeypatch.setattr(os, "link", lambda old, new: _refuse(errno.EPERM))
    first = read_build_record(Path(one.arguments["folder"]) / "one")
    second = replace(first, batch_size=16)
    assert agree_on_record(tmp_path, None, first) == first
    assert agree_on_record(tmp_path, None, second) == first
    with pytest.raises(FileExistsError, match="build.json"):
        write_build_record(tmp_path, second, exclusive=True)
    assert [path.name for path in tmp_path.iterdir()] == ["build.json"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 32}, "was built with .*64.*32"),
        ({"dtype": "float16"}, "was built with .*float32.*float16"),
        ({"partition_rows": 10}, "partition_rows 20 .* asks for 10"),
        ({"batch_size": 16}, "batch size 512 .* asks for 16"),
        ({"on_nonfinite": "skip"}, "--on-nonfinite error, this worker has skip"),
    ],
)
def test_shards_with_other_options_are_rejected(changes, message, one, tmp_path):
    compute(one, tmp_path / "i", "0/2")
    before = read_build_record(tmp_path / "i")
    with pytest.raises(IndexMismatchError, match=message):
        compute(one, tmp_path / "i", "1/2", **changes)
    assert read_build_record(tmp_path / "i") == before


def test_a_shard_with_other_versions_or_data_is_rejected(one, tmp_path, monkeypatch):
    compute(one, tmp_path / "i", "0/2")
    with monkeypatch.context() as patched:
        patched.setattr(BUILD, "library_versions", lambda: {"python": "3.0", "torch": "2.4.0", "numpy": "1.26.0"})
        with pytest.raises(IndexMismatchError, match="computed with python .*, this worker has 3.0; use the same"):
            compute(one, tmp_path / "i", "1/2")
    with pytest.raises(IndexMismatchError, match="train_data"):
        build_shard(make_task(one, texts.make_rows(texts.N_TRAIN, 7)), tmp_path / "i", Shard(1, 2), CONFIG)


def test_shards_extend_an_index(one, tmp_path):
    rows, grow = texts.make_rows(190, 1), replace(CONFIG, append=True)
    for name in ("shards", "one"):
        build(make_task(one, rows[:130]), tmp_path / name, CONFIG)
    build(make_task(one, rows), tmp_path / "one", grow)
    done = [build_shard(make_task(one, rows), tmp_path / "shards", Shard(i, 3), grow) for i in (1, 2, 0)]
    # The rows of the last partition, which was not full, are computed again.
    assert sum(report.rows_extracted for report in done) == 3 * 70
    finish_build(make_task(one, rows), tmp_path / "shards", grow)
    assert sharing.read_index(tmp_path / "shards") == sharing.read_index(tmp_path / "one")
    assert len(InfluenceIndex.open(tmp_path / "shards")) == 190


def test_a_shard_repairs_its_files_of_a_finished_index(one, tmp_path, monkeypatch):
    build(NAME, tmp_path / "i", CONFIG, arguments=one.arguments)
    lost = sorted((tmp_path / "i" / FEATURES).iterdir())[1]
    before = lost.read_bytes()
    lost.unlink()
    monkeypatch.setattr(BUILD, "library_versions", lambda: {"python": "3", "torch": "2", "numpy": "1"})
    assert compute(one, tmp_path / "i", "1/2") == 0
    assert compute(one, tmp_path / "i", "0/2") == CONFIG.partition_rows
    assert lost.read_bytes() == before
    assert read_build_record(tmp_path / "i").spec.versions["torch"] != "2"


def test_a_shard_audits_its_most_uneven_batch(one, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        # Of the rows of the last shard, those with the most different lengths.
        swap_gradients(patched, lambda ids: min(ids) >= 120 and max(ids) < 140, "head.weight")
        assert compute(one, tmp_path / "i", "0/3") > 0
        with pytest.raises(GradientProofError, match="differs from plain autograd.*files of this build were removed"):
            compute(one, tmp_path / "i", "2/3")
    assert list((tmp_path / "i" / FEATURES).iterdir()) == []
    compute(one, tmp_path / "i", "0/3", "1/3", "2/3")
    finish(one, tmp_path / "i")
    assert_same_index(tmp_path / "i", one)


def words(one: OneProcess, out: Path, *more: str) -> list[str]:
    return ["--task", NAME, "--task-arg", f"folder={one.arguments['folder']}", "--out", str(out), *more]


def test_the_commands(one, tmp_path, monkeypatch):
    out = tmp_path / "i"
    for task, expected in ((1, "shard 0/2, 1 file; 150 rows"), (2, "shard 1/2, 2 files; 300 rows")):
        for name, value in {"ID": task, "COUNT": 2, "MIN": 1, "MAX": 2}.items():
            monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
        result = run(main, *words(one, out, "--dim", "8", "--shard", "auto"))
        assert result.exit_code == 0 and expected in result.output, result.output
    result = run(main, *words(one, out, "--dim", "8", "--no-yardstick", "--finish"))
    assert result.exit_code == 0 and "all features were already stored" in result.output, result.output
    assert len(InfluenceIndex.open(out)) == texts.N_TRAIN


@pytest.mark.parametrize(
    ("rank", "n_gpus", "expected"), [("3", 4, "cuda:3"), ("3", 1, "cuda:0"), ("3", 0, "auto"), ("", 4, "auto")]
)
def test_each_process_of_torchrun_uses_its_own_gpu(rank, n_gpus, expected, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: n_gpus > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: n_gpus)
    assert find_local_device({"LOCAL_RANK": rank} if rank else {}) == expected


@pytest.mark.parametrize(
    ("more", "uses_it"), [(("auto",), True), (("0/2",), False), (("auto", "--device", "abacus"), False)]
)
def test_the_gpu_of_a_process_is_for_shard_auto(more, uses_it, one, tmp_path, monkeypatch):
    monkeypatch.setattr("tracin_ann.device.find_local_device", lambda: "cuda:99")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = run(main, *words(one, tmp_path / "i", "--dim", "8", "--shard", *more))
    assert ("no such GPU: got 'cuda:99'" in result.output) == uses_it, result.output


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--shard", "0/2", "--finish"), "--shard and --finish exclude each other"),
        (("--finish", "--launcher", "ray"), "--finish and --launcher exclude each other"),
        (("--shard", "0/2", "--device", "cpu,cpu"), "--shard and several devices exclude each other"),
        (("--num-gpus-per-worker", "1"), "'--num-gpus-per-worker' needs '--launcher ray'"),
        (("--device", "cpu,abacus"), "unknown device: got 'abacus'"),
        (("--shard", "2/2"), "no such shard: got 2/2, expected 0/2 to 1/2"),
    ],
)
def test_options_that_exclude_each_other(more, message, one, tmp_path):
    result = run(main, *words(one, tmp_path / "i", *more))
    assert result.exit_code == 2 and message in result.output, result.output
    assert not (tmp_path / "i").exists()


def _refuse(number: int) -> None:
    raise OSError(number, os.strerror(number))


SHARD_PROGRAM = """
import errno
import os
import signal
import subprocess
import sys
import time
from sharing import CONFIG, NAME
from tracin_ann import Shard, build_shard
if __name__ == "__main__":
    out, folder, shard = sys.argv[1:]
    build_shard(NAME, out, Shard.parse(shard), CONFIG, arguments={"folder": folder, "slow": "yes"})
"""


@pytest.mark.slow
def test_processes_that_are_killed_and_run_again_give_the_index_of_one_process(tmp_path):
    one = sharing.build_in_one_process(tmp_path, slow="yes")
    out = tmp_path / "i"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{SUPPORT}", "OMP_NUM_THREADS": "1"}

    def start(shard: Shard) -> subprocess.Popen[bytes]:
        words = [sys.executable, "-c", SHARD_PROGRAM, str(out), one.arguments["folder"], str(shard)]
        return subprocess.Popen(words, env=environment)

    shards, names = [Shard(i, 4) for i in range(4)], [f"features-{p:06d}-{c:04d}" for p in range(8) for c in range(3)]
    processes = {shard: start(shard) for shard in shards}
    living = {Shard(1, 4), Shard(3, 4)}
    while living and all(processes[shard].poll() is None for shard in living):
        written = {path.name[:20] for path in out.glob("features/*.h5")}
        for shard in [shard for shard in living if written & set(shard.take(names))]:
            processes[shard].kill()
            living.remove(shard)
        time.sleep(0.005)
    assert [processes[shard].wait() for shard in shards] == [0, -signal.SIGKILL, 0, -signal.SIGKILL]
    with pytest.raises(UsageError, match="files missing.*--shard 1/4, --shard 3/4"):
        finish(one, out)
    again = [start(Shard(i, 3)) for i in range(3)]
    assert [process.wait() for process in again] == [0, 0, 0]
    finish(one, out)
    assert_same_index(out, one)
