"""The contract of launchers: all results, units of dead workers run again, errors of workers arrive as they are."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import sharing
from paths import ROOT, SUPPORT
from sharing import CONFIG, NAME, OneProcess, assert_same_index
from tasks import texts
from tasks.counting import Squares
from tracin_ann import ProcessLauncher, RayLauncher, Task, build
from tracin_ann.distributed import Launcher, ThisProcess
from tracin_ann.errors import TaskError, UsageError

SQUARES = {number: number**2 for number in range(20)}


def run(launcher: Launcher, workers: Any) -> list[tuple[int, int, Any]]:
    return list(launcher.run(workers, range(20)))


def make_processes() -> ProcessLauncher:
    return ProcessLauncher(["cpu", "cpu"])


every_launcher = pytest.mark.parametrize(
    "make", [ThisProcess, pytest.param(make_processes, marks=pytest.mark.slow)], ids=["this process", "processes"]
)


@every_launcher
def test_every_unit_is_computed(make: Callable[[], Launcher], tmp_path):
    found = run(make(), Squares(tmp_path))
    assert sorted((number, square) for number, square, _ in found) == list(SQUARES.items())
    assert list(make().run(Squares(tmp_path), [])) == []


@every_launcher
def test_the_error_of_a_worker_ends_the_run(make: Callable[[], Launcher], tmp_path):
    with pytest.raises(TaskError, match="^6 is even$"):
        run(make(), Squares(tmp_path, wrong=6))
    with pytest.raises(TaskError, match="^no model: got nothing"):
        run(make(), Squares(tmp_path, opens=False))


@every_launcher
def test_an_error_of_the_code_of_the_task_keeps_its_place(make: Callable[[], Launcher], tmp_path):
    with pytest.raises((ZeroDivisionError, RuntimeError), match="7 is odd$") as caught:
        run(make(), Squares(tmp_path, wrong=7))
    places = "".join(map(str, (caught.getrepr(), caught.value.__cause__)))
    assert "counting.py" in places


@every_launcher
def test_an_error_that_cannot_be_unpickled_arrives_as_text(make: Callable[[], Launcher], tmp_path):
    with pytest.raises((OSError, RuntimeError), match="store cannot be reached$"):
        run(make(), Squares(tmp_path, wrong=19))


@pytest.mark.slow
def test_processes_have_their_devices_and_share_the_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    # A second device that every machine has; a build accepts only CPUs and GPUs.
    monkeypatch.setattr("tracin_ann.distributed.processes.resolve_device", torch.device)
    found = run(ProcessLauncher(["cpu", "meta"]), Squares(tmp_path, seconds=0.4))
    assert {process for *_, (process, *_) in found}.isdisjoint({os.getpid()})
    assert {(device, threads) for *_, (_, device, threads, _) in found} == {("cpu", 3), ("meta", 3)}


@pytest.mark.slow
def test_units_of_a_killed_process_run_again(tmp_path):
    found = run(make_processes(), Squares(tmp_path, deadly=3))
    assert {number: square for number, square, _ in found} == SQUARES
    assert len({process for *_, (process, *_) in found}) >= 2


@pytest.mark.slow
def test_a_unit_that_kills_its_process_each_time_ends_the_run(tmp_path):
    with pytest.raises(TaskError, match="5 workers died one after another: got signal SIGKILL"):
        run(ProcessLauncher(["cpu"]), Squares(tmp_path, deadly=0, often=True))


def test_workers_that_cannot_be_pickled_are_rejected(tmp_path):
    with pytest.raises(UsageError, match="cannot be sent to other processes.*pass the task as file.py:name"):
        run(make_processes(), Squares(tmp_path, array=lambda: None))
    with pytest.raises(UsageError, match="no devices"):
        ProcessLauncher([])
    with pytest.raises(UsageError, match="no devices: got 'cpu', expected a list"):
        ProcessLauncher("cpu")


@pytest.mark.parametrize("address", ["127.0.0.1:9", "[::1]:9", "127.0.0.1:999999"])
def test_an_address_without_a_cluster_is_rejected_at_once(address, tmp_path):
    """Ray itself waits for minutes."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'tracin-ann[ray]'")
    with pytest.raises(UsageError, match=f"no Ray cluster at {re.escape(address)}: got ConnectionError: .*ray start"):
        run(RayLauncher(address), Squares(tmp_path))


@pytest.mark.parametrize("device", ["cuda:99", "mps", "gpu"])
def test_processes_on_devices_that_do_not_exist_are_rejected(device, tmp_path):
    with pytest.raises(UsageError, match=f"(no such GPU|unknown device): got '{device}'"):
        run(ProcessLauncher(["cpu", device]), Squares(tmp_path))


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> OneProcess:
    return sharing.build_in_one_process(tmp_path_factory.mktemp("texts"))


