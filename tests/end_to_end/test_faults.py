"""Builds, appends, added checkpoints and removals under faults: what is left is the old index or the new one, and the
same command run again ends where it would have ended.

Every call that changes the disk is a place to be killed at, to lose power at, or to fail at. Some of these places are
tried, chosen by a seed; with TRACIN_ANN_FAULTS=100 so many a test, with TRACIN_ANN_FAULTS=all every one.
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
from commands import KINDS, OUT, Answers, Command, Reference, answers, commands, plain, reference, task
from disk import Tree
from faults import Call, Crash, Fault, Watch, faults_of
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
    """Fsync nothing: the disk is a model, and the directories are thrown away."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """Return a place for one directory after another."""
    yield tmp_path / "root"


def watched(command: Command, root: Path, **more: object) -> Watch:
    """Return a watch over the directory that the command starts from."""
    shutil.rmtree(root, ignore_errors=True)
    disk.write(command.start, root)
    return Watch(root, **more)  # type: ignore[arg-type]


def states(command: Command, root: Path, losses: int, seed: int) -> list[tuple[str, Tree]]:
    """Return every state that a kill, or some losses of power, may leave, each with what made it."""
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

    watch = watched(command, root, seen=seen)
    with watch:
        command.at(root)
    assert plain(watch.disk.now()) == plain(disk.read(root)), "the watch has overlooked a call"
    return list(found.values())


def seen_by_a_reader(expected: Reference, root: Path) -> Answers | None:
    """Return what the index below a directory answers, which is nothing between old and new."""
    try:
        found = answers(root / OUT)
    except DamagedIndexError as error:
        assert expected.before is None and "got no file" in str(error) and not (root / OUT / MANIFEST).exists()
        return None
    assert found in (expected.before, expected.after)
    return found


def goes_on(expected: Reference, root: Path) -> None:
    """Run the command again and hold what it makes against what it should."""
    expected.command.at(root)
    found = plain(disk.read(root))
    assert found.keys() == expected.end.keys()
    assert [path for path in found if found[path] != expected.end[path]] == []
    assert seen_by_a_reader(expected, root) == expected.after


def chosen(places: list[T], seed: int) -> list[T]:
    """Return some, by a seed, or all."""
    return places if TRIED == "all" else Random(seed).sample(places, min(int(TRIED), len(places)))


@contextmanager
def said_with(place: str) -> Iterator[None]:
    """Name the place in whatever goes wrong there."""
    try:
        yield
    except Exception as error:
        raise AssertionError(f"{place}: {type(error).__name__}: {error}") from error


@every_command
@every_kind
def test_killed_or_without_power_it_is_the_old_or_the_new_and_goes_on(root: Path, kind: str, name: str) -> None:
    expected = reference(kind, name)
    found = states(expected.command, root, LOSSES, seed=1)
    for label, tree in chosen(found, seed=len(found)):
        shutil.rmtree(root)
        disk.write(tree, root)
        with said_with(f"{kind} {name}: {label}"):
            seen_by_a_reader(expected, root)
            goes_on(expected, root)


@every_command
@every_kind
def test_what_is_finished_outlives_a_loss_of_power(root: Path, kind: str, name: str) -> None:
    expected, random = reference(kind, name), Random(2)
    with watched(expected.command, root) as watch:
        expected.command.at(root)
    trees = {disk.digest(tree): tree for tree in (watch.disk.after_loss(random) for _ in range(40))}
    for tree in trees.values():
        shutil.rmtree(root)
        disk.write(tree, root)
        assert seen_by_a_reader(expected, root) == expected.after
        goes_on(expected, root)


@every_command
@every_kind
def test_killed_and_gone_on_with_it_outlives_a_loss_of_power(root: Path, kind: str, name: str) -> None:
    """What the first run had written and not fsynced is the second's to see to."""
    expected, random = reference(kind, name), Random(3)
    with watched(expected.command, root) as watch:
        expected.command.at(root)
    with_a_new_directory = [after for call, after in pairwise(watch.calls) if call.kind == "mkdir"]
    for call in dict.fromkeys([*with_a_new_directory, *chosen(watch.calls, seed=len(watch.calls))]):
        with watched(expected.command, root, fault=Fault(call.number)) as killed, pytest.raises(Crash):
            expected.command.at(root)
        assert plain(killed.disk.now()) == plain(disk.read(root))
        with Watch(root, disk=killed.disk) as again:
            expected.command.at(root)
        shutil.rmtree(root)
        disk.write(again.disk.after_loss(random), root)
        with said_with(f"{kind} {name}: killed at {call}"):
            assert seen_by_a_reader(expected, root) == expected.after


