"""Task and Checkpoint refuse what breaks the contract; references are found, by file and by module."""

from __future__ import annotations

import multiprocessing
import operator
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from paths import SUPPORT
from tasks import named
from tasks.toy import CONFIG, Toy, rows, toy
from tracin_ann import Checkpoint, Description, build, plan
from tracin_ann.errors import TaskError, UsageError
from tracin_ann.task.references import absolute_reference, load_task

TASK_FILE = '''
from tasks.named import function
from tasks.toy import rows

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
    """Let a test import task files without leaving their modules and folders behind."""
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


@pytest.mark.parametrize(
    "rate",
    [
        -0.1,
        float("nan"),
        float("inf"),
        -float("inf"),
        "0.1",
        None,
        1j,
        10**400,
        torch.tensor(-1.0),
        torch.tensor(1j),
        torch.ones(2),
        torch.ones((), device="meta"),
        np.array([0.1, 0.2]),
        np.array(["0.1"]),
    ],
)
def test_a_learning_rate_that_is_no_finite_number_of_0_or_more_is_refused(rate):
    with pytest.raises(TaskError) as caught:
        Checkpoint("runs/last.pt", learning_rate=rate)
    message = str(caught.value)
    assert message.startswith("checkpoint runs/last.pt has a bad learning rate: got ")
    assert "expected a finite number, 0 or more; give the learning rate that training used" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "rate",
    [
        1,
        1e-9,
        0,
        0.0,
        -0.0,
        np.float32(0.5),
        np.float64(0.5),
        np.int64(2),
        np.array(0.25),
        np.array([0.25]),
        torch.tensor(0.5),
        torch.tensor([0.5], dtype=torch.float64),
        torch.tensor(3),
        torch.tensor(0.5, requires_grad=True),
        torch.tensor(0.5, dtype=torch.bfloat16),
    ],
)
def test_every_kind_of_number_is_a_learning_rate_and_kept_as_a_float(rate):
    kept = Checkpoint(Path("last.pt"), learning_rate=rate).learning_rate
    assert type(kept) is float
    assert kept == (rate.item() if hasattr(rate, "item") else rate)
    assert str(kept)[0] != "-"


@pytest.mark.parametrize("n", [1, 2])
def test_a_task_whose_every_learning_rate_is_0_is_refused(tmp_path, n):
    got = f"{n} checkpoint{'s' if n > 1 else ''} with learning rate 0"
    with pytest.raises(TaskError, match=f"^every checkpoint has learning rate 0: got {got}, expected .* above 0"):
        toy(tmp_path, checkpoints=[Checkpoint(f"{i}.pt", 0) for i in range(n)])


@pytest.mark.parametrize("field", ["model", "loss", "train_data", "query_data", "query_loss", "collate", "load"])
def test_a_field_that_cannot_be_called_is_refused_by_name(tmp_path, field):
    with pytest.raises(TaskError, match=rf"^Task.{field} is not callable: got list, expected a function; "):
        toy(tmp_path, **{field: [1, 2]})


@pytest.mark.parametrize("field", ["model", "loss", "train_data", "query_data"])
def test_a_required_field_cannot_be_none(tmp_path, field):
    with pytest.raises(TaskError, match=f"^Task.{field} is not callable: got NoneType"):
        toy(tmp_path, **{field: None})


def test_a_task_without_checkpoints_is_refused(tmp_path):
    with pytest.raises(TaskError, match=r"^Task.checkpoints is empty: got no checkpoint, expected at least one; pass"):
        toy(tmp_path, checkpoints=[])


@pytest.mark.parametrize("checkpoints", [Checkpoint("a.pt", 0.1), ["a.pt"], None, "a.pt"])
def test_checkpoints_must_be_a_list_of_checkpoint(tmp_path, checkpoints):
    with pytest.raises(TaskError, match=r"^Task.checkpoints is not a list of checkpoints: got .*pass checkpoints=\["):
        toy(tmp_path, checkpoints=checkpoints)


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        (None, ["first.weight", "first.bias", "second.weight", "second.bias"]),
        ("*", ["first.weight", "first.bias", "second.weight", "second.bias"]),
        ("*.bias", ["first.bias", "second.bias"]),
        (["second.weight", "first.*"], ["first.weight", "first.bias", "second.weight"]),
        (("first.weight",), ["first.weight"]),
        (lambda name, p: p.dim() == 2 and "second" in name, ["second.weight"]),
    ],
)
def test_parameters_are_chosen_by_glob_list_or_predicate_in_the_models_order(tmp_path, parameters, expected):
    model = Toy()
    assert list(toy(tmp_path, model, parameters=parameters).select_parameters(model)) == expected


def test_without_a_choice_only_parameters_that_train_take_part_and_a_choice_may_name_frozen_ones(tmp_path):
    model = Toy()
    model.first.requires_grad_(False)
    assert list(toy(tmp_path, model).select_parameters(model)) == ["second.weight", "second.bias"]
    assert list(toy(tmp_path, model, parameters="first.*").select_parameters(model)) == ["first.weight", "first.bias"]


def test_a_tied_parameter_takes_part_once(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert list(toy(tmp_path, model).select_parameters(model)) == ["0.weight", "0.bias", "1.bias"]


@pytest.mark.parametrize(
    ("parameters", "what"),
    [
        ("third.*", "Task.parameters names 'third.*'"),
        (["first.*", "frist.bias"], "Task.parameters names 'frist.bias'"),
        ([], "no parameter is selected"),
        (lambda name, p: False, "no parameter is selected"),
    ],
)
def test_a_choice_that_matches_nothing_is_refused_with_the_names_there_are(tmp_path, parameters, what):
    model = Toy()
    with pytest.raises(TaskError) as caught:
        toy(tmp_path, model, parameters=parameters).select_parameters(model)
    assert str(caught.value) == (
        f"{what}: got no match, expected some of the model's 4 parameters (first.weight, first.bias, second.weight, "
        "second.bias); correct Task.parameters, or requires_grad in the model"
    )


def test_a_parameter_that_is_not_real_is_refused(tmp_path):
    model = nn.Linear(2, 2, dtype=torch.complex64)
    with pytest.raises(TaskError, match="^parameter weight cannot be used: got torch.complex64, expected a real float"):
        toy(tmp_path, model=lambda: model, checkpoints=[Checkpoint("a.pt", 1.0)]).select_parameters(model)


def test_a_description_may_be_a_text_or_a_description(tmp_path):
    picture = torch.zeros(2, 2)
    assert toy(tmp_path).described(1) is None
    assert toy(tmp_path, describe=lambda e: f"row {e}").described(1) == Description(text="row 1")
    assert toy(tmp_path, describe=lambda e: Description(image=picture)).described(1).image is picture


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


def test_a_files_neighbours_can_be_imported(write):
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
def test_a_reference_without_a_name_is_refused(reference):
    with pytest.raises(
        UsageError, match="the task cannot be found: got .*expected path/to/file.py:name or package.mod"
    ):
        load_task(reference)


def test_a_name_that_the_module_lacks_is_refused_with_the_tasks_it_has():
    with pytest.raises(UsageError) as caught:
        load_task("tasks.named:redy")
    assert str(caught.value) == (
        "tasks.named has no redy: got 'redy', expected a Task or a function that returns one, such as ready; "
        "correct the name after the colon"
    )


def test_a_missing_file_or_module_is_refused(tmp_path):
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
def test_arguments_that_do_not_fit_the_function_are_refused(arguments, got, expected):
    with pytest.raises(UsageError) as caught:
        load_task("tasks.named:function", arguments)
    assert str(caught.value) == (
        f"tasks.named:function does not take these arguments: got {got}, expected {expected}; change --task-arg"
    )


def test_an_error_inside_the_function_is_not_blamed_on_the_arguments():
    with pytest.raises(TypeError, match="unsupported operand"):
        load_task("tasks.named:fails_inside", {"rate": "1"})


@pytest.mark.parametrize(("name", "got"), [("number", "int"), ("no_task", "int")])
def test_what_is_no_task_is_refused(name, got):
    with pytest.raises(
        TaskError, match=rf"^tasks.named:{name} is not a task: got {got}, expected a tracin_ann.Task, or a"
    ):
        load_task(f"tasks.named:{name}")


@pytest.mark.parametrize("stem", ["random", "numpy", "tracin_ann"])
def test_a_file_that_bears_an_imported_modules_name_is_refused(write, stem):
    path = write(f"{stem}.py")
    with pytest.raises(UsageError) as caught:
        load_task(f"{path}:task")
    assert str(caught.value).startswith(f"the task's file cannot be imported as '{stem}': got ")
    assert f"expected {path}; rename the file" in str(caught.value)
    assert sys.modules[stem].__file__ != str(path)


def test_two_files_of_one_stem_are_not_confused(write):
    first, second = write("a/same_stem.py"), write("b/same_stem.py")
    load_task(f"{first}:task")
    with pytest.raises(UsageError, match=f"^the task's file cannot be imported as 'same_stem': got {first}, expected"):
        load_task(f"{second}:task")


@pytest.mark.parametrize("stem", ["my-task", "1task"])
def test_a_file_whose_stem_is_no_module_name_is_refused(write, stem):
    path = write(f"{stem}.py")
    with pytest.raises(
        UsageError, match=f"cannot be imported as '{stem}': got no valid module name, expected .*rename"
    ):
        load_task(f"{path}:task")


def test_a_references_file_is_made_absolute_and_a_module_is_left(monkeypatch):
    monkeypatch.chdir(SUPPORT)
    assert absolute_reference("tasks/named.py:ready") == f"{SUPPORT}/tasks/named.py:ready"
    assert absolute_reference("tasks.named:ready") == "tasks.named:ready"


@pytest.mark.parametrize("name", ["ids", "describe", "columns"])
def test_what_is_asked_of_rows_is_tried_before_the_build(tmp_path: Path, name: str) -> None:
    wrong = toy(tmp_path, **{name: lambda: ["of all rows"]})
    said = rf"^Task\.{name} fails on row 0 of train_data: got TypeError: .*{name}=lambda row"
    for ask in (plan, build):
        with pytest.raises(TaskError, match=said):
            ask(wrong, tmp_path / "out", CONFIG)
    assert not (tmp_path / "out").exists()


def test_columns_are_asked_of_training_rows_alone(tmp_path: Path) -> None:
    labelled = toy(
        tmp_path, train_data=lambda: [(*row, "named") for row in rows(10)], columns=lambda row: {"name": row[2]}
    )
    drop = replace(labelled, collate=lambda given: torch.utils.data.default_collate([row[:2] for row in given]))
    assert build(drop, tmp_path / "out", CONFIG).manifest.columns is not None
