"""The code and the commands of docs/ run unchanged, page by page, each page in a separate directory.

Pages that continue the five-minute start have the files of its blocks. Commands of the library run in this process.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import documents
from benchmarks.tables import fill_tables
from documents import Block, mask_numbers
from paths import ROOT
from project import SCRIPTS

DOCS = ROOT / "docs"
START = "start.md"
MOST_NOT_RUN = 12
RUN = ("python", "console")

# PEFT calls a function of transformers that has another name from version 5.24 on.
pytestmark = [
    pytest.mark.xdist_group("docs"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


def read_page(page: str) -> list[Block]:
    return documents.read_blocks((DOCS / page).read_text(encoding="utf-8"))


PAGES = sorted(path.name for path in DOCS.glob("*.md"))
RUN_PAGES = [page for page in PAGES if page != START and any(b.language in RUN for b in read_page(page))]


@dataclass
class Reader:
    """Runs a page in a directory: writes its files, runs its Python blocks in order, and runs its commands."""

    page: str
    place: Path
    names: dict[str, Any] = field(default_factory=lambda: {"__name__": "__page__"})
    printed: str = ""

    def follow(self) -> None:
        for block in read_page(self.page):
            where = f"docs/{self.page}:{block.line}"
            if not block.is_run:
                continue
            if block.file is not None:
                (self.place / block.file).write_text(block.code, encoding="utf-8")
            elif block.language == "python":
                self.run(block.code, where)
            elif block.language == "text" and block.title == "printed":
                assert mask_numbers(self.printed.splitlines()) == mask_numbers(block.code.splitlines()), where
            elif block.language == "console":
                self.type(block.code, where)

    def run(self, code: str, where: str) -> None:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(code, where, "exec"), self.names)
        self.printed = out.getvalue()

    def type(self, console: str, where: str) -> None:
        for command in documents.read_commands(console):
            status, out, err = self.command(command.text)
            refused = command.shown[:1] and command.shown[0].startswith("error: ")
            assert bool(status) == bool(refused), f"{where}: {command.text}\n{out}{err}"
            lines = err.splitlines()[-1:] if refused else out.splitlines()
            assert mask_numbers(lines) == mask_numbers(command.shown), f"{where}: {command.text}"

    def script(self, arguments: list[str]) -> str:
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
            patch.setattr(sys, "argv", arguments)
            runpy.run_path(arguments[0], run_name="__main__")
        return out.getvalue()

    def command(self, text: str) -> tuple[int, str, str]:
        """Run a command; the part after the first pipe gets its output."""
        first, pipe, rest = text.partition(" | ")
        name, *arguments = shlex.split(first, comments=True)
        if name == "python":
            return 0, self.script(arguments), ""
        if name not in SCRIPTS:
            return self.shell(text)
        module, _, function = SCRIPTS[name].partition(":")
        result = CliRunner().invoke(getattr(importlib.import_module(module), function), arguments, prog_name=name)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        if pipe and not result.exit_code:
            return self.shell(rest, result.stdout)
        return result.exit_code, result.stdout, result.stderr

    def shell(self, text: str, given: str = "") -> tuple[int, str, str]:
        command = ["bash", "-c", text]
        done = subprocess.run(command, cwd=self.place, input=given, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout, done.stderr


@contextlib.contextmanager
def work_in(place: Path) -> Iterator[None]:
    """Work in a directory with importable modules, which are removed from `sys.modules` afterwards."""
    before, path = set(sys.modules), list(sys.path)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(place)
            patch.setenv("COLUMNS", "100")
            sys.path.insert(0, str(place))
            yield
    finally:
        sys.path[:] = path
        for name in set(sys.modules) - before:
            if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(place)):
                del sys.modules[name]
        importlib.invalidate_caches()


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a directory in which the five-minute start was run, and a copy of its result."""
    folder = tmp_path_factory.mktemp("docs")
    place = folder / "place"
    place.mkdir()
    with work_in(place):
        Reader(START, place).follow()
    shutil.copytree(place, folder / "kept", ignore=shutil.ignore_patterns("__pycache__"))
    return place, folder / "kept"


def test_the_quick_start_runs(started: tuple[Path, Path]) -> None:
    assert (started[1] / "runs/mine/manifest.json").is_file()


# Of Lightning's move of batches to a device.
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")
@pytest.mark.slow
@pytest.mark.parametrize("page", RUN_PAGES)
def test_the_code_of_the_page_runs(page: str, started: tuple[Path, Path]) -> None:
    # In the directory of the start, restored for each page: an index stores the full path of its task's file.
    place, saved_copy = started
    shutil.rmtree(place)
    shutil.copytree(saved_copy, place)
    with work_in(place):
        Reader(page, place).follow()


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{page}" for page in PAGES)])
def test_tables_equal_the_result_files(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    # To update: python -m benchmarks.tables PAGE
    assert fill_tables(text) == text


@pytest.mark.parametrize("page", [*(f"docs/{page}" for page in PAGES), "README.md", "CHANGELOG.md", "CONTRIBUTING.md"])
def test_a_page_is_the_result_of_finished_merges(page: str) -> None:
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith(("<<<<<<<", "|||||||", ">>>>>>>"))] == []


def test_blocks_that_are_not_run_are_few_and_have_a_reason() -> None:
    marked = {
        f"{page}:{block.line}": block.title.removeprefix(documents.NOT_RUN)
        for page in PAGES
        for block in read_page(page)
        if not block.is_run
    }
    assert all(len(reason.split()) >= 2 for reason in marked.values()), marked
    assert len(marked) <= MOST_NOT_RUN, marked


def test_every_command_is_run_or_marked_as_not_run() -> None:
    shells = ("bash", "sh", "shell")
    loose = [f"{p}:{b.line}" for p in PAGES for b in read_page(p) if b.language in shells and b.is_run]
    assert loose == []
