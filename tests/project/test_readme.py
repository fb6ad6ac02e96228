"""The code and the commands of the README run unchanged in an empty directory."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import documents
from documents import mask_numbers
from paths import ROOT
from project import SCRIPTS

README = (ROOT / "README.md").read_text(encoding="utf-8")
LONGEST, WIDEST = 150, 120


def blocks(language: str) -> list[str]:
    return [block.code for block in documents.read_blocks(README, language)]


def commands() -> list[documents.Command]:
    """Return the console commands of the README with the output shown there."""
    return documents.read_commands("".join(blocks("console")))


def run(place: Path, *arguments: str) -> str:
    """Return the output of Python with these arguments."""
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with the README's task file and the checkpoints that it trains."""
    folder = tmp_path_factory.mktemp("readme")
    (task,) = (block for block in documents.read_blocks(README, "python") if block.file is not None)
    assert task.file is not None
    (folder / task.file).write_text(task.code, encoding="utf-8")
    assert f"Run `python {task.file}`" in README
    run(folder, task.file)
    return folder


@pytest.fixture(scope="session")
def printed(place: Path) -> list[str]:
    """Return what each command of the README prints, run one after the other."""
    outputs = []
    for command in commands():
        script, *arguments = shlex.split(command.text)
        module, _, function = SCRIPTS[script].partition(":")
        outputs.append(run(place, "-c", f"from {module} import {function}; {function}()", *arguments))
    return outputs


@pytest.mark.xdist_group("readme")
def test_the_commands_print_the_output_in_the_readme(printed: list[str]) -> None:
    assert len(commands()) == 2
    for command, output in zip(commands(), printed, strict=True):
        assert mask_numbers(output.splitlines()) == mask_numbers(command.shown)


@pytest.mark.xdist_group("readme")
@pytest.mark.usefixtures("printed")
def test_the_python_blocks_run(place: Path) -> None:
    (code,) = (block.code for block in documents.read_blocks(README, "python") if block.file is None)
    assert len(code.splitlines()) <= 10
    assert [line.split()[0] for line in run(place, "-c", code).splitlines()] == ["0", "1"]


def test_the_two_commands_are_make_targets() -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    for command in re.findall(r"^make (\w+)", "".join(blocks("bash")), re.M):
        assert command in targets


def test_every_command_is_named() -> None:
    assert set(re.findall(r"\btracin-\w+", README)) == set(SCRIPTS)


def test_the_task_is_short() -> None:
    assert len(blocks("python")[0].splitlines()) <= 45  # includes the training of the model


def test_readme_is_short_and_wraps() -> None:
    assert len(README.splitlines()) <= LONGEST
    prose = re.sub(r"^```.*?^```|^\|[^\n]*", "", README, flags=re.M | re.S)
    assert [line for line in prose.splitlines() if len(line) > WIDEST] == []


@pytest.mark.xdist_group("readme")
def test_a_group_of_tests_runs_in_one_process(request: pytest.FixtureRequest) -> None:
    """The groups share trained models and indexes; versions of pytest and pytest-xdist that do not fit ignore them."""
    if not getattr(request.config.option, "loadgroup", False):
        pytest.skip("tests are not distributed by group")
    assert request.node.nodeid.endswith("@readme")
