"""References to tasks, such as `file.py:name`: parsing, import of the module, and the call of a task function."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from tracin_ann.errors import TaskError, UsageError, problem
from tracin_ann.packages import postpone_collection
from tracin_ann.task.task import Task


@dataclass(frozen=True)
class TaskReference:
    """A task's reference and its arguments, with which a query or a worker process loads the task again.

    Attributes:
        reference: `path/to/file.py:name` or `package.module:name`; None for a Task object without a name.
        arguments: strings by name, if the reference names a function.
    """

    reference: str | None = None
    arguments: Mapping[str, str] = field(default_factory=dict)


@postpone_collection()
def load_task(reference: str, arguments: Mapping[str, str] | None = None) -> Task:
    """Return the task named `path/to/file.py:name` or `package.module:name`.

    The name refers to a Task, or to a function that returns one and takes `arguments` as strings. A file is
    imported under its stem with its directory on `sys.path`, as `python file.py` does it, so that a worker
    process can import it again.

    Raises:
        UsageError: the reference is malformed, nothing has this name, or the function does not take the arguments.
        TaskError: the object is not a task.
    """
    return as_task(find_object(reference), reference, dict(arguments or {}))


def find_object(reference: str) -> Any:
    """Import the module of a reference and return the object that it names.

    Raises:
        UsageError: the reference is malformed, or nothing has this name.
    """
    place, _, name = reference.rpartition(":")
    if not place or not name:
        raise UsageError(
            problem(
                "the task cannot be found",
                got=repr(reference),
                expected="path/to/file.py:name or package.module:name",
                remedy="add a colon and the name of the Task, or of the function that returns it",
            )
        )
    module = _import_file(Path(place)) if place.endswith(".py") else _import_module(place)
    if not hasattr(module, name):
        raise UsageError(
            problem(
                f"{place} has no {name}",
                got=repr(name),
                expected="a Task or a function that returns one, such as "
                + (", ".join(n for n, v in vars(module).items() if isinstance(v, Task)) or "task"),
                remedy="correct the name after the colon",
            )
        )
    return getattr(module, name)


def as_task(value: Any, reference: str, arguments: dict[str, str]) -> Task:
    """Return `value` if it is a Task, or call it with the arguments if it is a function.

    Raises:
        UsageError: the function does not take the arguments.
        TaskError: the result is not a Task.
    """
    if isinstance(value, Task):
        if arguments:
            raise UsageError(
                problem(
                    f"{reference} takes no arguments",
                    got="--task-arg " + ", ".join(arguments),
                    expected="none, because it is a Task, not a function",
                    remedy="remove --task-arg, or name a function that returns the Task",
                )
            )
        return value
    if not callable(value):
        raise TaskError(_not_a_task_message(reference, value))
    try:
        inspect.signature(value).bind(**arguments)
    except TypeError as error:
        raise UsageError(
            problem(
                f"{reference} does not take these arguments",
                got=", ".join(f"{k}={v}" for k, v in arguments.items()) or "none",
                expected=str(error),
                remedy="change --task-arg",
            )
        ) from error
    task = value(**arguments)
    if not isinstance(task, Task):
        raise TaskError(_not_a_task_message(reference, task))
    return task


def _not_a_task_message(reference: str, value: Any) -> str:
    return problem(
        f"{reference} is not a task",
        got=type(value).__name__,
        expected="a tracin_ann.Task, or a function that returns one",
        remedy="create it with Task(model=..., loss=..., train_data=..., query_data=..., checkpoints=[...])",
    )


def absolute_reference(reference: str) -> str:
    """Return the reference with the path of its file made absolute, so that it is valid in any directory."""
    place, _, name = reference.rpartition(":")
    return f"{Path(place).resolve()}:{name}" if place.endswith(".py") else reference


def _import_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
            raise
        raise UsageError(
            problem(
                "the task's module cannot be imported",
                got=name,
                expected="a module on sys.path",
                remedy="give the file instead (path/to/file.py:name), or set PYTHONPATH",
            )
        ) from error


def _import_file(path: Path) -> ModuleType:
    path = path.resolve()
    if not path.is_file():
        raise UsageError(
            problem("the task's file is missing", got=path, expected="a Python file", remedy="correct --task")
        )
    stem = path.stem
    loaded = sys.modules.get(stem)
    if loaded is not None and _module_file(loaded) == path:
        return loaded
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    importlib.invalidate_caches()
    found = importlib.util.find_spec(stem) if loaded is None and stem.isidentifier() else None
    if found is None or found.origin is None or Path(found.origin).resolve() != path:
        raise UsageError(
            problem(
                f"the task's file cannot be imported as {stem!r}",
                got=_module_file(loaded) if loaded else (found.origin if found else "no valid module name"),
                expected=path,
                remedy="rename the file: its stem must be a valid module name that no other module has",
            )
        )
    return importlib.import_module(stem)


def _module_file(module: ModuleType) -> Path | None:
    file = getattr(module, "__file__", None)
    return Path(file).resolve() if file else None
