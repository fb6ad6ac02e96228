"""Packaging: version, extras, pins, portable files, and a clear error for a missing or duplicate FAISS."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest

import tracin_ann
from paths import ROOT as REPOSITORY
from project import PYPROJECT, committed_files
from tracin_ann import device
from tracin_ann.errors import MissingPackageError

# Written so that this file does not match itself.
HOST = re.compile(r"pypi\.org|python" + r"hosted|download\.pytorch\.org")
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:work|root|farm|home)/")


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return PYPROJECT


def normalise(need: str) -> str:
    """Return the normalised name of a requirement or pin, as package indexes compare names."""
    found = re.match(r"[\w.-]+", need)
    assert found is not None
    return re.sub(r"[-_.]+", "-", found[0].split("==")[0]).lower()


def test_the_version_is_the_same_everywhere(project: dict[str, Any]) -> None:
    assert tracin_ann.__version__ == project["project"]["version"]


def test_cpu_and_gpu_exclude_each_other(project: dict[str, Any]) -> None:
    extras = project["project"]["optional-dependencies"]
    assert {"cpu", "gpu", "dev"} <= set(extras)
    pair = {"cpu", "gpu"}
    assert any({entry["extra"] for entry in group} == pair for group in project["tool"]["uv"]["conflicts"])


def test_every_command_has_a_function(project: dict[str, Any]) -> None:
    scripts = project["project"]["scripts"]
    commands = [path.stem for path in (REPOSITORY / "tracin_ann/cli").glob("*.py") if "\n@command(" in path.read_text()]
    assert scripts == {f"tracin-{name.replace('_', '-')}": f"tracin_ann.cli.{name}:main" for name in commands}
    for target in scripts.values():
        assert callable(importlib.metadata.EntryPoint("command", target, "console_scripts").load())


def test_names_that_the_first_python_does_not_have_are_not_imported(project: dict[str, Any]) -> None:
    assert project["project"]["requires-python"] == ">=3.10"
    later = {
        "typing": {"LiteralString", "Never", "NotRequired", "Required", "Self", "Unpack", "assert_never", "override"},
        "datetime": {"UTC"},
        "enum": {"StrEnum"},
        "hashlib": {"file_digest"},
        "itertools": {"batched"},
    }
    found = [
        f"{path.relative_to(REPOSITORY)}:{node.lineno} imports {name.name}"
        for path in committed_files()
        if path.suffix == ".py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom)
        for name in node.names
        if name.name in later.get(node.module or "", ())
    ]
    assert found == []


def test_constraints_pin_every_dependency(project: dict[str, Any]) -> None:
    lines = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert "torch==2.13.0" in pins
    form = re.compile(r"([\w.-]+)==([\w.]+)( ; python_version [<>=]+ \"3\.\d+\")?")
    assert [pin for pin in pins if not form.fullmatch(pin)] == []
    groups = [project["project"]["dependencies"], *project["project"]["optional-dependencies"].values()]
    wanted = {normalise(need) for group in groups for need in group}
    assert wanted - {normalise(pin) for pin in pins} == {"tracin-ann"}  # extras that refer to extras


def test_extras_that_refer_to_the_project_exist(project: dict[str, Any]) -> None:
    extras = project["project"]["optional-dependencies"]
    for needs in extras.values():
        for inner in (need[len("tracin-ann[") : -1] for need in needs if need.startswith("tracin-ann[")):
            assert set(inner.split(",")) <= set(extras)


@pytest.mark.parametrize("pattern", [HOST, MACHINE_PATH], ids=["registry host", "path of a machine"])
def test_committed_files_are_portable(pattern: re.Pattern[str]) -> None:
    files = committed_files()
    assert REPOSITORY / "pyproject.toml" in files
    texts = {path: path.read_bytes().decode(errors="replace") for path in files}
    found = {str(path.relative_to(REPOSITORY)): hit[0] for path, text in texts.items() if (hit := pattern.search(text))}
    assert found == {}


def test_files_named_in_contributing_exist() -> None:
    text = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = re.findall(r"(?:tracin_ann|tests|docs|benchmarks)/[\w./-]*\w", text)
    assert len(named) > 30
    assert [name for name in named if "NAME" not in name and not (REPOSITORY / name).exists()] == []


def test_readme_shows_the_two_commands() -> None:
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert "make demo" in readme
    assert "make test" in readme


def pretend_installed(monkeypatch: pytest.MonkeyPatch, *wheels: str) -> None:
    """Make the package metadata list these FAISS wheels only."""
    real = importlib.metadata.version

    def version(name: str) -> str:
        if not name.startswith("faiss"):
            return real(name)
        if name in wheels:
            return "1.15.1"
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)


@pytest.mark.parametrize(
    "left", [None, ModuleType("faiss")], ids=["no module", "an empty module, left by an uninstall"]
)
def test_a_missing_faiss_is_reported(monkeypatch: pytest.MonkeyPatch, left: ModuleType | None) -> None:
    pretend_installed(monkeypatch)
    monkeypatch.setitem(sys.modules, "faiss", left)
    with pytest.raises(MissingPackageError, match=r"FAISS is not installed.*pip install 'tracin-ann\[cpu\]'"):
        device.import_faiss.__wrapped__()


def test_two_faiss_packages_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_installed(monkeypatch, "faiss-cpu", "faiss-gpu")
    with pytest.raises(MissingPackageError, match="faiss-cpu and faiss-gpu.*pip uninstall -y faiss-cpu faiss-gpu"):
        device.import_faiss.__wrapped__()


def test_one_faiss_package_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_installed(monkeypatch, "faiss-gpu")
    assert device.import_faiss.__wrapped__() is sys.modules["faiss"]


IMPORT_WITH = """
import importlib.metadata, sys
real, wheels = importlib.metadata.version, sys.argv[1:]
def version(name):
    if name in wheels:
        return "1.15.1"
    if name.startswith("faiss"):
        raise importlib.metadata.PackageNotFoundError(name)
    return real(name)
importlib.metadata.version = version
if not wheels:
    sys.modules["faiss"] = None
import tracin_ann
print("still well")
tracin_ann.build
"""


@pytest.mark.parametrize(
    ("wheels", "message"),
    [([], "FAISS is not installed"), (["faiss-cpu", "faiss-gpu"], "several FAISS packages share one module")],
    ids=["none", "two"],
)
def test_the_first_use_of_faiss_reports_the_error(wheels: list[str], message: str) -> None:
    command = [sys.executable, "-c", IMPORT_WITH, *wheels]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (1, "still well\n")
    assert f"MissingPackageError: {message}" in result.stderr.strip().splitlines()[-1]
