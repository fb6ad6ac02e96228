"""Untrusted indexes: no command runs the code that a manifest names, or changes a file outside the index."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

import tracin_ann
from forgery import name_task
from paths import ROOT, SUPPORT
from tasks.toy import CONFIG, Toy, save_checkpoints
from tracin_ann import InfluenceIndex, build
from tracin_ann.cli.query import main as query_command
from tracin_ann.cli.remove import main as remove_command
from tracin_ann.cli.verify import main as verify_command
from tracin_ann.errors import DamagedIndexError, UsageError
from tracin_ann.operations.removal import remove
from tracin_ann.operations.verification import repair
from tracin_ann.store.generations import generation_folder
from tracin_ann.store.locks import WRITER
from tracin_ann.store.manifest import BUILD_RECORD, FEATURES, MANIFEST, Manifest
from trees import read_contents

NAME = "task_of_trust"
TASK = f"""
import sys
sys.path.insert(0, {str(SUPPORT)!r})
from pathlib import Path
from tasks.toy import RATES, Toy, make_rows, make_toy_task
from tracin_ann import Checkpoint, Task

def task(folder=".") -> Task:
    return make_toy_task(
        Path(folder), Toy(),
        checkpoints=[Checkpoint(Path(folder) / f"checkpoint{{i}}.pt", rate) for i, rate in enumerate(RATES)],
        columns=lambda row: {{"label": row[1]}}, describe=lambda row: f"a {{row[1]}}",
    )
"""
MARKING = "from pathlib import Path\nPath({marker!r}).touch()\n"
COMMANDS = {
    "build": ["--task", f"{NAME}.py:task", "--dim", "32", "--dtype", "float32", "--append", "--out", "DIR"],
    "query": ["DIR", "--ids", "0"],
    "info": ["DIR"],
    "verify": ["DIR", "--repair"],
    "remove": ["DIR", "--ids", "1"],
    "mislabelled": ["DIR"],
    "explain": ["DIR", "--train-id", "1", "--id", "0"],
    "hubs": ["DIR"],
    "duplicates": ["DIR"],
    "select": ["DIR", "--n", "2"],
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Create a user's directory with a task's file, checkpoints and an index, and make it the current directory."""
    folder = tmp_path_factory.mktemp("project")
    save_checkpoints(Toy(), folder)
    (folder / f"{NAME}.py").write_text(TASK)
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        patched.setattr(sys, "path", [*sys.path])
        build(f"{NAME}.py:task", "runs/mine", CONFIG)
        yield folder
        sys.modules.pop(NAME, None)


@pytest.fixture
def index(project: Path, tmp_path: Path) -> Path:
    """Return a copy of the index below the user's directory."""
    out = project / "runs" / tmp_path.name
    shutil.copytree(project / "runs" / "mine", out)
    return out


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """Return the path of a file that hostile code would create."""
    return tmp_path / "marker"


def test_a_task_of_the_user_is_found_without_an_option(index: Path, project: Path) -> None:
    done = CliRunner().invoke(query_command, [str(index), "--ids", "0"])
    assert done.exit_code == 0 and "a 0" in done.output and "error" not in done.stderr
    name_task(index, f"{project / NAME}.py:task", folder=str(project))
    assert len(InfluenceIndex.open(index).query([0])) == 1
    with pytest.raises(UsageError, match="does not take these arguments"):
        name_task(index, f"{project / NAME}.py:task", command="x")
        _ = InfluenceIndex.open(index).task


@pytest.mark.parametrize(
    "reference", ["os:system", "subprocess:getoutput", "builtins:exec", "tracin_ann.task:Task", "os"]
)
def test_a_module_is_never_imported(index: Path, marker: Path, reference: str) -> None:
    for arguments in ({"command": f"touch {marker}"}, {"cmd": f"touch {marker}"}, {}):
        name_task(index, reference, **arguments)
        with pytest.raises(
            UsageError, match=r"is not imported: got .*not an absolute path of a file.*; pass --task FILE.py"
        ):
            _ = InfluenceIndex.open(index).task
    assert not marker.exists()


