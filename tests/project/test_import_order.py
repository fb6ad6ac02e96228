"""The order of imports in the library's source: imports go down the floors only; and rules for modules.

A room is a module or package directly under `tracin_ann`; modules of one package may import each other.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from paths import ROOT as REPOSITORY

PACKAGE = "tracin_ann"

# The seven floors, top first: rooms on one floor do not import each other, except as BESIDE allows.
# "__init__" is the facade, `tracin_ann` itself. A new room needs a place here.
FLOORS: list[set[str]] = [
    {"cli", "report", "serve", "__init__"},
    {"analysis", "evaluation", "operations"},
    {"build", "build_job", "index", "config", "distributed"},
    {"scoring"},
    {"features"},
    {"gradients", "sketch", "search", "store", "results"},
    {"task"},
]
# Modules below all floors: each may import those after it.
GROUND = ["files", "progress", "device", "packages", "types", "errors", "text", "choices"]

# Allowed imports between rooms of one floor, with the reason.
BESIDE: dict[str, set[str]] = {
    "cli": {"report", "serve", "__init__"},  # a command writes a page, serves pages, and prints the version
    "serve": {"report", "__init__"},  # pages with the report's views, and the version
    "__init__": {"report"},  # the facade names write_report
    "evaluation": {"analysis"},  # the rankings of wrong labels that are compared
    "build": {"build_job", "config", "distributed"},  # the story of a build, whose steps are those of a job
    "build_job": {"config", "distributed"},  # launchers do not know what their workers compute
    "index": {"distributed"},  # an open index starts workers for its shards
    "sketch": {"gradients"},  # a sketch reads the factors of gradients
    "store": {"sketch", "search"},  # the manifest records which sketch, and how well the lists search
}

# Rooms that may import only some of the rooms below: these do not use models.
ONLY: dict[str, set[str]] = {
    "search": {"files", *GROUND},
    "store": {"sketch", "search", "task", "files", *GROUND},
    "files": {"types", "errors", "text", "choices"},
}

# Imported in one module at most, inside the function that needs it.
OPTIONAL = (
    "ray",
    "transformers",
    "matplotlib",
    "sklearn",
    "pandas",
    "pyarrow",
    "torchvision",
    "scipy",
    "IPython",
    "jinja2",
    "PIL",
)


@dataclass(frozen=True)
class Module:
    """One source file of the library, parsed."""

    path: Path
    name: str  # dotted, tracin_ann.search.flat; a package's __init__ has the package's name
    tree: ast.Module
    text: str

    @property
    def room(self) -> str:
        """Return the room of the module."""
        return name_room(self.name)

    @property
    def package(self) -> str:
        """Return the package that relative imports start from."""
        return self.name if self.path.name == "__init__.py" else self.name.rpartition(".")[0]


def name_room(dotted: str) -> str:
    """Return the room of a dotted name in the package."""
    parts = dotted.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def parse_module(path: Path, root: Path) -> Module:
    """Parse one file; `root` is the directory that holds the package."""
    parts = list(path.relative_to(root).with_suffix("").parts)
    if parts[-1] == "__init__":
        parts.pop()
    text = path.read_text(encoding="utf-8")
    return Module(path, ".".join(parts), ast.parse(text, str(path)), text)


def find_imports(module: Module, rooms: set[str]) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) of every import, at any depth; `from tracin_ann import x` counts as an import of x."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = module.package.split(".")[: len(module.package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            if base == PACKAGE:
                for alias in node.names:
                    yield node.lineno, f"{base}.{alias.name}" if alias.name in rooms else base
            else:
                yield node.lineno, base


def find_upward_imports(module: Module, rooms: set[str]) -> list[str]:
    """Return one line for every import of the module that does not go down."""
    floor = {room: number for number, names in enumerate([*FLOORS, *({room} for room in GROUND)]) for room in names}
    wrong = []
    for line, target in find_imports(module, rooms):
        if target.split(".")[0] != PACKAGE or (room := name_room(target)) == module.room:
            continue
        where = f"{module.path.name}:{line} ({module.room}) imports {room}"
        if room not in floor:
            wrong.append(f"{where}, which has no floor")
        elif floor[room] < floor[module.room]:
            wrong.append(f"{where}, which lies above it")
        elif floor[room] == floor[module.room] and room not in BESIDE.get(module.room, set()):
            wrong.append(f"{where}, its neighbour")
        elif module.room in ONLY and room not in ONLY[module.room]:
            wrong.append(f"{where}; it may import only {', '.join(sorted(ONLY[module.room]))}")
    return wrong


def find_private_imports(module: Module) -> list[str]:
    """Return one line for every import of a file of another package that does not go through its `__init__.py`."""
    wrong = []
    for line, target in find_imports(module, ROOMS):
        room = name_room(target)
        if target.split(".")[0] == PACKAGE and room != module.room and target.count(".") > 1:
            wrong.append(f"{module.path.name}:{line} ({module.room}) imports {target}, not {PACKAGE}.{room}")
    return wrong


def find_circles(modules: Iterable[Module]) -> list[str]:
    """Return the modules with circular imports, at the top of the file or inside functions."""
    names = {module.name for module in modules}
    graph = {m.name: {t for t in _modules_imported(m, names) if t != m.name} for m in modules}
    while leaves := [name for name, targets in graph.items() if not targets & graph.keys()]:
        for name in leaves:
            del graph[name]
    return sorted(graph)


def _modules_imported(module: Module, names: set[str]) -> Iterator[str]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ImportFrom) and not node.level and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                if full in names or node.module in names:
                    yield full if full in names else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in names)


MODULES = [parse_module(path, REPOSITORY) for path in sorted((REPOSITORY / PACKAGE).rglob("*.py"))]
ROOMS = {module.room for module in MODULES}
every_module = pytest.mark.parametrize("module", MODULES, ids=lambda module: module.name)


def test_every_room_has_one_floor() -> None:
    placed = [room for names in [*FLOORS, set(GROUND)] for room in names]
    assert len(placed) == len(set(placed)), "a room stands on two floors of FLOORS"
    assert sorted(ROOMS - set(placed)) == [], f"put these into FLOORS in {Path(__file__).name}"
    assert sorted(set(placed) - ROOMS) == [], f"these of FLOORS in {Path(__file__).name} are gone"


@every_module
def test_other_packages_are_imported_through_their_init(module: Module) -> None:
    assert find_private_imports(module) == []


@pytest.mark.parametrize("room", sorted(ROOMS - {"cli"}))
def test_every_package_has_a_caption_and_public_names(room: str) -> None:
    (face,) = [m for m in MODULES if m.name == (PACKAGE if room == "__init__" else f"{PACKAGE}.{room}")]
    if face.path.name == "__init__.py":
        (public,) = [
            node.value
            for node in face.tree.body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        ]
        names = ast.literal_eval(public)
        assert names == sorted(set(names)), f"__all__ of {face.name} is sorted, each name once"


def test_imports_are_not_circular() -> None:
    assert find_circles(MODULES) == []


@every_module
def test_imports_go_down(module: Module) -> None:
    assert find_upward_imports(module, ROOMS) == []


@every_module
def test_the_first_line_of_a_module_is_its_caption(module: Module) -> None:
    docstring = ast.get_docstring(module.tree, clean=False)
    assert docstring and docstring.splitlines()[0].strip(), f"{module.path} has no docstring that begins on its line 1"


@every_module
def test_accelerators_are_named_in_device_only(module: Module) -> None:
    if module.room != "device":
        lines = [n for n, line in enumerate(module.text.splitlines(), 1) if re.search("cuda", line)]
        assert lines == [], f"{module.path} names cuda; that is a word of device"


@every_module
def test_only_the_commands_print(module: Module) -> None:
    calls = [node for node in ast.walk(module.tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    lines = [node.lineno for node in calls if isinstance(node.func, ast.Name) and node.func.id == "print"]
    assert module.room == "cli" or lines == [], f"{module.path} prints; use logging, or return it to cli"


@pytest.mark.parametrize("package", OPTIONAL)
def test_every_optional_package_is_imported_in_one_module(package: str) -> None:
    importers = [m for m in MODULES if any(name.split(".")[0] == package for _, name in find_imports(m, ROOMS))]
    assert len(importers) <= 1, f"{package} is imported by {[m.name for m in importers]}; keep one"
    for module in importers:
        functions = [n for n in ast.walk(module.tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
        inside = [range(n.lineno, (n.end_lineno or n.lineno) + 1) for n in functions]
        lines = [line for line, name in find_imports(module, ROOMS) if name.split(".")[0] == package]
        assert all(any(line in span for span in inside) for line in lines), (
            f"{module.name}: {package} outside a function"
        )


@every_module
def test_web_packages_are_imported_in_serve_only(module: Module) -> None:
    web = ("fastapi", "starlette", "uvicorn", "tracin_ann.serve")
    lines = [line for line, name in find_imports(module, ROOMS) if name.startswith(web)]
    assert module.room == "serve" or module.name == "tracin_ann.cli.serve" or lines == []


@every_module
def test_faiss_is_imported_by_device_only(module: Module) -> None:
    lines = [
        line for line, name in find_imports(module, ROOMS) if name == "faiss"
    ]  # its submodules may be imported after
    assert module.room == "device" or lines == [], f"{module.path} imports faiss; call device.import_faiss()"


# The checker itself, on a small synthetic package.
CASES = [
    ("store/a.py", "import tracin_ann.index", "which lies above it"),
    ("store/a.py", "from tracin_ann import index", "which lies above it"),
    ("store/a.py", "from .. import index", "which lies above it"),
    ("search/flat.py", "from ..store import FeatureStore", "its neighbour"),
    ("store/manifest.py", "from ..gradients import Form", "its neighbour"),
    ("search/flat.py", "from ..task import Task", "it may import only"),
    ("search/flat.py", "def f():\n    from tracin_ann.scoring import g", "which lies above it"),
    ("task.py", "from tracin_ann import build", "which lies above it"),
    ("device.py", "from tracin_ann import Task", "imports __init__, which lies above it"),
    ("report/app.py", "from tracin_ann.cli import page", "its neighbour"),
    ("types.py", "from tracin_ann.novelty import x", "which has no floor"),
    ("search/flat.py", "from .merge import top_k\nfrom ..types import TopK\nimport torch", None),
    ("search/__init__.py", "from .flat import Flat\nfrom .. import device", None),
    ("task.py", "from tracin_ann.device import devices", None),
    ("cli/query.py", "from tracin_ann import __version__, index", None),
]


@pytest.mark.parametrize(("path", "source", "expected"), CASES)
def test_the_checker_detects_violations(tmp_path: Path, path: str, source: str, expected: str | None) -> None:
    file = tmp_path / PACKAGE / path
    file.parent.mkdir(parents=True)
    file.write_text(source, encoding="utf-8")
    wrong = find_upward_imports(
        parse_module(file, tmp_path), {room for names in [*FLOORS, set(GROUND)] for room in names}
    )
    assert ([expected] if expected else []) == [expected for line in wrong if expected is None or expected in line]
