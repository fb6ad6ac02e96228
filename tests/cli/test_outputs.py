"""Results are written completely or not at all, as by a shell's redirection; streams may be closed or full."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from hostile import HANGS_AFTER, ROOT, query_arguments, query_index, shell


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "status", "message"),
    [
        (
            '"$@" --format jsonl >&-',
            1,
            r"error: cannot read or write stdout: got the stream is closed .EBADF.*--output.*",
        ),
        ('"$@" >&-', 1, r"error: cannot read or write stdout: got the stream is closed .EBADF.*"),
        ('"$@" --output {out}/a.csv >&- 2>&-', 0, ""),
        ('"$@" --format jsonl 2>&-', 0, ""),
        ('"$@" --ids 99 2>&-', 2, ""),
        ('"$@" --ids 99 <&- >&- 2>&-', 1, ""),
        ('"$@" --format jsonl <&- >&- 2>&-', 1, ""),
        ('"$@" --format csv > /dev/full', 1, r"error: cannot read or write a file: got No space left on device.*"),
        ('set -o pipefail; "$@" --ids 0-6 -k 40 --train-ids 0-39 --format jsonl | head -c 1', 1, ""),
        ('set -o pipefail; "$@" --ids 0-6 -k 40 --train-ids 0-39 | head -c 1', 1, ""),
    ],
    ids=range(10),
)
def test_closed_and_full_streams_end_without_a_traceback(
    hostile_folder: Path, tmp_path: Path, line: str, status: int, message: str
) -> None:
    done = shell(line.format(out=tmp_path), *query_arguments(hostile_folder, "--ids", "0", "-q"))
    assert (done.returncode, bool(re.fullmatch(message, done.stderr.decode().strip()))) == (status, True), done.stderr
    if "a.csv" in line:
        assert len(pd.read_csv(tmp_path / "a.csv")) > 0


def read_results(folder: Path) -> str:
    return query_index(folder, "--ids", "0", "-k", 2, "--format", "jsonl").stdout


def test_a_result_is_written_through_a_link(hostile_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    target, link, chain = tmp_path / "real" / "a.jsonl", tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    link.symlink_to("real/a.jsonl")
    chain.symlink_to(link)
    for path in (link, chain):
        for before in (None, "before"):
            target.unlink(missing_ok=True)
            if before is not None:
                target.write_text(before)
                target.chmod(0o640)
            assert query_index(hostile_folder, "--ids", "0", "-k", 2, "--output", path).exit_code == 0
            assert path.is_symlink() and not target.is_symlink()
            assert target.read_text() == read_results(hostile_folder)
            assert before is None or target.stat().st_mode & 0o777 == 0o640
    page = tmp_path / "page.html"
    page.symlink_to("real/page.html")
    assert query_index(hostile_folder, "--ids", "0", "--html", page).exit_code == 0
    assert page.is_symlink() and "<!doctype html>" in (tmp_path / "real" / "page.html").read_text()
    assert sorted(p.name for p in (tmp_path / "real").iterdir()) == ["a.jsonl", "page.html"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl", "page.html", "real"]


def test_circular_links_are_rejected(hostile_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").symlink_to("b.jsonl")
    (tmp_path / "b.jsonl").symlink_to("a.jsonl")
    result = query_index(hostile_folder, "--ids", "0", "--output", tmp_path / "a.jsonl")
    assert result.exit_code in (1, 2) and "Traceback" not in result.stderr
    assert "symbolic links" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet", "html"])
def test_a_fifo_is_written_to(hostile_folder: Path, tmp_path: Path, form: str) -> None:
    path, copy = tmp_path / f"fifo.{form}", tmp_path / f"copy.{form}"
    os.mkfifo(path)
    where = ("--html", path) if form == "html" else ("--output", path)
    with open(copy, "wb") as file, subprocess.Popen(["cat", path], stdout=file) as reader:
        assert query_index(hostile_folder, "--ids", "0", "-k", 2, *where).exit_code == 0
        assert reader.wait(HANGS_AFTER) == 0
    assert path.is_fifo()
    if form == "parquet":
        assert len(pd.read_parquet(copy)) > 0
    elif form == "jsonl":
        assert copy.read_text() == read_results(hostile_folder)
    else:
        assert copy.stat().st_size > 0


def test_devices_are_written_to_and_directories_are_rejected(hostile_folder: Path, tmp_path: Path) -> None:
    before = os.stat("/dev/null")
    for where in (("--output", "/dev/null", "--format", "jsonl"), ("--html", "/dev/null")):
        result = query_index(hostile_folder, "--ids", "0", *where)
        assert (result.exit_code, result.stdout) == (0, "")
    after = os.stat("/dev/null")
    assert (after.st_ino, after.st_mode, after.st_rdev) == (before.st_ino, before.st_mode, before.st_rdev)
    for option in ("--output", "--html"):
        result = query_index(hostile_folder, "--ids", "0", "--format", "jsonl", option, tmp_path)
        assert result.exit_code == 2 and "is a directory" in result.stderr.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of Linux's /proc")
def test_open_descriptors_are_written_to(hostile_folder: Path, tmp_path: Path) -> None:
    given = query_arguments(hostile_folder, "--ids", "0", "-k", "2", "--format", "jsonl", "-q")
    expected = read_results(hostile_folder).encode()
    assert shell('"$@" --output /dev/stdout', *given).stdout == expected
    file = tmp_path / "log"
    done = shell(f'{{ echo first; "$@" --output /dev/stdout; echo last; }} > {file}', *given)
    assert (done.returncode, file.read_bytes()) == (0, b"first\n" + expected + b"last\n")
    done = shell(f'"$@" --output /dev/fd/7 7> {file}', *given)
    assert (done.returncode, file.read_bytes()) == (0, expected)
    done = shell('"$@" --output /dev/fd/9', *given)
    assert done.returncode == 1 and b"cannot read or write /dev/fd/9" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


WRITES = """
import sys, time
from pathlib import Path
from tracin_ann.results.formats import Fields, open_writer
with open_writer("csv", Path(sys.argv[1]), Fields((("id", "id"),))) as write:
    write([{"id": 1}])
    print("written", flush=True)
    time.sleep(600)
