"""The layout of benchmarks/: every benchmark is listed, no circular imports, shared code in `common` only."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from benchmarks import tables
from benchmarks.__main__ import FOLDER, find_benchmarks, format_list, read_caption

ROOT = FOLDER.parent
SHARED = "common"
TOPICS = (
    "attribution",
    "distributed",
    "features",
    "fidelity",
    "labels",
    "peers",
    "reliability",
    "reports",
    "retrieval",
    "serving",
)
WIDEST_LINE = 120
# Loaded by name, because each needs the environment of one peer.
LOADED_BY_NAME = {"benchmarks.peers.worker": "benchmarks.peers.adapters."}


def name_module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_module(path): path for path in sorted(FOLDER.rglob("*.py"))}


def find_imports(path: Path) -> set[str]:
    """Return the modules of benchmarks that a module imports, in its body or in a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else str(node.module) for name in names}
    return {name for name in found if name.partition(".")[0] == "benchmarks"}


IMPORTS = {name: find_imports(path) for name, path in MODULES.items()}


def name_topic(module: str) -> str:
    """Return the folder below benchmarks/ that a module is in, or an empty string."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and (FOLDER / parts[1]).is_dir() else ""


def test_imports_are_not_circular() -> None:
    list(TopologicalSorter(IMPORTS).static_order())


def test_imports_name_modules_that_exist() -> None:
    assert set().union(*IMPORTS.values()) <= set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_topics_share_code_through_common_only(module: str) -> None:
    allowed = {SHARED, name_topic(module)} if name_topic(module) else {SHARED, ""}
    if name_topic(module) == SHARED:
        allowed = {SHARED}
    # `benchmarks.tables` makes the tables of every topic.
    shared = {name for name in IMPORTS[module] if module == "benchmarks.tables" and name.endswith(".tables")}
    assert {name_topic(imported) for imported in IMPORTS[module] - shared} <= allowed


def test_every_folder_is_a_topic_with_a_caption() -> None:
    packages = {path.parent.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.py")}
    assert packages == {".", SHARED, *TOPICS, "peers/adapters"}
    assert all(read_caption(FOLDER / package).endswith((".", "them.")) for package in packages)


def test_every_module_is_listed_or_used_by_its_topic() -> None:
    listed = {benchmark.command.split()[2] for benchmark in find_benchmarks()}
    used = set().union(*IMPORTS.values())
    for module, path in MODULES.items():
        by_name = any(module.startswith(prefix) for prefix in LOADED_BY_NAME.values())
        if path.name not in ("__init__.py", "__main__.py") and module not in listed:
            assert module in used or by_name, f"{module} has no main and nothing imports it"
        if "__main__" in path.read_text(encoding="utf-8") and path.name != "__main__.py":
            assert module in listed


def test_every_benchmark_has_a_caption_and_an_output() -> None:
    benchmarks = list(find_benchmarks())
    assert {benchmark.topic for benchmark in benchmarks} == {"", *TOPICS}
    for benchmark in benchmarks:
        assert benchmark.caption.endswith("."), benchmark
        assert benchmark.output, f"{benchmark} has neither RESULT nor OUTPUT"
    results = [b.output for b in benchmarks if b.output.startswith("benchmarks/results/")]
    assert len(set(results)) == len(results)
    assert [path for path in results if not (ROOT / path).is_file()] == []


def test_the_list_imports_nothing_heavy() -> None:
    code = "import runpy, sys; runpy.run_module('benchmarks', run_name='__main__'); print(sorted(sys.modules))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    printed, _, modules = done.stdout.rstrip().rpartition("\n")
    assert printed == format_list(find_benchmarks())
    assert not {"torch", "numpy", "tracin_ann"} & set(ast.literal_eval(modules))


def test_tables_have_different_names() -> None:
    assert len(tables.TABLES) == sum(len(topic.TABLES) for topic in tables.TOPICS)


@pytest.mark.parametrize("name", tables.TABLES)
def test_tables_fit_a_screen_and_state_their_scope(name: str) -> None:
    lines = tables.TABLES[name]().splitlines()
    # README states the scope of the short tables in its text.
    assert lines[0].startswith("Scope: ") or name.endswith("_summary")
    rows = [line for line in lines if line.startswith("|")]
    assert [row for row in rows if len(row) > WIDEST_LINE] == []
    assert len(rows) > 2


def test_all_markers_of_a_document_are_filled() -> None:
    marks = [f"# {name}\n\n<!-- table: {name} -->\nstale figures\n<!-- end -->\n" for name in tables.TABLES]
    filled = tables.fill_tables("\n".join(marks))
    assert "stale figures" not in filled
    assert all(make() in filled for make in tables.TABLES.values())
    assert tables.fill_tables(filled) == filled


@pytest.mark.parametrize(
    "text",
    [
        "<!-- table: nothing -->\n<!-- end -->\n",
        "<!-- table: proofs -->\n",
        "<!-- table: proofs -->\n<!-- table: recall -->\n<!-- end -->\n",
        "<!-- end -->\n",
    ],
)
def test_an_invalid_marker_is_rejected(text: str) -> None:
    with pytest.raises(ValueError, match="unknown table|do not form pairs"):
        tables.fill_tables(text)


@pytest.mark.parametrize("document", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name)
def test_the_markers_of_the_documents_can_be_filled(document: Path, tmp_path: Path, monkeypatch) -> None:
    text = document.read_text(encoding="utf-8")
    copy = tmp_path / document.name
    copy.write_text(text, encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["tables", str(copy)])
    tables.main()
    assert copy.read_text(encoding="utf-8") == tables.fill_tables(text)
    assert copy.read_text(encoding="utf-8").count("<!-- table: ") == text.count("<!-- table: ")
