"""References name a task by file or by module; a reference that cannot be loaded is reported."""

from __future__ import annotations

import gc
import multiprocessing
import operator
import sys
from pathlib import Path

import pytest
import torch

from paths import SUPPORT
from tasks import named
from tracin_ann.errors import TaskError, UsageError
from tracin_ann.task.references import absolute_reference, load_task
from tracin_ann.task.trust import load_named_task

TASK_FILE = '''
from tasks.named import function
from tasks.toy import make_rows

class Rows:
    """A data set whose class only this file defines."""
    def __init__(self, n):
        self.n = n
    def __len__(self):
        return self.n
    def __getitem__(self, i):
        return ("row", i)

def task(rate="0.25"):
    return function(rate)
'''


@pytest.fixture
def clean_imports(monkeypatch):
    """Remove imported task files from `sys.modules` and `sys.path` after a test."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.fixture
def write(tmp_path, clean_imports):
    def written(name, text=TASK_FILE):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return written


def test_a_module_is_named_with_dots(clean_imports):
    assert load_task("tasks.named:ready") is named.ready
    task = load_task("tasks.named:function", {"rate": "0.125", "rows_wanted": "7"})
    assert task.checkpoints[0].learning_rate == 0.125
    assert len(task.train_data()) == 7


def test_a_file_is_imported_under_its_stem_once(write, monkeypatch):
    path = write("my_own_task.py")
    task = load_task(f"{path}:task", {"rate": "0.75"})
    assert task.checkpoints[0].learning_rate == 0.75
    assert load_task(f"{path}:task").checkpoints[0].learning_rate == 0.25
    module = sys.modules["my_own_task"]
    monkeypatch.chdir(path.parent)
    load_task("my_own_task.py:task")
    assert sys.modules["my_own_task"] is module


def test_modules_beside_the_file_can_be_imported(write):
    write("neighbour_of_task.py", "rate = '0.375'\n")
    path = write(
        "beside_a_neighbour.py", TASK_FILE + "\nimport neighbour_of_task\nnear = task(neighbour_of_task.rate)\n"
    )
    assert load_task(f"{path}:near").checkpoints[0].learning_rate == 0.375


def test_a_data_set_whose_class_the_task_file_defines_reaches_a_spawned_worker(write):
    path = write("task_for_workers.py")
    load_task(f"{path}:task")
    data = sys.modules["task_for_workers"].Rows(3)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(operator.getitem, (data, 2)) == ("row", 2)
        assert type(pool.apply(operator.pos, (torch.tensor(1),))) is torch.Tensor


@pytest.mark.parametrize("reference", ["tasks.named", "named.py", ":name", "tasks.named:", ""])
def test_a_reference_without_a_name_is_rejected(reference):
    with pytest.raises(
        UsageError, match="the task cannot be found: got .*expected path/to/file.py:name or package.mod"
    ):
        load_task(reference)


def test_an_unknown_name_is_rejected_with_the_tasks_of_the_module():
    with pytest.raises(UsageError) as caught:
        load_task("tasks.named:redy")
    assert str(caught.value) == (
        "tasks.named has no redy: got 'redy', expected a Task or a function that returns one, such as ready; "
        "correct the name after the colon"
    )


def test_a_missing_file_or_module_is_rejected(tmp_path):
    with pytest.raises(
        UsageError, match="^the task's file is missing: got .*/absent.py, expected a Python file; correct"
    ):
        load_task(f"{tmp_path}/absent.py:task")
    for module in ("no_such_package", "tasks.no_such_module"):
        with pytest.raises(UsageError, match=f"^the task's module cannot be imported: got {module}, expected a module"):
            load_task(f"{module}:task")


def test_a_module_that_fails_to_import_something_else_shows_that_error(write):
    path = write("imports_what_is_absent.py", "import no_such_package_at_all\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_package_at_all"):
        load_task(f"{path}:task")
    with pytest.raises(ModuleNotFoundError, match="no_such_package_at_all"):
        load_task("imports_what_is_absent:task")


def test_a_task_takes_no_arguments():
    with pytest.raises(UsageError, match="^tasks.named:ready takes no arguments: got --task-arg rate, expected none"):
        load_task("tasks.named:ready", {"rate": "1"})


@pytest.mark.parametrize(
    ("arguments", "got", "expected"),
    [
        ({}, "none", "missing a required argument: 'rate'"),
        ({"rate": "1", "sed": "2"}, "rate=1, sed=2", "got an unexpected keyword argument 'sed'"),
    ],
)
def test_arguments_that_do_not_fit_the_function_are_rejected(arguments, got, expected):
    with pytest.raises(UsageError) as caught:
        load_task("tasks.named:function", arguments)
    assert str(caught.value) == (
        f"tasks.named:function does not take these arguments: got {got}, expected {expected}; change --task-arg"
    )


def test_an_error_inside_the_function_is_not_reported_as_wrong_arguments():
    with pytest.raises(TypeError, match="unsupported operand"):
        load_task("tasks.named:fails_inside", {"rate": "1"})


@pytest.mark.parametrize(("name", "got"), [("number", "int"), ("no_task", "int")])
def test_an_object_that_is_not_a_task_is_rejected(name, got):
    with pytest.raises(
        TaskError, match=rf"^tasks.named:{name} is not a task: got {got}, expected a tracin_ann.Task, or a"
    ):
        load_task(f"tasks.named:{name}")


@pytest.mark.parametrize("stem", ["random", "numpy", "tracin_ann"])
def test_a_file_with_the_name_of_an_imported_module_is_rejected(write, stem):
    path = write(f"{stem}.py")
    with pytest.raises(UsageError) as caught:
        load_task(f"{path}:task")
    assert str(caught.value).startswith(f"the task's file cannot be imported as '{stem}': got ")
    assert f"expected {path}; rename the file" in str(caught.value)
    assert sys.modules[stem].__file__ != str(path)


def test_two_files_with_one_stem_are_not_confused(write):
    first, second = write("a/same_stem.py"), write("b/same_stem.py")
    load_task(f"{first}:task")
    with pytest.raises(UsageError, match=f"^the task's file cannot be imported as 'same_stem': got {first}, expected"):
        load_task(f"{second}:task")


@pytest.mark.parametrize("stem", ["my-task", "1task"])
def test_a_file_whose_stem_is_not_a_module_name_is_rejected(write, stem):
    path = write(f"{stem}.py")
    with pytest.raises(
        UsageError, match=f"cannot be imported as '{stem}': got no valid module name, expected .*rename"
    ):
        load_task(f"{path}:task")


def test_a_reference_to_a_file_becomes_absolute_and_to_a_module_does_not_change(monkeypatch):
    monkeypatch.chdir(SUPPORT)
    assert absolute_reference("tasks/named.py:ready") == f"{SUPPORT}/tasks/named.py:ready"
    assert absolute_reference("tasks.named:ready") == "tasks.named:ready"


@pytest.mark.parametrize(
    "load", [load_task, lambda name: load_named_task(name, {}, Path("runs"))], ids=["named", "recorded"]
)
def test_a_task_is_imported_without_the_collector(load, write, monkeypatch):
    """It may import libraries with hundreds of thousands of objects."""
    file = write(
        "without_collector.py",
        "import gc\nfrom tracin_ann import Task\nfrom tasks.named import function\nENABLED = [gc.isenabled()]\n"
        "def task() -> Task:\n    ENABLED.append(gc.isenabled())\n    return function('0.25')\n",
    )
    monkeypatch.chdir(file.parent)
    load(f"{file}:task")
    assert sys.modules["without_collector"].ENABLED == [False, False]
    assert gc.isenabled()
