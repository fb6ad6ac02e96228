"""List of the benchmarks: what each measures, how to run it and which file it writes."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Benchmark:
    """A module that can be run.

    Attributes:
        topic: the folder of the module, or an empty string.
        name: the name of the module within its folder.
        caption: the first line of its docstring.
        required: the options and arguments that it requires.
        output: the file or folder that it writes.
    """

    topic: str
    name: str
    caption: str
    required: tuple[str, ...]
    output: str

    @property
    def command(self) -> str:
        """Return the command that runs it, with its required options."""
        module = ".".join(part for part in ("benchmarks", self.topic, self.name) if part)
        options = (f"{o} {o.lstrip('-').upper()}" if o.startswith("-") else o.upper() for o in self.required)
        return " ".join([f"python -m {module}", *options])


def find_benchmarks(folder: Path = FOLDER) -> Iterator[Benchmark]:
    """Yield the benchmarks by topic and name; their source is parsed and not imported."""
    for path in sorted(folder.glob("**/*.py"), key=lambda path: (path.parent.as_posix(), path.stem)):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if path.name == "__main__.py" or not has_main(tree):
            continue
        topic = ".".join(path.parent.relative_to(folder).parts)
        caption = (ast.get_docstring(tree) or "").partition("\n")[0]
        yield Benchmark(topic, path.stem, caption, tuple(find_required(tree)), find_output(tree))


def has_main(tree: ast.Module) -> bool:
    """Return whether a module defines `main`."""
    return any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body)


def find_required(tree: ast.Module) -> Iterator[str]:
    """Yield the required options and arguments of a module's parser."""
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument":
            keywords = {keyword.arg: keyword.value for keyword in call.keywords}
            option = str(ast.literal_eval(call.args[0]))
            if option.startswith("-"):
                needed = ast.literal_eval(keywords.get("required", ast.Constant(False)))
            else:
                needed = ast.literal_eval(keywords.get("nargs", ast.Constant("1"))) not in ("*", "?")
            if needed:
                yield option


def find_output(tree: ast.Module) -> str:
    """Return what a module writes: its constant RESULT names a result file, its constant OUTPUT anything else."""
    for node in tree.body:
        if not (isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)):
            continue
        target = node.targets[0]
        if isinstance(target, ast.Name) and target.id == "RESULT":
            return f"benchmarks/results/{node.value.value}.json"
        if isinstance(target, ast.Name) and target.id == "OUTPUT":
            return str(node.value.value)
    return ""


def read_caption(folder: Path) -> str:
    """Return the first docstring line of a package."""
    tree = ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))
    return (ast.get_docstring(tree) or "").partition("\n")[0]


def format_list(benchmarks: Iterator[Benchmark]) -> str:
    """Return the list as text, grouped by topic."""
    lines = []
    for topic, group in groupby(benchmarks, key=lambda benchmark: benchmark.topic):
        heading = f"{topic}: {read_caption(FOLDER / topic)}" if topic else "Tools"
        lines += [heading, ""]
        for benchmark in group:
            lines += [f"  {benchmark.name}: {benchmark.caption}", f"      run:    {benchmark.command}"]
            lines += [f"      writes: {benchmark.output}", ""]
    lines.append("`--help` lists the options of a benchmark.")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").splitlines()[0])
    parser.parse_args()
    print(format_list(find_benchmarks()))


if __name__ == "__main__":
    main()
