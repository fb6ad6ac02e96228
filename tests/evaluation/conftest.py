"""Fixtures of an index of the task that is retrained within milliseconds."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.retrained import CLASSES, WIDTH, N, make_task
from tracin_ann import BuildConfig, InfluenceIndex, build

D = 32
TASK = """
import sys
sys.path[:0] = {paths!r}
from tasks.retrained import make_task as made
from tracin_ann import Task
def task(folder) -> Task:
    return made(folder)
def without(folder) -> Task:
    return made(folder, retrain=None)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the index `index` and the task file `task.py`."""
    path = tmp_path_factory.mktemp("evaluated")
    build(make_task(path), path / "index", BuildConfig(dim=D, device="cpu", dtype="float32", index="flat"))
    (path / "of_evaluation.py").write_text(TASK.format(paths=[str(Path(__file__).parent.parent / "support")]))
    return path


@pytest.fixture(scope="module")
def index(folder: Path) -> InfluenceIndex:
    opened = InfluenceIndex.open(folder / "index", make_task(folder), device="cpu")
    assert (len(opened), D < 3 * WIDTH * CLASSES) == (N, True)
    return opened