@every_command
@every_kind
def test_a_call_that_fails_is_told_in_a_line_and_leaves_the_old_or_the_new(
    root: Path, kind: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = reference(kind, name)
    with watched(expected.command, root) as watch:
        expected.command.at(root)
    failing = [(call, fault) for call in watch.calls for fault in faults_of(call)]
    for call, fault in chosen(failing, seed=len(failing)):
        with said_with(f"{kind} {name}: {fault} at {call}"):
            with watched(expected.command, root, fault=fault):
                ended = _told(expected.command, root)
            said = capsys.readouterr().err
            assert ended == (1 if said else 0)
            if said:
                (line,) = said.splitlines()
                assert line.startswith("error: cannot ") and f"{root}" in line and os.strerror(fault.error or 0) in line
            seen = seen_by_a_reader(expected, root)
            assert said or seen == expected.after
            goes_on(expected, root)


@every_kind
def test_a_file_that_the_system_does_not_map_is_named_and_no_damage(root: Path, kind: str) -> None:
    expected = reference(kind, "append")
    disk.write(expected.command.start, root)
    with Watch(root) as watch:
        assert answers(root / OUT) == expected.before
    mapped = [call for call in watch.calls if call.kind == "map"]
    assert any(call.path.endswith(".h5") for call in mapped)
    assert kind == "flat" or any(call.path.endswith(".npy") for call in mapped)
    for call in mapped:
        with Watch(root, fault=Fault(call.number, errno.ENOMEM)), pytest.raises(OSError) as found:
            answers(root / OUT)
        assert (found.value.errno, found.value.filename) == (errno.ENOMEM, str(root / call.path))
        assert answers(root / OUT) == expected.before


@every_kind
@pytest.mark.parametrize("harmed", ["features-000001-0001.h5", "canaries.h5", MANIFEST])
def test_a_repair_killed_anywhere_and_run_again_leaves_the_index_and_nothing_else(
    root: Path, kind: str, harmed: str
) -> None:
    expected = reference(kind, "remove")
    disk.write(expected.command.start, root)
    (path,) = (path for path in (root / OUT).rglob(harmed) if path.parent != root / OUT)
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(
        content[:middle] + bytes(byte ^ 1 for byte in content[middle : middle + 9]) + content[middle + 9 :]
    )
    assert [damage.path for damage in verify(root / OUT).damage] == [path]
    start = disk.read(root)
    with Watch(root) as watch:
        repair(root / OUT, task(10))
    for call in chosen(watch.calls, seed=len(watch.calls)):
        shutil.rmtree(root)
        disk.write(start, root)
        with Watch(root, fault=Fault(call.number)), pytest.raises(Crash):
            repair(root / OUT, task(10))
        with said_with(f"{kind} {harmed}: killed at {call}"):
            repair(root / OUT, task(10))
            assert verify(root / OUT).damage == () and answers(root / OUT) == expected.before
            assert _left_over(root / OUT) == []


def _left_over(out: Path) -> list[Path]:
    """Return the files and directories that the current manifest does not name."""
    manifest = Manifest.read(out)
    own, features = generation_folder(out, manifest.generation), out / FEATURES
    named = {out / MANIFEST, out / BUILD_RECORD, own, own / MANIFEST, features}
    named |= {own / record.name for record in manifest.own_files} | {
        features / record.name for record in manifest.features
    }
    return sorted(set(out.rglob("*")) - named)


def _told(command: Command, root: Path) -> int:
    """Run the command as the command line does, and return its exit status."""
    try:
        handle_failures(command.at)(root)
    except click.exceptions.Exit as end:
        return end.exit_code
    return 0


def test_all_commands_are_walked() -> None:
    assert all(tuple(commands(kind)) == NAMES for kind in KINDS)


def test_real_kills_of_real_processes() -> None:
    words = [sys.executable, "-m", "benchmarks.reliability.kills", "--kills", "5", "--rows", "300", "--print"]
    root = ROOT
    done = subprocess.run(words, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert [row["kills"] for row in results] == [1] * 5 and all(row["ended_as_undisturbed"] for row in results)


def test_the_document_names_tests_that_there_are() -> None:
    named = re.findall(r"\| `(test_\w+)` \|$", (ROOT / "docs" / "operations.md").read_text(), re.M)
    assert len(named) > 10
    text = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert [test for test in named if f"def {test}(" not in text] == []
