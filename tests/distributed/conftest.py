"""The folder of the tests of queries over shards."""

from __future__ import annotations

from pathlib import Path

import pytest

from shard_folder import make_shard_folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a task and its indexes `sharded` and `single`."""
    return make_shard_folder(tmp_path_factory.mktemp("shards"))
