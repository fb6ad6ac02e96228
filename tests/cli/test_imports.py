"""Imports of a command: modules that no command needs, the garbage collector, and the wait policy of threads."""

from __future__ import annotations

import ast
import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest

import zoo
from paths import ROOT, SUPPORT
from tracin_ann.cli.imports import pause_collector, wait_passively

HEAVY = (
    *("sympy", "torch._dynamo", "torch._inductor", "torch.onnx", "torch.distributed.fsdp", "torch.distributed.tensor"),
    *("scipy", "sklearn", "pandas", "pyarrow", "matplotlib", "PIL", "jinja2", "IPython", "unittest.mock"),
)
"""Modules that take long to import. PyTorch itself imports some of them, and then none of them is the command's."""
CODE = f"""
import sys
import torch, faiss
before = set(sys.modules)
from tracin_ann.cli.{{command}} import main
main({{words}}, standalone_mode=False)
print("\\n", sorted((set({HEAVY}) & set(sys.modules)) - before))
"""
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(SUPPORT)])}
TASK = f"{Path(zoo.__file__).resolve()}:task"


def run_python(code: str, **environment: str) -> str:
    """Return the last line that a new process prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**ENVIRONMENT, **environment}
    )
    return done.stdout.splitlines()[-1].strip()


def find_heavy_modules(command: str, *words: object) -> list[str]:
    return ast.literal_eval(run_python(CODE.format(command=command, words=[str(word) for word in words])))


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Return an index that a command has built, and the modules that it imported."""
    folder = tmp_path_factory.mktemp("mlp")
    zoo.save_checkpoints("mlp", 0, folder)
    words = ["--task", TASK, "--task-arg", "case=mlp", "--task-arg", f"folder={folder}", "--task-arg", "seed=0"]
    return folder / "index", find_heavy_modules("build", *words, "--out", folder / "index", "--dim", 64)


def test_a_build_imports_nothing_that_it_does_not_need(index: tuple[Path, list[str]]) -> None:
    assert index[1] == []


@pytest.mark.parametrize(
    "words",
    [
        ("query", "--ids", "0"),
        pytest.param(("query", "--ids", "0", "--exact", "--format", "jsonl"), marks=pytest.mark.slow),
        pytest.param(("query", "--self-influence", "--format", "csv"), marks=pytest.mark.slow),
        ("info",),
        pytest.param(("verify",), marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_a_command_imports_nothing_that_it_does_not_need(words: tuple[str, ...], index: tuple[Path, list[str]]) -> None:
    command, *options = words
    assert find_heavy_modules(command, index[0], *options) == []


def test_the_collector_runs_again_after_the_imports_of_a_command(index: tuple[Path, list[str]]) -> None:
    code = f"""
import gc, os
from tracin_ann.cli.query import main
main([{str(index[0])!r}, "--ids", "0"], standalone_mode=False)
print()
print(gc.isenabled(), gc.get_freeze_count() > 100_000, os.environ.get("OMP_WAIT_POLICY"))
"""
    assert run_python(code) == "True True None"


def test_the_collector_runs_again_after_a_failed_import() -> None:
    code = """
import gc
from tracin_ann.cli.imports import pause_collector
try:
    with pause_collector():
        assert not gc.isenabled()
        import no_such_module
except ImportError:
    print(gc.isenabled())
"""
    assert run_python(code) == "True"


def test_the_collector_is_unchanged_in_a_process_with_torch() -> None:
    frozen = gc.get_freeze_count()
    with pause_collector():
        assert gc.isenabled()
    assert gc.get_freeze_count() == frozen


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"])
def test_the_users_wait_policy_takes_precedence(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for other in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        monkeypatch.delenv(other, raising=False)
    before = dict(os.environ)
    with wait_passively():
        assert dict(os.environ) == {**before, "OMP_WAIT_POLICY": "PASSIVE"}
    assert dict(os.environ) == before
    monkeypatch.setenv(name, "1")
    with wait_passively():
        assert dict(os.environ) == {**before, name: "1"}
    assert os.environ[name] == "1"
