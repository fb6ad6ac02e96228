"""How a task is named, as a file or a module with a name in it, and how it is found again and imported."""

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
from tracin_ann.task.task import Task


@dataclass(frozen=True)
class TaskReference:
    """How the task was named, so that a query or a worker finds it again; `reference` is None for a Task object."""

    reference: str | None = None
    arguments: Mapping[str, str] = field(default_factory=dict)


def load_task(reference: str, arguments: Mapping[str, str] | None = None) -> Task:
    """Return the task named `path/to/file.py:name` or `package.module:name`.

    The name is a Task, or a function that returns one and takes `arguments` as strings. A file is
    imported under its own stem with its folder on `sys.path`, as `python file.py` would have it,
    so that a worker process can import it again.

    Raises:
        UsageError: the reference cannot be read or found, or the arguments do not fit.
        TaskError: what it names is no task.
    """
    return as_task(find_object(reference), reference, dict(arguments or {}))


def find_object(reference: str) -> Any:
    """Return what a reference names; imports its module.

    Raises:
        UsageError: the reference cannot be read or found.
    """
    place, _, name = reference.rpartition(":")
    if not place or not name:
        raise UsageError(
            problem(
                "the task cannot be found",
                got=repr(reference),
                expected="path/to/file.py:name or package.module:name",
                remedy="add the name of the Task, or of the function that returns it, behind a colon",
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
                remedy="correct the name behind the colon",
            )
        )
    return getattr(module, name)


def as_task(value: Any, reference: str, arguments: dict[str, str]) -> Task:
    """Return a Task as it is, or what a function makes of the arguments.

    Raises:
        UsageError: the arguments do not fit.
        TaskError: it is no task.
    """
    if isinstance(value, Task):
        if arguments:
            raise UsageError(
                problem(
                    f"{reference} takes no arguments",
                    got="--task-arg " + ", ".join(arguments),
                    expected="none, since it is a Task and no function",
                    remedy="drop --task-arg, or name a function that returns the Task",
                )
            )
        return value
    if not callable(value):
        raise TaskError(_no_task(reference, value))
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
        raise TaskError(_no_task(reference, task))
    return task


def _no_task(reference: str, value: Any) -> str:
    return problem(
        f"{reference} is no task",
        got=type(value).__name__,
        expected="a tracin_ann.Task, or a function that returns one",
        remedy="build it with Task(model=..., loss=..., train_data=..., query_data=..., checkpoints=[...])",
    )


def absolute_reference(reference: str) -> str:
    """Return the reference with a file's path made absolute, so that it holds from any folder."""
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
    if loaded is not None and _file_of(loaded) == path:
        return loaded
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    importlib.invalidate_caches()
    found = importlib.util.find_spec(stem) if loaded is None and stem.isidentifier() else None
    if found is None or found.origin is None or Path(found.origin).resolve() != path:
        raise UsageError(
            problem(
                f"the task's file cannot be imported as {stem!r}",
                got=_file_of(loaded) if loaded else (found.origin if found else "no valid module name"),
                expected=path,
                remedy="rename the file: its stem must be a valid module name that no other module bears",
            )
        )
    return importlib.import_module(stem)


def _file_of(module: ModuleType) -> Path | None:
    file = getattr(module, "__file__", None)
    return Path(file).resolve() if file else None
