"""Rejections before a build starts: the message, the exit status, and no files left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import broken
from tracin_ann.cli.build import main as build_command

BROKEN = f"{Path(broken.__file__).resolve()}:task"

REFUSED = {
    "reduced": ["the loss is not one number per example", "shape []", "shape [12]", "reduction='none'"],
    "batch norm": ["examples of a batch mix in the loss", "row 0", "batch norm outside eval mode"],
    "in-batch negatives": ["examples of a batch mix in the loss", "in-batch negatives"],
    "random rows": ["rows of train_data change", "two different readings of row 0", "--allow-random-data"],
    "checkpoint": ["does not match the model", "missing 0.bias", "the 4 entries"],
    "no gradient": ["the loss has no gradient", "no_grad"],
    "nan": ["the loss of row 2 at checkpoint 0 is not finite", "got nan"],
    "dropout": ["the loss is random", "functional dropout"],
    "empty": ["Task.train_data cannot be used", "got no rows", "at least one row"],
    "learning rate": ["bad learning rate", "got -1", "a finite number, 0 or more"],
}


def build(kind: str, tmp_path: Path, *options: str) -> Result:
    words = ["--task", BROKEN, "--task-arg", f"kind={kind}", "--task-arg", f"folder={tmp_path}"]
    return CliRunner().invoke(build_command, [*words, "--out", str(tmp_path / "index"), "--dim", "8", *options])


@pytest.mark.parametrize("options", [[], ["--dry-run"]], ids=["build", "dry run"])
@pytest.mark.parametrize("kind", REFUSED)
def test_a_broken_task_is_rejected(tmp_path: Path, kind: str, options: list[str]) -> None:
    result = build(kind, tmp_path, *options)
    assert result.exit_code == 1
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("error: "))
    for part in [*REFUSED[kind], "got ", "expected ", "; "]:
        assert part in line
    assert [path.name for path in tmp_path.iterdir()] in ([], ["0.pt"])


def test_random_rows_are_accepted_if_they_are_allowed(tmp_path: Path) -> None:
    result = build("random rows", tmp_path, "--allow-random-data")
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "index" / "manifest.json").exists()


def test_a_valid_task_is_built(tmp_path: Path) -> None:
    assert build("sound", tmp_path).exit_code == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sketch", "kronecker", "--dim", "7"], ["the kronecker sketch cannot use this dimension", "got 7"]),
        (["--task-arg", "unknown=1"], ["does not take these arguments", "unknown"]),
        (["--batch-size", "0"], ["--batch-size"]),
        (["--task-arg", "kind=sound"], ["got kind twice"]),
        (["--sketch", "folded"], ["--sketch"]),
    ],
)
def test_bad_options_are_rejected(tmp_path: Path, options: list[str], message: list[str]) -> None:
    result = build("sound", tmp_path, *options)
    assert result.exit_code == 2
    assert all(part in result.stderr for part in message), result.stderr
    assert not (tmp_path / "index").exists()