def test_arguments_that_are_not_strings_are_rejected(index: Path, project: Path) -> None:
    name_task(index, f"{project / NAME}.py:task", folder=["x"])
    with pytest.raises(DamagedIndexError, match="TaskReference.arguments"):
        InfluenceIndex.open(index)


ANNOTATED = "from tracin_ann import Task\ndef task() -> Task: ...\n"
FILES = {
    "outside": ("{outside}/evil.py", ANNOTATED, "not below the current directory"),
    "in the index": ("{index}/evil.py", ANNOTATED, "inside the index"),
    "in a generation": ("{index}/generation-000001/evil.py", ANNOTATED, "inside the index"),
    "relative": ("evil.py", ANNOTATED, "not an absolute path"),
    "upwards": ("{project}/../{outside_name}/evil.py", ANNOTATED, "not below the current directory"),
    "absent": ("{project}/absent.py", "", "cannot be found"),
    "a link": ("{project}/link.py", ANNOTATED, "not below the current directory"),
    "installed": ("{project}/.venv/lib/site-packages/evil.py", ANNOTATED, "installed package"),
    "a script": ("{project}/script.py", "def task(): ...\n", "neither a Task nor a function with the annotation"),
    "another's Task": ("{project}/celery_app.py", "def task() -> Task: ...\n", "neither a Task nor"),
    "without the name": ("{project}/other.py", "from tracin_ann import Task\n", "neither a Task nor"),
    "imported": ("{project}/taken.py", "from tracin_ann import Task\nfrom os import system as task\n", "neither"),
    "no Python": ("{project}/broken.py", "def task( -> Task\n", "neither a Task nor"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_is_not_a_task_of_the_user_is_not_run(
    index: Path, project: Path, tmp_path: Path, marker: Path, case: str
) -> None:
    place, text, message = FILES[case]
    path = Path(
        place.format(
            index=index, project=project, outside=tmp_path, outside_name=os.path.relpath(tmp_path, project.parent)
        )
    )
    if text:
        path.parent.mkdir(parents=True, exist_ok=True)
        real = tmp_path / "target.py" if case == "a link" else path
        real.write_text(MARKING.format(marker=str(marker)) + text)
        if case == "a link":
            path.symlink_to(real)
    name_task(index, f"{path}:task")
    with pytest.raises(UsageError, match=f"is not imported: .*{message}"):
        _ = InfluenceIndex.open(index).task
    with pytest.raises(UsageError, match="is not imported"):
        (index / FEATURES / Manifest.read(index).features[0].name).unlink()
        repair(index)
    assert not marker.exists() and "evil" not in sys.modules


def test_other_functions_of_a_task_file_are_not_called(index: Path, project: Path, marker: Path) -> None:
    (project / "besides.py").write_text(
        "import os\nfrom tracin_ann import Task\nrun = os.system\nlast: object = os.system\n"
    )
    for name in ("run", "last"):
        name_task(index, f"{project / 'besides.py'}:{name}", command=f"touch {marker}")
        with pytest.raises(UsageError, match="is not imported: got .*a builtin_function_or_method"):
            _ = InfluenceIndex.open(index).task
    assert not marker.exists()


def test_functions_of_this_library_are_not_tasks(
    index: Path, tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`load_task(reference) -> Task` would import any module; no other module is imported either."""
    package = Path(tracin_ann.__file__).resolve().parent
    monkeypatch.chdir(package.parent)
    (tmp_path / "evil.py").write_text(MARKING.format(marker=str(marker)))
    name_task(index, f"{package / 'task' / 'references.py'}:load_task", reference=f"{tmp_path / 'evil.py'}:x")
    with pytest.raises(UsageError, match="installed package"):
        _ = InfluenceIndex.open(index).task
    name_task(index, f"{package / 'build.py'}:build")
    with pytest.raises(UsageError, match="installed package"):
        _ = InfluenceIndex.open(index).task
    assert not marker.exists()


def test_no_task_is_trusted_in_the_root_directory(index: Path, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    with pytest.raises(UsageError, match="not below the current directory"):
        _ = InfluenceIndex.open(index).task


def test_a_task_that_the_user_names_is_imported_from_anywhere(index: Path, tmp_path: Path, project: Path) -> None:
    name_task(index, "os:system", command="true")
    path = tmp_path / "task_elsewhere.py"
    path.write_text(TASK.replace(" -> Task", ""))
    arguments = {"folder": str(project)}
    assert len(InfluenceIndex.open(index, f"{path}:task", arguments=arguments).query([0])) == 1


def plant_links(index: Path, victim: Path) -> None:
    """Replace parts of an index by links to a directory of the user."""
    (index / "generation-000000").symlink_to(victim)
    (index / WRITER).symlink_to(victim / "canary")
    (index / ".tracin-tmp-00000000-1-00.h5").symlink_to(victim / "canary")


# A process for each command: only the two that users run on an index of somebody else most are fast tests.
@pytest.mark.parametrize(
    "name", [name if name in ("query", "info") else pytest.param(name, marks=pytest.mark.slow) for name in COMMANDS]
)
def test_no_command_runs_code_or_changes_a_file_outside_of_the_index(
    index: Path, project: Path, tmp_path: Path, marker: Path, name: str
) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "canary").write_bytes(b"sings")
    os.utime(victim / "canary", (0, 0))
    name_task(index, "os:system", command=f"touch {marker}")
    (index / "generation-notes").mkdir()
    (index / "generation-notes" / "canary").write_bytes(b"notes")
    words = [str(index) if word == "DIR" else word for word in COMMANDS[name]]
    command = [sys.executable, "-m", f"tracin_ann.cli.{name}", *words]
    before = read_contents(victim), read_contents(project)
    code = f"import sys; sys.argv[0] = {name!r}; from tracin_ann.cli.{name} import main; main()"
    command = [sys.executable, "-c", code, *words]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    for links in (False, True):
        if links:
            plant_links(index, victim)
        done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)
        assert "Traceback" not in done.stderr and done.returncode in (0, 2, 4), done.stderr
        assert done.returncode == 4 or not links, (done.stdout, done.stderr)
        assert not marker.exists() and read_contents(victim) == before[0]
        assert (index / "generation-notes" / "canary").read_bytes() == b"notes"
    outside = {path: content for path, content in before[1].items() if not path.startswith(f"runs/{index.name}/")}
    after = read_contents(project)
    assert {path: after[path] for path in outside} == outside


# Links, in one place at a time.


PLACES = [
    MANIFEST,
    BUILD_RECORD,
    FEATURES,
    "generation-000001",
    f"generation-000001/{MANIFEST}",
    "generation-000001/canaries.h5",
]


@pytest.mark.parametrize("place", PLACES)
def test_a_link_in_an_index_is_not_followed(index: Path, tmp_path: Path, place: str) -> None:
    """The target of the link is intact and must not change."""
    away = tmp_path / "away"
    shutil.move(index / place, away)
    (index / place).symlink_to(away)
    before = read_contents(away) if away.is_dir() else away.read_bytes()
    runner = CliRunner()
    for command, words in (
        (query_command, ["--self-influence"]),
        (verify_command, []),
        (remove_command, ["--ids", "1"]),
    ):
        done = runner.invoke(command, [str(index), *words])
        if place == BUILD_RECORD and command is query_command:
            continue
        assert done.exit_code == 4, (command, done.output)
        assert "a symbolic link" in done.output and Path(place).name in done.output
    assert (read_contents(away) if away.is_dir() else away.read_bytes()) == before


def test_an_index_behind_a_link_is_accepted(index: Path, tmp_path: Path) -> None:
    link = tmp_path / "elsewhere"
    link.symlink_to(index)
    assert len(InfluenceIndex.open(link).query([0])) == 1
    build(f"{NAME}.py:task", link, CONFIG)
    assert remove(link, [2]).generation == 2 and generation_folder(index, 2).is_dir()
    assert InfluenceIndex.open(link).removed.tolist() == [2]


@pytest.mark.parametrize("kind", ["a symbolic link", "a hard link to another file", "a directory", "a FIFO"])
def test_a_lock_path_that_is_not_a_lock_file_is_not_written_to(index: Path, tmp_path: Path, kind: str) -> None:
    canary = tmp_path / "canary"
    canary.write_bytes(b"sings")
    make = {"a symbolic link": os.symlink, "a hard link to another file": os.link}.get(kind)
    if make is not None:
        make(canary, index / WRITER)
    elif kind == "a FIFO":
        os.mkfifo(index / WRITER)
    else:
        (index / WRITER).mkdir()
    for act in (lambda: remove(index, [1]), lambda: repair(index), lambda: build(f"{NAME}.py:task", index, CONFIG)):
        with pytest.raises(DamagedIndexError, match=rf"{WRITER}: got {kind}.*; inspect it and remove it"):
            act()
    assert canary.read_bytes() == b"sings" and (index / WRITER).exists()


@pytest.mark.parametrize("place", [FEATURES, ".index-unfinished", ".index-unfinished/ivf.faiss", "generation-000000"])
def test_writers_reject_a_planted_link_and_remove_nothing_behind_it(index: Path, tmp_path: Path, place: str) -> None:
    victim = tmp_path / "victim"
    if (index / place).exists():
        shutil.move(index / place, victim)
    else:
        victim.mkdir()
    for name in ("features-000009-0000.h5", MANIFEST, "ivf.faiss", ".tracin-tmp-00000000-1-00.h5"):
        (victim / name).write_bytes(b"mine")
        os.utime(victim / name, (0, 0))
    (index / place).parent.mkdir(exist_ok=True)
    (index / place).symlink_to(victim)
    before = read_contents(victim)
    for act in (
        lambda: remove(index, [1]),
        lambda: repair(index),
        lambda: build(f"{NAME}.py:task", index, replace(CONFIG, index="ivf")),
    ):
        with pytest.raises(DamagedIndexError, match=rf"{place}: got a symbolic link"):
            act()
    assert read_contents(victim) == before


def test_cleanup_removes_only_files_with_names_of_writers(index: Path, tmp_path: Path) -> None:
    (tmp_path / "canary").write_bytes(b"sings")
    mine = ["generation-notes", "generation-1", "generation-", "generation-000000/notes", f"{FEATURES}/notes"]
    for name in mine:
        (index / name).mkdir(parents=True)
        (index / name / "canary").write_bytes(b"mine")
    (index / FEATURES / "features-notes.h5").write_bytes(b"mine")
    leftovers = ["generation-000000/link", f"{FEATURES}/features-000009-0000.h5", ".tracin-tmp-00000000-1-00.h5"]
    for name in leftovers:
        (index / name).symlink_to(tmp_path / "canary")
    os.utime(index / leftovers[2], (0, 0), follow_symlinks=False)
    assert remove(index, [1]).generation == 2
    assert (tmp_path / "canary").read_bytes() == b"sings"
    assert not any((index / name).is_symlink() for name in leftovers)
    assert all((index / name / "canary").read_bytes() == b"mine" for name in mine)
    assert (index / FEATURES / "features-notes.h5").read_bytes() == b"mine"


@pytest.mark.parametrize("place", [MANIFEST, "generation-000001/canaries.h5", "features"])
def test_no_command_waits_for_a_fifo_in_an_index(index: Path, place: str) -> None:
    path = index / place if place != "features" else sorted((index / FEATURES).iterdir())[0]
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DamagedIndexError, match=f"{path.name}.*a FIFO"):
        InfluenceIndex.open(index)
