"""Indexes built by an earlier version open, verify and answer as they did (format 4, features of version 3)."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tracin_ann import BuildConfig, InfluenceIndex, QueryOptions, Task, build
from tracin_ann.operations import verify
from tracin_ann.task import load_task

GOLDEN = Path(__file__).parent / "golden"
ANSWERS = json.loads((GOLDEN / "answers.json").read_text(encoding="utf-8"))
CONFIG = BuildConfig(dim=16, batch_size=8, device="cpu", partition_rows=16)


@pytest.fixture
def task() -> Iterator[Task]:
    before = list(sys.path)
    yield load_task(f"{GOLDEN / 'task.py'}:task")
    sys.path[:] = before


@pytest.mark.parametrize("kind", ["flat", "ivf"])
def test_an_index_of_an_earlier_version_gives_the_same_answers(kind: str, task: Task, tmp_path: Path) -> None:
    folder = tmp_path / kind
    shutil.copytree(GOLDEN / kind, folder)
    assert verify(folder).damage == ()
    index = InfluenceIndex.open(folder, task, device="cpu")
    lines = index.query(range(6), options=QueryOptions(k=4)).lines()
    for line, expected in zip(lines, ANSWERS[kind], strict=True):
        ids = {side: [hit["id"] for hit in line[side]] for side in ("proponents", "opponents")}
        assert ids == {side: [hit["id"] for hit in expected[side]] for side in ("proponents", "opponents")}
        for side in ("proponents", "opponents"):
            scores = [hit["score"] for hit in line[side]]
            assert scores == pytest.approx([hit["score"] for hit in expected[side]], rel=1e-4)


def test_the_same_build_gives_the_same_features(task: Task, tmp_path: Path) -> None:
    build(task, tmp_path / "flat", CONFIG)
    for old in sorted((GOLDEN / "flat" / "features").iterdir()):
        assert old.name in {path.name for path in (tmp_path / "flat" / "features").iterdir()}
    old = InfluenceIndex.open(GOLDEN / "flat", task, device="cpu").view().take(range(24))
    new = InfluenceIndex.open(tmp_path / "flat", task, device="cpu").view().take(range(24))
    assert new == pytest.approx(old, abs=1e-3 * float(abs(old).max()))
