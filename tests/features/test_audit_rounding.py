"""The audit reports no difference for a correct build, for any model, sketch and precision."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import models
import ragged
import zoo
from tasks.toy import CONFIG, Toy, cross_entropy, make_rows, make_toy_task
from tracin_ann import Checkpoint, InfluenceIndex, build
from tracin_ann.features.audit import N_DRAWN
from tracin_ann.gradients.engine import GradientEngine
from tracin_ann.operations.verification import AuditSample, audit

N = 200
SMALL = replace(CONFIG, partition_rows=80, yardstick=False)


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 200), nn.Linear(200, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x)))


@pytest.mark.parametrize("case", models.CASES)
def test_every_model_of_the_zoo_is_well_within_the_tolerance(case, tmp_path):
    zoo.save_checkpoints(case, 0, tmp_path)
    result = build(zoo.task(case, str(tmp_path)), tmp_path / "i", replace(SMALL, batch_size=5, partition_rows=6))
    assert result.manifest.audit is not None
    assert result.manifest.audit.rows == N_DRAWN
    assert result.manifest.audit.largest < 1e-5


@pytest.mark.parametrize("case", ragged.CASES)
def test_every_row_of_models_whose_first_dimension_is_not_the_batch(case, tmp_path):
    sizes = torch.randint(1, 6, (60,)).tolist()
    model, chosen, examples = ragged.make_case(case, sizes)
    task = make_toy_task(
        tmp_path,
        model,
        loss=chosen.loss,
        collate=chosen.collate,
        train_data=lambda: examples,
        query_data=lambda: examples[:3],
    )
    result = build(task, tmp_path / "i", replace(SMALL, batch_size=8, partition_rows=32))
    assert result.uneven.rows == 8
    found = audit(tmp_path / "i", AuditSample(120), task)
    assert (found.rows, found.differences) == (120, ())
    assert found.largest < 1e-5


@pytest.mark.parametrize("sketch", ["factored", "kronecker", "dense", "dense-gaussian"])
@pytest.mark.parametrize("case", ["mlp", "conv2d", "gpt tied", "own linear layers", "gru"])
def test_every_sketch_agrees_on_full_and_factored_gradients(sketch, case, tmp_path):
    zoo.save_checkpoints(case, 0, tmp_path)
    config = replace(SMALL, batch_size=5, sketch=sketch, dim=16)
    result = build(zoo.task(case, str(tmp_path)), tmp_path / "i", config)
    assert result.manifest.audit.largest < 1e-5


@pytest.mark.parametrize("dim", [16, 2048])
def test_tensorsketch_agrees_on_full_and_factored_gradients(dim, tmp_path):
    model = nn.Sequential(nn.Linear(5, 90), nn.Tanh(), nn.Linear(90, 70), nn.Tanh(), nn.Linear(70, 3))
    result = build(make_toy_task(tmp_path, model), tmp_path / "i", replace(SMALL, dim=dim))
    assert result.manifest.build.spec.rank_one == {"0.weight", "2.weight", "4.weight"}
    assert result.manifest.audit.largest < 1e-5


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_tolerance_includes_the_rounding_of_storage(dtype, tmp_path):
    result = build(
        make_toy_task(tmp_path, train_data=lambda: make_rows(N)), tmp_path / "i", replace(SMALL, dtype=dtype, dim=512)
    )
    assert result.manifest.audit.largest < (2**-11 if dtype == "float16" else 1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_models_of_every_floating_dtype(dtype, tmp_path):
    torch.manual_seed(0)
    data = [(x.to(dtype), y) for x, y in make_rows(N)]
    task = make_toy_task(tmp_path, Toy().to(dtype), train_data=lambda: data, query_data=lambda: data[:3])
    result = build(task, tmp_path / "i", SMALL)
    assert result.manifest.audit.largest < (1e-6 if dtype == torch.float64 else 5e-2)


def test_rounding_of_batches_is_measured_where_it_exceeds_the_tolerance_of_the_dtype(tmp_path):
    """Batches may use other kernels, here with more rounding than the tolerance of float32."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        coarse = 7e-4 * torch.sin(1e3 * batch[0].sum(1)) if len(batch[0]) > 1 else 0
        plain = cross_entropy(model, batch)
        return plain + coarse * (plain - plain.detach())

    task = make_toy_task(tmp_path, loss=loss, train_data=lambda: make_rows(N))
    build(task, tmp_path / "i", SMALL)
    found = audit(tmp_path / "i", AuditSample(N), task)
    assert not found.differences
    assert found.largest > 6e-4


