"""Records of a data set: rows as mappings, from `datasets`, files (JSONL, Parquet, CSV) or any map-style data set."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tracin_ann.errors import TaskError, problem
from tracin_ann.task.data import materialise
from tracin_ann.task.integrations.packages import import_datasets, import_parquet

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".tsv")


def open_records(data: Any) -> Any:
    """Return a map-style data set of records, `{column: value}`.

    A `datasets.Dataset` and a folder of `save_to_disk` stay on disk, mapped into memory; the rows of a Parquet file are
    converted one at a time. JSONL and CSV files are read into a list. Values of CSV files are strings.

    Args:
        data: a `datasets.Dataset`, a folder that `save_to_disk` wrote, a path of a JSONL, Parquet, CSV or TSV file, a
            map-style data set or a list of mappings, a pandas frame, or a function that returns one of these.

    Raises:
        TaskError: a file is missing or malformed, or the data set has no rows, several splits or no length.
        MissingPackageError: `datasets` or pyarrow is needed and not installed.
    """
    given = data
    if callable(data) and not hasattr(data, "__getitem__"):
        data = data()
    name = repr(str(data)) if isinstance(data, str | os.PathLike) else f"a {type(data).__name__}"
    if isinstance(data, str | os.PathLike):
        path = Path(data)
        data = _open_folder(path) if path.is_dir() else _open_file(path)
    if hasattr(data, "to_dict") and hasattr(data, "iloc"):
        data = _FrameRecords(data)
    if isinstance(data, Mapping):
        raise TaskError(
            problem(
                "a data set has several splits",
                got=", ".join(map(str, data)),
                expected="one data set",
                remedy="pass one of its splits; for a folder of save_to_disk, the folder of the split",
            )
        )
    if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
        if isinstance(data, Iterable) and callable(given):
            data = materialise(data)
        else:
            raise TaskError(
                problem(
                    "data cannot be used",
                    got=name,
                    expected="a data set with len() and [i], a path, or a function that returns one",
                    remedy="pass tracin_ann.materialise(data), which reads a stream into a list",
                )
            )
    if len(data) == 0:
        raise TaskError(
            problem(f"data {name} is empty", got="no rows", expected="at least one row", remedy="correct the data")
        )
    return data


def _open_folder(path: Path) -> Any:
    if (path / "dataset_dict.json").is_file():
        splits = sorted(part.name for part in path.iterdir() if (part / "state.json").is_file())
        raise TaskError(
            problem(
                f"data folder {path} has several splits",
                got=", ".join(splits),
                expected="the folder of one split",
                remedy=f"pass {path / splits[0] if splits else path}",
            )
        )
    if not (path / "state.json").is_file():
        raise TaskError(
            problem(
                f"data folder {path} is not a data set",
                got="no state.json",
                expected="a folder that datasets.Dataset.save_to_disk wrote",
                remedy="pass the path of a file or of such a folder",
            )
        )
    return import_datasets().load_from_disk(str(path))


def _open_file(path: Path) -> Any:
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES or not path.is_file():
        raise TaskError(
            problem(
                f"data file {path} cannot be used",
                got=f"a file {suffix or 'without suffix'}" if path.is_file() else "no such file",
                expected=f"a file {', '.join(SUFFIXES)} or a folder of save_to_disk",
                remedy="correct the path, or convert the file",
            )
        )
    if suffix == ".parquet":
        return _ParquetRecords(import_parquet().read_table(path, memory_map=True))
    with path.open(encoding="utf-8-sig", newline="") as file:
        if suffix in (".csv", ".tsv"):
            reader = csv.DictReader(
                file,
                delimiter="\t" if suffix == ".tsv" else ",",
                quoting=csv.QUOTE_NONE if suffix == ".tsv" else csv.QUOTE_MINIMAL,
            )
            return [dict(row) for row in reader]
        return _parse_json(path, file.read())


def _parse_json(path: Path, text: str) -> list[Any]:
    """Return the objects of JSON Lines, or of one JSON list.

    Raises:
        TaskError: a line is not a JSON object.
    """
    records: list[Any] = []
    if text.lstrip().startswith("["):
        lines: list[tuple[int, str]] = [(1, text)]
    else:
        lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    for number, line in lines:
        try:
            value = json.loads(line)
        except ValueError as error:
            raise TaskError(_not_json_message(path, number, str(error))) from error
        records += value if isinstance(value, list) else [value]
        if not isinstance(records[-1:] and records[-1], dict | list):
            raise TaskError(_not_json_message(path, number, type(records[-1]).__name__))
    return records


def _not_json_message(path: Path, number: int, got: str) -> str:
    return problem(
        f"line {number} of data file {path} is not a record",
        got=got[:160],
        expected="a JSON object on each line",
        remedy="correct the line",
    )


@dataclass(frozen=True)
class _ParquetRecords(Sequence[Any]):
    """The rows of a table of pyarrow, each converted when it is read."""

    table: Any

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __getitem__(self, i: Any) -> Any:
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        return self.table.slice(i % len(self), 1).to_pylist()[0]


@dataclass(frozen=True)
class _FrameRecords(Sequence[Any]):
    """The rows of a pandas frame."""

    frame: Any

    def __len__(self) -> int:
        return len(self.frame)

    def __getitem__(self, i: Any) -> Any:
        return self.frame.iloc[i].to_dict()
