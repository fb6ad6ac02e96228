"""Concurrent writers and readers, killed writers and full disks: the lock, and each writer of a file."""

from __future__ import annotations

import errno
import importlib
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import zoo
from commands import collect_answers, make_config, task
from faults import Crash, Fault, Watch
from paths import ROOT, SUPPORT
from tasks.toy import Toy
from tracin_ann import InfluenceIndex, build
from tracin_ann.cli.build import main as build_command
from tracin_ann.errors import BusyIndexError, DamagedIndexError, attach_path
from tracin_ann.features.canaries import Canaries, write_canaries
from tracin_ann.files import atomic_write, make_directory, remove_temporaries, save_array
from tracin_ann.files import durable as files
from tracin_ann.operations.removal import remove
from tracin_ann.search.inverted_lists import InvertedLists
from tracin_ann.store import FeatureBlock
from tracin_ann.store import exclusions as absent
from tracin_ann.store.arrays import make_text_array
from tracin_ann.store.columns import RowTable, write_columns
from tracin_ann.store.feature_file import write_feature_file
from tracin_ann.store.generations import generation_folder, take_lease
from tracin_ann.store.locks import WRITER, Lease, hold_writer_lock, lock_unless_read
from tracin_ann.store.manifest import MANIFEST, Manifest
from tracin_ann.store.stored_rows import FileHeader
from trees import list_names

BUILD, REMOVAL = (importlib.import_module(f"tracin_ann.{name}") for name in ("build_job", "operations.removal"))


@pytest.fixture
def finished_index(tmp_path: Path) -> Path:
    """Return a finished index of ten rows."""
    build(task(10), tmp_path / "index", make_config("flat"))
    return tmp_path / "index"


# Two writers


@pytest.mark.parametrize("other", ["is at it", "is done"])
def test_one_of_two_simultaneous_builds_in_a_new_directory_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    """The other build starts between the check of the directory and its creation."""
    out = tmp_path / "index"
    tune = BUILD.BuildJob.tune

    def overtaken(work: object, *given: object) -> object:
        monkeypatch.undo()
        if other == "is done":
            build(replace(task(10), model=Toy), out, make_config("flat"))
        else:
            out.mkdir()
            held.enter_context(hold_writer_lock(out))
        return tune(work, *given)

    with ExitStack() as held:
        monkeypatch.setattr(BUILD.BuildJob, "tune", overtaken)
        with pytest.raises(BusyIndexError, match="is being written|another build has started"):
            build(task(10), out, make_config("flat"))
    assert build(task(10), out, make_config("flat")).rows_extracted == (0 if other == "is done" else 20)
    assert WRITER not in list_names(out)


STAY = """
import os, sys, time
from pathlib import Path
from tracin_ann.store.locks import hold_writer_lock
reader, writer = os.pipe()
with hold_writer_lock(Path(sys.argv[1])):
    if os.fork() == 0:
        os.close(1)
        os.write(writer, b"forked")  # a fork has released its descriptors by now
        time.sleep(60)
        os._exit(0)
    os.read(reader, 6)
    print("held", flush=True)
    time.sleep(60)
"""


