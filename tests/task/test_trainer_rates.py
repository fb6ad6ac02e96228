"""Learning rates of Trainer runs: from the scheduler's state, from the log, and summed."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tracin_ann.errors import TaskError
from tracin_ann.task.integrations.rates import list_trainer_checkpoints, read_trainer_rates


def write_checkpoint(
    run: Path, step: int, logged: dict[int, float], scheduler: Sequence[float] = (), names: Sequence[list[str]] = ()
) -> None:
    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    history = [{"step": at, "learning_rate": rate} for at, rate in logged.items()] + [{"step": step, "eval_loss": 1.0}]
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": history}))
    if scheduler:
        torch.save({"_last_lr": list(scheduler), "last_epoch": step}, folder / "scheduler.pt")
    if names:
        groups = [{"lr": 9.0, "params": [i], "param_names": each} for i, each in enumerate(names)]
        torch.save({"state": {}, "param_groups": groups}, folder / "optimizer.pt")


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    for step in (100, 20, 3):
        write_checkpoint(tmp_path, step, {})
    (tmp_path / "checkpoint-best").mkdir()
    assert [c.step for c in list_trainer_checkpoints(tmp_path)] == [3, 20, 100]


def test_the_state_of_the_scheduler_has_precedence_over_the_log(tmp_path):
    write_checkpoint(tmp_path, 10, {10: 0.5}, [0.4])
    assert read_trainer_rates(tmp_path) == [0.4]


def test_without_a_scheduler_the_rate_of_the_next_update_is_interpolated(tmp_path):
    write_checkpoint(tmp_path, 3, {2: 0.8})
    write_checkpoint(tmp_path, 6, {2: 0.8, 6: 0.4})
    assert read_trainer_rates(tmp_path) == pytest.approx([0.6, 0.4], rel=1e-12)


def test_sums_interpolate_between_the_log_and_the_schedulers(tmp_path):
    # Update 1: 1.0 (nearest), 2: 1.0 (logged), 3: 0.9, 4: 0.8 (scheduler of step 3), 5: 0.6, 6: 0.4 (logged).
    write_checkpoint(tmp_path, 3, {2: 1.0}, [0.8])
    write_checkpoint(tmp_path, 6, {2: 1.0, 6: 0.4}, [0.0])
    assert read_trainer_rates(tmp_path, "sum") == pytest.approx([2.9, 1.8], rel=1e-12)


def test_groups_with_names_give_a_mapping(tmp_path):
    write_checkpoint(tmp_path, 5, {}, [0.1, 0.2], [["a.weight"], ["a.bias"]])
    assert read_trainer_rates(tmp_path) == [{"a.weight": 0.1, "a.bias": 0.2}]


def test_groups_without_names_give_the_first_rate_and_a_warning(tmp_path, caplog):
    write_checkpoint(tmp_path, 5, {}, [0.1, 0.2])
    with caplog.at_level(logging.WARNING, "tracin_ann"):
        assert read_trainer_rates(tmp_path) == [0.1]
    assert "learning rates 0.1, 0.2 without names" in caplog.text


def test_groups_with_one_rate_give_a_number(tmp_path):
    write_checkpoint(tmp_path, 5, {}, [0.1, 0.1], [["a"], ["b"]])
    assert read_trainer_rates(tmp_path) == [0.1]


def test_names_of_groups_lose_the_prefixes_of_wrappers(tmp_path):
    write_checkpoint(tmp_path, 5, {}, [0.1, 0.2], [["module._orig_mod.a.weight"], ["module._orig_mod.a.bias"]])
    assert read_trainer_rates(tmp_path) == [{"a.weight": 0.1, "a.bias": 0.2}]


@pytest.mark.parametrize(
    "history",
    [
        None,
        [{"learning_rate": 0.1}, {"step": 4, "learning_rate": float("nan")}, 3],
        [{"step": 4, "learning_rate": -0.1}, {"step": "4", "learning_rate": 0.1}],
    ],
)
def test_entries_of_the_log_without_a_usable_rate_are_ignored(tmp_path, history):
    write_checkpoint(tmp_path, 5, {})
    path = tmp_path / "checkpoint-5" / "trainer_state.json"
    path.write_text(json.dumps({"global_step": 5, "log_history": history}))
    with pytest.raises(TaskError, match=r"are unknown: got no scheduler.pt.*; pass rates="):
        read_trainer_rates(tmp_path)


@pytest.mark.parametrize("rates", [["fast"], [0.1, float("nan")], [-0.1]])
def test_rates_of_a_scheduler_that_are_no_rates_are_refused(tmp_path, rates):
    write_checkpoint(tmp_path, 5, {2: 0.1}, rates)
    with pytest.raises(TaskError, match=r"scheduler.pt cannot be read: got _last_lr .*expected learning rates"):
        read_trainer_rates(tmp_path)


def test_a_run_without_rates_is_refused(tmp_path):
    write_checkpoint(tmp_path, 5, {})
    with pytest.raises(TaskError, match=r"are unknown: got no scheduler.pt.*; pass rates="):
        read_trainer_rates(tmp_path)
