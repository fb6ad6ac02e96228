"""Runs of a plain training loop: dictionaries with an optimizer's state, and the records of `RunRecorder`."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from runs import CONFIG, Small, assert_close, batches, brute_force_scores, cross_entropy, exact_scores, make_images
from tracin_ann import Checkpoint, InfluenceIndex, RunRecorder, Task, build
from tracin_ann.errors import CheckpointError, IndexMismatchError, TaskError
from tracin_ann.task.checkpoint_loader import CheckpointLoader, checkpoint_digest

ROWS, QUERIES = make_images(12), make_images(4, seed=2)
HEAD = ("head.weight", "head.bias", "scale")


@dataclass
class Run:
    """A run of a plain loop: its files, and the model and the scheduler's rates by name when each was saved."""

    folder: Path
    files: list[Path] = field(default_factory=list)
    models: list[nn.Module] = field(default_factory=list)
    rates: list[dict[str, float]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)


def train(folder: Path, *, named: bool = False, record: bool = False, epochs: int = 3) -> Run:
    """Train with AdamW, two groups and a cosine schedule; save the model before a step of the scheduler."""
    torch.manual_seed(0)
    model, run = Small(), Run(folder)
    groups: list[dict[str, Any]] = [{"params": [], "lr": 3e-2}, {"params": [], "lr": 5e-3}]
    for name, parameter in model.named_parameters():
        groups[name not in HEAD]["params"].append((name, parameter))
    run.names = [name for group in groups for name, _ in group["params"]]
    if not named:
        groups = [{**group, "params": [parameter for _, parameter in group["params"]]} for group in groups]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3 * epochs)
    recorder = RunRecorder(folder, model, optimizer) if record else None
    for epoch in range(epochs):
        for batch in batches(ROWS, 6):
            optimizer.zero_grad()
            loss = cross_entropy(model, batch).mean()
            loss.backward()
            optimizer.step()
            rates = dict(zip(("head", "body"), scheduler.get_last_lr(), strict=True))
            scheduler.step()
            if recorder is not None:
                recorder.step(loss)
        if recorder is None:
            rates = dict(zip(("head", "body"), scheduler.get_last_lr(), strict=True))
        run.rates.append({name: rates["head" if name in HEAD else "body"] for name, _ in model.named_parameters()})
        run.models.append(copy.deepcopy(model))
        run.files.append(folder / f"epoch-{epoch}.pt")
        state = {"net": model.state_dict(), "optim": optimizer.state_dict(), "sched": scheduler.state_dict()}
        torch.save({**state, "epoch": epoch}, run.files[-1])
    if recorder is not None:
        recorder.close()
    return run


def make_task(checkpoints: list[Checkpoint], **fields: Any) -> Task:
    return Task(Small, cross_entropy, lambda: ROWS, lambda: QUERIES, checkpoints, **fields)


def save(tmp_path: Path, **content: Any) -> Path:
    torch.save(content, tmp_path / "given.pt")
    return tmp_path / "given.pt"


