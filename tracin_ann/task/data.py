"""Data sets: the check of a task's training or query set, errors that name a row, and streams read into lists."""

from __future__ import annotations

import itertools
import os
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import torch
from torch.utils.data import IterableDataset

from tracin_ann.choices import SIDE_NAMES, SideName
from tracin_ann.errors import TaskError, TracinAnnError, UsageError, problem
from tracin_ann.task.content import encode_content
from tracin_ann.task.datasets.records import as_map_style
from tracin_ann.task.datasets.stored_rows import StoredRows, has_rows, write_rows
from tracin_ann.task.task import Task
from tracin_ann.types import ProgressCallback

_MAX_CHARS = 300


@dataclass(frozen=True)
class DataSet:
    """The rows of one side, by position; their number is fixed when the data set is opened."""

    side: SideName
    data: Any
    n_rows: int

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.n_rows

    def __getitem__(self, i: int) -> Any:
        """Return a row.

        Raises:
            TaskError: the data set raises an error.
        """
        try:
            return self.data[i]
        except (TracinAnnError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise TaskError(
                problem(
                    f"row {i} of {SIDE_NAMES[self.side]} cannot be read",
                    got=_describe_error(error),
                    expected=f"an example for each of the {self.n_rows} rows that its len() counts",
                    remedy="correct the data set's __getitem__, or its __len__ if there are fewer rows",
                )
            ) from error


def open_data(task: Task, side: SideName) -> DataSet:
    """Return the data set of a task, `train` or `query`, after a check that it is map-style and not empty.

    Raises:
        TaskError: it has no length or no rows, or does not support indexing.
    """
    data = as_map_style(task.train_data() if side == "train" else task.query_data())
    name = type(data).__name__
    if isinstance(data, IterableDataset):
        raise TaskError(_unusable_message(side, f"{name}, an IterableDataset", data))
    if not hasattr(type(data), "__len__"):
        raise TaskError(_unusable_message(side, f"a {name} without a length", data))
    if not hasattr(data, "__getitem__"):
        raise TaskError(_unusable_message(side, f"a {name} that cannot be indexed", data))
    try:
        n_rows = len(data)
    except Exception as error:
        raise TaskError(
            _unusable_message(side, f"a {name} whose len() fails with {_describe_error(error)}", data)
        ) from error
    if n_rows == 0:
        raise TaskError(_unusable_message(side, "no rows"))
    if isinstance(data, Mapping) and all(isinstance(key, str) for key in data):
        names = ", ".join(list(data)[:4])
        raise TaskError(
            problem(
                f"Task.{side}_data cannot be used",
                got=f"a {name} with the keys {names}",
                expected="one map-style data set (len(data), data[i])",
                remedy="return one of its values if they are data sets, such as the splits of a DatasetDict",
            )
        )
    return DataSet(side, data, n_rows)


def open_examples(examples: Any) -> DataSet:
    """Return the data set of examples that a caller gives, after a check that it is map-style and not empty.

    Raises:
        UsageError: it has no length or no rows, does not support indexing, or is a batch.
    """
    if isinstance(examples, DataSet):
        return examples
    examples = as_map_style(examples)
    name = type(examples).__name__
    is_batch = isinstance(examples, Mapping | str | bytes)
    if is_batch or not (hasattr(type(examples), "__len__") and hasattr(examples, "__getitem__")):
        raise UsageError(
            problem(
                "these are not examples",
                got=f"a {name}",
                expected="a list or a map-style data set of examples, each as query_data[i] returns it, not collated",
                remedy="pass [example, ...]",
            )
        )
    if not len(examples):
        raise UsageError(problem("no query", got="no examples", expected="at least one", remedy="pass an example"))
    return DataSet("input", examples, len(examples))


def _unusable_message(side: str, got: str, data: Any = None) -> str:
    is_stream = isinstance(data, Iterable) and not isinstance(data, Sequence)
    return problem(
        f"Task.{side}_data cannot be used",
        got=got,
        expected="a map-style data set (len(data), data[i]) with at least one row",
        remedy="return tracin_ann.materialise(data), which reads it into a list"
        if is_stream
        else "return a list or a torch.utils.data.Dataset that is not empty",
    )


def _describe_error(error: Exception) -> str:
    """Return an error of the user's code in one line, with the file and line where it was raised."""
    message = " ".join(str(error).split())[:_MAX_CHARS]
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames[1:] else ""
    return type(error).__name__ + (f": {message}" if message else "") + place


@overload
def materialise(stream: Iterable[Any]) -> list[Any]: ...
@overload
def materialise(
    stream: Iterable[Any], folder: str | os.PathLike[str], progress: ProgressCallback | None = None
) -> Sequence[Any]: ...
def materialise(
    stream: Iterable[Any], folder: str | os.PathLike[str] | None = None, progress: ProgressCallback | None = None
) -> Sequence[Any]:
    """Return the rows of a stream, such as an `IterableDataset`, as a map-style data set: a list, or files.

    The stream is read once, to its end. Without a folder, all its rows are stored in memory. It must then yield the
    same rows in the same order each time it is read, because an index identifies rows by their position.

    With a folder, the rows are written to files, and each row is read from them when it is accessed. If the folder
    already contains such files, the stream is not read: to read it again, delete the folder. The folder appears when
    all rows are written; an interrupted call leaves none, and starts again. Rows may consist of tensors, NumPy arrays,
    numbers, text, bytes and images of Pillow, in dicts, lists and tuples. Other mappings become dicts, and tensors are
    on the CPU. Files are read without pickle.

    Args:
        stream: yields the examples; without a folder, each a new object.
        folder: for the rows; None: they stay in memory.
        progress: called with ("rows", rows written, rows in total, or rows written if the stream has no length).

    Raises:
        TaskError: a row cannot be read or stored, the stream yields the same object repeatedly with changed content, or
            the folder contains something else.
    """
    if folder is not None:
        path = Path(folder)
        if not has_rows(path):
            n_rows = len(stream) if isinstance(stream, Sized) else None
            write_rows(_read_stream(stream), path, n_rows, progress)
        return StoredRows(path)
    rows: list[Any] = []
    first = None
    for row in _read_stream(stream):
        first = first or encode_content(row)
        rows.append(row)
    if rows and encode_content(rows[0]) != first:
        raise TaskError(
            problem(
                "the rows of the stream share memory",
                got="a first row that changed while later rows were read",
                expected="a new object for each row",
                remedy="yield copies of the rows",
            )
        )
    return rows


def _read_stream(stream: Iterable[Any]) -> Iterator[Any]:
    """Yield the rows of a stream.

    Raises:
        TaskError: a row cannot be read; the message has its number.
    """
    reading = iter(stream)
    for number in itertools.count():
        try:
            row = next(reading)
        except StopIteration:
            return
        except (TracinAnnError, MemoryError):
            raise
        except Exception as error:
            raise TaskError(
                problem(
                    f"row {number} of the stream cannot be read",
                    got=_describe_error(error),
                    expected="one example after another",
                    remedy=f"correct the __iter__ of {type(stream).__name__}",
                )
            ) from error
        yield row