def test_processes_forked_by_a_killed_writer_do_not_hold_its_lock(finished_index: Path) -> None:
    running = subprocess.Popen(
        [sys.executable, "-c", STAY, str(finished_index)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )
    try:
        assert running.stdout is not None and running.stdout.readline() == "held\n"
        with pytest.raises(BusyIndexError, match=f"process {running.pid}"), hold_writer_lock(finished_index):
            pass
        os.kill(running.pid, signal.SIGKILL)
        running.wait()
        with hold_writer_lock(finished_index):
            pass
    finally:
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()
        running.stdout.close()  # type: ignore[union-attr]


def test_a_writer_that_cannot_remove_its_lock_file_releases_the_lock(finished_index: Path) -> None:
    with Watch(finished_index) as watch:
        with hold_writer_lock(finished_index):
            pass
        (unlinked,) = (call.number for call in watch.calls if call.kind == "unlink")
    with (
        Watch(finished_index, fault=Fault(unlinked, errno.EIO)),
        pytest.raises(OSError, match="Input/output"),
        hold_writer_lock(finished_index),
    ):
        pass
    with hold_writer_lock(finished_index):
        pass
    assert WRITER not in list_names(finished_index)


def test_a_writer_killed_before_it_releases_its_removed_lock_blocks_no_other_writer(finished_index: Path) -> None:
    with Watch(finished_index) as watch:
        with hold_writer_lock(finished_index):
            pass
        last = len(watch.calls) - 1
    for number in range(last + 1):
        with Watch(finished_index, fault=Fault(number)), pytest.raises(Crash), hold_writer_lock(finished_index):
            pass
        with hold_writer_lock(finished_index):
            pass
        assert WRITER not in list_names(finished_index)


def test_the_check_for_readers_opens_the_file_for_writing(
    finished_index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS refuses an exclusive lock on a file that is open for reading only."""
    path, flags, opened = generation_folder(finished_index, 1) / MANIFEST, [], os.open

    def noted(path: Path, flag: int, *rest: int) -> int:
        flags.append(flag)
        return opened(path, flag, *rest)

    monkeypatch.setattr(os, "open", noted)
    with lock_unless_read(path) as nobody_reads:
        assert nobody_reads
    assert flags[0] & os.O_RDWR
    lease = Lease(path)
    with lock_unless_read(path) as nobody_reads:
        assert not nobody_reads
    lease.close()

    def refused(*given: object) -> int:
        raise PermissionError(errno.EACCES, "not yours", str(path))

    monkeypatch.setattr(os, "open", refused)
    with lock_unless_read(path) as nobody_reads:
        assert not nobody_reads


# Concurrent readers


def test_readers_that_open_while_generations_change_find_a_complete_one(finished_index: Path) -> None:
    found: list[int] = []
    wrong: list[BaseException] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            try:
                index = InfluenceIndex.open(finished_index)
                assert len(index.removed) == index.manifest.generation - 1
                assert len(index.columns["label"]) == len(index.view().take(range(len(index)))) == 10
                found.append(index.manifest.generation)
            except BaseException as error:
                wrong.append(error)
                return

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for row in range(9):
        remove(finished_index, [row])
        time.sleep(0.01)
    done.set()
    for reader in readers:
        reader.join()
    assert wrong == [] and len(found) > len(readers)
    remove(finished_index, [0])
    assert list_names(finished_index) == ["build.json", "features", "generation-000010", MANIFEST]


def test_an_index_that_is_being_read_is_not_cleaned(finished_index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = importlib.import_module("tracin_ann.cli.info")
    remove(finished_index, [1])
    read = absent.read_removed_ids

    def slow(directory: Path, manifest: Manifest) -> object:
        remove(finished_index, [2])
        return read(directory, manifest)

    monkeypatch.setattr(absent, "read_removed_ids", slow)
    result = CliRunner().invoke(info.main, [str(finished_index)])
    assert result.exit_code == 0 and "generation: 2, 1 row removed" in result.output


# Leftovers of killed writers


def test_a_repeated_build_removes_leftovers_of_a_killed_one(finished_index: Path) -> None:
    """The other build may have been killed after it wrote its manifest and before its cleanup."""
    old, folder = finished_index / "generation-000000", generation_folder(finished_index, 1)
    old.mkdir()
    (old / "canaries.h5").write_bytes(b"")
    for place in (finished_index, folder, finished_index / "features"):
        (place / f".tracin-tmp-{files._host_digest()}-{os.getpid()}-0123.h5").write_bytes(b"")
    (finished_index / "features" / "features-000009-0000.h5").write_bytes(b"")
    (finished_index / ".index-unfinished").mkdir()
    (finished_index / ".index-unfinished" / "ivf.faiss").write_bytes(b"")
    (finished_index / WRITER).write_bytes(b"")
    assert build(task(10), finished_index, make_config("flat")).rows_extracted == 0
    assert list_names(finished_index) == ["build.json", "features", folder.name, MANIFEST]
    assert len(list_names(finished_index / "features")) == 6 and len(list_names(folder)) == 3


def test_a_generation_with_files_that_nfs_retains_is_removed_later(
    finished_index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: Path) -> None:
        raise OSError(errno.ENOTEMPTY, "not empty", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rmdir", refused)
        assert remove(finished_index, [1]).generation == 2
    assert list_names(generation_folder(finished_index, 1)) == []
    remove(finished_index, [2])
    assert list_names(finished_index) == ["build.json", "features", "generation-000003", MANIFEST]


def test_a_build_killed_before_its_first_rename_can_be_resumed(tmp_path: Path) -> None:
    (tmp_path / f".tracin-tmp-{files._host_digest()}-{os.getpid()}-0123.json").write_bytes(b"{")
    (tmp_path / WRITER).write_bytes(b"")
    build(task(10), tmp_path, make_config("flat"))
    assert list_names(tmp_path) == ["build.json", "features", "generation-000001", MANIFEST]


def test_a_removal_killed_before_publication_leaves_no_files(finished_index: Path) -> None:
    """Its generation has a manifest, and links to the same files as the next generation."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(REMOVAL, "publish", lambda *given: pytest.fail("not yet"))
        with pytest.raises(pytest.fail.Exception):
            remove(finished_index, [3])
    assert not (generation_folder(finished_index, 2) / MANIFEST).exists()
    assert remove(finished_index, [3]).generation == 2
    assert list_names(generation_folder(finished_index, 2)) == ["canaries.h5", "columns.npz", MANIFEST, "removed.npy"]
    assert remove(finished_index, [3]).generation == 2


def test_temporary_files_with_this_process_number_are_removed_unless_in_use(tmp_path: Path) -> None:
    """In a container, every run may have the same process number."""
    left = tmp_path / f".tracin-tmp-{files._host_digest()}-{os.getpid()}-0123.bin"
    left.write_bytes(b"")
    with atomic_write(tmp_path / "a.bin") as file:
        assert remove_temporaries(tmp_path) == [left]
        file.write(b"x")
    assert list_names(tmp_path) == ["a.bin"]


def test_a_directory_is_created_durably_with_its_parents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Watch(tmp_path) as watch:
        make_directory(tmp_path / "a" / "b")
        make_directory(tmp_path / "a" / "b")
    assert [(call.kind, call.path) for call in watch.calls] == [
        ("mkdir", "a"),
        ("fsync", "."),
        ("mkdir", "a/b"),
        ("fsync", "a"),
    ]


# Full disks: the system limits the number of bytes, at any point of a write by HDF5, FAISS or NumPy.


@contextmanager
def limit_space(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


ROWS = np.random.default_rng(0).standard_normal((600, 8)).astype(np.float32)
BLOCK = FeatureBlock(np.arange(600), ROWS, ROWS[:, 0].astype(np.float64) ** 2, ROWS[:, 1])
ROW_TABLE = RowTable({"label": np.arange(3000), "name": make_text_array(["a", "bc"] * 1500)}, np.arange(3000))
WRITERS: dict[str, Callable[[Path], object]] = {
    "features.h5": lambda path: write_feature_file(path, BLOCK, header=FileHeader("digest", 0, 600, 0, 8)),
    "canaries.h5": lambda path: write_canaries(path, [Canaries("train", np.arange(600), ROWS[None])]),
    "columns.npz": lambda path: write_columns(path, ROW_TABLE),
    "removed.npy": lambda path: save_arrays(path, np.arange(3000)),
    "ivf.faiss": lambda path: make_lists().save(path),
}


def save_arrays(path: Path, array: np.ndarray) -> None:
    with atomic_write(path) as file:
        save_array(file, array)


def make_lists() -> InvertedLists:
    lists = InvertedLists.train(ROWS, 4, "sq8")
    lists.add(ROWS, np.arange(600) % 4, np.arange(600))
    return lists


@pytest.mark.parametrize("name", WRITERS)
def test_no_file_is_truncated_by_a_full_disk_without_an_error(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    WRITERS[name](path)
    size = path.stat().st_size
    path.unlink()
    for room in (0, 1, 200, size // 2, size - 4097, size - 1000, size - 1):
        if room < 0:
            continue
        # Report the error outside of the limit, because standard output may be a file as well.
        with pytest.raises(OSError, match="File too large") as raised, limit_space(room):
            WRITERS[name](path)
        assert (raised.value.errno, raised.value.filename) == (errno.EFBIG, str(path))
        assert list_names(tmp_path) in ([], ["ivf.faiss"])


def test_saved_arrays_equal_those_of_numpy(tmp_path: Path) -> None:
    for array in (np.arange(10), np.zeros((0, 3), np.float32), ROWS[:, ::2]):
        save_arrays(tmp_path / "ours.npy", array)
        np.save(tmp_path / "numpys.npy", array)
        assert (tmp_path / "ours.npy").read_bytes() == (tmp_path / "numpys.npy").read_bytes()


def test_a_command_on_a_full_disk_names_the_file_in_one_line_and_can_be_resumed(tmp_path: Path) -> None:
    zoo.save_checkpoints("mlp", 0, tmp_path)
    words = ["--task", f"{SUPPORT / 'zoo.py'}:task", "--task-arg", "case=mlp"]
    words += ["--task-arg", f"folder={tmp_path}", "--dim", "8", "--no-yardstick"]
    out, other = tmp_path / "index", tmp_path / "other"
    assert CliRunner().invoke(build_command, [*words, "--out", str(other)]).exit_code == 0
    size, largest = max((path.stat().st_size, path.relative_to(other)) for path in other.rglob("*"))
    with limit_space(size - 1):
        result = CliRunner().invoke(build_command, [*words, "--out", str(out)])
    assert result.exit_code == 1
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("error: "))
    assert line.startswith(f"error: cannot read or write {out / largest}: got File too large (EFBIG), expected ")
    assert line.endswith("; fix the cause and run this command again: complete files are reused")
    result = CliRunner().invoke(build_command, [*words, "--out", str(out)])
    assert result.exit_code == 0 and (out / largest).stat().st_size == size


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "full"), "full: 'a'"),
        (OSError(errno.EIO, "sick", "b"), "sick: 'b'"),
        (OSError(errno.EIO, "sick", "a.tmp"), "sick: 'a'"),
        (OSError("10 requested and 5 written"), "10 requested and 5 written: 'a'"),
        (RuntimeError("something else"), "^something else$"),
        (DamagedIndexError("damaged"), "^damaged$"),
    ],
)
def test_system_errors_name_the_file(error: Exception, message: str) -> None:
    with pytest.raises(type(error) if "else" in message or "damaged" in message else OSError, match=message):
        with attach_path(Path("a"), Path("a.tmp")):
            raise error


def test_a_reader_of_a_growing_index_opens_the_newest_generation(finished_index: Path) -> None:
    manifest, lease = take_lease(finished_index)
    build(task(11), finished_index, make_config("flat", append=True))
    assert (
        collect_answers(finished_index)
        and list_names(finished_index).count(generation_folder(finished_index, manifest.generation).name) == 1
    )
    lease.close()
    remove(finished_index, [1])
    assert list_names(finished_index) == ["build.json", "features", "generation-000003", MANIFEST]
