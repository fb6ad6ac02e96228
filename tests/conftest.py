"""Shared fixtures and settings: threads, seeds, devices, the data directory, Hypothesis profiles."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

from paths import ROOT as REPOSITORY

# Before torch and FAISS start their thread pools: parallel test processes must not all use every core.
# With too few cores, waiting threads make these small operations a thousand times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

if "OMP_NUM_THREADS" in os.environ:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


# No deadline and no database: a slow machine or an earlier run must not decide whether a test passes.
settings.register_profile(
    "local", deadline=None, database=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("ci", settings.get_profile("local"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Start every test with the same global random state, so that results do not depend on order or selection."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _forget_task_files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Forget the modules of task files that a test writes, so that tests of one process can use the same name."""
    before, path = set(sys.modules), list(sys.path)
    yield
    place = str(tmp_path_factory.getbasetemp().resolve())
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(place):
            del sys.modules[name]
    sys.path[:] = [entry for entry in sys.path if entry in path or not entry.startswith(place)]


@pytest.fixture
def generator() -> torch.Generator:
    """Return a seeded CPU generator."""
    return torch.Generator().manual_seed(20)


@pytest.fixture(scope="session", params=["cpu", "accelerator"])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Return each type of device; an accelerator that does not exist is skipped."""
    if request.param == "cpu":
        yield torch.device("cpu")
    elif torch.cuda.is_available():
        yield torch.device("cuda")
    else:
        pytest.skip("no accelerator on this machine")


@pytest.fixture
def emulated_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let builds use bfloat16 on a CPU that has no arithmetic for it."""
    monkeypatch.setattr("tracin_ann.build_job.require_native_bf16", lambda device: None)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Return the directory with mnist.npz etc.: $TRACIN_ANN_DATA, or ../shared/data beside the repository."""
    found = Path(os.environ.get("TRACIN_ANN_DATA") or REPOSITORY.parent / "shared" / "data")
    if not found.is_dir():
        pytest.skip(f"no data directory {found}; set TRACIN_ANN_DATA to one")
    return found
