"""An explorer of a small index, shared by the tests of this directory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="FastAPI is not installed")
pytest.importorskip("httpx", reason="httpx is not installed")

from explorer import Place, build_place, serve


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> Place:
    return build_place(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def client(place) -> Iterator[Any]:
    with serve(place.location) as client:
        yield client


@pytest.fixture
def index(place) -> Any:
    return place.open()
