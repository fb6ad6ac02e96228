"""Atomic writes leave the old file or the complete new one, and leftovers of killed writers are removed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from paths import ROOT
from tracin_ann.files import atomic_path, atomic_write, remove_temporaries
from trees import list_names

DIE_WHILE_WRITING = """
import os, sys
from pathlib import Path
from tracin_ann.files import atomic_write
with atomic_write(Path(sys.argv[1])) as file:
    file.write(b"half")
    file.flush()
    os._exit(9)
"""


def write(path: Path, data: bytes) -> None:
    with atomic_write(path) as file:
        file.write(data)


def die_while_writing(path: Path) -> None:
    root = ROOT
    done = subprocess.run([sys.executable, "-c", DIE_WHILE_WRITING, str(path)], cwd=root, check=False)
    assert done.returncode == 9


def test_a_write_replaces_the_complete_file(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write(path, b"the older and longer text")
    write(path, b"new")
    assert path.read_bytes() == b"new"
    assert list_names(tmp_path) == ["a.bin"]


def test_new_files_have_the_permissions_of_the_umask(tmp_path: Path) -> None:
    ordinary = tmp_path / "ordinary"
    ordinary.write_bytes(b"")
    write(tmp_path / "atomic", b"")
    assert (tmp_path / "atomic").stat().st_mode == ordinary.stat().st_mode


@pytest.mark.parametrize("failing", ["replace", "fsync"])
def test_a_failure_before_the_rename_leaves_the_old_file_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = tmp_path / "a.bin"
    write(path, b"old")

    def fail(*_: object) -> None:
        raise OSError("disk gone")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="disk gone"):
        write(path, b"new")
    assert path.read_bytes() == b"old"
    assert list_names(tmp_path) == ["a.bin"]


def test_an_exception_in_the_block_removes_the_temporary_file(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), atomic_write(tmp_path / "a.bin") as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert list_names(tmp_path) == []


def test_a_temporary_file_has_the_directory_and_suffix_of_the_target(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "a.faiss") as temporary:
        assert (temporary.parent, temporary.suffix) == (tmp_path, ".faiss")
        temporary.write_bytes(b"x")
        assert not (tmp_path / "a.faiss").exists()
    assert list_names(tmp_path) == ["a.faiss"]


def test_data_is_synced_before_the_rename_and_the_directory_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor: int) -> None:
        calls.append("directory" if Path(f"/proc/self/fd/{descriptor}").resolve() == tmp_path.resolve() else "file")
        fsync(descriptor)

    def record_replace(source: Path, target: Path) -> None:
        assert Path(source).read_bytes() == b"data"
        calls.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    write(tmp_path / "a.bin", b"data")
    assert calls == ["file", "replace", "directory"]


def test_a_temporary_file_of_a_killed_writer_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write(path, b"old")
    die_while_writing(path)
    assert path.read_bytes() == b"old"
    assert len(list_names(tmp_path)) == 2
    assert len(remove_temporaries(tmp_path)) == 1
    assert list_names(tmp_path) == ["a.bin"]


def test_temporary_files_of_running_writers_and_other_files_are_not_removed(tmp_path: Path) -> None:
    foreign = tmp_path / ".tracin-tmp-00000000-1-abc.h5"
    foreign.write_bytes(b"")
    with atomic_write(tmp_path / "a.bin") as file:
        assert remove_temporaries(tmp_path) == []
        file.write(b"x")
    os.utime(foreign, (0, 0))
    assert remove_temporaries(tmp_path) == [foreign]
    assert list_names(tmp_path) == ["a.bin"]


def test_cleaning_a_missing_directory_does_nothing(tmp_path: Path) -> None:
    assert remove_temporaries(tmp_path / "none") == []
