"""Trust in the task that an index names: which files may be imported when a user opens an index without a task.

An index may come from an untrusted source, and whoever writes its manifest also writes the manifest's digest. The task
that the manifest names is imported only from a file below the current directory, and only if the source of the file
shows that the name is a task. The library's own task of a Trainer run is also allowed, with files outside the index: it
reads local files as data and runs no code of theirs.
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
from tracin_ann.packages import postpone_collection
from tracin_ann.task.references import as_task, find_object
from tracin_ann.task.task import Task

TRANSFORMERS_TASK = "tracin_ann.task.integrations.transformers:task"
"""The reference of the built-in task of a run folder of the Hugging Face Trainer."""
_PATH_ARGUMENTS = frozenset({"run", "data", "query_data", "tokenizer", "base"})
_MAX_CHARS = 200
_PACKAGES = (
    Path(__file__).resolve().parents[1],
    *(Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")),
)


@postpone_collection()
def load_named_task(reference: str, arguments: Mapping[str, str], directory: Path) -> Task:
    """Return the task that an index's manifest names.

    The task must be a Task, or a function with the annotation `-> Task`, in a file below the current directory, outside
    the index and outside installed packages, or `TRANSFORMERS_TASK`. Nothing else is imported.

    Args:
        reference: from the manifest, `/path/to/file.py:name` or `TRANSFORMERS_TASK`.
        arguments: from the manifest, for a function.
        directory: of the index.

    Raises:
        UsageError: the manifest names something else, or nothing has this name.
        TaskError: the function does not return a Task.
    """
    if reference == TRANSFORMERS_TASK:
        for name in _PATH_ARGUMENTS & arguments.keys():
            if Path(arguments[name]).resolve().is_relative_to(directory.resolve()):
                raise UsageError(_untrusted_message(reference, directory, f"{name} inside the index"))
        return as_task(find_object(reference), reference, dict(arguments))
    place, _, name = reference.rpartition(":")
    reason = next(_rejection_reasons(place, name, directory), None)
    if reason is not None:
        raise UsageError(_untrusted_message(reference, directory, reason))
    value = find_object(reference)
    if not isinstance(value, Task) and not _is_function_in(value, Path(place)):
        raise UsageError(_untrusted_message(reference, directory, f"a {type(value).__name__}"))
    return as_task(value, reference, dict(arguments))


def _rejection_reasons(place: str, name: str, directory: Path) -> Iterator[str]:
    """Yield the reasons why a reference is not imported. Take the first one: later checks need the earlier ones."""
    path = Path(place)
    if not place.endswith(".py") or not path.is_absolute():
        yield "not an absolute path of a file"
    try:
        path, here = path.resolve(strict=True), Path.cwd()
    except OSError as error:
        yield f"a file that cannot be found ({error.strerror})"
    # Services are often started in the root directory, and every file lies below it.
    if here == here.parent or not path.is_relative_to(here):
        yield "a file that is not below the current directory"
    if path.is_relative_to(directory.resolve()):
        yield "a file inside the index"
    if any(path.is_relative_to(package) for package in _PACKAGES) or {"site-packages", "dist-packages"} & {*path.parts}:
        yield "a file of an installed package"
    if not _defines_task(path, name):
        yield f"a file in which {name} is neither a Task nor a function with the annotation -> Task"


def _defines_task(path: Path, name: str) -> bool:
    """Return whether a source file imports tracin_ann and may define the name as a task; the file is not run."""
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return False
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    assigned = [
        node for node in tree.body if isinstance(node, ast.Assign | ast.AnnAssign) and name in _assigned_names(node)
    ]
    uses_library = any(
        module.split(".")[0] == "tracin_ann" for node in ast.walk(tree) for module in _imported_modules(node)
    )
    return uses_library and bool(functions or assigned) and all(_returns_task(function) for function in functions)


def _assigned_names(node: ast.Assign | ast.AnnAssign) -> list[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _imported_modules(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module is not None:
        yield node.module


def _returns_task(function: ast.FunctionDef) -> bool:
    returns: Any = function.returns
    text = returns.value if isinstance(returns, ast.Constant) else "" if returns is None else ast.unparse(returns)
    return str(text).rpartition(".")[2] == "Task"


def _is_function_in(value: object, path: Path) -> bool:
    """Return whether a value is a function that this file defines, decorated or not."""
    function = unwrap(value) if callable(value) else value
    return isinstance(function, FunctionType) and Path(function.__code__.co_filename).resolve() == path.resolve()


def _untrusted_message(reference: str, directory: Path, reason: str) -> str:
    return problem(
        f"the task that index {directory} names is not imported",
        got=f"{reference[:_MAX_CHARS]!r}, {reason}",
        expected="a file below the current directory and outside the index that defines a Task, or a function -> Task",
        remedy="pass --task FILE.py:NAME (task= in Python) if you trust it",
    )
