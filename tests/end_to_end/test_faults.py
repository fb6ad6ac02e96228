"""Builds, appends, added checkpoints and removals under faults: kills, losses of power and failing system calls.

A fault leaves the old index or the new one, and the same command, run again, ends in the same state as without the
fault. A fault can occur at every call that changes the disk. Each test tries a seeded sample of these calls:
TRACIN_ANN_FAULTS=100 sets the size of the sample, TRACIN_ANN_FAULTS=all tries every call.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import TypeVar

import click
import pytest

import disk
from commands import (
    KINDS,
    OUT,
    Answers,
    Command,
    Reference,
    collect_answers,
    make_commands,
    read_files,
    run_reference,
    task,
)
from disk import Tree
from faults import Call, Crash, Fault, Watch, list_faults
from paths import ROOT
from tracin_ann.cli.failures import handle_failures
from tracin_ann.errors import DamagedIndexError
from tracin_ann.operations.verification import repair, verify
from tracin_ann.store.generations import generation_folder
from tracin_ann.store.manifest import BUILD_RECORD, FEATURES, MANIFEST, Manifest

pytestmark = pytest.mark.slow

T = TypeVar("T")
NAMES = ("build", "append", "add a checkpoint", "remove")
every_command = pytest.mark.parametrize("name", NAMES)
every_kind = pytest.mark.parametrize("kind", KINDS)
TRIED = os.environ.get("TRACIN_ANN_FAULTS", "12")
LOSSES = 3


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disable fsync: the disk is simulated, and the directories are temporary."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """Return the path for the directories of a test, used one after another."""
    yield tmp_path / "root"


def watch_command(command: Command, root: Path, **more: object) -> Watch:
    """Return a watch over a fresh copy of the directory from which the command starts."""
    shutil.rmtree(root, ignore_errors=True)
    disk.write_tree(command.start, root)
    return Watch(root, **more)  # type: ignore[arg-type]


def states(command: Command, root: Path, losses: int, seed: int) -> list[tuple[str, Tree]]:
    """Return every state that a kill can leave, and some that a loss of power can leave, with descriptions."""
    random, found = Random(seed), {}

    def seen(call: Call, data: bytes) -> None:
        now = watch.disk.now()
        trees = [("killed before", now)] + [("power lost before", watch.disk.after_loss(random)) for _ in range(losses)]
        if data:
            number, content = now[call.path] or (0, b"")
            cut = data[: random.randrange(len(data))]
            trees.append(("killed within", {**now, call.path: (number, content + cut)}))
        for label, tree in trees:
            found.setdefault(disk.digest(tree), (f"{label} {call}", tree))

    watch = watch_command(command, root, seen=seen)
    with watch:
        command.at(root)
    assert read_files(watch.disk.now()) == read_files(disk.read_tree(root)), "the watch missed a call"
    return list(found.values())


def read_answers(expected: Reference, root: Path) -> Answers | None:
    """Return the answers of the index below a directory: those of the old index or of the new one."""
    try:
        found = collect_answers(root / OUT)
    except DamagedIndexError as error:
        assert expected.before is None and "got no file" in str(error) and not (root / OUT / MANIFEST).exists()
        return None
    assert found in (expected.before, expected.after)
    return found


def run_again(expected: Reference, root: Path) -> None:
    """Run the command again, and compare its result with the expected one."""
    expected.command.at(root)
    found = read_files(disk.read_tree(root))
    assert found.keys() == expected.end.keys()
    assert [path for path in found if found[path] != expected.end[path]] == []
    assert read_answers(expected, root) == expected.after


def sample(places: list[T], seed: int) -> list[T]:
    """Return a seeded sample, or all."""
    return places if TRIED == "all" else Random(seed).sample(places, min(int(TRIED), len(places)))


@contextmanager
def name_place(place: str) -> Iterator[None]:
    """Add the place of the fault to errors."""
    try:
        yield
    except Exception as error:
        raise AssertionError(f"{place}: {type(error).__name__}: {error}") from error


@every_command
@every_kind
def test_a_kill_or_power_loss_leaves_the_old_or_the_new_index(root: Path, kind: str, name: str) -> None:
    expected = run_reference(kind, name)
    found = states(expected.command, root, LOSSES, seed=1)
    for label, tree in sample(found, seed=len(found)):
        shutil.rmtree(root)
        disk.write_tree(tree, root)
        with name_place(f"{kind} {name}: {label}"):
            read_answers(expected, root)
            run_again(expected, root)


@every_command
@every_kind
def test_finished_work_survives_a_power_loss(root: Path, kind: str, name: str) -> None:
    expected, random = run_reference(kind, name), Random(2)
    with watch_command(expected.command, root) as watch:
        expected.command.at(root)
    trees = {disk.digest(tree): tree for tree in (watch.disk.after_loss(random) for _ in range(40))}
    for tree in trees.values():
        shutil.rmtree(root)
        disk.write_tree(tree, root)
        assert read_answers(expected, root) == expected.after
        run_again(expected, root)


@every_command
@every_kind
def test_a_resumed_command_survives_a_power_loss(root: Path, kind: str, name: str) -> None:
    """The second run must fsync what the first run wrote without fsync."""
    expected, random = run_reference(kind, name), Random(3)
    with watch_command(expected.command, root) as watch:
        expected.command.at(root)
    with_a_new_directory = [after for call, after in pairwise(watch.calls) if call.kind == "mkdir"]
    for call in dict.fromkeys([*with_a_new_directory, *sample(watch.calls, seed=len(watch.calls))]):
        with watch_command(expected.command, root, fault=Fault(call.number)) as killed, pytest.raises(Crash):
            expected.command.at(root)
        assert read_files(killed.disk.now()) == read_files(disk.read_tree(root))
        with Watch(root, disk=killed.disk) as again:
            expected.command.at(root)
        shutil.rmtree(root)
        disk.write_tree(again.disk.after_loss(random), root)
        with name_place(f"{kind} {name}: killed at {call}"):
            assert read_answers(expected, root) == expected.after


@every_command
@every_kind
def test_a_failed_call_leaves_the_old_or_the_new_index(
    root: Path, kind: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = run_reference(kind, name)
    with watch_command(expected.command, root) as watch:
        expected.command.at(root)
    failing = [(call, fault) for call in watch.calls for fault in list_faults(call)]
    for call, fault in sample(failing, seed=len(failing)):
        with name_place(f"{kind} {name}: {fault} at {call}"):
            with watch_command(expected.command, root, fault=fault):
                ended = _exit_status(expected.command, root)
            message = capsys.readouterr().err
            assert ended == (1 if message else 0)
            if message:
                (line,) = message.splitlines()
                assert line.startswith("error: cannot ") and f"{root}" in line and os.strerror(fault.error or 0) in line
            seen = read_answers(expected, root)
            assert message or seen == expected.after
            run_again(expected, root)


@every_kind
def test_a_file_that_cannot_be_mapped_is_named_and_not_reported_as_damaged(root: Path, kind: str) -> None:
    expected = run_reference(kind, "append")
    disk.write_tree(expected.command.start, root)
    with Watch(root) as watch:
        assert collect_answers(root / OUT) == expected.before
    mapped = [call for call in watch.calls if call.kind == "map"]
    assert any(call.path.endswith(".h5") for call in mapped)
    assert kind not in ("ivf", "bounds") or any(call.path.endswith(".npy") for call in mapped)
    for call in mapped:
        with Watch(root, fault=Fault(call.number, errno.ENOMEM)), pytest.raises(OSError) as found:
            collect_answers(root / OUT)
        assert (found.value.errno, found.value.filename) == (errno.ENOMEM, str(root / call.path))
        assert collect_answers(root / OUT) == expected.before


@every_kind
@pytest.mark.parametrize("harmed", ["features-000001-0001.h5", "canaries.h5", MANIFEST])
def test_a_killed_repair_run_again_leaves_the_index_and_no_other_files(root: Path, kind: str, harmed: str) -> None:
    expected = run_reference(kind, "remove")
    disk.write_tree(expected.command.start, root)
    (path,) = (path for path in (root / OUT).rglob(harmed) if path.parent != root / OUT)
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(
        content[:middle] + bytes(byte ^ 1 for byte in content[middle : middle + 9]) + content[middle + 9 :]
    )
    assert [damage.path for damage in verify(root / OUT).damage] == [path]
    start = disk.read_tree(root)
    with Watch(root) as watch:
        repair(root / OUT, task(10))
    for call in sample(watch.calls, seed=len(watch.calls)):
        shutil.rmtree(root)
        disk.write_tree(start, root)
        with Watch(root, fault=Fault(call.number)), pytest.raises(Crash):
            repair(root / OUT, task(10))
        with name_place(f"{kind} {harmed}: killed at {call}"):
            repair(root / OUT, task(10))
            assert verify(root / OUT).damage == () and collect_answers(root / OUT) == expected.before
            assert _left_over(root / OUT) == []


def _left_over(out: Path) -> list[Path]:
    """Return the files and directories that the current manifest does not list."""
    manifest = Manifest.read(out)
    own, features = generation_folder(out, manifest.generation), out / FEATURES
    named = {out / MANIFEST, out / BUILD_RECORD, own, own / MANIFEST, features}
    named |= {own / record.name for record in manifest.own_files} | {
        features / record.name for record in manifest.features
    }
    return sorted(set(out.rglob("*")) - named)


def _exit_status(command: Command, root: Path) -> int:
    """Run the command like the command line, and return its exit status."""
    try:
        handle_failures(command.at)(root)
    except click.exceptions.Exit as end:
        return end.exit_code
    return 0


def test_all_commands_are_tested() -> None:
    assert all(tuple(make_commands(kind)) == NAMES for kind in KINDS)


def test_killed_processes_can_be_resumed() -> None:
    words = [sys.executable, "-m", "benchmarks.reliability.kills", "--kills", "5", "--rows", "300", "--print"]
    root = ROOT
    done = subprocess.run(words, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert [row["kills"] for row in results] == [1] * 5 and all(row["ended_as_undisturbed"] for row in results)


def test_the_tests_named_in_the_documentation_exist() -> None:
    named = re.findall(r"\| `(test_\w+)` \|$", (ROOT / "docs" / "operations.md").read_text(), re.M)
    assert len(named) > 10
    text = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert [test for test in named if f"def {test}(" not in text] == []
