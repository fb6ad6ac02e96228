"""Fuzzing of the readers of all file formats: they read an altered file or reject it. `make fuzz` runs more cases."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

import fuzz

CASES = 250
NAMES = (
    *("manifest", "build record", "features", "canaries", "columns", "removed"),
    *("ivf.faiss", "ivf.npz", "ivf-centroids.npy", "ivf.json"),
)


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, fuzz.Reader]:
    return fuzz.build_readers(tmp_path_factory.mktemp("fuzz"))


def test_every_reader_is_fuzzed(readers: dict[str, fuzz.Reader]) -> None:
    assert tuple(readers) == NAMES
    for reader in readers.values():
        reader.read()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_altered_files_are_read_or_rejected(readers: dict[str, fuzz.Reader], name: str) -> None:
    assert fuzz.find_failures(name, readers[name], range(CASES)) == []


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_failures_are_detected(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(100))

    def bad() -> None:
        content = path.read_bytes()
        if len(content) < 50:
            raise KeyError("short")
        if content.count(0) < 60:
            os.kill(os.getpid(), signal.SIGKILL)

    wrong = fuzz.find_failures("bad", fuzz.Reader(path, bad), range(300))
    assert any("KeyError" in line for line in wrong)
    assert any("ended with status" in line for line in wrong)
    assert path.read_bytes() == bytes(100)