@pytest.mark.usefixtures("emulated_bf16")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
def test_gradients_that_consist_of_rounding_only(scale, precision, tmp_path, monkeypatch):
    """Models that fit the rows better and better, down to a loss of 0."""
    monkeypatch.setattr("tracin_ann.features.autotune._CLEARLY_SLOWER", 1e9)
    model = Wide()
    with torch.no_grad():
        model.last.weight.mul_(scale)
        labels = model(torch.stack([x for x, _ in make_rows(N)])).argmax(1).tolist()
    data = [(x, y) for (x, _), y in zip(make_rows(N), labels, strict=True)]
    torch.save(model.state_dict(), tmp_path / "fitted.pt")
    checkpoints = [Checkpoint(tmp_path / "fitted.pt", learning_rate=0.1)]
    task = make_toy_task(tmp_path, model, checkpoints=checkpoints, train_data=lambda: data, query_data=lambda: data[:5])
    build(task, tmp_path / "i", replace(SMALL, batch_size=64, precision=precision))
    found = audit(tmp_path / "i", AuditSample(N), task)
    assert (found.rows, found.differences) == (N, ())


class Kink(nn.Module):
    """Adds ReLU(x₀ − x₁ ± 10⁻⁹) / 20 to the first output; the sign, like rounding, depends on the size of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(2, 1, bias=False), nn.Linear(2, 3)
        self.first.weight.data = torch.tensor([[1.0, -1.0]])

    def forward(self, x_B2: Tensor) -> Tensor:
        gate_B1 = torch.relu(self.first(x_B2) + (-1e-9 if len(x_B2) == 5 else 1e-9))
        return self.last(x_B2) + gate_B1 * torch.tensor([0.05, 0.0, 0.0])


def test_rounding_that_switches_a_relu_is_not_a_difference(tmp_path):
    data = [(torch.tensor([0.1 * i, 1.0]), i % 3) for i in range(60)]
    data[33] = (torch.tensor([1.0, 1.0]), 0)
    # The weights of all checkpoints have the kink at row 33.
    torch.save(Kink().state_dict(), tmp_path / "kink.pt")
    checkpoints = [Checkpoint(tmp_path / "kink.pt", learning_rate=0.1)]
    task = make_toy_task(
        tmp_path, Kink(), checkpoints=checkpoints, train_data=lambda: data, query_data=lambda: data[:5]
    )
    build(task, tmp_path / "i", replace(SMALL, batch_size=5))
    found = audit(tmp_path / "i", AuditSample(60), task)
    assert (found.rows, found.differences) == (60, ())
    stored = InfluenceIndex.open(tmp_path / "i", task).view().take([33])
    alone = InfluenceIndex.open(tmp_path / "i", task).features("train", [33])
    assert np.linalg.norm(stored - alone) > 0.01 * np.linalg.norm(alone)


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.bfloat16()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.float()


def by_autocast(model: nn.Module, batch: Any) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return F.cross_entropy(model(batch[0]).float(), batch[1], reduction="none")


def by_custom_function(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(Rounded.apply(model(batch[0])).float(), batch[1], reduction="none")


@pytest.mark.parametrize(
    ("loss", "expected"), [(cross_entropy, False), (by_autocast, True), (by_custom_function, True)]
)
def test_half_precision_inside_a_loss_is_detected_for_all_dtypes(loss, expected):
    """The tolerance depends on it."""
    model = Toy().requires_grad_(False)
    engine = GradientEngine(model, dict(model.named_parameters()), loss, torch.utils.data.default_collate)
    batch = engine.batch([0], make_rows(1))
    assert engine.losses(batch).dtype == torch.float32
    assert engine.is_half_precision(batch) is expected
    assert not any(parameter.requires_grad for parameter in model.parameters())
