"""Behaviour that all commands share: help, versions, completion, config files, quiet, logs, errors in one line."""

from __future__ import annotations

import importlib
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.shell_completion import BashComplete
from click.testing import CliRunner

import zoo
from invocation import run
from paths import ROOT as REPOSITORY
from project import SCRIPTS
from tracin_ann import __version__
from tracin_ann.cli.build import main as build_command
from tracin_ann.cli.info import main as info_command
from tracin_ann.cli.query import main as query_command
from tracin_ann.cli.remove import main as remove_command
from tracin_ann.cli.verify import main as verify_command

COMMANDS: dict[str, click.Command] = {
    name: importlib.import_module(target.partition(":")[0]).main for name, target in SCRIPTS.items()
}
ZOO = str(Path(zoo.__file__).resolve())
ANSI = "\x1b["
every_command = pytest.mark.parametrize("name", COMMANDS)


def complete(name: str, words: list[str], incomplete: str) -> list[str]:
    found = BashComplete(COMMANDS[name], {}, name, "_TRACIN_COMPLETE").get_completions(words, incomplete)
    return [f"{item.type} {item.value}" if item.type != "plain" else item.value for item in found]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with checkpoints, `build.toml` and the index that it describes."""
    directory = tmp_path_factory.mktemp("shared")
    zoo.save_checkpoints("mlp", 0, directory)
    (directory / "build.toml").write_text(
        f'task = "{ZOO}:task"\nout = "{directory}/index"\ndim = 64\nbatch-size = 4\nyardstick = false\n'
        f'compact = true\n[task_arg]\ncase = "mlp"\nfolder = "{directory}"\nseed = 0\n'
    )
    result = run(build_command, "--config", directory / "build.toml")
    assert result.exit_code == 0, result.stderr
    return directory


@pytest.fixture
def index(folder: Path) -> Path:
    return folder / "index"


@every_command
def test_help_has_examples_that_can_be_copied(name: str) -> None:
    result = run(COMMANDS[name], "--help")
    examples = [line.strip() for line in result.stdout.splitlines() if line.startswith(f"    {name} ")]
    assert examples
    for shared in ("--config", "--quiet", "--verbose", "--debug", "--version", "Exit status: 0 success"):
        assert shared in result.stdout
    known = {option for parameter in COMMANDS[name].params for option in (*parameter.opts, *parameter.secondary_opts)}
    for example in examples:
        assert set(re.findall(r"(?<!\S)--?[a-z][a-z-]*", example)) <= known, example


@every_command
def test_every_command_prints_the_version(name: str) -> None:
    result = CliRunner().invoke(COMMANDS[name], ["--version"], prog_name=name)
    assert (result.exit_code, result.stdout) == (0, f"{name} {__version__}\n")


@every_command
def test_every_option_is_completed(name: str) -> None:
    options = complete(name, [], "--")
    assert {"--config", "--quiet", "--help"} <= set(options)
    shown = [p for p in COMMANDS[name].params if isinstance(p, click.Option) and not p.hidden]
    assert {option for p in shown for option in p.opts if option.startswith("--")} <= set(options)


def test_values_are_completed() -> None:
    assert complete("tracin-query", ["--format"], "") == ["table", "jsonl", "csv", "parquet"]
    assert complete("tracin-query", ["--rerank"], "e") == ["exact"]
    assert complete("tracin-query", ["--device"], "c") == ["cpu", "cuda"]
    assert complete("tracin-query", [], "runs/") == ["dir runs/"]
    assert complete("tracin-build", ["--task"], "my") == ["file my"]
    assert complete("tracin-build", ["--config"], "b") == ["file b"]


def test_documented_shell_completion_works() -> None:
    code = "from tracin_ann.cli.query import main; import sys; main(prog_name='tracin-query')"
    asked = {"_TRACIN_QUERY_COMPLETE": "zsh_complete", "COMP_WORDS": "tracin-query --rerank ", "COMP_CWORD": "2"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, env=os.environ | asked, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["plain", "none", "_", "plain", "stored", "_", "plain", "exact", "_"]


def test_a_config_file_has_the_effect_of_the_options(folder: Path, index: Path) -> None:
    record = json.loads((index / "build.json").read_text())
    assert record["batch_size"] == 4
    assert record["task"]["arguments"] == {"case": "mlp", "folder": str(folder), "seed": "0"}
    manifest = json.loads((index / "manifest.json").read_text())
    assert manifest["fidelity"] is None
    refused = run(build_command, "--config", folder / "build.toml", "--dim", 32)
    assert refused.exit_code == 3
    assert "was built with dimension 64" in refused.stderr or "asks for" in refused.stderr


def test_a_query_reads_its_options_from_a_config_file(index: Path, tmp_path: Path) -> None:
    file = tmp_path / "query.toml"
    file.write_text(f'dir = "{index}"\nids = [0, "1-2"]\nk = 2\nformat = "jsonl"\nbatch_size = 3\n')
    result = run(query_command, index, "--ids", "0-2", "-k", 2, "--format", "jsonl", "--batch-size", 3)
    assert run(query_command, "--config", file).stdout == result.stdout
    one = run(query_command, "--config", file, "--ids", "1")
    (answer,) = (json.loads(line) for line in one.stdout.splitlines())
    assert (answer["query"], len(answer["proponents"])) == (1, 2)


def test_an_option_of_a_config_file_without_effect_is_rejected(index: Path, tmp_path: Path) -> None:
    (tmp_path / "query.toml").write_text('rerank = "exact"\nself_influence = true\n')
    result = run(query_command, index, "--config", tmp_path / "query.toml")
    assert result.exit_code == 2
    assert "--self-influence" in result.stderr and "got --rerank" in result.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('tsak = "x"', ["got tsak", "expected task"]),
        ("quit = true", ["unknown option", "quiet"]),
        ("config = 'x'", ["unknown option"]),
        ('dim = "many"', ["dim: got 'many'", "an integer"]),
        ("dim = 1.5", ["dim: got 1.5"]),
        ("dim = true", ["dim: got True"]),
        ("dim = 0", ["dim: got 0", "x>=1"]),
        ("append = 1", ["append: got 1", "true or false"]),
        ("task = 5", ["task: got 5", "a string in quotes"]),
        ('index = "best"', ["index: got 'best'", "'auto', 'flat', 'ivf'"]),
        ("target_recall = 'x'", ["a number"]),
        ("task_arg = [true]", ["task_arg: got True"]),
        ("dim = ", ["cannot read --config", "expected a TOML file"]),
    ],
)
def test_bad_config_files_are_rejected_in_one_line(tmp_path: Path, text: str, message: list[str]) -> None:
    (tmp_path / "build.toml").write_text(text)
    result = run(build_command, "--config", tmp_path / "build.toml", "--out", tmp_path / "index")
    assert (result.exit_code, result.stdout, len(result.stderr.splitlines())) == (2, "", 1)
    for part in (*message, "build.toml", "; "):
        assert part in result.stderr


def test_a_missing_config_file_is_rejected(tmp_path: Path) -> None:
    result = run(query_command, "--config", tmp_path / "none.toml")
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: cannot read --config {tmp_path}/none.toml: got ")


def test_quiet_prints_only_results_and_errors(folder: Path, index: Path) -> None:
    words = ("--ids", "0", "-k", "2", "--format", "jsonl")
    loud, quiet = run(query_command, index, *words), run(query_command, index, *words, "--quiet")
    assert quiet.stdout == loud.stdout
    assert (bool(loud.stderr), quiet.stderr) == (True, "")
    for command, asked in (
        (build_command, ["--config", folder / "build.toml"]),
        (verify_command, [index]),
        (remove_command, [index, "--ids", "13"]),
    ):
        result = run(command, *asked, "-q")
        assert (result.exit_code, result.output) == (0, "")
    assert "rows" in run(info_command, index, "-q").stdout
    refused = run(query_command, index, "--ids", "99", "-q")
    assert (refused.exit_code, len(refused.stderr.splitlines())) == (2, 1)


def test_verbose_enables_logs_for_one_command(folder: Path, tmp_path: Path) -> None:
    result = run(build_command, "--config", folder / "build.toml", "--out", tmp_path / "index", "-v")
    logged = [line for line in result.stderr.splitlines() if re.match(r"\d\d:\d\d:\d\d tracin_ann[.\w]*: ", line)]
    for part in ("features of 14 rows at 2 checkpoints", "batches of 4 rows", "index flat", "is published"):
        assert any(part in line for line in logged), result.stderr
    assert run(build_command, "--config", folder / "build.toml").stderr.count("tracin_ann.") == 0
    done = run(query_command, tmp_path / "index", "--ids", "0", "--rerank", "exact", "-v")
    assert re.search(r"tracin_ann\.scoring\.ranking: exact scores of \d+ rows for 1 queries", done.stderr)
    assert "loading checkpoint" not in done.stderr
    assert "loading checkpoint 0" in run(query_command, tmp_path / "index", "--ids", "0", "-vv").stderr


TASK = """
from zoo import task as made
from dataclasses import replace

