"""Data sets: the check of a task's training or query set, errors that name a row, and streams read into lists."""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import IterableDataset

from tracin_ann.choices import SIDE_NAMES, SideName
from tracin_ann.errors import TaskError, TracinAnnError, UsageError, problem
from tracin_ann.task.content import encode_content
from tracin_ann.task.task import Task

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
    data = task.train_data() if side == "train" else task.query_data()
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
    return DataSet(side, data, n_rows)


def open_examples(examples: Any) -> DataSet:
    """Return the data set of examples that a caller gives, after a check that it is map-style and not empty.

    Raises:
        UsageError: it has no length or no rows, does not support indexing, or is a batch.
    """
    if isinstance(examples, DataSet):
        return examples
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


def materialise(stream: Iterable[Any]) -> list[Any]:
    """Return the rows of a stream, such as an `IterableDataset`, as a list: a map-style data set.

    The stream is read once, to its end, and all its rows are stored in memory. It must yield the same rows in the same
    order each time it is read, because an index identifies rows by their position.

    Args:
        stream: yields the examples, each a new object.

    Raises:
        TaskError: a row cannot be read, or the stream yields the same object repeatedly with changed content.
    """
    rows: list[Any] = []
    first = None
    reading = iter(stream)
    while True:
        try:
            row = next(reading)
        except StopIteration:
            break
        except (TracinAnnError, MemoryError):
            raise
        except Exception as error:
            raise TaskError(
                problem(
                    f"row {len(rows)} of the stream cannot be read",
                    got=_describe_error(error),
                    expected="one example after another",
                    remedy=f"correct the __iter__ of {type(stream).__name__}",
                )
            ) from error
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
