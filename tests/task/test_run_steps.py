"""`Checkpoint.steps` of training runs: the optimizer's kind, sums of rates of real schedulers, records, defaults."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, OneCycleLR

from runs import Small, batches, cross_entropy, make_images
from tracin_ann import BuildConfig, Checkpoint, InfluenceIndex, RunRecorder, Task, build
from tracin_ann.task.integrations.losses import ClassLoss
from tracin_ann.task.integrations.param_groups import count_steps, read_momentum
from tracin_ann.task.integrations.rates import read_trainer_rates, read_trainer_steps

UPDATES, SAVE_EVERY = 24, 8
SGD, ADAM = torch.optim.SGD, torch.optim.AdamW
Schedule = Callable[[torch.optim.Optimizer], LRScheduler]
SCHEDULES: dict[str, Schedule] = {
    "cosine": lambda optimizer: CosineAnnealingLR(optimizer, UPDATES, 0.01),
    "linear": lambda optimizer: LinearLR(optimizer, 1.0, 0.25, UPDATES),
    "to zero": lambda optimizer: CosineAnnealingLR(optimizer, UPDATES),
}


def step_once(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step(lambda: 1.0)


@pytest.mark.parametrize(
    ("make", "momentum"),
    [
        (lambda p: SGD(p, lr=0.1), 0.0),
        (lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1), 0.9),
        (lambda p: SGD(p, lr=0.1, momentum=0.5, nesterov=True), 0.5),
        (lambda p: SGD(p, lr=0.1, momentum=0.9, dampening=0.9), None),
        (lambda p: SGD(p, lr=0.1, momentum=1.0), None),
        (lambda p: SGD([{"params": p}, {"params": [torch.ones(1)], "momentum": 0.5}], lr=0.1, momentum=0.9), None),
        (lambda p: torch.optim.Adam(p, lr=0.1), None),
        (lambda p: ADAM(p, lr=0.1), None),
        (lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9), None),
        (lambda p: torch.optim.Adagrad(p, lr=0.1), None),
        (lambda p: torch.optim.Rprop(p, lr=0.1), None),
        (lambda p: torch.optim.LBFGS(p, lr=0.1), None),
        (lambda p: torch.optim.Muon(p, lr=0.1), None),
    ],
)
def test_the_momentum_of_gradient_descent_alone_is_read(make: Any, momentum: float | None) -> None:
    optimizer = make([nn.Parameter(torch.ones(3, 3))])
    for _ in range(2):
        assert read_momentum(optimizer.state_dict()) == momentum
        step_once(optimizer)


def test_a_buffer_of_another_optimizer_is_not_gradient_descent() -> None:
    group = {"lr": 0.1, "momentum": 0.9, "dampening": 0, "params": [0]}
    assert read_momentum({"param_groups": [group], "state": {0: {"momentum_buffer": torch.ones(1)}}}) == 0.9
    assert read_momentum({"param_groups": [group], "state": {0: {"exp_avg_sq": torch.ones(1)}}}) is None
    assert read_momentum({"param_groups": [], "state": {}}) is None


def test_steps_are_the_sum_of_rates_over_the_rate() -> None:
    assert count_steps([0.5, 0.25, 0.0], [1.0, 0.5, 0.5], [0.0] * 3) == [4.0, 8.0, None]
    # Each part of the run has its own momentum; of several rates, the largest counts.
    assert count_steps([{"a": 0.5, "b": 0.1}], [{"a": 1.0, "b": 3.0}], [0.5]) == [12.0]
    assert count_steps([1.0, 0.5], [1.0, 2.0], [0.0, 0.5]) == [5.0, 10.0]
    assert count_steps([1.0, 1.0], [1.0, None], [0.0, 0.0]) == [None, None]
    assert count_steps([1.0, 1.0], [1.0, 1.0], [0.0, None]) == [None, None]
    # A checkpoint before the first step.
    assert count_steps([1.0], [0.0], [0.0]) == [None]


def write_trainer_run(run: Path, optimizer: torch.optim.Optimizer, schedule: Schedule) -> list[float]:
    """Step an optimizer and its scheduler, save what the Trainer saves, and return the first group's rates."""
    scheduler, used, history = schedule(optimizer), [], []
    for step in range(1, UPDATES + 1):
        used.append(optimizer.param_groups[0]["lr"])
        history.append({"step": step, "learning_rate": used[-1]})
        step_once(optimizer)
        scheduler.step()
        if step % SAVE_EVERY == 0:
            folder = run / f"checkpoint-{step}"
            folder.mkdir()
            (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": history}))
            torch.save(optimizer.state_dict(), folder / "optimizer.pt")
            torch.save(scheduler.state_dict(), folder / "scheduler.pt")
    return used


@pytest.mark.parametrize("rule", ["at", "sum"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_steps_of_a_trainer_run_are_those_of_its_scheduler(
    tmp_path: Path, schedule: str, momentum: float, rule: Any
) -> None:
    optimizer = SGD([nn.Parameter(torch.ones(2))], lr=0.4, momentum=momentum)
    used = write_trainer_run(tmp_path, optimizer, SCHEDULES[schedule])
    rates = read_trainer_rates(tmp_path, rule)
    steps = read_trainer_steps(tmp_path, rates)
    for rate, count in zip(rates, steps, strict=True):
        assert isinstance(rate, float)
        assert count == (pytest.approx(sum(used) / (1 - momentum) / rate, rel=1e-9) if rate else None)
    # Only a schedule that ends at 0 has a rate of 0, and only at the end.
    assert (steps[-1] is None) == (schedule == "to zero" and rule == "at") and None not in steps[:-1]


def test_steps_of_groups_are_those_of_their_common_schedule(tmp_path: Path) -> None:
    groups = [{"params": [(name, nn.Parameter(torch.ones(2)))], "lr": rate} for name, rate in (("a", 0.1), ("b", 0.4))]
    used = write_trainer_run(tmp_path, SGD(groups), SCHEDULES["linear"])
    rates = read_trainer_rates(tmp_path)
    assert all(isinstance(rate, dict) and rate["b"] == pytest.approx(4 * rate["a"]) for rate in rates)
    assert read_trainer_steps(tmp_path, rates) == [
        pytest.approx(sum(used) / rate["a"])  # type: ignore[index]
        for rate in rates
    ]


@pytest.mark.parametrize("change", ["Adam", "no state", "damaged", "not a state"])
def test_steps_are_unknown_without_the_state_of_gradient_descent(tmp_path: Path, change: str) -> None:
    parameters = [nn.Parameter(torch.ones(2))]
    write_trainer_run(tmp_path, (ADAM if change == "Adam" else SGD)(parameters, lr=0.4), SCHEDULES["linear"])
    path = tmp_path / f"checkpoint-{SAVE_EVERY}" / "optimizer.pt"
    if change == "no state":
        path.unlink()
    elif change == "damaged":
        path.write_bytes(b"PK" + bytes(100))
    elif change == "not a state":
        torch.save({"lr": 0.4}, path)
    assert read_trainer_steps(tmp_path, read_trainer_rates(tmp_path)) == [None] * (UPDATES // SAVE_EVERY)


def record_run(folder: Path, make: Callable[[nn.Module], torch.optim.Optimizer], schedule: Schedule) -> list[float]:
    """Record a run, and return the largest rate of each step, divided by 1 − momentum."""
    model, used = Small(), []
    optimizer = make(model)
    scheduler = schedule(optimizer)
    batch = batches(make_images(6), 6)[0]
    with RunRecorder(folder, model, optimizer) as recorder:
        for step in range(UPDATES):
            cross_entropy(model, batch).mean().backward()
            used.append(max(g["lr"] / (1 - g.get("momentum", 0)) for g in optimizer.param_groups))
            optimizer.step()
            scheduler.step()
            recorder.step(4.0 * 0.8**step)
    return used


def make_sgd(model: nn.Module, momentum: float = 0.9) -> torch.optim.Optimizer:
    assert isinstance(model, Small)
    groups = [{"params": model.head.parameters(), "lr": 0.05}, {"params": model.body.parameters()}]
    return SGD(groups, lr=0.01, momentum=momentum)


@pytest.mark.parametrize("rule", ["at", "sum"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_record_has_the_steps_of_its_scheduler(tmp_path: Path, momentum: float, rule: Any) -> None:
    used = record_run(tmp_path, lambda model: make_sgd(model, momentum), SCHEDULES["cosine"])
    found = Checkpoint.from_run(tmp_path, rates=rule)
    assert len(found) > 2
    assert [c.steps for c in found] == [pytest.approx(sum(used) / c.largest_rate) for c in found]
    content = json.loads((tmp_path / "tracin.json").read_text())
    assert {entry["momentum"] for entry in content["checkpoints"]} == {momentum}
    # A record of an earlier version.
    for entry in content["checkpoints"]:
        del entry["momentum"]
    (tmp_path / "tracin.json").write_text(json.dumps(content))
    assert [c.steps for c in Checkpoint.from_run(tmp_path, rates=rule)] == [None] * len(found)


def test_a_momentum_that_changes_counts_at_each_checkpoint(tmp_path: Path) -> None:
    used = record_run(tmp_path, make_sgd, lambda optimizer: OneCycleLR(optimizer, [0.05, 0.01], UPDATES))
    found = Checkpoint.from_run(tmp_path)
    # The momentum moves between .85 and .95, and is known at checkpoints only.
    assert [c.steps for c in found] == [pytest.approx(sum(used) / c.largest_rate, rel=0.2) for c in found]


def test_a_record_of_adam_has_no_steps(tmp_path: Path) -> None:
    record_run(tmp_path, lambda model: ADAM(model.parameters()), SCHEDULES["cosine"])
    assert {c.steps for c in Checkpoint.from_run(tmp_path)} == {None}
    content = json.loads((tmp_path / "tracin.json").read_text())
    assert {entry["momentum"] for entry in content["checkpoints"]} == {None}


@pytest.mark.parametrize(
    ("problem_type", "n_outputs", "label", "expected"),
    [
        (None, 3, 1, True),
        (None, 3, [0.0, 1.0, 1.0], False),
        (None, 1, 0.5, False),
        ("single_label_classification", 3, 1, True),
        ("multi_label_classification", 3, [0.0, 1.0, 1.0], False),
        ("regression", 2, [0.5, 1.0], False),
    ],
)
def test_the_loss_of_one_label_is_a_log_probability(
    problem_type: str | None, n_outputs: int, label: Any, expected: bool
) -> None:
    row = {"labels": torch.tensor(label)}
    loss = ClassLoss(problem_type)
    assert loss.is_nll(n_outputs, row) == expected
    logits = torch.randn(1, n_outputs)
    value = loss(partial(SimpleNamespace, logits=logits), {"labels": row["labels"][None]})
    if expected:
        assert value.item() == pytest.approx(-logits.softmax(1)[0, label].log().item())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
def test_the_index_of_a_trainer_run_has_the_damping_of_its_optimizer(tmp_path: Path, optim: str) -> None:
    pytest.importorskip("accelerate")
    run = import_module("trainer_runs").train("bert", tmp_path / "run", optim=optim)
    task = Task.from_transformers(run.folder, run.records)
    rates = list(run.at_save.values())
    assert rates[-1] == 0 and task.loss_is_nll is True
    if optim == "sgd":
        assert [c.steps for c in task.checkpoints] == [pytest.approx(sum(run.used) / r) if r else None for r in rates]
    else:
        assert {c.steps for c in task.checkpoints} == {None}
    given = Task.from_transformers(run.folder, run.records, rates=[0.1] * len(rates))
    assert {c.steps for c in given.checkpoints} == {None}
    build(task, tmp_path / "index", BuildConfig(dim=64, device="cpu", yardstick=False))
    index = InfluenceIndex.open(tmp_path / "index", task, device="cpu")
    assert index.default_score == index.query([0])[0].score == "gauss-newton"
    damping = index.score_maker.damp("gauss-newton")
    assert (damping.rule == "5e-4 of the trace") is (optim != "sgd")
    if optim == "sgd":
        assert damping.rule == "1 / (learning rate × steps)"
        assert list(damping.damping_C[:-1]) == [pytest.approx(1 / sum(run.used))] * (len(rates) - 1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_the_steps_of_a_language_model_are_those_of_the_mean_over_tokens(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    run = import_module("trainer_runs").train("gpt2", tmp_path / "run", optim="sgd")
    assert any(c.steps for c in Task.from_transformers(run.folder, run.records, loss="mean").checkpoints)
    assert {c.steps for c in Task.from_transformers(run.folder, run.records).checkpoints} == {None}