def loss(model, batch):
    raise ValueError("the label is\\nmissing")

def task(folder):
    return replace(made("mlp", folder), loss=loss)

def unopened(folder):
    return {}["nothing"]
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "task",
            r"error: \S*hurt\.py:6, in loss, raised ValueError: the label is missing; --debug shows .*",
        ),
        ("unopened", r"error: \S*hurt\.py:12, in unopened, raised KeyError: 'nothing'; --debug shows the traceback"),
    ],
)
def test_an_exception_of_the_task_is_reported_in_one_line(
    folder: Path, tmp_path: Path, name: str, message: str
) -> None:
    (tmp_path / "hurt.py").write_text(TASK)
    words = ["--task", f"{tmp_path}/hurt.py:{name}", "--task-arg", f"folder={folder}", "--out", tmp_path / "index"]
    try:
        result = run(build_command, *words, "-q")
        assert result.exit_code == 1
        assert re.fullmatch(message, result.stderr.strip())
        debugged = run(build_command, *words, "-q", "--debug")
    finally:
        sys.modules.pop("hurt", None)
        sys.path.remove(str(tmp_path))
    assert debugged.exit_code == 1
    assert debugged.stderr.startswith("Traceback (most recent call last):")
    assert re.fullmatch(message, debugged.stderr.splitlines()[-1])


