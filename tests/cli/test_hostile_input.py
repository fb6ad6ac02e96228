"""Oversized values on the command line, and FIFOs, devices and folders in place of files."""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest

from hostile import HANGS_AFTER, query_arguments, query_index, shell
from invocation import run
from tasks.own_ids import QUERIES, N
from tasks.toy import CONFIG, make_toy_task
from tracin_ann import build
from tracin_ann.cli.info import main as info_command
from tracin_ann.cli.parameters import CheckpointRanges, IdRanges, MemorySize
from tracin_ann.cli.query import main as query_command
from tracin_ann.cli.remove import main as remove_command
from tracin_ann.cli.verify import main as verify_command
from tracin_ann.errors import CheckpointError, DamagedIndexError, TracinAnnError
from tracin_ann.store.generations import generation_folder
from tracin_ann.store.manifest import Manifest, read_build_record

ROOM = 1 << 29


@pytest.fixture
def limit_resources() -> Iterator[None]:
    """Limit the test to half a gigabyte of additional address space, and stop it if it hangs."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + ROOM, before[1]))
    signal.alarm(HANGS_AFTER)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, before)


MANY = "9" * 5000
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of Linux's /proc and /dev")


@linux
@pytest.mark.usefixtures("limit_resources")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--ids", "0-9999999999"), f"no such row in query_data: got {QUERIES}, expected 0 to {QUERIES - 1}"),
        (("--ids", "9999999999"), "got 9999999999, expected 0 to"),
        (("--ids", "0-999999999999999999"), "no such row in query_data"),
        (("--train-ids", "3-9999999999"), f"no such row in train_data: got {N}, expected 0 to {N - 1}"),
        (("--ids", "0", "--against", "0-9999999999"), "no such row in query_data"),
        (("--ids", "0", "--only", "0-9999999999"), "no such row in train_data"),
        (("--ids", "0", "--without", "0-9999999999"), "no such row in train_data"),
        (("--ids", "0", "--checkpoints", "0-9999999999"), "no such checkpoint: got 100000"),
        (("--ids", MANY), "positions of at most 18 digits"),
        (("--ids", f"0-{MANY}"), "positions of at most 18 digits"),
        (("--ids", "x" * 5000), "expected positions and ranges"),
        (("--ids", "0", "--checkpoints", MANY), "positions of at most 18 digits"),
        (("--ids", "@/dev/zero"), "cannot read /dev/zero (binary data"),
        (("--ids", "@/dev/urandom"), "cannot read /dev/urandom ("),
        (("--own-ids", "--ids", "@/dev/zero"), "cannot read /dev/zero (binary data"),
        (("--ids", "@/"), "Is a directory"),
        (("--config", "/dev/zero"), "cannot read --config /dev/zero: got binary data"),
        (("--config", "/dev/urandom"), "cannot read --config /dev/urandom"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, tuple) else "",
)
def test_oversized_arguments_are_rejected_in_one_line(
    hostile_folder: Path, options: tuple[str, ...], message: str
) -> None:
    result = query_index(hostile_folder, *options)
    line = result.stderr.splitlines()[-1]
    assert (result.exit_code, result.stdout) == (2, ""), result.stderr
    assert message in line and len(line) < 300


def test_overlapping_ranges_select_each_row_once() -> None:
    found = IdRanges().convert("5-7,0,6-9", None, None)
    assert found.expand(10, "bad") == (5, 6, 7, 0, 8, 9)  # type: ignore[union-attr]
    assert CheckpointRanges().convert("1,0-1", None, None) == (1, 0)
    with pytest.raises(TracinAnnError, match="bad: got 9, expected 0 to 8"):
        found.expand(9, "bad")  # type: ignore[union-attr]
    with pytest.raises(click.BadParameter, match="expected a size"):
        MemorySize().convert(MANY, None, None)


@pytest.mark.parametrize("digits", [100, 5000])
@pytest.mark.parametrize("option", ["-k", "--candidates", "--batch-size", "--seed", "--dim"])
def test_numbers_with_many_digits_are_rejected_in_one_line(hostile_folder: Path, option: str, digits: int) -> None:
    result = query_index(hostile_folder, "--ids", "0", option, "9" * digits)
    assert result.exit_code in (1, 2, 3) or (result.exit_code == 0 and option in ("-k", "--candidates", "--batch-size"))
    assert "Traceback" not in result.stderr and "internal error" not in result.stderr


@pytest.mark.usefixtures("limit_resources")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = " + "[" * 50_000, "recursion"),
        ("x = " + "{a=" * 20_000, "recursion"),
        ("a." * 30_000 + "b = 1", "more than 200 dots"),
        ("[" + "a." * 30_000 + "b]\nc = 1", "more than 200 dots"),
        ("".join(f"[{'a.' * i}a]\n" for i in range(150)), "unknown option"),
        ("task_arg = [" + "[" * 90 + "]" * 90 + "]", "expected a string in quotes or a number"),
        (f"k = {MANY}", "4300"),
        (f"k = 0x{'F' * 5000}", "expected an integer"),
        (f"k = 0x{'F' * 50}", "expected an integer"),
        (f"ids = 0x{'F' * 5000}", "expected a string in quotes or a number"),
        ("x = 1\n" * 20_000, "more than 65,536 bytes"),
        ("x = '\0'", "got binary data"),
    ],
    ids=range(12),
)
def test_deep_or_large_config_files_are_rejected_in_one_line(hostile_folder: Path, text: str, message: str) -> None:
    path = hostile_folder / "deep.toml"
    path.write_text(text)
    result = query_index(hostile_folder, "--config", path)
    assert (result.exit_code, result.stdout, len(result.stderr.splitlines())) == (2, "", 1), result.stderr
    assert message in result.stderr and "deep.toml" in result.stderr and len(result.stderr) < 600


def test_ids_are_read_from_another_command_and_a_fifo_without_a_writer_is_rejected(
    hostile_folder: Path, tmp_path: Path
) -> None:
    plain = query_index(hostile_folder, "--ids", "1,3-4", "-k", 2, "--format", "jsonl").stdout
    given = query_arguments(hostile_folder, "-k", 2, "--format", "jsonl", "-q")
    done = shell('"$@" --ids @<(sleep 0.2; echo 1; echo 3-4)', *given)
    assert (done.returncode, done.stdout.decode(), done.stderr) == (0, plain, b"")
    os.mkfifo(tmp_path / "ids")
    refused = query_index(hostile_folder, "--ids", f"@{tmp_path / 'ids'}")
    assert refused.exit_code == 2 and "no process writes to it" in refused.stderr


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


FILES: dict[str, Callable[[Path, Manifest], Path]] = {
    "manifest": lambda out, manifest: out / "manifest.json",
    "the generation's manifest": lambda out, manifest: generation_folder(out, manifest.generation) / "manifest.json",
    "build record": lambda out, manifest: out / "build.json",
    "feature file": lambda out, manifest: out / "features" / manifest.features[0].name,
    "canaries": lambda out, manifest: generation_folder(out, manifest.generation) / "canaries.h5",
    "columns": lambda out, manifest: generation_folder(out, manifest.generation) / "columns.npz",
}


@pytest.mark.usefixtures("limit_resources")
@pytest.mark.parametrize("become", [fifo, device, directory], ids=lambda become: become.__name__)
@pytest.mark.parametrize("name", FILES)
def test_no_command_waits_for_a_path_that_is_not_a_file(
    hostile_folder: Path, index_copy: Path, name: str, become: Callable[[Path], None]
) -> None:
    path = FILES[name](index_copy, Manifest.read(index_copy))
    become(path)
    task = query_arguments(hostile_folder)[1:]
    for command, more in (
        (query_command, [*task, "--ids", "0"]),
        (verify_command, []),
        (info_command, []),
        (remove_command, ["--ids", "1"]),
    ):
        result = run(command, index_copy, *more)
        assert result.exit_code in (0, 1, 4), (command, result.stderr)
        assert len(result.stderr.splitlines()) <= 1 or not result.exit_code
    if name in ("manifest", "feature file"):
        assert run(query_command, index_copy, *task, "--ids", "0").exit_code == 4
    if name == "build record":
        with pytest.raises(DamagedIndexError, match=r"build.json: got (a FIFO|a symbolic link|a directory)"):
            read_build_record(index_copy)


@pytest.mark.usefixtures("limit_resources")
@pytest.mark.parametrize("become", [fifo, device], ids=lambda become: become.__name__)
def test_a_checkpoint_that_is_not_a_file_is_rejected(tmp_path: Path, become: Callable[[Path], None]) -> None:
    task = make_toy_task(tmp_path)
    become(tmp_path / "checkpoint1.pt")
    with pytest.raises(CheckpointError, match=r"checkpoint1.pt is not a file: got (a FIFO|a device), expected"):
        build(task, tmp_path / "out", CONFIG)
