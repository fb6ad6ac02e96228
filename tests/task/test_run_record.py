"""The record of a run, `tracin.json`: the rule for checkpoints, callbacks, interruptions, damage, second moments."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.nn import functional as F

from paths import ROOT
from runs import Small, batches, cross_entropy, make_images
from tracin_ann import Checkpoint, LossFall, RunRecorder, TracInCallback
from tracin_ann.errors import CheckpointError, UsageError
from tracin_ann.task import has_run_record, read_order, read_run_record
from tracin_ann.task.integrations.transformers import list_checkpoints

ROWS = make_images(12)


def train(
    folder: Path, losses: list[float], *, scheduled: bool = True, **options: Any
) -> tuple[RunRecorder, nn.Module]:
    """Take one step of a small model for each of these losses, which are given to the recorder."""
    torch.manual_seed(0)
    model = Small()
    optimizer = torch.optim.Adam([{"params": model.head.parameters(), "lr": 0.02}, {"params": model.body.parameters()}])
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5 if scheduled else 1.0)
    recorder = RunRecorder(folder, model, optimizer, **options)
    for batch, loss in zip(batches(ROWS * len(losses), 12), losses, strict=False):
        cross_entropy(model, batch).mean().backward()
        optimizer.step()
        scheduler.step()
        recorder.step(torch.tensor(loss))
    return recorder, model


def steps_of(folder: Path) -> list[int]:
    return [checkpoint.step for checkpoint in read_run_record(folder).checkpoints]


def plain(*fractions: float, **options: Any) -> LossFall:
    return LossFall(fractions, smoothing=options.pop("smoothing", 0.0), **options)


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


def damage(content: dict[str, Any], place: tuple[Any, ...], value: object) -> None:
    for key in place[:-1]:
        content = content[key]
    content[place[-1]] = value


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("format",), "other", "format 'other', version 1"),
        (("version",), 2, "format 'tracin-run', version 2"),
        (("checkpoints",), [], "no checkpoints"),
        (("checkpoints",), {}, "no checkpoints"),
        (("checkpoints", 0), 3, "checkpoint 0 is a int"),
        (("checkpoints", 0, "step"), "one", "checkpoint 0 has step 'one'"),
        (("checkpoints", 1, "step"), 1, "checkpoints at steps 1, 1, which do not increase"),
        (("checkpoints", 1, "loss"), "low", "checkpoint 1 has loss 'low'"),
        (("checkpoints", 1, "learning_rates"), -1, "checkpoint 1 has learning rates -1"),
        (("checkpoints", 1, "learning_rates"), {}, "checkpoint 1 has learning rates {}"),
        (("checkpoints", 1, "learning_rates"), {"a": True}, "checkpoint 1 has learning rates {'a': True}"),
        (("checkpoints", 1, "path"), "/etc/passwd", "has path '/etc/passwd', which is not below the folder"),
        (("checkpoints", 1, "path"), "../a", "has path '../a', which is not below the folder"),
        (("checkpoints", 1, "path"), "tracin/a.pt", "checkpoint 1 names tracin/a.pt, which does not exist"),
        (("checkpoints", 1, "optimizer"), 3, "has path 3, which is not below the folder"),
        (("checkpoints", 1, "momentum"), 1.0, "checkpoint 1 has momentum 1.0"),
        (("checkpoints", 1, "momentum"), "heavy", "checkpoint 1 has momentum 'heavy'"),
        (("order",), "absent", "order names absent, which does not exist"),
    ],
)
def test_a_damaged_record_is_rejected_in_one_line(
    tmp_path: Path, place: tuple[Any, ...], value: object, message: str
) -> None:
    train(tmp_path, [4.0, 1.0])[0].close()
    content = json.loads((tmp_path / "tracin.json").read_text())
    damage(content, place, value)
    (tmp_path / "tracin.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.from_run(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}/tracin.json is damaged: got ")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_or_truncated_record_is_rejected_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"^the run has no record: got no file {tmp_path}/tracin.json, expected"):
        read_run_record(tmp_path)
    train(tmp_path, [4.0])[0].close()
    text = (tmp_path / "tracin.json").read_text()
    for wrong in (text[:50], "[]", ""):
        (tmp_path / "tracin.json").write_text(wrong)
        with pytest.raises(
            CheckpointError, match=r"^[^\n]*expected a JSON object; restore the file, or give the check"
        ):
            read_run_record(tmp_path)
    (tmp_path / "tracin.json").write_text(text)
    with pytest.raises(CheckpointError, match="contains no order of examples"):
        next(read_order(tmp_path))


# Callbacks.


@pytest.fixture
def trainer(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Return a function that makes a Trainer of a tiny BERT, with a cosine schedule, weight decay and 6 steps."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, num_labels=2
    )

    def make(*callbacks: Any, steps: int = 6, **options: Any) -> Any:
        torch.manual_seed(0)
        rows = [{"input_ids": torch.tensor([2, 3 + i % 5, 9]), "labels": i % 2, "own_id": 100 + i} for i in range(12)]
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / "run"), max_steps=steps, per_device_train_batch_size=4, logging_steps=1,
            lr_scheduler_type="cosine", learning_rate=0.02, weight_decay=0.1, save_strategy="no", report_to=[],
            use_cpu=True, disable_tqdm=True, remove_unused_columns=False, **options,
        )  # fmt: skip
        drop = "own_id" if not any(c._options["ids"] for c in callbacks if isinstance(c, TracInCallback)) else ""
        rows = [{k: v for k, v in row.items() if k != drop} for row in rows]
        model = transformers.BertForSequenceClassification(config)
        return transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, callbacks=list(callbacks))

    yield make


def test_the_trainer_is_recorded_with_its_rates_moments_and_order(trainer: Callable[..., Any], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    used: dict[int, float] = {}
    moments: dict[int, dict[str, torch.Tensor]] = {}

    class Notes(transformers.TrainerCallback):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
            used[state.global_step + 1] = objects["lr_scheduler"].get_last_lr()[0]
            own = objects["optimizer"].state
            named = objects["model"].named_parameters()
            moments[state.global_step + 1] = {n: own[p]["exp_avg_sq"].clone() for n, p in named}

    callback = TracInCallback(rule=plain(0.05, 0.3), save_moments=True, ids="own_id")
    job = trainer(callback, Notes())
    job.train()
    record = read_run_record(tmp_path / "run")
    assert record.checkpoints[0].step == 1 and record.checkpoints[-1].step == 6
    for checkpoint in record.checkpoints:
        assert checkpoint.learning_rates == pytest.approx(used[checkpoint.step], rel=1e-12)
        assert checkpoint.epoch == pytest.approx(checkpoint.step / 3)
        with safe_open(record.folder / str(checkpoint.optimizer), "pt") as file:
            assert all(torch.equal(file.get_tensor(n), v) for n, v in moments[checkpoint.step].items())
    found = list_checkpoints(record.folder)
    assert [each.second_moments for each in found] == [record.folder / str(c.optimizer) for c in record.checkpoints]
    last = type(job.model).from_pretrained(record.folder / record.checkpoints[-1].path, local_files_only=True)
    assert all(torch.equal(a, b) for a, b in zip(last.parameters(), job.model.parameters(), strict=True))
    order = list(read_order(record.folder))
    assert [step for step, _ in order] == [1, 2, 3, 4, 5, 6]
    for epoch in (order[:3], order[3:]):
        assert sorted(i for _, ids in epoch for i in ids) == list(range(100, 112))
    # The model takes batches with ids after training too, and does not record them.
    job.evaluate()
    assert len(list(read_order(record.folder))) == 6


@pytest.mark.slow
def test_a_resumed_trainer_continues_the_record(trainer: Callable[..., Any], tmp_path: Path) -> None:
    options = {"rule": plain(0.01), "overwrite": False}
    job = trainer(TracInCallback(**options), steps=4)
    job.args.save_strategy = type(job.args.save_strategy)("steps")
    job.args.save_steps = job.state.save_steps = 2
    job.train()
    before = steps_of(tmp_path / "run")
    assert before[-1] == 4
    with pytest.raises(UsageError, match="already contains the record of a run"):
        trainer(TracInCallback(**options)).train()
    trainer(TracInCallback(**options)).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    after = steps_of(tmp_path / "run")
    assert [step for step in after if step <= 2] == [step for step in before if step <= 2]
    assert after[-1] == 6
    trainer(TracInCallback(rule=plain(), overwrite=True), steps=3).train()
    assert steps_of(tmp_path / "run") == [1, 3]


def test_the_last_checkpoint_is_not_the_best_model_that_the_trainer_loads(
    trainer: Callable[..., Any], tmp_path: Path
) -> None:
    job = trainer(TracInCallback(rule=plain()), eval_strategy="steps", eval_steps=2, save_steps=2)
    job.args.save_strategy = type(job.args.save_strategy)("steps")
    job.args.load_best_model_at_end, job.args.metric_for_best_model = True, "eval_loss"
    last: list[torch.Tensor] = []
    load_best = job._load_best_model

    def load() -> None:
        last.append(job.model.classifier.weight.detach().clone())
        load_best()
        with torch.no_grad():
            job.model.classifier.weight.add_(1.0)

    job._load_best_model = load
    job.train()
    record = read_run_record(tmp_path / "run")
    saved = type(job.model).from_pretrained(record.folder / record.checkpoints[-1].path, local_files_only=True)
    assert record.checkpoints[-1].step == 6
    assert torch.equal(saved.classifier.weight, last[0])


def test_weights_that_are_sharded_and_ids_by_a_function_are_rejected(trainer: Callable[..., Any]) -> None:
    job = trainer(TracInCallback())
    job.args.fsdp = "full_shard"
    callback = next(c for c in job.callback_handler.callbacks if isinstance(c, TracInCallback))
    with pytest.raises(UsageError, match="^TracInCallback cannot save this model: got weights that DeepSpeed or FSDP"):
        callback.on_train_begin(job.args, job.state, job.control, model=job.model, optimizer=job.optimizer)
    with pytest.raises(UsageError, match="^TracInCallback cannot read the ids of examples: got ids=a function"):
        trainer(TracInCallback(ids=lambda batch: [])).train()


def fit(folder: Path, callback: Any, change: Callable[[Any], None] = lambda net: None, **options: Any) -> Any:
    lightning = pytest.importorskip("lightning")

    class Net(lightning.LightningModule):
        def __init__(self, width: int = 4) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.small = Small(width)
            self.seen: dict[int, dict[str, torch.Tensor]] = {}

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return F.cross_entropy(self.small(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=0.02)

        def on_train_batch_end(self, *_: Any) -> None:
            state = self.trainer.optimizers[0].state
            named = self.named_parameters()
            self.seen[self.trainer.global_step] = {n: state[p]["exp_avg_sq"].clone() for n, p in named if p in state}

    lightning.seed_everything(0, verbose=False)
    trainer = lightning.Trainer(
        max_epochs=options.pop("max_epochs", 2), accelerator="cpu", callbacks=[callback], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        **options,
    )  # fmt: skip
    net = Net()
    change(net)
    trainer.fit(net, torch.utils.data.DataLoader([(*row, i) for i, row in enumerate(ROWS)], 3))
    return net


lightning_warnings = pytest.mark.filterwarnings(
    "ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning",
)


@lightning_warnings
def test_lightning_is_recorded_with_its_moments_and_order(tmp_path: Path) -> None:
    callback = TracInCallback(rule=plain(0.01), save_moments=True, ids=lambda batch: batch[2])
    net = fit(tmp_path, callback)
    record = read_run_record(tmp_path)
    assert record.checkpoints[0].step == 1 and record.checkpoints[-1].step == 8
    for checkpoint in record.checkpoints:
        assert checkpoint.epoch == pytest.approx(checkpoint.step / 4)
        with safe_open(tmp_path / str(checkpoint.optimizer), "pt") as file:
            assert all(torch.equal(file.get_tensor(n), v) for n, v in net.seen[checkpoint.step].items())
    content = torch.load(tmp_path / record.checkpoints[-1].path, weights_only=True)
    assert content["hyper_parameters"] == {"width": 4}
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in content["state_dict"].items())
    # Lightning loads it too.
    again = type(net).load_from_checkpoint(tmp_path / record.checkpoints[-1].path)
    assert torch.equal(again.small.scale, net.small.scale)
    assert list(read_order(tmp_path)) == [
        (s, list(range(3 * ((s - 1) % 4), 3 * ((s - 1) % 4) + 3))) for s in range(1, 9)
    ]


@lightning_warnings
def test_lightning_divides_the_loss_of_accumulated_batches(tmp_path: Path) -> None:
    fit(tmp_path / "one", TracInCallback(rule=plain()), max_epochs=1)
    fit(tmp_path / "two", TracInCallback(rule=plain()), max_epochs=1, accumulate_grad_batches=2)
    one, two = (read_run_record(tmp_path / name).checkpoints for name in ("one", "two"))
    assert [c.step for c in two] == [1, 2]
    # The loss of the second batch, before any step and after one.
    assert two[0].loss == pytest.approx(one[0].loss, rel=0.5)


@lightning_warnings
@pytest.mark.filterwarnings("ignore:.*training_step. returned .None.*:UserWarning")
def test_skipped_batches_of_lightning_and_manual_optimization(tmp_path: Path) -> None:
    def leave_out(net: Any) -> None:
        step = net.training_step
        net.training_step = lambda batch, batch_idx: step(batch, 0) if batch_idx else None

    fit(tmp_path / "some", TracInCallback(rule=plain()), leave_out)
    # Lightning counts a step without a loss.
    assert steps_of(tmp_path / "some") == [2, 8]

    def optimize_by_hand(net: Any, returns: bool) -> None:
        step, net.automatic_optimization = net.training_step, False

        def train(batch: Any, batch_idx: int) -> Any:
            optimizer, loss = net.optimizers(), step(batch, batch_idx)
            optimizer.zero_grad()
            net.manual_backward(loss)
            optimizer.step()
            return loss if returns else None

        net.training_step = train

    fit(tmp_path / "own", TracInCallback(rule=plain()), lambda net: optimize_by_hand(net, True))
    assert steps_of(tmp_path / "own") == [1, 8]
    with pytest.raises(UsageError, match="^TracInCallback gets no loss from training_step: got manual optimization"):
        fit(tmp_path / "none", TracInCallback(rule=plain()), lambda net: optimize_by_hand(net, False))


@lightning_warnings
def test_an_interrupted_run_of_lightning_leaves_the_complete_checkpoints(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")

    class Stop(lightning.pytorch.callbacks.Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 5:
                raise ZeroDivisionError

    callback = TracInCallback(rule=plain())
    with pytest.raises(ZeroDivisionError):
        trainer = lightning.Trainer(
            max_epochs=2, accelerator="cpu", callbacks=[callback, Stop()], logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip

        class Net(lightning.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.small = Small()

            def training_step(self, batch: Any, index: int) -> dict[str, torch.Tensor]:
                return {"loss": F.cross_entropy(self.small(batch[0]), batch[1])}

            def configure_optimizers(self) -> Any:
                return torch.optim.Adam(self.parameters(), lr=0.02)

        trainer.fit(Net(), torch.utils.data.DataLoader(ROWS, 3))
    assert steps_of(tmp_path) == [1]


def test_a_callback_is_one_of_both_libraries_and_can_be_copied() -> None:
    transformers, lightning = pytest.importorskip("transformers"), pytest.importorskip("lightning")
    callback = TracInCallback(save_moments=True, ids="own_id")
    bases = (transformers.TrainerCallback, lightning.pytorch.callbacks.Callback)
    assert isinstance(callback, TracInCallback) and all(isinstance(callback, base) for base in bases)
    for copied in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert type(copied) is type(callback)
        assert copied._options == callback._options
    # Also if a library is imported after the construction.
    early = object.__new__(TracInCallback)
    TracInCallback.__init__(early)
    assert callable(early.setup) and callable(early.on_init_end) and type(early) is type(callback)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        early.nonsense  # noqa: B018
    # The only event of both libraries is handled for both.
    events = [{name for name in dir(base) if name.startswith("on_")} for base in bases]
    assert events[0] & events[1] == {"on_train_end"}


def test_the_callback_imports_neither_library() -> None:
    code = (
        "import sys, tracin_ann; tracin_ann.TracInCallback(); print({'transformers', 'lightning'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
