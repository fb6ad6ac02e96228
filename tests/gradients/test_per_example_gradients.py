"""Per-example gradients by every method, compared with a float64 loop of autograd."""

from __future__ import annotations

import pytest
import torch

import models
import oracle
from tracin_ann.gradients import factors
from tracin_ann.gradients.engine import GradientEngine
from tracin_ann.task import Checkpoint, Task
from tracin_ann.task.nested import to_device


def make_engine(model, case, examples, device, **options):
    task = Task(
        model=lambda: model,
        loss=case.loss,
        train_data=lambda: examples,
        query_data=lambda: examples,
        checkpoints=[Checkpoint("unused", 1.0)],
        **options,
    )
    model = model.to(device)
    parameters = task.select_parameters(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return GradientEngine(model, parameters, case.loss, lambda rows: to_device(task.collate_rows(rows), device))


def collect_gradients(engine, batch):
    gradients = {}

    def start():
        gradients.clear()

        def sink(name, form, rows):
            flat = factors.materialise(form)
            total = gradients.setdefault(
                name, torch.zeros(len(batch), engine.parameters[name].numel(), device=flat.device)
            )
            total[rows] += flat

        return sink

    losses = engine.run(batch, start)
    zeros = {n: torch.zeros(len(batch), p.numel()) for n, p in engine.parameters.items()}
    return losses, torch.cat([gradients.get(n, zeros[n]).cpu() for n in engine.parameters], 1)


@pytest.mark.parametrize("name", models.CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_gradients_of_every_parameter_of_every_model_equal_autograd(name, seed, device):
    model, case, examples = models.make_case(name, seed)
    truth = oracle.gradients(model, case.loss, examples)
    engine = make_engine(model, case, examples, device)
    batch = engine.batch(range(len(examples)), examples)
    losses, gradients = collect_gradients(engine, batch)
    assert gradients.shape == truth.shape
    error = (gradients.double() - truth).norm(dim=1) / truth.norm(dim=1)
    assert error.max() < 2e-5, engine.plan
    assert {step.name for step in engine.plan.steps.values()} <= case.methods, engine.plan
    assert losses.shape == (len(examples),)
