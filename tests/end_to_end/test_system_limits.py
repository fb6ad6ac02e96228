"""Too few file descriptors or too little memory: reported as such; no file is reported as damaged or removed."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch
from click.testing import CliRunner

from descriptors import limit_descriptors
from paths import ROOT
from tasks.toy import CONFIG, Toy, make_rows, make_toy_task, save_checkpoints
from tracin_ann import InfluenceIndex, Task, build
from tracin_ann.cli.verify import main as verify_command
from tracin_ann.device import import_faiss
from tracin_ann.errors import DamagedIndexError
from tracin_ann.features.canaries import read_generation_canaries
from tracin_ann.files import arrays, json_records, mapping
from tracin_ann.files.opening import find_system_error, report_damage
from tracin_ann.operations.removal import remove
from tracin_ann.operations.verification import repair, verify
from tracin_ann.store.generations import generation_folder
from tracin_ann.store.manifest import Manifest
from trees import read_contents


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Task]:
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    model = Toy()
    fields: dict[str, Any] = {"train_data": lambda: make_rows(70), "columns": lambda row: {"label": row[1]}}
    task = make_toy_task(folder, model, checkpoints=save_checkpoints(model, folder), **fields)
    build(task, folder / "index", replace(CONFIG, index="ivf", partition_rows=32, dim=8))
    remove(folder / "index", [3])
    return folder / "index", task


@pytest.fixture
def index(original: tuple[Path, Task], tmp_path: Path) -> Path:
    shutil.copytree(original[0], tmp_path / "index")
    return tmp_path / "index"


@pytest.mark.slow
def test_without_file_descriptors_no_file_is_damaged(index: Path, original: tuple[Path, Task]) -> None:
    """At any number of free descriptors, an operation fails with EMFILE or succeeds."""
    before = read_contents(index)
    verify(index)
    InfluenceIndex.open(index, original[1]).query([0])
    acts: list[Callable[[], object]] = [
        lambda: verify(index),
        lambda: repair(index, original[1]),
        lambda: InfluenceIndex.open(index, original[1]).query([0]),
        lambda: remove(index, [3]),
    ]
    for act in acts:
        refused = 0
        for n in range(40):
            try:
                with limit_descriptors(n):
                    act()
            except OSError as error:
                assert error.errno == errno.EMFILE, error
                refused += 1
        assert refused
        assert read_contents(index) == before
    assert verify(index).damage == ()


LIMITED = """
import resource, sys
from click.testing import CliRunner
from tracin_ann.cli.verify import main
import tracin_ann.operations.verification, faiss
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[2]), int(sys.argv[2])))
main([sys.argv[1], "--repair"])
"""


@pytest.mark.parametrize("n", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (4, 5))])
def test_the_command_reports_missing_resources_in_one_line(index: Path, n: int) -> None:
    before = read_contents(index)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", LIMITED, str(index), str(n)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert "got Too many open files (EMFILE)" in line and "raise the limit of open files" in line
    assert read_contents(index) == before


LACK = [
    OSError(errno.EMFILE, os.strerror(errno.EMFILE)),
    OSError(errno.ENFILE, os.strerror(errno.ENFILE)),
    OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
    MemoryError(),
    OSError("Unable to open file (unable to open file: errno = 24, error message = 'Too many open files')"),
    RuntimeError("Error in FileIOReader: could not open x for reading: Too many open files"),
]


@pytest.mark.parametrize("error", LACK, ids=lambda error: type(error).__name__ + str(error)[:12])
@pytest.mark.parametrize("place", ["h5py", "a map", "arrays", "faiss", "JSON"])
def test_a_lack_of_resources_is_detected_in_the_errors_of_any_library(
    index: Path, original: tuple[Path, Task], monkeypatch: pytest.MonkeyPatch, error: Exception, place: str
) -> None:
    def lacking(*given: object, **more: object) -> object:
        raise error

    before, faiss = read_contents(index), import_faiss()
    owner, name = {
        "h5py": (h5py, "File"),
        "a map": (mapping, "map_pages"),
        "arrays": (arrays, "read_array"),
        "faiss": (faiss, "read_index"),
        "JSON": (json_records, "open_regular"),
    }[place]
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, lacking)
        with pytest.raises(OSError) as found:
            verify(index)
        assert found.value.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
        assert str(index) in str(found.value.filename)
        done = CliRunner().invoke(verify_command, [str(index), "--repair"])
        assert done.exit_code == 1
    assert read_contents(index) == before and verify(index).damage == ()


def test_a_system_error_is_found_behind_another_error() -> None:
    try:
        try:
            raise OSError(errno.EMFILE, "too many")
        except OSError:
            raise KeyError("id") from None
    except KeyError as error:
        found = find_system_error(error, Path("a"))
    assert found is not None and (found.errno, found.filename) == (errno.EMFILE, "a")
    assert find_system_error(ValueError("odd"), Path("a")) is None
    with (
        pytest.raises(DamagedIndexError, match="cannot read a: got odd, expected b; c"),
        report_damage(Path("a"), "b", "c"),
    ):
        raise ValueError("odd")
    with pytest.raises(PermissionError), report_damage(Path("a"), "b", "c"):
        raise PermissionError(errno.EACCES, "no")


def test_canaries_stay_if_descriptors_run_out(index: Path, original: tuple[Path, Task]) -> None:
    manifest = Manifest.read(index)
    own = generation_folder(index, manifest.generation)
    with limit_descriptors(0), pytest.raises(OSError, match="Too many open files"):
        read_generation_canaries(own, manifest)
    assert len(read_generation_canaries(own, manifest)) == 2
