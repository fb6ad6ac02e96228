"""Examples that the command line gives: `--input` files and `--text`, read by the task's `read_query`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tracin_ann.cli.command import complete_files

if TYPE_CHECKING:
    from tracin_ann.index import InfluenceIndex
    from tracin_ann.task import Task

Function = Callable[..., Any]


def input_options(function: Function) -> Function:
    """Add `--input` and `--text`, which `open_inputs` reads."""
    files = click.option(
        "--input",
        multiple=True,
        type=click.Path(exists=True, dir_okay=False),
        metavar="FILE",
        shell_complete=complete_files,
        help="Queries that are not in query_data: records (.jsonl, .csv, .parquet) or a picture; repeatable.",
    )
    texts = click.option("--text", multiple=True, help="Query that is not in query_data: a text; repeatable.")
    return files(texts(function))


def open_inputs(index: InfluenceIndex, options: Mapping[str, object]) -> Sequence[Any] | None:
    """Return the examples of `--input` and then of `--text`, each made by `Task.read_query` when it is read.

    Returns None without these options.

    Raises:
        UsageError: the task has no `read_query`.
        TaskError: a file is missing, empty or malformed.
    """
    from tracin_ann.task import is_image_file, read_records, require_read_query

    files: Sequence[str] = options["input"]  # type: ignore[assignment]
    texts: Sequence[str] = options["text"]  # type: ignore[assignment]
    if not files and not texts:
        return None
    require_read_query(index.task, "--input" if files else "--text")
    parts: list[tuple[str, Sequence[Any]]] = [
        (file, _Picture(Path(file)) if is_image_file(file) else read_records(file)) for file in files
    ]
    if texts:
        parts.append(("--text", [{"text": text} for text in texts]))
    return _Inputs(index.task, parts)


class _Picture(Sequence[Any]):
    """The record of a picture, which is decoded when it is read."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __len__(self) -> int:
        return 1

    def __getitem__(self, place: Any) -> Any:
        from tracin_ann.task import read_image

        return {"image": read_image(self._path)}


class _Inputs(Sequence[Any]):
    """The examples of all parts, one after the other; a part is the name of a file, or `--text`, and its records."""

    def __init__(self, task: Task, parts: Sequence[tuple[str, Sequence[Any]]]) -> None:
        self._task, self._parts = task, parts

    def __len__(self) -> int:
        return sum(len(records) for _, records in self._parts)

    def __getitem__(self, place: Any) -> Any:
        row = place
        for name, records in self._parts:
            if row < len(records):
                return self._make_example(name, row, records)
            row -= len(records)
        raise IndexError(place)

    def _make_example(self, name: str, row: int, records: Sequence[Any]) -> Any:
        from tracin_ann.task import read_query_example

        where = f"record {row} of {name}" if len(records) > 1 else name
        return read_query_example(self._task, records[row], where)