"""


def start_query(path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", WRITES, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "written\n"
    return process


@pytest.mark.slow
def test_leftovers_of_a_killed_query_are_removed_by_the_next_query_to_the_same_file(
    hostile_folder: Path, tmp_path: Path
) -> None:
    mine, other = tmp_path / "a.csv", tmp_path / "b.csv"
    foreign = tmp_path / ".tracin-tmp-notes"
    foreign.write_text("the user's own")
    for path in (mine, other):
        with start_query(path) as process:
            process.kill()
    with start_query(mine) as running:
        before, asked = list(tmp_path.iterdir()), query_index(hostile_folder, "--ids", "0", "--output", mine)
        after = {path.name for path in tmp_path.iterdir()}
        running.kill()
    # The temporary files of another result and of a running query stay, like files of the user.
    assert (len(before), asked.exit_code, len(after)) == (3, 0, 4)
    assert {"a.csv", foreign.name} < after
    for path in (mine, other):
        assert query_index(hostile_folder, "--ids", "0", "--output", path).exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [foreign.name, "a.csv", "b.csv"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_query_leaves_no_files(hostile_folder: Path, tmp_path: Path, number: signal.Signals) -> None:
    path = tmp_path / "a.csv"
    given = query_arguments(
        hostile_folder, "--train-ids", "0-39", "--exact", "-k", "1", "--batch-size", "1", "--output", path
    )
    # If the tests run in the background of a shell, they and their child processes ignore SIGINT.
    code = "import signal, runpy; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code += "; runpy.run_path('query.py', run_name='__main__')"
    process = subprocess.Popen([sys.executable, "-c", code, *given], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + HANGS_AFTER
    while not list(tmp_path.iterdir()) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=HANGS_AFTER)
    left = [found.name for found in tmp_path.iterdir()]
    assert (process.returncode, left) in ((128 + number, []), (0, ["a.csv"])), stderr
    assert "Traceback" not in stderr
