"""`RunRecorder`: the rule for checkpoints, rates, second moments, order of examples, resumed and killed runs."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

from paths import ROOT
from recorded_runs import ROWS, plain, steps_of, train
from runs import Small, batches, cross_entropy
from tracin_ann import Checkpoint, LossFall, RunRecorder
from tracin_ann.errors import CheckpointError, UsageError
from tracin_ann.task import has_run_record, read_order, read_run_record


@pytest.mark.parametrize(
    ("rule", "losses", "expected"),
    [
        (plain(0.25, 0.5), [4.0, 3.5, 3.0, 2.5, 2.0, 1.5], [1, 3, 5, 6]),
        # The first step, a fraction that is reached once only, and two fractions at one step.
        (plain(0.25), [4.0, 3.0, 4.0, 3.0, 2.5, 2.0], [1, 2, 6]),
        (plain(0.25, 0.5), [4.0, 1.0, 0.5], [1, 2, 3]),
        (plain(0.5), [4.0, 4.0, 5.0], [1, 3]),
        # From the floor, which may be negative.
        (plain(0.5, floor=2.0), [4.0, 3.5, 3.0, 2.5], [1, 3, 4]),
        (plain(0.5, floor=-4.0), [4.0, 1.0, 0.0, -1.0], [1, 3, 4]),
        # A loss that is not finite is not used; the smoothed losses are 4, 3, 2.5.
        (plain(0.25, smoothing=0.5), [4.0, 2.0, float("nan"), 2.0], [1, 2, 4]),
        (plain(0.3, smoothing=0.5), [4.0, 2.0, float("inf"), 2.0], [1, 4]),
    ],
)
def test_checkpoints_are_saved_at_fractions_of_the_fall(
    tmp_path: Path, rule: LossFall, losses: list[float], expected: list[int]
) -> None:
    train(tmp_path, losses, rule=rule)[0].close()
    assert steps_of(tmp_path) == expected


def test_a_rule_out_of_range_and_a_loss_below_the_floor_are_rejected(tmp_path: Path) -> None:
    for wrong in ({"fractions": [0.0]}, {"fractions": [1.5]}, {"smoothing": 1.0}, {"floor": float("inf")}):
        with pytest.raises(UsageError, match="^the rule for checkpoints cannot be used: got LossFall"):
            LossFall(**wrong)
    with pytest.raises(UsageError, match="^the fall of the loss cannot be measured: got a first loss of -1, "):
        train(tmp_path, [-1.0])


def test_the_record_has_rates_sums_and_losses(tmp_path: Path) -> None:
    recorder, model = train(tmp_path, [4.0, 3.5, 3.0, 2.0, 2.0], rule=plain(0.25, 0.5))
    recorder.close()
    record = read_run_record(tmp_path)
    names = {name: 0.02 if name.startswith("head") else 0.001 for name, _ in model.named_parameters()}
    # No optimizer updates the scale.
    names["scale"] = 0.0
    assert steps_of(tmp_path) == [1, 3, 4, 5]
    for checkpoint, halvings in zip(record.checkpoints, ([0], [1, 2], [3], [4]), strict=True):
        assert checkpoint.learning_rates == {n: pytest.approx(r * 0.5 ** halvings[-1]) for n, r in names.items()}
        summed = sum(0.5**halving for halving in halvings)
        assert checkpoint.summed_learning_rates == {n: pytest.approx(r * summed) for n, r in names.items()}
    assert [checkpoint.loss for checkpoint in record.checkpoints] == [4.0, 3.0, 2.0, 2.0]
    sums = [checkpoint.learning_rate for checkpoint in Checkpoint.from_run(tmp_path, rates="sum")]
    assert sums == [checkpoint.summed_learning_rates for checkpoint in record.checkpoints]
    content = json.loads((tmp_path / "tracin.json").read_text())
    assert (content["format"], content["version"], content["order"]) == ("tracin-run", 1, None)
    assert content["checkpoints"][0].keys() >= {"path", "step", "epoch", "loss", "learning_rates", "optimizer"}


def test_equal_rates_are_one_number(tmp_path: Path) -> None:
    model = Small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with RunRecorder(tmp_path, model, optimizer) as recorder:
        optimizer.step()
        recorder.step(1.0, epoch=0.5)
    (checkpoint,) = read_run_record(tmp_path).checkpoints
    assert (checkpoint.learning_rates, checkpoint.epoch) == (0.5, 0.5)


def test_accumulated_batches_are_saved_after_the_optimizer_step(tmp_path: Path) -> None:
    model = Small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with RunRecorder(tmp_path, model, optimizer, rule=plain(0.5)) as recorder:
        for i, loss in enumerate([4.0, 4.0, 1.0, 1.0, 1.0, 1.0]):
            if i % 2:
                optimizer.step()
            recorder.step(loss)
    assert steps_of(tmp_path) == [1, 2, 3]


def test_names_are_those_of_the_module_that_is_wrapped(tmp_path: Path) -> None:
    model = nn.ModuleDict({"module": Small()})
    optimizer = torch.optim.SGD([{"params": model["module"].head.parameters(), "lr": 2.0}], lr=0.5)
    with RunRecorder(tmp_path, model, optimizer) as recorder:
        optimizer.step()
        recorder.step(1.0)
    (checkpoint,) = read_run_record(tmp_path).checkpoints
    assert checkpoint.learning_rates == {n: 2.0 if "head" in n else 0.0 for n, _ in Small().named_parameters()}


def test_an_optimizer_of_another_model_is_rejected(tmp_path: Path) -> None:
    model, other = Small(), Small()
    with pytest.raises(UsageError, match="^the optimizers do not match the model: got an optimizer without"):
        RunRecorder(tmp_path, model, torch.optim.SGD(other.parameters(), lr=1.0))
    twice = [torch.optim.SGD(model.head.parameters(), lr=1.0), torch.optim.SGD(model.parameters(), lr=1.0)]
    with pytest.raises(UsageError, match="got two optimizers of head.weight"):
        RunRecorder(tmp_path, model, twice)
    assert not has_run_record(tmp_path)


def test_second_moments_equal_those_of_the_optimizer(tmp_path: Path) -> None:
    model = Small()
    groups = [{"params": model.head.parameters(), "betas": (0.9, 0.95)}, {"params": model.body.parameters()}]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    expected: list[dict[str, Any]] = []
    with RunRecorder(tmp_path, model, optimizer, rule=plain(0.5), save_moments=True) as recorder:
        for batch, loss in zip(batches(ROWS, 4), [4.0, 3.0, 2.0], strict=True):
            cross_entropy(model, batch).mean().backward()
            optimizer.step()
            expected.append({n: optimizer.state[p] for n, p in model.named_parameters() if p in optimizer.state})
            expected[-1] = copy.deepcopy(expected[-1])
            recorder.step(loss)
    record = read_run_record(tmp_path)
    assert [checkpoint.step for checkpoint in record.checkpoints] == [1, 3]
    for checkpoint in record.checkpoints:
        assert checkpoint.optimizer is not None
        with safe_open(tmp_path / checkpoint.optimizer, "pt") as file:
            states = expected[checkpoint.step - 1]
            assert set(file.keys()) == set(states) == {n for n, _ in model.named_parameters()} - {"scale"}
            assert all(torch.equal(file.get_tensor(n), state["exp_avg_sq"]) for n, state in states.items())
            described = json.loads(file.metadata()["groups"])
        of_head = next(each for each in described if "head.bias" in each["names"])
        assert of_head == {"beta2": 0.95, "eps": 1e-8, "step": checkpoint.step, "names": ["head.weight", "head.bias"]}


def test_second_moments_of_an_optimizer_without_them_are_rejected(tmp_path: Path) -> None:
    model = Small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    recorder = RunRecorder(tmp_path, model, optimizer, save_moments=True)
    optimizer.step()
    with pytest.raises(UsageError, match=r"^second moments cannot be saved: got .* without exp_avg_sq \(SGD\)"):
        recorder.step(1.0)


def test_the_order_of_examples_is_recorded_and_cut_when_a_run_is_resumed(tmp_path: Path) -> None:
    model = Small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    ids = [torch.tensor([3, 1]), ["a", "b"], [torch.tensor(5), 6]]

    def run(losses: list[float], start_step: int | None) -> None:
        with RunRecorder(tmp_path, model, optimizer, rule=plain(0.5), start_step=start_step) as recorder:
            for batch, loss in zip(ids, losses, strict=False):
                optimizer.step()
                recorder.step(loss, batch)

    run([4.0, 3.0, 2.0], None)
    assert list(read_order(tmp_path)) == [(1, [3, 1]), (2, ["a", "b"]), (3, [5, 6])]
    # A line that an interruption left incomplete.
    with open(tmp_path / "tracin" / "order.jsonl", "a") as file:
        file.write('{"step": 4, "ids": [1')
    assert len(list(read_order(tmp_path))) == 3
    run([2.0], 2)
    assert list(read_order(tmp_path)) == [(1, [3, 1]), (2, ["a", "b"]), (3, [3, 1])]
    run([2.0], 0)
    assert list(read_order(tmp_path)) == [(1, [3, 1])]


def test_a_resumed_run_continues_the_record_and_the_rule(tmp_path: Path) -> None:
    rule = plain(0.25, 0.5, 0.75)
    train(tmp_path, [4.0, 3.5, 3.0, 2.5, 2.0, 2.0], rule=rule)[0].close()
    assert steps_of(tmp_path) == [1, 3, 5, 6]
    with pytest.raises(
        UsageError, match="already contains the record of a run: got tracin.json, .*start_step: 0 replac"
    ):
        train(tmp_path, [1.0], rule=rule)
    # From step 4: the fraction 0.25 has been reached, and the checkpoints of steps 5 and 6 are left out.
    train(tmp_path, [2.9, 2.5, 2.0, 2.0], rule=rule, start_step=4)[0].close()
    assert steps_of(tmp_path) == [1, 3, 7, 8]
    with pytest.raises(CheckpointError, match="has no sum of learning rates at step 7"):
        Checkpoint.from_run(tmp_path, rates="sum")
    with pytest.raises(UsageError, match="^bad rates: got 'mean', expected 'at' or 'sum'"):
        Checkpoint.from_run(tmp_path, rates="mean")  # type: ignore[arg-type]
    train(tmp_path, [1.0], rule=rule, start_step=0)[0].close()
    assert steps_of(tmp_path) == [1]


def test_a_closed_recorder_rejects_steps(tmp_path: Path) -> None:
    recorder, _ = train(tmp_path, [1.0])
    recorder.close()
    recorder.close()
    with pytest.raises(UsageError, match="^the run recorder is closed"):
        recorder.step(1.0)


def test_an_exception_in_a_with_block_leaves_the_complete_checkpoints(tmp_path: Path) -> None:
    model = Small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with pytest.raises(ZeroDivisionError), RunRecorder(tmp_path, model, optimizer) as recorder:
        for _ in range(3):
            optimizer.step()
            recorder.step(1.0)
        _ = 1 / 0
    assert steps_of(tmp_path) == [1]


KILLED = """
    import os, sys, torch
    from tracin_ann import LossFall, RunRecorder

    def run(folder, last_write):
        n_writes = 0
        def count(event, arguments):
            # The audit event of each file that is opened for writing, renamed or removed.
            nonlocal n_writes
            mode = arguments[1] if event == "open" else None
            if event in ("os.rename", "os.remove") or (isinstance(mode, str) and "r" not in mode):
                n_writes += 1
                if n_writes == last_write:
                    os._exit(9)
        torch.manual_seed(0)
        model = torch.nn.Linear(300, 300)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        recorder = RunRecorder(folder, model, optimizer, rule=LossFall([0.5, 0.9], smoothing=0))
        sys.addaudithook(count)
        for loss in (4.0, 2.0, 0.1, 0.1):
            optimizer.step()
            recorder.step(loss)
        recorder.close()
        os._exit(0)

    # A first step imports a part of torch, which the processes below then have.
    torch.optim.SGD([torch.zeros(1, requires_grad=True)]).step()
    status, at = 9, 0
    while status == 9:
        at += 1
        child = os.fork()
        if child == 0:
            run(f"{sys.argv[1]}/{at}", at)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(at - 1, status)
"""


@pytest.mark.slow
def test_a_killed_run_leaves_a_valid_record_at_every_write(tmp_path: Path) -> None:
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    n_writes, status = map(int, done.stdout.split())
    assert status == 0 and n_writes >= 12
    seen = set()
    for at in range(1, n_writes + 1):
        folder = tmp_path / str(at)
        if has_run_record(folder):
            seen.add(len(steps_of(folder)))
            for checkpoint in Checkpoint.from_run(folder):
                assert torch.load(checkpoint.path, weights_only=True)["weight"].shape == (300, 300)
        # What the interruption left does not disturb the next run.
        model = nn.Linear(300, 300)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        with RunRecorder(folder, model, optimizer, start_step=0) as recorder:
            optimizer.step()
            recorder.step(1.0)
        assert steps_of(folder) == [1]
        assert not [path for path in (folder / "tracin").iterdir() if path.name.startswith(".")]
    assert seen == {1, 2, 3}
