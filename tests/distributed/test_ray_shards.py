"""Queries over the shards of an index by actors of a Ray cluster of this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_shard_search import EXACT, OPTIONS, open_named, strip, workers

from shard_folder import QUERIES
from tracin_ann import InfluenceIndex, RayLauncher
from tracin_ann.distributed import ShardOptions

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]
ray = pytest.importorskip("ray", reason="Ray is not installed")


@pytest.fixture(scope="module")
def sharded(folder: Path) -> Iterator[InfluenceIndex]:
    index = open_named(folder, "sharded")
    index.start_workers(ShardOptions(), RayLauncher("local"))
    yield index
    index.close()
    ray.shutdown()


def test_actors_answer_as_one_process_also_after_a_kill(folder: Path, sharded: InfluenceIndex) -> None:
    single = open_named(folder, "single")
    expected = strip(single.query(range(QUERIES), options=OPTIONS))
    found = sharded.query(range(QUERIES), options=OPTIONS)
    assert strip(found) == expected
    assert {(answer.shards, answer.missing_shards) for answer in found} == {((0, 1), ())}
    before: Any = workers(sharded)[1]
    ray.kill(before.actor)
    found = sharded.query(range(QUERIES), options=OPTIONS)
    assert strip(found) == expected and {answer.missing_shards for answer in found} == {()}
    assert workers(sharded)[1] is not before


def test_actors_compute_exact_scores(folder: Path, sharded: InfluenceIndex) -> None:
    (expected,) = open_named(folder, "single").query([3], options=EXACT)
    (found,) = sharded.query([3], options=EXACT)
    assert [hit.row for hit in found.hits] == [hit.row for hit in expected.hits]
    assert [hit.score for hit in found.hits] == pytest.approx([hit.score for hit in expected.hits], rel=1e-5)
