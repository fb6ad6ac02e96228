"""Queries over the shards of an index by actors on three nodes of a Ray cluster, while actors and nodes are lost."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from test_shard_search import EXACT, OPTIONS, open_named, strip, workers

from shard_folder import QUERIES
from tracin_ann import InfluenceIndex, RayLauncher
from tracin_ann.cli.query import main
from tracin_ann.results import Answer

pytestmark = pytest.mark.slow
ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'tracin-ann[ray]'")

LONG_S = 120


@pytest.fixture(scope="module")
def sharded(folder: Path, cluster: Any) -> Iterator[InfluenceIndex]:
    with open_named(folder, "sharded", RayLauncher()) as index:
        yield index


def find_node(index: InfluenceIndex, shard: int) -> str:
    """Return the id of the node of a shard's actor."""
    worker: Any = workers(index)[shard]
    node: str = ray.get(worker.actor.__ray_call__.remote(lambda actor: ray.get_runtime_context().get_node_id()))
    return node


def assert_complete(index: InfluenceIndex, expected: list[Answer]) -> None:
    found = index.query(range(QUERIES), options=OPTIONS)
    assert strip(found) == expected
    assert {(answer.shards, answer.missing_shards) for answer in found} == {((0, 1), ())}


def test_a_lost_actor_or_node_loses_no_query(cluster: Any, folder: Path, sharded: InfluenceIndex) -> None:
    expected = strip(open_named(folder, "single").query(range(QUERIES), options=OPTIONS))
    assert_complete(sharded, expected)
    before: Any = workers(sharded)[1]
    ray.kill(before.actor)
    assert_complete(sharded, expected)
    assert workers(sharded)[1] is not before
    nodes = [find_node(sharded, shard) for shard in range(2)]
    # With one CPU on each of three nodes, at least one of two actors is not on the head node.
    lost = next(node for node in cluster.worker_nodes if node.node_id in nodes)
    orphan = workers(sharded)[nodes.index(lost.node_id)]
    cluster.remove_node(lost, allow_graceful=False)
    end_s = time.monotonic() + LONG_S
    while orphan in workers(sharded):
        # The actor may answer until it notices the end of its node.
        assert time.monotonic() < end_s
        assert_complete(sharded, expected)
    assert lost.node_id not in [find_node(sharded, shard) for shard in range(2)]


def test_actors_compute_exact_scores(folder: Path, sharded: InfluenceIndex) -> None:
    (expected,) = open_named(folder, "single").query([3], options=EXACT)
    (found,) = sharded.query([3], options=EXACT)
    assert [hit.row for hit in found.hits] == [hit.row for hit in expected.hits]
    assert [hit.score for hit in found.hits] == pytest.approx([hit.score for hit in expected.hits], rel=1e-5)


def test_the_command_starts_actors(cluster: Any, folder: Path, sharded: InfluenceIndex, tmp_path: Path) -> None:
    # There are processors for one set of workers; the fixture starts no other one after this test.
    sharded.close()
    arguments = [f"{folder}/sharded", "--task", f"{folder}/shard_task.py:task", "--ids", "0", "--device", "cpu"]
    options = ["--search", "index", "--shard-workers", "--ray-address", "auto", "--format", "jsonl", "--quiet"]
    # Ray prints to stdout that the node of another test was lost.
    output = tmp_path / "hits.jsonl"
    result = CliRunner().invoke(main, [*arguments, *options, "--output", str(output)])
    assert result.exit_code == 0, result.output
    (line,) = map(json.loads, output.read_text(encoding="utf-8").splitlines())
    (expected,) = open_named(folder, "single").query([0], options=replace(OPTIONS, k=10)).lines()
    assert line == json.loads(json.dumps(expected)) | {"shards": [0, 1]}
