"""README's code and commands are run as they stand, in an empty directory."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import documents
from documents import ROOT, words

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return [block.code for block in documents.blocks(README, language)]


def commands() -> list[documents.Command]:
    """Return README's console commands with the lines that they print there."""
    return documents.commands("".join(blocks("console")))


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with README's task file, checkpoints of its model, and the two scripts."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "my_task.py").write_text(blocks("python")[0])
    for script in ("build_index.py", "query.py"):
        (folder / script).symlink_to(ROOT / script)
    (folder / "checkpoints").mkdir()
    train(folder)
    return folder


def train(folder: Path) -> None:
    """Train README's model for three epochs and save it after each."""
    sys.path.insert(0, str(folder))
    try:
        import my_task  # noqa: PLC0415 - README's own file, just written
    finally:
        sys.path.remove(str(folder))
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
    loader = torch.utils.data.DataLoader(my_task.rows(0, 1400), 16)
    for epoch in range(3):
        for batch in loader:
            optimiser.zero_grad()
            my_task.loss(net, batch).mean().backward()
            optimiser.step()
        torch.save(net.state_dict(), folder / f"checkpoints/epoch-{epoch}.pt")


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
    code = blocks("python")[1]
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
