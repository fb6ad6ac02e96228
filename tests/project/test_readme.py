"""README's code and commands are run as they stand, in an empty directory."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import documents
from documents import words
from paths import ROOT

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return [block.code for block in documents.blocks(README, language)]


def commands() -> list[documents.Command]:
    """Return README's console commands with the lines that they print there."""
    return documents.commands("".join(blocks("console")))


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with README's files, checkpoints of its model, and the two scripts."""
    folder = tmp_path_factory.mktemp("readme")
    for block in documents.blocks(README, "python"):
        if block.file is not None:
            (folder / block.file).write_text(block.code)
    for script in ("build_index.py", "query.py"):
        (folder / script).symlink_to(ROOT / script)
    subprocess.run([sys.executable, "train.py"], cwd=folder, check=True)
    return folder


@pytest.mark.xdist_group("readme")
def test_the_commands_print_what_readme_shows(place: Path) -> None:
    assert len(commands()) == 3
    for command in commands():
        python, *arguments = shlex.split(command.text)
        assert python == "python"
        done = subprocess.run([sys.executable, *arguments], cwd=place, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert words(done.stdout.splitlines()) == words(command.shown)


@pytest.mark.xdist_group("readme")
def test_the_ten_lines_run(place: Path) -> None:
    (code,) = (block.code for block in documents.blocks(README, "python") if block.file is None)
    assert len(code.splitlines()) <= 10
    done = subprocess.run([sys.executable, "-c", code], cwd=place, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["0", "1"]


def test_the_two_commands_are_makes() -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
    for command in re.findall(r"^make (\w+)", "".join(blocks("bash")), re.M):
        assert command in targets


def test_the_task_is_short() -> None:
    assert len(blocks("python")[0].splitlines()) <= 40
