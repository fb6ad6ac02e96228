"""Workers that square numbers, and fail or die in ways that a test chooses: for the tests of launchers."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tracin_ann.distributed import Worker
from tracin_ann.errors import TaskError


class UnreachableError(OSError):
    """An error that cannot be unpickled, as those of some clients of object stores."""

    def __init__(self, *, address: str) -> None:
        super().__init__(f"{address} cannot be reached")


@dataclass(frozen=True)
class Squares:
    """Opens a worker that squares numbers.

    Attributes:
        folder: where workers leave marks: they have opened, or one has died and does so once only.
        deadly: a worker is killed at this number.
        often: it is killed at this number each time.
        wrong: a worker fails at this number: with an error of the library if it is even; at 19, with one that cannot be
            unpickled.
        opens: opening fails.
        seconds: time that a number takes.
        array: sent along; the worker changes its copy.
    """

    folder: Path
    deadly: int = -1
    often: bool = False
    wrong: int = -1
    opens: bool = True
    seconds: float = 0.0
    array: Any = None

    @contextmanager
    def __call__(self, device: str | None) -> Iterator[Worker[int, tuple[int, int, Any]]]:
        if not self.opens:
            raise TaskError("no model: got nothing, expected a model; make one")
        if self.array is not None:
            self.array[:] += 1
        (self.folder / "opened").touch()
        yield lambda numbers: self.square(numbers, device)

    def square(self, numbers: Sequence[int], device: str | None) -> Iterator[tuple[int, int, Any]]:
        """Yield each number with its square, and the process, device, threads and sum of the array."""
        for number in numbers:
            time.sleep(self.seconds)
            if number == self.deadly and (self.often or not (self.folder / "died").exists()):
                (self.folder / "died").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if number == self.wrong == 19:  # noqa: PLR2004
                raise UnreachableError(address="store")
            if number == self.wrong:
                raise TaskError(f"{number} is even") if number % 2 == 0 else ZeroDivisionError(f"{number} is odd")
            total = None if self.array is None else float(np.sum(self.array))
            yield number, number**2, (os.getpid(), device, torch.get_num_threads(), total)
