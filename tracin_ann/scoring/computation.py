"""Computation in steps: a generator that can be continued by any thread, and that several callers can share."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Generic, TypeVar

T = TypeVar("T")
Steps = Generator[int, None, T]
"""Yields the units that a step has finished, and returns the result."""


def run_steps(steps: Steps[T], progress: Callable[[int], None] | None = None) -> T:
    """Return the result of all steps; `progress` is called with the units of each."""
    while True:
        try:
            units = next(steps)
        except StopIteration as stop:
            result: T = stop.value
            return result
        if progress is not None:
            progress(units)


class Computation(Generic[T]):
    """A computation that is continued by whichever caller comes next; one at a time.

    Args:
        total: the units of all steps.
        steps: the computation.

    Attributes:
        done: units that are done.
        callers: how many callers wait for the result.
        result: None until the last step.
    """

    def __init__(self, total: int, steps: Steps[T]) -> None:
        self.total, self._steps = total, steps
        self.done = self.callers = 0
        self.result: T | None = None
        self._error: BaseException | None = None

    def finish(self, progress: Callable[[int, int], None] | None = None) -> T:
        """Do the steps that are left, and return the result.

        If `progress` raises, the computation can be continued by another caller. If a step raises, every caller gets
        its error.

        Args:
            progress: called with (done, total) after each step. Another caller may continue the computation meanwhile.
        """
        while self.result is None:
            if self._error is not None:
                raise self._error
            try:
                self.done += next(self._steps)
            except StopIteration as stop:
                self.result = stop.value
            except BaseException as error:
                # Also an interrupt: it has ended the generator.
                self._error = error
                raise
            else:
                if progress is not None:
                    progress(self.done, self.total)
        return self.result