def read_error(*arguments: Any, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.from_file(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("named", [True, False])
def test_files_of_a_loop_give_brute_force_scores_with_the_rates_of_the_scheduler(tmp_path: Path, named: bool) -> None:
    run = train(tmp_path, named=named)
    names = None if named else run.names
    checkpoints = [Checkpoint.from_file(path, "net", parameter_names=names) for path in run.files]
    for checkpoint, rates in zip(checkpoints, run.rates, strict=True):
        assert checkpoint.learning_rate == {name: pytest.approx(rate, rel=1e-12) for name, rate in rates.items()}
    task = make_task(checkpoints)
    expected = brute_force_scores(run.models, run.rates, cross_entropy, QUERIES, ROWS)
    assert_close(exact_scores(task, tmp_path / "index"), expected)
    # The rates of the groups matter: with one rate for all parameters, scores differ.
    alike = [dict.fromkeys(rates, max(rates.values())) for rates in run.rates]
    with pytest.raises(AssertionError):
        assert_close(expected, brute_force_scores(run.models, alike, cross_entropy, QUERIES, ROWS), 0.05)


def test_a_recorded_loop_gives_brute_force_scores_with_the_rates_of_its_last_steps(tmp_path: Path) -> None:
    run = train(tmp_path, record=True)
    checkpoints = Checkpoint.from_run(tmp_path)
    assert checkpoints[-1].learning_rate == {n: pytest.approx(r, rel=1e-12) for n, r in run.rates[-1].items()}
    models = []
    for checkpoint in checkpoints:
        models.append(Small())
        models[-1].load_state_dict(torch.load(checkpoint.path, weights_only=True))
    assert all(
        torch.equal(mine, theirs)
        for mine, theirs in zip(models[-1].parameters(), run.models[-1].parameters(), strict=True)
    )
    rates = [dict(checkpoint.learning_rate) for checkpoint in checkpoints]  # type: ignore[arg-type]
    expected = brute_force_scores(models, rates, cross_entropy, QUERIES, ROWS)
    assert_close(exact_scores(make_task(checkpoints), tmp_path / "index"), expected)


def test_second_moments_of_a_record_equal_those_of_a_file(tmp_path: Path) -> None:
    model = Small()
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.AdamW([{"params": [(n, p) for n, p in parameters.items()]}], lr=0.05)
    with RunRecorder(tmp_path, model, optimizer, save_moments=True) as recorder:
        for batch in batches(ROWS, 4):
            loss = cross_entropy(model, batch).mean()
            loss.backward()
            optimizer.step()
            recorder.step(loss)
    path = save(tmp_path, model=model.state_dict(), optimizer=optimizer.state_dict())
    recorded, saved = Checkpoint.from_run(tmp_path)[-1], Checkpoint.from_file(path)
    weighted, same, plain = (
        exact_scores(make_task([checkpoint]), tmp_path / f"index{i}", preconditioner=preconditioner)
        for i, (checkpoint, preconditioner) in enumerate([(recorded, "adam"), (saved, "adam"), (saved, "none")])
    )
    assert_close(weighted, same, 1e-6)
    assert abs(weighted - plain).max() > 0.1 * abs(plain).max()


def test_groups_with_one_rate_need_no_names(tmp_path: Path) -> None:
    model = Small()
    optimizer = torch.optim.SGD([{"params": model.head.parameters()}, {"params": model.body.parameters()}], lr=0.25)
    path = save(tmp_path, model=model.state_dict(), optimizer=optimizer.state_dict())
    assert Checkpoint.from_file(path) == Checkpoint(path, 0.25, path, "model")


def test_a_rate_may_be_a_tensor_and_the_optimizer_is_found_under_its_usual_key(tmp_path: Path) -> None:
    model = Small()
    states = [torch.optim.Adam(model.parameters(), lr=torch.tensor(rate)).state_dict() for rate in (0.5, 0.125)]
    path = save(tmp_path, model=model.state_dict(), other=states[0], optimizer=states[1])
    assert Checkpoint.from_file(path).learning_rate == 0.125
    assert Checkpoint.from_file(path, optimizer_key="other").learning_rate == 0.5
    assert Checkpoint.from_file(path, learning_rate=2).learning_rate == 2.0


def test_the_entry_of_the_key_is_loaded_among_several_that_fit(tmp_path: Path) -> None:
    model, averaged = Small(), Small()
    path = save(tmp_path, model=model.state_dict(), ema={f"module.{k}": v for k, v in averaged.state_dict().items()})
    loaded = Small()
    task = make_task([Checkpoint.from_file(path, "ema", 0.5), Checkpoint.from_file(path, "model", 0.5)])
    for i, source in enumerate((averaged, model)):
        CheckpointLoader(task).load(loaded, i, torch.device("cpu"))
        assert torch.equal(loaded.head.weight, source.head.weight)
    digests = {checkpoint_digest(checkpoint) for checkpoint in (*task.checkpoints, Checkpoint(path, 0.5))}
    assert len(digests) == 3


def test_files_without_weights_or_rates_are_rejected_in_one_line(tmp_path: Path) -> None:
    model = Small()
    state = torch.optim.SGD(model.parameters(), lr=0.5).state_dict()
    path = save(tmp_path, net=model.state_dict(), first=state, second=state)
    assert read_error(tmp_path / "absent.pt").startswith("a checkpoint is missing: ")
    assert read_error(path) == (
        f"checkpoint {path} has no state_dict under 'model': got a dict with net, first, second, expected a dict of "
        "tensors by name under 'model'; pass the key under which the training loop saved model.state_dict()"
    )
    assert "got 'first', 'second' with the state dict of an optimizer, expected one under 'opt" in read_error(
        path, "net"
    )
    assert "expected one under 'third'" in read_error(path, "net", optimizer_key="third")
    bare = save(tmp_path, model=model.state_dict())
    assert "has no learning rate: got no entry with" in read_error(bare)
    for damage in ({"lr": -1.0}, {"lr": float("nan")}, {"lr": None}, {"params": "all"}):
        groups = [{**state["param_groups"][0], **damage}]
        path = save(tmp_path, model=model.state_dict(), optimizer={"state": {}, "param_groups": groups})
        assert f"entry 'optimizer' of {path} has an unusable parameter group 0" in read_error(path)


def test_names_that_do_not_match_are_rejected_in_one_line(tmp_path: Path) -> None:
    run = train(tmp_path, epochs=1)
    path = run.files[0]
    assert "have different learning rates: got 0.0" in read_error(path, "net")
    assert "got 6 names, 6 of them different, expected 7" in read_error(path, "net", parameter_names=run.names[:6])
    assert "7 names, 6 of them" in read_error(path, "net", parameter_names=[*run.names[:6], run.names[0]])
    # The model's own order is not that of the groups; Adam's state has other shapes.
    wrong = read_error(path, "net", parameter_names=[name for name, _ in Small().named_parameters()])
    assert "got body.0.weight of shape [4, 1, 3, 3] for parameter 1, expected shape [3, 64]" in wrong
    unknown = read_error(path, "net", parameter_names=[*run.names[:6], "other"])
    assert "got other of shape None for parameter 6, expected a parameter of the model" in unknown


def test_a_task_rejects_a_key_beside_its_own_load(tmp_path: Path) -> None:
    path = save(tmp_path, model=Small().state_dict())
    with pytest.raises(TaskError, match="^Task.load and Checkpoint.key exclude each other: got key='model' of "):
        make_task([Checkpoint.from_file(path, learning_rate=1)], load=lambda model, path: None)


def test_an_index_rejects_a_task_that_reads_another_entry(tmp_path: Path) -> None:
    path = save(tmp_path, model=Small().state_dict(), ema=Small().state_dict())
    build(make_task([Checkpoint.from_file(path, "model", 0.5)]), tmp_path / "index", CONFIG)
    index = InfluenceIndex.open(tmp_path / "index", make_task([Checkpoint.from_file(path, "ema", 0.5)]), device="cpu")
    with pytest.raises(IndexMismatchError, match="given.pt"):
        index.query([0])
