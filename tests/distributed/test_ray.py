"""The launcher of Ray: the contract of launchers on three nodes, and a node that is lost during a build."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import sharing
from invocation import run as run_command
from paths import ROOT, SUPPORT
from sharing import CONFIG, NAME, OneProcess, assert_same_index
from tasks import texts
from tasks.counting import Squares
from tracin_ann import RayLauncher, build
from tracin_ann.cli.build import main
from tracin_ann.errors import MissingPackageError, TaskError, UsageError

pytestmark = pytest.mark.slow
N_NUMBERS = 20
STORE_BYTES = 80 << 20


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Yield a cluster of three nodes of this machine with one CPU each, to which this process is connected."""
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'tracin-ann[ray]'")
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", f"{ROOT}:{SUPPORT}")
        patched.setenv("RAY_USAGE_STATS_ENABLED", "0")
        # Of the nodes; workers have as many threads as CPUs.
        patched.setenv("OMP_NUM_THREADS", "7")
        node = {"num_cpus": 1, "object_store_memory": STORE_BYTES}
        started = cluster_utils.Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
        try:
            for _ in range(2):
                started.add_node(**node)
            ray.init(started.address, log_to_driver=False)
            yield started
        finally:
            ray.shutdown()
            started.shutdown()


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> OneProcess:
    return sharing.build_in_one_process(tmp_path_factory.mktemp("texts"), slow="yes")


def run(launcher: RayLauncher, workers: Any) -> list[tuple[int, int, Any]]:
    return list(launcher.run(workers, range(N_NUMBERS)))


def test_every_unit_is_computed_on_workers_with_their_threads(cluster, tmp_path):
    found = run(RayLauncher(), Squares(tmp_path, seconds=0.4))
    assert sorted(number for number, *_ in found) == list(range(N_NUMBERS))
    assert all(square == number**2 for number, square, _ in found)
    processes = {process for *_, (process, *_) in found}
    assert os.getpid() not in processes and len(processes) > 1
    assert {(device, threads) for *_, (_, device, threads, _) in found} == {(None, 1)}


def test_arrays_of_a_task_can_be_written_to(cluster, tmp_path):
    array = np.zeros(200_000)
    found = run(RayLauncher(workers=1), Squares(tmp_path, array=array))
    assert {total for *_, (*_, total) in found} == {200_000.0} and not array.any()


def test_errors_of_workers_arrive_as_they_are(cluster, tmp_path):
    with pytest.raises(TaskError, match="^6 is even$"):
        run(RayLauncher(), Squares(tmp_path, wrong=6))
    with pytest.raises(ZeroDivisionError, match="7 is odd") as caught:
        run(RayLauncher(), Squares(tmp_path, wrong=7))
    assert "counting.py" in str(caught.value.__cause__)
    with pytest.raises(TaskError, match="^no model: got nothing"):
        run(RayLauncher(), Squares(tmp_path, opens=False))


def test_units_of_a_killed_worker_run_again(cluster, tmp_path):
    found = run(RayLauncher(), Squares(tmp_path, deadly=3))
    assert {number for number, *_ in found} == set(range(N_NUMBERS))
    with pytest.raises(TaskError, match="5 workers died one after another"):
        run(RayLauncher(workers=1), Squares(tmp_path, deadly=0, often=True))


def test_a_worker_that_has_no_place_is_rejected(cluster, tmp_path):
    with pytest.raises(UsageError, match="no place for a worker: got 3 CPUs and 0 GPUs, expected 4 CPUs"):
        run(RayLauncher(num_cpus_per_worker=4), Squares(tmp_path))
    with pytest.raises(UsageError, match="expected 1 CPUs and 1 GPUs"):
        run(RayLauncher(num_gpus_per_worker=1), Squares(tmp_path))


def test_a_node_that_is_lost_during_a_build_changes_nothing(cluster, one, tmp_path):
    node = cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)
    is_lost = False

    def lose_node(stage: str, done: int, total: int) -> None:
        nonlocal is_lost
        if stage == "features" and 0 < done < total and not is_lost:
            is_lost = True
            cluster.remove_node(node, allow_graceful=False)

    launcher = RayLauncher(workers=4)
    build(NAME, tmp_path / "i", CONFIG, arguments=one.arguments, launcher=launcher, progress=lose_node)
    assert is_lost
    assert_same_index(tmp_path / "i", one)


def test_a_task_without_a_name_is_sent_with_its_code(cluster, one, tmp_path):
    rows = texts.make_rows(90, 3)
    task = replace(texts.task(**one.arguments), train_data=lambda: rows)
    build(task, tmp_path / "one", CONFIG)
    build(task, tmp_path / "ray", CONFIG, launcher=RayLauncher())
    assert sharing.read_index(tmp_path / "ray") == sharing.read_index(tmp_path / "one")


def test_the_command(cluster, one, tmp_path):
    words = ["--task", NAME, "--task-arg", f"folder={one.arguments['folder']}", "--out", tmp_path / "i"]
    result = run_command(main, *words, "--launcher", "ray", "--ray-address", cluster.address)
    assert result.exit_code == 0 and "450 rows x checkpoints" in result.output, result.output


def test_a_local_cluster_listens_on_the_loopback_interface_only(tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'tracin-ann[ray]'")
    psutil = pytest.importorskip("psutil")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{SUPPORT}")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    # In a process of its own, because this one may be connected to another cluster.
    program = (
        "import sys; from pathlib import Path; from tasks.counting import Squares; from tracin_ann import RayLauncher\n"
        "for _ in RayLauncher('local', workers=1).run(Squares(Path(sys.argv[1])), range(3)): input()"
    )
    words = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        while not (tmp_path / "opened").exists():
            assert process.poll() is None
            time.sleep(0.1)
        started = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
        listening = {c.laddr.ip for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.pid in started}
        process.communicate(b"\n" * 3)
    assert process.returncode == 0
    assert listening and listening <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}


@pytest.mark.parametrize("changes", [{"workers": 0}, {"num_cpus_per_worker": 0}, {"num_gpus_per_worker": -1}])
def test_impossible_numbers_are_rejected(changes):
    with pytest.raises(UsageError, match=f"bad {next(iter(changes))}"):
        RayLauncher(**changes)


def test_ray_is_optional(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingPackageError, match=r"Ray is not installed.*pip install 'tracin-ann\[ray\]'"):
        RayLauncher()
    words = ["--task", NAME, "--task-arg", f"folder={tmp_path}", "--out", tmp_path / "i", "--launcher", "ray"]
    result = run_command(main, *words)
    assert result.exit_code == 1 and "Ray is not installed" in result.output
    assert not (tmp_path / "i").exists()