def test_an_internal_error_is_reported_in_one_line(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("tracin_ann.store.take_lease", broken)
    result = run(info_command, index)
    assert (result.exit_code, len(result.stderr.splitlines())) == (1, 1)
    assert "raised ZeroDivisionError; --debug shows" in result.stderr


def test_debug_shows_the_traceback_of_a_rejection(index: Path) -> None:
    result = run(query_command, index, "--ids", "0", "--seed", "7", "--debug")
    assert result.exit_code == 3
    assert "IndexMismatchError" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: index ")


def run_on_a_terminal(words: list[str], **environment: str) -> str:
    """Return what a command prints on a pseudo-terminal, stdout and stderr together."""
    reader, writer = pty.openpty()
    command = [sys.executable, "query.py", *words]
    clean = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    with subprocess.Popen(
        command, cwd=REPOSITORY, env=clean | environment, stdin=writer, stdout=writer, stderr=writer, close_fds=True
    ) as process:
        os.close(writer)
        seen = b""
        try:
            while part := os.read(reader, 65536):
                seen += part
        except OSError:  # the other end is closed
            pass
        os.close(reader)
    assert process.returncode == 0, seen
    return seen.decode()


@pytest.mark.slow
def test_colours_are_printed_only_on_terminals_that_support_them(index: Path) -> None:
    words = [str(index), "--ids", "0", "-k", "2"]
    shown = run_on_a_terminal(words, TERM="xterm-256color", NO_COLOR="1")
    assert re.findall(r"\x1b\[[\d;]*[34]\d[\d;]*m", shown) == []
    assert "proponent" in shown
    assert ANSI not in run_on_a_terminal(words, TERM="dumb")
    assert ANSI not in run(query_command, *words).output


def test_the_documentation_has_completion_for_every_command() -> None:
    page = (REPOSITORY / "docs/commands.md").read_text(encoding="utf-8")
    (listed,) = re.findall(r"^for c in (.*); do$", page, re.M)
    assert {f"tracin-{name}" for name in listed.split()} == set(COMMANDS)
