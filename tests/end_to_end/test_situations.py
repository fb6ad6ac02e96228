"""Models and losses that are hard to differentiate per example: a build, and exact scores compared with autograd."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import oracle
from situations import EXACT, SITUATIONS, Int8, Toy, cross_entropy, vectors
from tasks.toy import RATES, make_toy_task
from tracin_ann import BuildConfig, build, plan
from tracin_ann.errors import TaskError
from tracin_ann.features import RunOptions, TaskRunner
from tracin_ann.gradients.plan import FORWARD, LOOP, NONE, RULE, VMAP
from tracin_ann.scoring.exact import exact_scores

CONFIG = BuildConfig(dim=64, batch_size=4, device="cpu", dtype="float32", index="flat")
CPU = torch.device("cpu")
N_ROWS, N_QUERIES = 10, 3


def make_situation_task(situation, folder):
    model, rows = situation.model(), situation.rows(N_ROWS)
    query = rows[:N_QUERIES]
    return make_toy_task(folder, model, loss=situation.loss, train_data=lambda: rows, query_data=lambda: query), rows


def compute_true_scores(situation, task, rows):
    """Return TracInCP scores [Q, N] in float64, computed one example at a time."""
    names = [name for name, p in task.model().named_parameters() if p.requires_grad]
    by_checkpoint = []
    for checkpoint in task.checkpoints:
        torch.manual_seed(0)
        model = situation.truth() if situation.truth else situation.model()
        state = torch.load(checkpoint.path, weights_only=True)
        own = model.state_dict()
        with torch.no_grad():
            for name, value in state.items():
                int8 = isinstance(task.model().state_dict()[name], Int8)
                own[name].copy_(Int8.of(value).dequantised() if int8 else value)
        by_checkpoint.append(oracle.gradients(model, situation.loss, rows, names))
    every = torch.stack(by_checkpoint, 1)
    return oracle.tracin(every[:N_QUERIES], every, RATES)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("name", SITUATIONS)
def test_exact_scores_of_a_build_equal_autograd(name, tmp_path):
    situation = SITUATIONS[name]
    task, rows = make_situation_task(situation, tmp_path)
    true_QN = compute_true_scores(situation, task, rows)
    build(task, tmp_path / "out", CONFIG)
    found_QN = exact_scores(
        TaskRunner(task, RunOptions(CPU, 4)), ("query", range(N_QUERIES)), range(N_ROWS), range(len(RATES))
    )
    assert np.abs(found_QN - true_QN).max() <= situation.tolerance * np.abs(true_QN).max()


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("LoRA, input requires grad", {RULE}),
        ("LoRA, checkpointing", {RULE}),
        ("LoRA, reentrant checkpointing, no hook", {RULE}),
        ("whole Llama, reentrant checkpointing", {RULE}),
        ("one branch requires grad", {RULE}),
        ("rows that require grad", {RULE}),
        ("attention in bfloat16", {RULE, FORWARD, VMAP}),
        ("autocast in the loss", {RULE}),
        ("autocast in the loss, no modules", {VMAP}),
        ("gradient penalty", {FORWARD, LOOP}),
        ("gradient penalty by torch.func", {FORWARD, VMAP}),
        ("adversarial", {RULE}),
        ("adversarial and plain", {RULE}),
        ("scripted", {VMAP}),
        ("scripted in part", {RULE, VMAP}),
        ("LoRA over int8", {RULE}),
        ("parameters of size 0", {RULE, NONE}),
        ("a 0-dim parameter", {RULE, FORWARD}),
        ("a 0-dim parameter, control flow", {RULE, FORWARD}),
    ],
)
def test_each_situation_uses_the_fastest_correct_gradient_method(name, steps, tmp_path):
    task, _ = make_situation_task(SITUATIONS[name], tmp_path)
    planned = plan(task, tmp_path / "out", CONFIG).gradients
    assert {step.name for step in planned.steps.values()} == steps, planned.steps


def test_parameters_of_size_0_are_recorded_without_a_gradient_method(tmp_path):
    task, _ = make_situation_task(SITUATIONS["parameters of size 0"], tmp_path)
    report = build(task, tmp_path / "out", CONFIG)
    sizes = {p.name: p.shape for p in report.manifest.build.spec.parameters}
    steps = {step.parameter: step for step in report.manifest.steps}
    assert sizes["softmax.tail.1.0.weight"] == (0, 8) and sizes["softmax.tail.1.1.weight"] == (30, 0)
    for name in ("softmax.tail.1.0.weight", "softmax.tail.1.1.weight"):
        assert (steps[name].step, steps[name].reason) == (NONE, "it has no elements")


def test_a_model_with_one_nonempty_parameter_is_built(tmp_path):
    task, _ = make_situation_task(SITUATIONS["parameters of size 0"], tmp_path)
    task = dataclasses.replace(task, parameters=["softmax.tail.*", "embed.weight"])
    build(task, tmp_path / "out", CONFIG)


class Rare(Toy):
    """A model in which only rows with a large first entry reach a parameter."""

    def forward(self, x):
        return torch.where(x[:, :1] > 5, super().forward(x), x[:, :3])


def make_rows_that_reach(some):
    rows = vectors(40)
    for i in some:
        rows[i][0][0] = 6.0
    return rows


@pytest.mark.parametrize("detached", [False, True], ids=["zero gradients", "no graph"])
def test_further_batches_are_tried_if_the_first_reaches_no_parameter(tmp_path, detached):
    def loss(model, batch):
        losses = cross_entropy(model, batch)
        return losses if not detached or bool((batch[0][:, 0] > 5).any()) else losses.detach()

    data = make_rows_that_reach([23, 37])
    task = make_toy_task(tmp_path, Rare(), loss=loss, train_data=lambda: data, query_data=lambda: data[20:])
    report = build(task, tmp_path / "out", CONFIG)
    assert {step.step for step in report.manifest.steps} == {RULE}
    found_QN = exact_scores(TaskRunner(task, RunOptions(CPU, 4)), ("query", range(20)), range(40), range(len(RATES)))
    by_checkpoint = []
    for checkpoint in task.checkpoints:
        model = Rare()
        model.load_state_dict(torch.load(checkpoint.path, weights_only=True))
        by_checkpoint.append(oracle.gradients(model, cross_entropy, data))
    every = torch.stack(by_checkpoint, 1)
    true_QN = oracle.tracin(every[20:], every, RATES)
    assert np.abs(found_QN - true_QN).max() <= EXACT * np.abs(true_QN).max()
    assert np.abs(true_QN).max() > 0


def test_the_error_names_how_many_rows_reach_no_parameter(tmp_path):
    data = make_rows_that_reach([])

    def loss(model, batch):
        return model(batch[0]).detach().sum(1)

    task = make_toy_task(tmp_path, Rare(), loss=loss, train_data=lambda: data, query_data=lambda: data)
    with pytest.raises(TaskError, match="depend on none of the chosen parameters, in any of 40 rows, expected losses"):
        build(task, tmp_path / "out", CONFIG)
