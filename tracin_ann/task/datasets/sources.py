"""Sources of records: `datasets`, folders of `save_to_disk`, files, frames and functions, as map-style data sets."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tracin_ann.errors import TaskError, problem
from tracin_ann.packages import import_datasets
from tracin_ann.task.data import materialise
from tracin_ann.task.datasets.records import as_map_style, read_records

_STATE = "state.json"


def open_records(data: Any) -> Any:
    """Return a map-style data set of records, `{column: value}`.

    A `datasets.Dataset` and a folder of `save_to_disk` stay on disk, mapped into memory; records of files are read when
    they are accessed (`read_records`).

    Args:
        data: a `datasets.Dataset`, a folder that `save_to_disk` wrote, a path of a JSONL, Parquet, CSV or TSV file, a
            map-style data set or a list of mappings, a pandas frame, or a function that returns one of these.

    Raises:
        TaskError: a file is missing or malformed, or the data set has no rows, several splits or no length.
        MissingPackageError: `datasets` or pyarrow is needed and not installed.
    """
    is_made = callable(data) and not hasattr(data, "__getitem__")
    if is_made:
        data = data()
    name = str(data) if isinstance(data, str | os.PathLike) else f"a {type(data).__name__}"
    if isinstance(data, str | os.PathLike):
        path = Path(data)
        data = _open_folder(path) if path.is_dir() else read_records(path)
    data = as_map_style(data)
    if isinstance(data, Mapping):
        raise TaskError(_splits_message("the data set", ", ".join(map(str, data)), "pass one of its splits"))
    if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
        if not (is_made and isinstance(data, Iterable)):
            raise TaskError(
                problem(
                    "the data cannot be used",
                    got=name,
                    expected="a data set with len() and [i], a path, or a function that returns one",
                    remedy="pass tracin_ann.materialise(data), which reads a stream",
                )
            )
        data = materialise(data)
    if len(data) == 0:
        raise TaskError(
            problem(
                "the data are empty", got=f"no rows in {name}", expected="at least one row", remedy="correct the data"
            )
        )
    return data


def _open_folder(path: Path) -> Any:
    if (path / "dataset_dict.json").is_file():
        splits = sorted(part.name for part in path.iterdir() if (part / _STATE).is_file())
        raise TaskError(_splits_message(f"folder {path}", ", ".join(splits), "pass the folder of one split"))
    if not (path / _STATE).is_file():
        raise TaskError(
            problem(
                f"folder {path} is not a data set",
                got=f"no {_STATE}",
                expected="a folder that datasets.Dataset.save_to_disk wrote",
                remedy="pass the path of a file or of such a folder",
            )
        )
    return import_datasets().load_from_disk(str(path))


def _splits_message(what: str, got: str, remedy: str) -> str:
    return problem(f"{what} has several splits", got=got, expected="the rows of one split", remedy=remedy)