@every_launcher
def test_a_launched_build_is_the_index_of_one_process(make: Callable[[], Launcher], one, tmp_path):
    reports: list[tuple[int, int]] = []
    report = build(
        NAME,
        tmp_path / "i",
        CONFIG,
        arguments=one.arguments,
        launcher=make(),
        progress=lambda stage, done, total: reports.append((done, total)) if stage == "features" else None,
    )
    assert_same_index(tmp_path / "i", one)
    total = 3 * texts.N_TRAIN
    assert report.rows_extracted == total and reports[-1] == (total, total)
    # A finished index needs no worker.
    assert build(NAME, tmp_path / "i", CONFIG, arguments=one.arguments, launcher=make()).rows_extracted == 0


def test_a_task_without_a_name_and_with_one_module_can_be_launched(one, tmp_path):
    module = texts.model()
    task = replace(texts.task(**one.arguments), model=lambda: module)
    build(task, tmp_path / "a", CONFIG)
    build(task, tmp_path / "b", CONFIG, launcher=ThisProcess())
    assert sharing.read_index(tmp_path / "a") == sharing.read_index(tmp_path / "b")


def test_a_launched_build_of_an_invalid_task_writes_nothing(one, tmp_path):
    task = replace(texts.task(**one.arguments), loss=lambda model, batch: torch.zeros(3))
    with pytest.raises(TaskError):
        build(task, tmp_path / "i", CONFIG, launcher=ThisProcess())
    assert not (tmp_path / "i").exists()


def test_a_launched_build_of_a_task_that_cannot_be_pickled_leaves_nothing(one, tmp_path):
    task = replace(texts.task(**one.arguments), train_data=lambda: list(texts.train_data()))
    with pytest.raises(UsageError, match="cannot be sent to other processes"):
        build(task, tmp_path / "i", CONFIG, launcher=make_processes())
    assert not (tmp_path / "i").exists()


class Elsewhere(Launcher):
    """Runs units in this process, but their files disappear, as on another machine without a shared directory."""

    def __init__(self, out: Path, *, keeps_directory: bool) -> None:
        self.out, self.keeps_directory = out, keeps_directory

    def run(self, open_worker: Any, units: Any) -> Any:
        if not self.keeps_directory:
            self.out.rename(self.out.with_name("moved"))
        yield from ThisProcess().run(open_worker, units)
        for path in (self.out / "features").iterdir():
            path.unlink()


@pytest.mark.parametrize(
    ("keeps", "message"),
    [(True, "have not written all files.*got 24 of 24 files missing"), (False, "does not exist on")],
)
def test_a_directory_that_workers_do_not_share_is_rejected(keeps, message, one, tmp_path):
    with pytest.raises(UsageError, match=message):
        build(
            NAME,
            tmp_path / "i",
            CONFIG,
            arguments=one.arguments,
            launcher=Elsewhere(tmp_path / "i", keeps_directory=keeps),
        )


@pytest.mark.slow
def test_a_launched_build_extends_and_repairs_an_index(one, tmp_path):
    def make_task(n_rows: int) -> Task:
        return replace(texts.task(**one.arguments), train_data=lambda: texts.make_rows(190, 1)[:n_rows])

    for launcher, out in ((None, tmp_path / "plain"), (ThisProcess(), tmp_path / "launched")):
        build(make_task(130), out, CONFIG, launcher=launcher)
        assert build(make_task(190), out, replace(CONFIG, append=True), launcher=launcher).rows_extracted == 3 * 70
        sorted((out / "features").iterdir())[5].unlink()
        assert build(make_task(190), out, CONFIG, launcher=launcher).rows_extracted == CONFIG.partition_rows
    assert sharing.read_index(tmp_path / "launched") == sharing.read_index(tmp_path / "plain")


@pytest.mark.slow
def test_processes_end_with_the_command_that_started_them(tmp_path):
    psutil = pytest.importorskip("psutil")
    program = (
        "import pathlib, sys; from tasks.counting import Squares; from tracin_ann import ProcessLauncher\n"
        "if __name__ == '__main__':\n"
        "    list(ProcessLauncher(['cpu']).run(Squares(pathlib.Path(sys.argv[1]), seconds=600), range(3)))"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{SUPPORT}"}
    command = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], env=environment)
    while not (tmp_path / "opened").exists():
        assert command.poll() is None
        time.sleep(0.05)
    workers = psutil.Process(command.pid).children(recursive=True)
    command.kill()
    command.wait()
    assert workers
    assert psutil.wait_procs(workers, timeout=60)[1] == []
