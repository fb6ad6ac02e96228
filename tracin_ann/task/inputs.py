"""Examples of queries that are not in query_data, which the task's `read_query` makes from records."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tracin_ann.errors import TaskError, TracinAnnError, UsageError, first_line, problem
from tracin_ann.task.task import Task


def require_read_query(task: Task, source: str) -> None:
    """Check that the task can make examples from records.

    Args:
        task: the task.
        source: the option or field that gives the records.

    Raises:
        UsageError: it has no `read_query`.
    """
    if task.read_query is None:
        raise UsageError(
            problem(
                f"the task cannot read {source}",
                got="a task without read_query",
                expected="Task.read_query, a function record -> example as in query_data",
                remedy='add it to the task, such as read_query=lambda record: encode(record["text"])',
            )
        )


def read_query_example(task: Task, record: Mapping[str, Any], name: str) -> Any:
    """Return the example that the task makes from a record; it has a `read_query`.

    Args:
        task: the task.
        record: values by name.
        name: the record's name, for the message.

    Raises:
        TaskError: `read_query` fails.
    """
    assert task.read_query is not None
    try:
        return task.read_query(record)
    except (TracinAnnError, MemoryError):
        raise
    except Exception as error:
        raise TaskError(
            problem(
                f"Task.read_query fails on {name}",
                got=first_line(error),
                expected=f"an example, made from a record with {_list_names(record)}",
                remedy="correct the record, or Task.read_query",
            )
        ) from error


def _list_names(record: Mapping[str, Any]) -> str:
    names = ", ".join(map(repr, record))
    return f"the fields {names}" if len(record) > 1 else f"the field {names}"
