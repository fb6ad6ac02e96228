"""A side's data set: opened and checked, rows that cannot be read refused by their number, a stream made a list."""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import IterableDataset

from tracin_ann.errors import TaskError, TracinAnnError, problem
from tracin_ann.task.content import encode_content
from tracin_ann.task.task import Task

_LONGEST = 300


@dataclass(frozen=True)
class DataSet:
    """The rows of a side: as many as the data set counted when it was opened, each by its position."""

    side: str
    data: Any
    n_rows: int

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.n_rows

    def __getitem__(self, i: int) -> Any:
        """Return a row.

        Raises:
            TaskError: the data set cannot read it.
        """
        try:
            return self.data[i]
        except (TracinAnnError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise TaskError(
                problem(
                    f"row {i} of {self.side}_data cannot be read",
                    got=_told(error),
                    expected=f"an example for each of the {self.n_rows} rows that its len() counts",
                    remedy="mend the data set's __getitem__, or its __len__ if there are fewer rows",
                )
            ) from error


def open_data(task: Task, side: str) -> DataSet:
    """Return the rows of a side, of a data set checked to be map-style and not empty.

    Raises:
        TaskError: it has no length or no rows, or cannot be indexed.
    """
    data = task.train_data() if side == "train" else task.query_data()
    name = type(data).__name__
    if isinstance(data, IterableDataset):
        raise TaskError(_no_rows(side, f"{name}, an IterableDataset", data))
    if not hasattr(type(data), "__len__"):
        raise TaskError(_no_rows(side, f"a {name} without a length", data))
    if not hasattr(data, "__getitem__"):
        raise TaskError(_no_rows(side, f"a {name} that cannot be indexed", data))
    try:
        n_rows = len(data)
    except Exception as error:
        raise TaskError(_no_rows(side, f"a {name} whose len() fails with {_told(error)}", data)) from error
    if n_rows == 0:
        raise TaskError(_no_rows(side, "no rows"))
    return DataSet(side, data, n_rows)


def _no_rows(side: str, got: str, data: Any = None) -> str:
    streams = isinstance(data, Iterable) and not isinstance(data, Sequence)
    return problem(
        f"Task.{side}_data cannot be used",
        got=got,
        expected="a map-style data set (len(data), data[i]) with at least one row",
        remedy="return tracin_ann.materialise(data), which reads it into a list"
        if streams
        else "return a list or a torch.utils.data.Dataset that is not empty",
    )


def _told(error: Exception) -> str:
    """Return an error of the user's code in one line, with the place where it was raised."""
    said = " ".join(str(error).split())[:_LONGEST]
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames[1:] else ""
    return type(error).__name__ + (f": {said}" if said else "") + place


def materialise(stream: Iterable[Any]) -> list[Any]:
    """Return the rows of a stream, such as an `IterableDataset`, as a list: a map-style data set.

    The stream is read once, to its end, and all its rows stay in memory. It must give the same rows in the same order
    whenever it is read: an index names rows by their position.

    Args:
        stream: yields one example after another, each an object of its own.

    Raises:
        TaskError: a row cannot be read, or the stream yields one object again and again, changed in between.
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
                    got=_told(error),
                    expected="one example after another",
                    remedy=f"mend the __iter__ of {type(stream).__name__}",
                )
            ) from error
        first = first or encode_content(row)
        rows.append(row)
    if rows and encode_content(rows[0]) != first:
        raise TaskError(
            problem(
                "the rows of the stream share memory",
                got="a first row that changed while others were read",
                expected="an example of its own each time",
                remedy="yield copies",
            )
        )
    return rows
