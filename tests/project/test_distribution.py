"""The wheel and the source distribution: their content, and that the installed package works without the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from dataclasses import dataclass
from email import message_from_bytes
from pathlib import Path
from typing import Any

import pytest

from paths import ROOT as REPOSITORY
from project import PYPROJECT, committed_files

pytestmark = pytest.mark.xdist_group("distribution")

# The build backend runs in this environment: nothing is downloaded.
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


@dataclass(frozen=True)
class Distributions:
    """The sdist of the committed files, and the wheel of the unpacked sdist."""

    sdist: Path
    wheel: Path
    files: set[str]

    def in_sdist(self) -> set[str]:
        with tarfile.open(self.sdist) as tar:
            return {name.partition("/")[2] for name in tar.getnames()}

    def in_wheel(self) -> set[str]:
        with zipfile.ZipFile(self.wheel) as archive:
            return set(archive.namelist())


def run(*words: object, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(word) for word in words]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Distributions:
    root = tmp_path_factory.mktemp("distribution")
    files = {str(path.relative_to(REPOSITORY)) for path in committed_files()}
    for name in files:
        (root / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, root / "source" / name)
    sdist = root / run(sys.executable, "-c", BUILD, "build_sdist", root, cwd=root / "source").splitlines()[-1]
    with tarfile.open(sdist) as tar:
        tar.extractall(root / "unpacked", filter="data")
    (unpacked,) = (root / "unpacked").iterdir()
    wheel = root / run(sys.executable, "-c", BUILD, "build_wheel", root, cwd=unpacked).splitlines()[-1]
    return Distributions(sdist, wheel, files)


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return PYPROJECT["project"]


@pytest.mark.slow
def test_the_wheel_contains_only_the_library(distributions: Distributions) -> None:
    held = {name for name in distributions.in_wheel() if ".dist-info/" not in name}
    assert held == {name for name in distributions.files if name.startswith("tracin_ann/")}
    assert {"tracin_ann/py.typed", "tracin_ann/cli/query.py"} <= held


@pytest.mark.slow
def test_the_sdist_contains_everything_that_its_tests_need(distributions: Distributions) -> None:
    held = distributions.in_sdist()
    needed = ("tracin_ann/", "tests/", "docs/", "examples/", "benchmarks/", "scripts/")
    assert {name for name in distributions.files if name.startswith(needed)} - held == set()
    assert {"README.md", "CONTRIBUTING.md", "LICENSE", "pyproject.toml", "constraints.txt"} <= held
    assert {"build_index.py", "query.py"} <= held


@pytest.mark.slow
def test_the_metadata_equals_that_of_the_project(distributions: Distributions, project: dict[str, Any]) -> None:
    (name,) = (name for name in distributions.in_wheel() if name.endswith(".dist-info/METADATA"))
    with zipfile.ZipFile(distributions.wheel) as archive:
        message = message_from_bytes(archive.read(name))
        licence = archive.read(name.replace("METADATA", "licenses/LICENSE")).decode()
    assert licence == (REPOSITORY / "LICENSE").read_text(encoding="utf-8")
    assert (message["Name"], message["Version"]) == (project["name"], project["version"])
    assert message["License-Expression"] == project["license"]
    assert message["Requires-Python"] == project["requires-python"]
    assert message["Description-Content-Type"] == "text/markdown"
    shown = message.get_payload(decode=True).decode()
    assert shown.strip() == (REPOSITORY / "README.md").read_text(encoding="utf-8").strip()
    assert set(message.get_all("Provides-Extra", [])) == set(project["optional-dependencies"])


@pytest.mark.slow
def test_the_installed_package_works_without_the_repository(
    distributions: Distributions, project: dict[str, Any], tmp_path: Path
) -> None:
    venv.create(tmp_path / "env", with_pip=False, symlinks=True)
    python = tmp_path / "env" / "bin" / "python"
    paths = {name: sysconfig.get_path(name) for name in ("purelib", "platlib")}
    (own,) = (tmp_path / "env").glob("lib/python*/site-packages")
    # Use the installed torch and other packages. Links of an editable install are there as well and are not followed.
    (own / "here.pth").write_text("\n".join(dict.fromkeys(paths.values())))
    install = ("install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check", distributions.wheel)
    run(sys.executable, "-m", "pip", "--python", python, *install, cwd=tmp_path)
    for command in project["scripts"]:
        assert (python.parent / command).exists()
    assert "--ids" in run(python.parent / "tracin-query", "--help", cwd=tmp_path)
    assert run(python.parent / "tracin-build", "--version", cwd=tmp_path) == f"tracin-build {project['version']}\n"
    code = "import tracin_ann; print(tracin_ann.__file__); print(tracin_ann.InfluenceIndex.__module__)"
    file, module = run(python, "-I", "-c", code, cwd=tmp_path).splitlines()
    assert Path(file).is_relative_to(own)
    assert module == "tracin_ann.index"
