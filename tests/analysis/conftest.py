"""Fixtures of a toy index with ids of the task, columns and removed rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks import own_ids
from tracin_ann import InfluenceIndex


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the index `words` and the task file `of_MODULE.py` of a test module."""
    module = request.path.stem.removeprefix("test_")
    path = tmp_path_factory.mktemp(module)
    own_ids.build_indexes(path, f"of_{module}.py", gone=own_ids.GONE)
    return path


@pytest.fixture(scope="module")
def index(folder: Path) -> InfluenceIndex:
    return InfluenceIndex.open(folder / "words", own_ids.make_task(folder, "words"), device="cpu")
