"""Which task an index may bring along: a manifest names one, and runs nothing that its user does not trust.

An index may come from a stranger, and whoever writes a manifest writes its digest too. The task that it names is
imported only from a file of the user's own, and only what the file's text shows to be a task.
"""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator, Mapping
from inspect import unwrap
from pathlib import Path
from types import FunctionType
from typing import Any

from tracin_ann.errors import UsageError, problem
from tracin_ann.task.references import as_task, find_object
from tracin_ann.task.task import Task

_LONGEST = 200
_PACKAGES = (
    Path(__file__).resolve().parent,
    *(Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")),
)


def load_named_task(reference: str, arguments: Mapping[str, str], directory: Path) -> Task:
    """Return the task that an index's manifest names.

    It is a Task, or a function with the annotation `-> Task`, that a file defines which lies below the current
    directory, outside the index and in no installed package. Nothing else is imported.

    Raises:
        UsageError: the manifest names something else, or it cannot be found.
        TaskError: the function returns no task.
    """
    place, _, name = reference.rpartition(":")
    why = next(_refusals(place, name, directory), None)
    if why is not None:
        raise UsageError(_untrusted(reference, directory, why))
    value = find_object(reference)
    if not isinstance(value, Task) and not _is_function_of(value, Path(place)):
        raise UsageError(_untrusted(reference, directory, f"a {type(value).__name__}"))
    return as_task(value, reference, dict(arguments))


def _refusals(place: str, name: str, directory: Path) -> Iterator[str]:
    """Yield why what a reference names is not imported, as far as one reason leaves the next to be asked."""
    path = Path(place)
    if not place.endswith(".py") or not path.is_absolute():
        yield "no absolute path of a file"
    try:
        path, here = path.resolve(strict=True), Path.cwd()
    except OSError as error:
        yield f"a file that cannot be found ({error.strerror})"
    # Everything lies below the root, where services are started: that says nothing of trust.
    if here == here.parent or not path.is_relative_to(here):
        yield "a file that is not below the current directory"
    if path.is_relative_to(directory.resolve()):
        yield "a file inside the index"
    if any(path.is_relative_to(package) for package in _PACKAGES) or {"site-packages", "dist-packages"} & {*path.parts}:
        yield "a file of an installed package"
    if not _shows_task(path, name):
        yield f"a file in which {name} is neither a Task nor a function with the annotation -> Task"


def _shows_task(path: Path, name: str) -> bool:
    """Return whether a file's text, which is not run, uses tracin_ann and defines the name as a task may be."""
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return False
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    assigned = [node for node in tree.body if isinstance(node, ast.Assign | ast.AnnAssign) and name in _targets(node)]
    named = any(module.split(".")[0] == "tracin_ann" for node in ast.walk(tree) for module in _imported(node))
    return named and bool(functions or assigned) and all(_returns_task(function) for function in functions)


def _targets(node: ast.Assign | ast.AnnAssign) -> list[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _imported(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module is not None:
        yield node.module


def _returns_task(function: ast.FunctionDef) -> bool:
    said: Any = function.returns
    text = said.value if isinstance(said, ast.Constant) else "" if said is None else ast.unparse(said)
    return str(text).rpartition(".")[2] == "Task"


def _is_function_of(value: object, path: Path) -> bool:
    """Return whether a value is a function that this very file defines, decorated or not."""
    function = unwrap(value) if callable(value) else value
    return isinstance(function, FunctionType) and Path(function.__code__.co_filename).resolve() == path.resolve()


def _untrusted(reference: str, directory: Path, why: str) -> str:
    return problem(
        f"the task that index {directory} names is not imported",
        got=f"{reference[:_LONGEST]!r}, {why}",
        expected="a file below the current directory and outside the index that defines a Task, or a function -> Task",
        remedy="pass --task FILE.py:NAME (task= in Python) if you trust it",
    )
