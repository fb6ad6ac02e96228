"""Shares of units: every unit has one shard, whatever names the shard, and one worker at a time."""

from __future__ import annotations

import pytest

from tracin_ann.distributed import Shard
from tracin_ann.distributed.units import UnitQueue
from tracin_ann.errors import TaskError, UsageError


@pytest.mark.parametrize(("n_units", "count"), [(12, 1), (12, 5), (3, 7), (0, 2), (96, 32)])
def test_every_unit_belongs_to_one_shard(n_units, count):
    shares = [Shard(i, count).take(range(n_units)) for i in range(count)]
    assert [unit for share in shares for unit in share] == list(range(n_units))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("text", ["", "3", "4/4", "1/0", "-1/4", "1/4/2", "a/b", "1 / 4"])
def test_a_bad_shard_is_rejected(text):
    with pytest.raises(UsageError, match="shard"):
        Shard.parse(text)


def slurm(task: int, count: int, least: int, most: int) -> dict[str, str]:
    """Return the environment of a task of an array."""
    values = {"ID": task, "COUNT": count, "MIN": least, "MAX": most}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in values.items()}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (slurm(0, 4, 0, 3), "0/4"),
        (slurm(32, 32, 1, 32), "31/32"),
        (slurm(20, 3, 10, 30), "1/3"),
        (slurm(7, 1, 7, 7), "0/1"),
        ({"RANK": "2", "WORLD_SIZE": "3"}, "2/3"),
        ({"JOB_COMPLETION_INDEX": "0", "JOB_COMPLETION_COUNT": "8"}, "0/8"),
    ],
)
def test_the_environment_of_a_scheduler_names_the_shard(environment, expected):
    assert str(Shard.parse("auto", environment)) == expected


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "got none of the variables"),
        ({**slurm(0, 4, 0, 3), "RANK": "1", "WORLD_SIZE": "2"}, "got SLURM_ARRAY_TASK_ID=0 and RANK=1"),
        # An array of the tasks that failed: its numbers do not say how many shards there were.
        (slurm(3, 2, 3, 7) | {"SLURM_ARRAY_TASK_ID": "5"}, "evenly spaced"),
        (slurm(3, 3, 3, 9) | {"SLURM_ARRAY_TASK_MAX": "10"}, "evenly spaced"),
        ({"JOB_COMPLETION_INDEX": "3"}, "JOB_COMPLETION_COUNT: got no such variable"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK: got 'x'"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "no such shard"),
    ],
)
def test_an_environment_that_does_not_name_the_shard_is_rejected(environment, message):
    with pytest.raises(UsageError, match=message):
        Shard.parse("auto", environment)


def test_a_queue_gives_long_runs_first_and_single_units_last():
    queue = UnitQueue(range(40), 2)
    taken = [queue.take() for _ in range(20)]
    runs = [units for units in taken if units]
    assert [unit for units in runs for unit in units] == list(range(40))
    sizes = list(map(len, runs))
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == 10 and sizes[-4:] == [1] * 4
    assert not queue


def test_units_of_a_lost_worker_are_next():
    queue = UnitQueue(range(8), 1)
    lost = queue.take()
    queue.put_back(lost, "killed")
    assert lost == [0, 1, 2, 3] and queue.take() == lost and queue.take() == [4, 5]


@pytest.mark.parametrize("loses", ["units", "nothing"])
def test_workers_that_die_again_and_again_end_the_run(loses):
    queue = UnitQueue(range(8), 1)
    with pytest.raises(TaskError, match="5 workers died one after another: got signal SIGKILL"):
        for _ in range(6):
            queue.put_back(queue.take() if loses == "units" else [], "signal SIGKILL")


def test_losses_before_the_first_unit_do_not_add_up_while_others_work():
    queue = UnitQueue(range(100), 10)
    for _ in range(10):
        queue.put_back([], "node lost")
        queue.take()
