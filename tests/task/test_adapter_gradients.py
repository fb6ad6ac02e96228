"""Gradients and scores of adapters of PEFT: equal to autograd, by layer rules, at each precision of the base."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from peft_adapters import (
    CONFIGS,
    MARKS,
    ROWS,
    SMALL,
    STEPS,
    compute_scores,
    make_adapter,
    make_ia3,
    make_lora,
    make_task,
    peft,
    trainer_runs,
)
from tracin_ann import Checkpoint, InfluenceIndex, Task, build
from tracin_ann.gradients import GradientEngine, materialise, require_grad
from tracin_ann.gradients.capture import LayerCapture
from tracin_ann.task import make_model

pytestmark = MARKS


@pytest.mark.parametrize("name", CONFIGS)
def test_exact_scores_of_adapters_equal_autograd_and_use_layer_rules(adapter_runs, name, tmp_path):
    task = adapter_runs[name].task()
    report = build(task, tmp_path / "index", SMALL)
    assert {step.step for step in report.manifest.steps} == {"layer rule"}
    index = InfluenceIndex.open(tmp_path / "index", task, device="cpu")
    scores = trainer_runs.exact_scores(index)
    truth = compute_scores(adapter_runs[name], [adapter_runs[name].run.at_save[step] for step in STEPS])
    assert np.abs(truth).max() > 0
    assert np.abs(scores - truth).max() <= 1e-4 * np.abs(truth).max()


@pytest.mark.parametrize("name", CONFIGS)
def test_only_parameters_of_the_adapter_are_selected(adapter_runs, name):
    task = adapter_runs[name].task()
    model = make_model(task)
    selected = task.select_parameters(model)
    assert selected
    assert all("lora_" in name or "ia3_" in name for name in selected)
    saved = load_file(adapter_runs[name].folders[0] / "adapter_model.safetensors")
    assert len(selected) == len(saved)
    assert sum(p.numel() for p in selected.values()) == sum(tensor.numel() for tensor in saved.values())


def test_frozen_weights_get_no_gradient(adapter_runs):
    task = adapter_runs["lora"].task()
    model = make_model(task).eval()
    rows = task.train_data()
    batch = task.collate_rows([rows[i] for i in range(4)])
    with require_grad(task.select_parameters(model).values()):
        task.loss(model, batch).sum().backward()
    assert all((p.grad is None) == ("lora_" not in name) for name, p in model.named_parameters())


def make_engine(task: Task, n_rows: int) -> tuple[GradientEngine, Any, dict[str, torch.nn.Parameter]]:
    """Return an engine for a task, the batch of its first rows, and the parameters whose gradients it computes."""
    model = make_model(task).eval()
    parameters = task.select_parameters(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    engine, rows = GradientEngine(model, parameters, task.loss, task.collate_rows), task.train_data()
    return engine, engine.batch(range(n_rows), [rows[i] for i in range(n_rows)]), parameters


def test_dora_needs_no_second_backward(adapter_runs, monkeypatch):
    # DoRA calls the matrices of LoRA on the identity, whose rows are not examples.
    engine, batch, _ = make_engine(adapter_runs["dora"].task(), 4)
    engine.choose_methods(batch)

    def fail(*_: Any) -> None:
        raise AssertionError("a second backward")

    monkeypatch.setattr(LayerCapture, "_run_weighted_backward", fail)
    engine.run(batch, lambda: lambda name, form, part: None)


# By name: the base model, the adapter, and the methods that are not layer rules by a part of the parameter's name.
VMAP = "vmap(grad)"


OTHERS: dict[str, Any] = {
    "embedding": ("llama", lambda: make_lora(target_modules=["embed_tokens", "v_proj"]), {}),
    "dora of an embedding": (
        "llama",
        lambda: make_lora(target_modules=["embed_tokens"], use_dora=True),
        {"lora_embedding_": VMAP, "lora_magnitude": VMAP},
    ),
    "whole modules": ("llama", lambda: make_lora(target_modules=["v_proj"], modules_to_save=["lm_head"]), {}),
    "all linear layers": ("llama", lambda: make_lora(target_modules="all-linear", use_rslora=True), {}),
    "lora of gpt2": ("gpt2", lambda: make_lora(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True), {}),
    "dora of gpt2": ("gpt2", lambda: make_lora(target_modules=["c_attn"], use_dora=True, fan_in_fan_out=True), {}),
    "ia3 of gpt2": (
        "gpt2",
        lambda: make_ia3(
            target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"], fan_in_fan_out=True
        ),
        {},
    ),
    "trained biases": ("gpt2", lambda: make_lora(target_modules=["c_attn"], bias="lora_only", fan_in_fan_out=True), {}),
}


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.parametrize("name", OTHERS)
def test_gradients_of_other_adapters_equal_autograd(name, tmp_path):
    kind, make_config, others = OTHERS[name]
    base, folder = make_adapter(tmp_path, make_config(), kind)
    before = [p.detach().clone() for p in base.parameters()]
    check_gradients(make_task(base, folder), others)
    # The user's model keeps its values, also if the adapter contains tensors of the base model.
    assert all(torch.equal(p, value) for p, value in zip(base.parameters(), before, strict=True))


def check_gradients(task: Task, others: dict[str, str]) -> None:
    """Compare the gradients of five rows with autograd, and the methods with the expected ones."""
    engine, batch, parameters = make_engine(task, 5)
    found: dict[str, torch.Tensor] = {}

    def start():
        found.clear()
        return lambda name, form, part: collect(found, parameters, name, form, part)

    engine.run(batch, start)
    for parameter, method in engine.plan.steps.items():
        expected = [other for part, other in others.items() if part in parameter] or ["layer rule"]
        assert method.name == expected[0], f"{parameter}: {method.reason}"
    for i in range(5):
        _, truth = engine.compute_alone(batch, i)
        mine = torch.cat([found[name][i] for name in parameters])
        assert (mine - truth).abs().max() <= 1e-5 * truth.abs().max()


def collect(found: Any, parameters: Any, name: str, form: Any, part: slice) -> None:
    total = found.setdefault(name, torch.zeros(5, parameters[name].numel()))
    total[part] += materialise(form)


class Pictures(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow, self.out = torch.nn.Conv2d(2, 6, 3), torch.nn.Conv2d(6, 4, 3), torch.nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.relu(self.narrow(torch.relu(self.wide(x)))).mean((2, 3)))


CONVOLUTIONS: dict[str, Any] = {
    "lora": (lambda: peft.LoraConfig(r=2, target_modules=["wide", "narrow"]), {}),
    "dora": (lambda: peft.LoraConfig(r=2, target_modules=["wide", "narrow"], use_dora=True), {}),
    "ia3": (
        lambda: peft.IA3Config(target_modules=["narrow", "out"], feedforward_modules=["out"]),
        {"narrow.ia3_l": VMAP},
    ),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_adapters_of_convolutions_in_a_model_of_the_user(name, tmp_path):
    make_config, others = CONVOLUTIONS[name]
    torch.manual_seed(0)
    base = Pictures()
    model = peft.get_peft_model(Pictures(), make_config())
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape)
    model.save_pretrained(tmp_path)
    rows = [(torch.randn(2, 8, 8), i % 3) for i in range(ROWS)]
    task = Task(
        model=lambda: base,
        loss=lambda net, batch: torch.nn.functional.cross_entropy(net(batch[0]), batch[1], reduction="none"),
        train_data=lambda: rows,
        query_data=lambda: rows,
        checkpoints=[Checkpoint(tmp_path, 0.5)],
    )
    check_gradients(task.with_adapters(), others)


def test_a_base_in_bfloat16_keeps_its_dtype(adapter_runs, tmp_path):
    task = adapter_runs["lora"].task(dtype="bfloat16")
    model = make_model(task)
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    report = build(task, tmp_path / "index", SMALL)
    assert {step.step for step in report.manifest.steps} == {"layer rule"}
    scores = trainer_runs.exact_scores(InfluenceIndex.open(tmp_path / "index", task, device="cpu"))
    truth = compute_scores(adapter_runs["lora"], [c.learning_rate for c in task.checkpoints])
    assert np.linalg.norm(scores - truth) <= 0.1 * np.linalg.norm(truth)


def test_a_base_in_int8(adapter_runs, tmp_path):
    pytest.importorskip("torchao")
    task = adapter_runs["lora"].task(quantization="int8")
    report = build(task, tmp_path / "index", SMALL)
    assert {step.step for step in report.manifest.steps} == {"layer rule"}
    quantised = [type(p).__name__ for p in task.model().parameters() if type(p) is not torch.nn.Parameter]
    assert quantised
    scores = trainer_runs.exact_scores(InfluenceIndex.open(tmp_path / "index", task, device="cpu"))
    truth = compute_scores(adapter_runs["lora"], [c.learning_rate for c in task.checkpoints])
    assert np.linalg.norm(scores - truth) <= 0.1 * np.linalg.norm(truth)
