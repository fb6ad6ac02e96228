"""A build on Ray nodes in network namespaces: own addresses and scratch, one shared directory, one node is lost."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import sharing
from hosts import Host, NoRights, end_session, make_hosts
from paths import ROOT, SUPPORT
from sharing import assert_same_index

pytestmark = pytest.mark.slow
N_HOSTS, PORT = 3, 6379
RAY = str(Path(sys.executable).parent / "ray")
PROGRAM = """
import sys, time
import ray
from sharing import CONFIG, NAME
from tracin_ann import RayLauncher, build
if __name__ == "__main__":
    address, out, folder, n_hosts = sys.argv[1:]
    ray.init(address, log_to_driver=False)
    while len({node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}) < int(n_hosts):
        time.sleep(0.1)
    arguments = {"folder": folder, "slow": "yes"}
    build(NAME, out, CONFIG, arguments=arguments, launcher=RayLauncher(workers=int(n_hosts)))
"""


@contextmanager
def start_nodes(hosts: list[Host], environment: dict[str, str]) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Start a Ray node with one CPU on each host; the first one is the head."""
    common = ["--block", "--num-cpus=1", "--object-store-memory=80000000", "--disable-usage-stats"]
    head = f"{hosts[0].address}:{PORT}"
    nodes = []
    try:
        for host in hosts:
            role = (
                ["--head", f"--port={PORT}", "--include-dashboard=false"] if host is hosts[0] else [f"--address={head}"]
            )
            words = [
                str(Path(sys.executable).parent / "ray"),
                "start",
                *common,
                f"--node-ip-address={host.address}",
                *role,
            ]
            nodes.append(host.popen(words, environment))
        yield nodes
    finally:
        for node in nodes:
            end_session(node)


def test_a_host_that_is_lost_during_a_build_changes_nothing(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'tracin-ann[ray]'")
    one, out = sharing.build_in_one_process(tmp_path, slow="yes"), tmp_path / "i"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{SUPPORT}", "RAY_AUTH_MODE": "disabled", "TMPDIR": "/tmp"}
    try:
        with make_hosts(N_HOSTS) as hosts, start_nodes(hosts, environment) as nodes:
            words = [f"{hosts[0].address}:{PORT}", str(out), one.arguments["folder"], str(N_HOSTS)]
            driver = hosts[0].popen([sys.executable, "-c", PROGRAM, *words], environment)
            while driver.poll() is None and len(list(out.glob("features/*.h5"))) < 6:
                time.sleep(0.02)
            end_session(nodes[-1])
            assert len(list(out.glob("features/*.h5"))) < sharing.N_FILES
            assert driver.wait() == 0
    except NoRights as error:
        pytest.skip(str(error))
    assert_same_index(out, one)
