"""Objects that a task reference can name: a Task, functions that return one, and others."""

from __future__ import annotations

from torch import nn

from tasks.toy import cross_entropy, make_rows
from tracin_ann import Checkpoint, Task


def function(rate: str, rows_wanted: str = "4") -> Task:
    return Task(
        model=lambda: nn.Linear(5, 3),
        loss=cross_entropy,
        train_data=lambda: make_rows(int(rows_wanted)),
        query_data=lambda: make_rows(2),
        checkpoints=[Checkpoint("unused.pt", learning_rate=float(rate))],
    )


ready = function("0.5")
number = 3


def no_task() -> int:
    return 3


def fails_inside(rate: str) -> Task:
    return function(1 + rate)  # type: ignore[operator]
