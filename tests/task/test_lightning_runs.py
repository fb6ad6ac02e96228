"""Runs of Lightning: from `.ckpt` files to scores, learning rates of the scheduler, hyper-parameters, rejections."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from runs import Small, assert_close, brute_force_scores, exact_scores, make_images
from tracin_ann import Checkpoint, Task, TracInCallback
from tracin_ann.errors import CheckpointError, TaskError

lightning = pytest.importorskip("lightning")

# Of Lightning's move of batches to a device.
pytestmark = pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")
ROWS, QUERIES = make_images(12), make_images(4, seed=2)
FAST = ("head.weight", "head.bias", "scale")


class Net(lightning.LightningModule):
    """A CNN with two parameter groups and a cosine schedule by step."""

    def __init__(
        self, width: int = 4, rate: float = 0.05, groups: int = 2, named: bool = False, sgd: bool = False
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        small = Small(width)
        self.body, self.head, self.scale = small.body, small.head, small.scale

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)) * self.scale

    def training_step(self, batch: Any, index: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        rate, slow, parameters = self.hparams.rate, self.hparams.rate / 8, dict(self.named_parameters())
        groups = [
            {"params": [pair if self.hparams.named else pair[1] for pair in parameters.items() if pair[0] in FAST]},
            {"params": [pair if self.hparams.named else pair[1] for pair in parameters.items() if pair[0] not in FAST]},
        ]
        groups[1]["lr"] = slow if self.hparams.groups > 1 else rate
        optimizer = (
            torch.optim.SGD(groups, lr=rate, momentum=0.5) if self.hparams.sgd else torch.optim.Adam(groups, lr=rate)
        )
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def loss(module: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1], reduction="none")


class Rates(lightning.pytorch.callbacks.Callback):
    """Notes the rates that the scheduler has after each step, and those that were used in each step."""

    def __init__(self) -> None:
        self.after: dict[int, list[float]] = {}
        self.used: dict[int, list[float]] = {}

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.used[trainer.global_step + 1] = [group["lr"] for group in optimizer.param_groups]

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.after[trainer.global_step] = trainer.lr_scheduler_configs[0].scheduler.get_last_lr()


def fit(folder: Path, *callbacks: Any, net: Net | None = None, **options: Any) -> Rates:
    """Train for 2 epochs of 4 steps; save checkpoints every 3 steps and at the end."""
    lightning.seed_everything(0, verbose=False)
    rates = Rates()
    files = lightning.pytorch.callbacks.ModelCheckpoint(
        dirpath=folder, save_top_k=-1, every_n_train_steps=3, save_last=True, **options
    )
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        callbacks=[rates, files, *callbacks],
        logger=lightning.pytorch.loggers.CSVLogger(folder, name="", version="")
        if any("Monitor" in type(c).__name__ for c in callbacks)
        else False,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(net or Net(), torch.utils.data.DataLoader(ROWS, 3))
    trainer.save_checkpoint(folder / "end.ckpt")
    return rates


def by_name(rates: list[float]) -> dict[str, float]:
    return {name: rates[name not in FAST] for name, _ in Net().named_parameters()}


def approximate(rates: Mapping[str, float]) -> dict[str, Any]:
    return {name: pytest.approx(rate, rel=1e-12) for name, rate in rates.items()}


def load_nets(paths: list[Any]) -> Iterator[Net]:
    for path in paths:
        content = torch.load(path, weights_only=True)
        net = Net(**content["hyper_parameters"])
        net.load_state_dict(content["state_dict"])
        yield net


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Rates]:
    folder = tmp_path_factory.mktemp("lightning")
    return folder, fit(folder)


def make_task(checkpoints: Any, module: Any = Net, **options: Any) -> Task:
    return Task.from_lightning(module, checkpoints, ROWS, QUERIES, **{"loss": loss, **options})


def read_error(kind: type[Exception], *arguments: Any, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        make_task(*arguments, **options).model()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_of_checkpoints_gives_brute_force_scores_with_the_rates_of_the_scheduler(
    run: tuple[Path, Rates], tmp_path: Path
) -> None:
    folder, noted = run
    task = make_task(folder)
    steps = [torch.load(c.path, weights_only=True)["global_step"] for c in task.checkpoints]
    # last.ckpt is a copy of one of the others.
    assert steps == [3, 6, 8]
    rates = [by_name(noted.after[step]) for step in steps]
    assert [c.learning_rate for c in task.checkpoints] == [approximate(each) for each in rates]
    nets = list(load_nets([c.path for c in task.checkpoints]))
    assert_close(exact_scores(task, tmp_path / "index"), brute_force_scores(nets, rates, loss, QUERIES, ROWS))


def test_the_module_is_made_from_hyper_parameters(run: tuple[Path, Rates], tmp_path: Path) -> None:
    fit(tmp_path, net=Net(width=6))
    paths = [tmp_path / "end.ckpt"]
    assert make_task(paths).model().hparams.width == 6
    changed = make_task(paths, functools.partial(Net, rate=7.0), learning_rates=[0.5]).model().hparams
    assert (changed.width, changed.rate) == (6, 7.0)
    module = Net(width=6)
    assert make_task(paths, module).model() is module
    assert make_task(str(paths[0]), lambda: Net(6)).model().hparams.width == 6
    assert "hyper-parameters cannot be replaced" in read_error(TaskError, paths, functools.partial(Net, 6))


class Whole(Net):
    """A module that takes all its hyper-parameters in one argument."""

    def __init__(self, hparams: dict[str, Any]) -> None:
        super().__init__(**{k: v for k, v in hparams.items() if k != "note"})
        self._hparams.clear()
        self.save_hyperparameters(hparams)
        self._hparams_name = "hparams"


class Configured(Net):
    """A module whose layers exist after configure_model."""

    def configure_model(self) -> None:
        if not hasattr(self, "extra"):
            self.extra = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.extra(super().forward(x))


@pytest.mark.parametrize("net", [Whole({"width": 6, "rate": 0.05, "groups": 1, "named": False}), Configured(width=6)])
def test_modules_that_are_made_in_other_ways(net: Net, tmp_path: Path) -> None:
    content = {"global_step": 1, "hyper_parameters": dict(net.hparams), "hparams_name": net._hparams_name}
    if isinstance(net, Configured):
        net.configure_model()
    torch.save({**content, "state_dict": net.state_dict()}, tmp_path / "a.ckpt")
    model = make_task(tmp_path, type(net), learning_rates=[1.0]).model()
    model.load_state_dict(net.state_dict())
    assert model.head.weight.shape == (3, 96)


def test_one_rate_for_all_groups_is_a_number(tmp_path: Path) -> None:
    noted = fit(tmp_path, net=Net(groups=1))
    rates = [checkpoint.learning_rate for checkpoint in make_task(tmp_path).checkpoints]
    assert rates == [pytest.approx(noted.after[step][0], rel=1e-12) for step in (3, 6, 8)]


def test_named_groups_do_not_need_the_configuration_of_optimizers(tmp_path: Path) -> None:
    noted = fit(tmp_path, net=Net(named=True))

    class Other(Net):
        def configure_optimizers(self) -> Any:
            raise RuntimeError("no trainer")

    rates = make_task(tmp_path / "end.ckpt", Other).checkpoints[0].learning_rate
    assert rates == approximate(by_name(noted.after[8]))


def test_a_schedule_may_depend_on_the_trainer(run: tuple[Path, Rates]) -> None:
    class Planned(Net):
        def configure_optimizers(self) -> Any:
            made = super().configure_optimizers()
            n_steps = self.trainer.estimated_stepping_batches
            scheduler = torch.optim.lr_scheduler.OneCycleLR(made["optimizer"], 1.0, n_steps)
            return [made["optimizer"]], [{"scheduler": scheduler, "interval": "step"}]

    folder, noted = run
    assert make_task(folder, Planned).checkpoints[1].learning_rate == approximate(by_name(noted.after[6]))


@pytest.mark.parametrize("groups", [1, 2])
def test_logged_rates_are_used_without_states_of_optimizers(tmp_path: Path, groups: int) -> None:
    monitor = lightning.pytorch.callbacks.LearningRateMonitor("step", log_momentum=True)
    noted = fit(tmp_path / "checkpoints", monitor, net=Net(groups=groups), save_weights_only=True)
    shutil.copy(tmp_path / "checkpoints" / "metrics.csv", tmp_path)
    task = make_task([tmp_path / "checkpoints" / f"epoch={e}-step={s}.ckpt" for e, s in ((0, 3), (1, 6))])
    # The rate that is logged at a step is used to leave the weights of that step.
    expected = [by_name(noted.used[step + 1]) for step in (3, 6)]
    if groups == 1:
        assert [c.learning_rate for c in task.checkpoints] == [pytest.approx(e["scale"]) for e in expected]
    else:
        assert [c.learning_rate for c in task.checkpoints] == [approximate(each) for each in expected]


def test_rates_of_unknown_groups_are_rejected_and_may_be_given(run: tuple[Path, Rates]) -> None:
    folder, _ = run

    class Failing(Net):
        def configure_optimizers(self) -> Any:
            return [self.trainer.datamodule]

    class Regrouped(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.Adam([{"params": [p]} for p in self.parameters()], lr=1.0)

    class Reordered(Net):
        def configure_optimizers(self) -> Any:
            parameters = list(self.parameters())
            return torch.optim.Adam([{"params": parameters[:3]}, {"params": parameters[3:]}], lr=1.0)

    what = "the parameters of the optimizer's groups in "
    failed = read_error(CheckpointError, folder, Failing)
    assert failed.startswith(what)
    assert "no attribute 'datamodule' in configure_optimizers(), expected the same groups as in training" in failed
    message = read_error(CheckpointError, folder, Regrouped)
    assert "makes groups of [[1, 1, 1, 1, 1, 1, 1]] parameters, the file has groups of [[3, 4]]" in message
    assert "got body.0.weight of shape [4, 1, 3, 3] for parameter 1" in read_error(CheckpointError, folder, Reordered)
    given = [{"head.*": 1.0, "scale": 1.0, "body.*": 0.5}, 0.5, 0.25]
    assert [c.learning_rate for c in make_task(folder, Failing, learning_rates=given).checkpoints] == given


def test_parameters_that_no_optimizer_updates_have_rate_0(tmp_path: Path) -> None:
    class Part(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.head.parameters(), lr=0.5)

    net = Part()
    optimizer = net.configure_optimizers().state_dict()
    content = {"state_dict": net.state_dict(), "global_step": 1, "hyper_parameters": dict(net.hparams)}
    torch.save({**content, "optimizer_states": [optimizer]}, tmp_path / "a.ckpt")
    rates = make_task(tmp_path, Part).checkpoints[0].learning_rate
    assert rates == {n: 0.5 if n.startswith("head") else 0.0 for n, _ in net.named_parameters()}
    assert make_task(tmp_path, Part, parameters="head.*").checkpoints[0].learning_rate == 0.5


def test_files_that_cannot_be_used_are_rejected_in_one_line(run: tuple[Path, Rates], tmp_path: Path) -> None:
    folder, _ = run
    assert "needs a loss per example" in read_error(TaskError, folder, loss=None)
    assert "the folder" in (nothing := read_error(CheckpointError, tmp_path)) and "correct the path" in nothing
    (tmp_path / "deep" / "er").mkdir(parents=True)
    shutil.copy(folder / "end.ckpt", tmp_path / "deep" / "er" / "a.ckpt")
    assert read_error(CheckpointError, tmp_path).endswith("; pass one of its folders: deep/er")
    assert "the checkpoints of the Lightning run cannot be used: got list []" in read_error(CheckpointError, [])
    assert "a checkpoint is missing" in read_error(CheckpointError, [tmp_path / "absent.ckpt"])
    torch.save({"model": Net().state_dict()}, tmp_path / "plain.ckpt")
    assert "has no state_dict under 'state_dict'" in read_error(CheckpointError, tmp_path / "plain.ckpt")
    torch.save({"state_dict": Net().state_dict()}, tmp_path / "plain.ckpt")
    assert "is not a checkpoint of Lightning: got global_step None" in read_error(
        CheckpointError, tmp_path / "plain.ckpt"
    )
    torch.save({"state_dict": Net().state_dict(), "global_step": 8}, tmp_path / "plain.ckpt")
    assert "has no learning rate: got neither" in read_error(CheckpointError, tmp_path / "plain.ckpt")
    both = [folder / "end.ckpt", tmp_path / "plain.ckpt"]
    assert "two checkpoints of step 8 have different weights" in read_error(CheckpointError, both)
    wrong = read_error(CheckpointError, folder, learning_rates=[1.0])
    assert "got 1 learning rates, expected 3, one for each of epoch=0-step=3.ckpt" in wrong
    content = torch.load(folder / "end.ckpt", weights_only=True)
    torch.save({**content, "hyper_parameters": {"width": "four"}}, tmp_path / "plain.ckpt")
    failed = read_error(TaskError, tmp_path / "plain.ckpt", learning_rates=[1.0])
    assert failed.startswith("the module Net cannot be made: got TypeError: ")


def test_a_file_that_would_run_code_is_rejected(tmp_path: Path) -> None:
    net = Net()
    torch.save(
        {"state_dict": net.state_dict(), "global_step": 1, "hyper_parameters": {"width": Path}}, tmp_path / "a.ckpt"
    )
    assert "which weights_only=True rejects" in read_error(CheckpointError, tmp_path)


def test_steps_of_gradient_descent_are_recorded_or_integrated(tmp_path: Path, run: tuple[Path, Rates]) -> None:
    used = fit(tmp_path / "own", TracInCallback(folder=tmp_path / "record"), net=Net(sgd=True)).used
    # Momentum 1/2 doubles each step.
    total = 2 * sum(max(each) for each in used.values())
    recorded = make_task(tmp_path / "record").checkpoints
    assert [c.steps for c in recorded] == [pytest.approx(total / c.largest_rate) for c in recorded]
    # Steps 3, 6 and 8 of the files, with the rates of the next steps.
    saved = make_task(tmp_path / "own").checkpoints
    rate_C = [c.largest_rate for c in saved]
    area = 3 * rate_C[0] + 3 * (rate_C[0] + rate_C[1]) / 2 + 2 * (rate_C[1] + rate_C[2]) / 2
    assert [c.steps for c in saved] == [pytest.approx(2 * area / rate, rel=1e-9) for rate in rate_C]
    assert 2 * area == pytest.approx(total, rel=0.2)
    assert {c.steps for c in make_task(tmp_path / "own", learning_rates=[0.1] * 3).checkpoints} == {None}
    assert {c.steps for c in make_task(run[0]).checkpoints} == {None}


def test_a_recorded_run_gives_brute_force_scores_with_the_rates_of_its_last_steps(tmp_path: Path) -> None:
    callback = TracInCallback(folder=tmp_path / "record")
    noted = fit(tmp_path / "own", callback)
    task = make_task(tmp_path / "record")
    steps = [torch.load(c.path, weights_only=True)["global_step"] for c in task.checkpoints]
    assert steps[0] == 1 and steps[-1] == 8
    rates = [by_name(noted.used[step]) for step in steps]
    assert [c.learning_rate for c in task.checkpoints] == [approximate(each) for each in rates]
    nets = list(load_nets([c.path for c in task.checkpoints]))
    assert_close(exact_scores(task, tmp_path / "index"), brute_force_scores(nets, rates, loss, QUERIES, ROWS))
    assert Checkpoint.from_run(tmp_path / "record")[0].learning_rate == approximate(rates[0])
