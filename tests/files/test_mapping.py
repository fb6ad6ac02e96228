"""Memory maps without file descriptors: content, read-only memory, lifetime, and errors."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from paths import ROOT
from tracin_ann.files import map_file

DTYPE = np.dtype("<f4")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "numbers").write_bytes(np.arange(6000, dtype=DTYPE).tobytes())
    return tmp_path / "numbers"


def is_mapped(path: Path) -> bool:
    return str(path) in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("first", [0, 1, 1023, 1024, 2500])
def test_a_map_contains_the_numbers_from_its_offset_on(path: Path, first: int) -> None:
    with path.open("rb") as file:
        mapped = map_file(file, 4 * first, (7, 5), DTYPE)
    assert mapped.dtype == DTYPE
    assert np.array_equal(mapped, np.arange(first, first + 35).reshape(7, 5))


def test_a_map_cannot_be_made_writable(path: Path) -> None:
    with path.open("rb") as file:
        mapped = map_file(file, 0, (6000,), DTYPE)
    assert not mapped.flags.writeable
    with pytest.raises(ValueError, match="WRITEABLE"):
        mapped.flags.writeable = True


def test_a_map_lasts_as_long_as_its_arrays_and_uses_no_descriptor(path: Path) -> None:
    descriptors = os.listdir("/proc/self/fd")
    with path.open("rb") as file:
        mapped = map_file(file, 0, (60, 100), DTYPE)
    part = mapped[7:9, 3:]
    del mapped
    assert os.listdir("/proc/self/fd") == descriptors
    assert is_mapped(path) and part[1, 0] == 803
    del part
    assert not is_mapped(path)


def test_a_file_that_cannot_be_mapped_is_a_system_error(path: Path) -> None:
    with path.open("rb") as file, pytest.raises(OSError, match=os.strerror(errno.ENOMEM)) as found:
        map_file(file, 0, (2**60,), DTYPE)
    assert found.value.errno == errno.ENOMEM


def test_a_map_may_be_in_use_when_the_process_ends(path: Path) -> None:
    code = (
        "import numpy as np, sys\nfrom threading import Thread\nfrom tracin_ann.files import map_file\n"
        "with open(sys.argv[1], 'rb') as file:\n    mapped = map_file(file, 0, (6000,), np.dtype('<f4'))\n"
        "def read():\n    while True:\n        mapped.sum()\nThread(target=read, daemon=True).start()\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, str(path)], env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
