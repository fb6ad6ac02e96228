"""What several tests share: a folder of indexes with and without shards, and a Ray cluster on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from paths import ROOT, SUPPORT
from shard_folder import make_shard_folder
from sharing import STORE_BYTES


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a task and its indexes `sharded` and `single`."""
    return make_shard_folder(tmp_path_factory.mktemp("shards"))


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
