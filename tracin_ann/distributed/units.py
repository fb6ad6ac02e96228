"""Shares of units: the share of one process of an array job, and the queue from which workers take theirs."""

from __future__ import annotations

import os
import re
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from tracin_ann.errors import TaskError, UsageError, problem

U = TypeVar("U")
_MOST_LOSSES = 5
"""How many workers may die while they compute the same unit."""
_INDEX_AND_COUNT = (("RANK", "WORLD_SIZE"), ("JOB_COMPLETION_INDEX", "JOB_COMPLETION_COUNT"))
"""Environment variables of torchrun, and of indexed jobs of Kubernetes, which sets only the first one."""


@dataclass(frozen=True)
class Shard:
    """One of several processes that share the units of a job by number.

    Attributes:
        index: from 0 to `count` - 1.
        count: the number of shards.
    """

    index: int
    count: int

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            UsageError: the index is not below the count.
        """
        if not 0 <= self.index < self.count:
            expected = f"0/{self.count} to {self.count - 1}/{self.count}" if self.count > 0 else "such as 0/4"
            raise UsageError(problem("no such shard", got=self, expected=expected, remedy="change --shard"))

    def __str__(self) -> str:
        """Return the shard as `--shard` takes it."""
        return f"{self.index}/{self.count}"

    @classmethod
    def parse(cls, text: str, environment: Mapping[str, str] = os.environ) -> Shard:
        """Return the shard of a text such as `3/8`, or for `auto`, that of the environment.

        Raises:
            UsageError: the text is malformed, there is no such shard, or the environment does not name one.
        """
        if text == "auto":
            return _find_shard(environment)
        match = re.fullmatch(r"([0-9]+)/([0-9]+)", text)
        if match is None:
            raise UsageError(
                problem("bad --shard", got=repr(text), expected="INDEX/COUNT such as 0/4, or auto", remedy="change it")
            )
        return cls(int(match[1]), int(match[2]))

    def take(self, units: Sequence[U]) -> Sequence[U]:
        """Return the share of this shard: consecutive units; sizes differ by one at most."""
        return units[len(units) * self.index // self.count : len(units) * (self.index + 1) // self.count]


def _find_shard(environment: Mapping[str, str]) -> Shard:
    """Return the shard that the variables of a scheduler name.

    Raises:
        UsageError: no scheduler names one, or more than one does.
    """
    found = {}
    if "SLURM_ARRAY_TASK_ID" in environment:
        found["SLURM_ARRAY_TASK_ID"] = _find_slurm_shard(environment)
    for index, count in _INDEX_AND_COUNT:
        if index in environment:
            found[index] = Shard(*(_read_number(environment, name) for name in (index, count)))
    if len(found) == 1:
        return next(iter(found.values()))
    names = ("SLURM_ARRAY_TASK_ID", *(index for index, _ in _INDEX_AND_COUNT))
    raise UsageError(
        problem(
            "--shard auto finds no single shard in the environment",
            got=" and ".join(f"{name}={environment[name]}" for name in found) or "none of the variables",
            expected=f"one of {', '.join(names)}",
            remedy="use --shard INDEX/COUNT",
        )
    )


def _find_slurm_shard(environment: Mapping[str, str]) -> Shard:
    """Return the shard of a task of a Slurm array whose ids are evenly spaced.

    Raises:
        UsageError: ids are missing, as in an array of the tasks that failed.
    """
    names = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_MAX")
    task, count, least, most = (_read_number(environment, name) for name in names)
    step = (most - least) // max(1, count - 1) or 1
    if least + (count - 1) * step != most or (task - least) % step:
        raise UsageError(
            problem(
                "--shard auto needs all tasks of an array",
                got=f"task {task} of {count} from {least} to {most}",
                expected="evenly spaced ids",
                remedy="to run some shards again, use --shard $SLURM_ARRAY_TASK_ID/COUNT with the earlier COUNT",
            )
        )
    return Shard((task - least) // step, count)


def _read_number(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name, "")
    if not value.isdecimal():
        got = repr(value) if name in environment else "no such variable"
        remedy = "set it, or use --shard INDEX/COUNT"
        raise UsageError(problem(f"--shard auto reads {name}", got=got, expected="a number", remedy=remedy))
    return int(value)


class UnitQueue(Generic[U]):
    """The units that no worker has finished or is computing.

    Workers take runs of consecutive units, so that neighbours share what they load: first long ones, which save
    exchanges, and at the end single units, so that all workers end at about the same time (guided self-scheduling,
    Polychronopoulos and Kuck 1987, with half of each worker's even share).

    Args:
        units: in order.
        n_workers: the number of workers.
    """

    def __init__(self, units: Iterable[U], n_workers: int) -> None:
        self._waiting, self._n_workers = deque(units), n_workers
        # None counts workers that died before they took a unit.
        self._losses: Counter[U | None] = Counter()

    def __len__(self) -> int:
        """Return the number of units that wait for a worker."""
        return len(self._waiting)

    def take(self) -> list[U]:
        """Return the units for a worker, or an empty list if none waits."""
        self._losses[None] = 0
        size = -(-len(self._waiting) // (2 * self._n_workers))
        return [self._waiting.popleft() for _ in range(size)]

    def put_back(self, units: Sequence[U], how: str) -> None:
        """Return the units of a worker that died.

        Args:
            units: what it had taken.
            how: it died, for the message.

        Raises:
            TaskError: several workers died while they computed the same unit, or one after another before their first.
        """
        lost: Sequence[U | None] = units or (None,)
        self._losses.update(lost)
        if max(self._losses[unit] for unit in lost) >= _MOST_LOSSES:
            raise TaskError(
                problem(
                    f"{_MOST_LOSSES} workers died one after another",
                    got=how,
                    expected="workers that run until all units are done",
                    remedy="use a smaller --batch-size or fewer workers if memory ran out, then run the command again",
                )
            )
        self._waiting.extendleft(reversed(units))
