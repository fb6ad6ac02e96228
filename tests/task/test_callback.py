"""`TracInCallback` records runs of the Trainer and of Lightning: checkpoints, rates, second moments, order."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch.nn import functional as F

from paths import ROOT
from recorded_runs import ROWS, plain, steps_of
from runs import Small
from tracin_ann import TracInCallback
from tracin_ann.errors import UsageError
from tracin_ann.task import read_order, read_run_record
from tracin_ann.task.integrations.transformers import list_checkpoints


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
