"""Fixtures of an index with hostile ids, labels and text, and of a copy of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from hostile import build_hostile_index


@pytest.fixture(scope="module")
def hostile_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a hostile task, its checkpoints and its index."""
    return build_hostile_index(tmp_path_factory.mktemp(request.path.stem))


@pytest.fixture
def index_copy(hostile_folder: Path, tmp_path: Path) -> Path:
    """Return a copy of the hostile index, which a test can change."""
    shutil.copytree(hostile_folder / "index", tmp_path / "index")
    return tmp_path / "index"
