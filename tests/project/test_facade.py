"""`import tracin_ann` and `--help` import nothing heavy, and every public name resolves."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import tracin_ann
from paths import ROOT as REPOSITORY
from project import SCRIPTS

HEAVY = ("torch", "faiss", "h5py", "numpy", "rich", "pandas", "matplotlib")
REPORT = f"\nimport sys\nprint([name for name in {HEAVY} if name in sys.modules])\n"


def run_python(code: str, **environment: str) -> str:
    command = [sys.executable, "-c", code + REPORT]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True, env=environment or None)
    return done.stdout.splitlines()[-1]


def test_the_import_loads_nothing_heavy() -> None:
    assert run_python("import tracin_ann; dir(tracin_ann); tracin_ann.TracinAnnError") == "[]"


def test_help_of_every_command_loads_nothing_heavy() -> None:
    code = "\n".join(
        f"import {place}\ntry: {place}.main(['--help'])\nexcept SystemExit as end: assert not end.code"
        for place in (target.partition(":")[0] for target in SCRIPTS.values())
    )
    assert run_python(code) == "[]"


def test_every_name_resolves() -> None:
    assert len(set(tracin_ann.__all__)) == len(tracin_ann.__all__)
    for name in tracin_ann.__all__:
        assert getattr(tracin_ann, name).__name__ == name
    assert set(tracin_ann.__all__) <= set(dir(tracin_ann))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        tracin_ann.nonsense  # noqa: B018


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(tracin_ann.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body for alias in node.names}  # type: ignore[attr-defined]
    assert seen == {name: f"tracin_ann.{home}" for name, home in tracin_ann._HOME_OF.items()}
    assert set(seen) == set(tracin_ann.__all__)


def test_a_function_is_not_hidden_by_the_module_of_its_name() -> None:
    code = "import tracin_ann.build, tracin_ann.operations\nfrom tracin_ann import build, plan\n"
    code += "assert callable(build) and callable(plan) and tracin_ann.build is build\n"
    assert "torch" in run_python(code)
