"""Launcher: where workers run units, and the launcher of this process."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TypeVar

from tracin_ann.errors import first_line, problem

U = TypeVar("U")
R = TypeVar("R")
Worker = Callable[[Sequence[U]], Iterator[R]]
"""Computes units, and yields results on the way. Units that were computed before cost little."""
OpenWorker = Callable[[str | None], AbstractContextManager[Worker[U, R]]]
"""Opens a worker on a device (None: its own choice) in the process that calls it; what it loads is kept until exit."""


class Launcher(ABC):
    """Runs independent, idempotent units on workers.

    If a worker dies, its units run again on another one. An error that a worker raises ends the run.
    """

    @abstractmethod
    def run(self, open_worker: OpenWorker[U, R], units: Sequence[U]) -> Iterator[R]:
        """Yield the results of the workers, in any order, until all units are done.

        The results of a worker that died come again from the worker that runs its units again.

        Args:
            open_worker: called once in each worker; other processes need to be able to pickle it.
            units: in an order in which neighbours have something in common, such as their rows.

        Raises:
            UsageError: `open_worker` cannot be sent to the workers, or there is no place for a worker.
            TaskError: workers died again and again.
            Exception: the first error that a worker raised.
        """


class WorkerTraceback(Exception):
    """The traceback of an error in another process, as text: the cause of the error that is raised in this one."""


def describe_unpicklable(error: Exception) -> str:
    """Return the message of the error that a worker cannot be sent to another process."""
    return problem(
        "the task cannot be sent to other processes",
        got=first_line(error),
        expected="a task named as file.py:name, or a task that can be pickled",
        remedy="pass the task as file.py:name",
    )


def describe_bad_launcher(launcher: object) -> str:
    """Return the message of the error that something else was passed instead of a launcher."""
    return problem(
        "no launcher",
        got=repr(launcher),
        expected="an object such as ProcessLauncher(['cpu', 'cpu']) or RayLauncher()",
        remedy="pass one, or leave out `launcher`",
    )


class ThisProcess(Launcher):
    """Runs all units in this process."""

    def run(self, open_worker: OpenWorker[U, R], units: Sequence[U]) -> Iterator[R]:
        """Yield the results of one worker; see `Launcher`."""
        with open_worker(None) as worker:
            yield from worker(units)
