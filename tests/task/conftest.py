"""Fixtures of the tests of tasks."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest


@pytest.fixture(scope="session")
def adapter_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return a run of the Trainer for each kind of adapter (`peft_adapters.AdapterRun`)."""
    adapters, folder = import_module("peft_adapters"), tmp_path_factory.mktemp("adapters")
    return {name: adapters.train_adapter(folder / name, make()) for name, make in adapters.CONFIGS.items()}
