"""Run folders of the Hugging Face Trainer: `Task.from_transformers`, from the folder to exact scores."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import trainer_runs
from tracin_ann import BuildConfig, InfluenceIndex, QueryOptions, Task, build
from tracin_ann.errors import CheckpointError, TaskError, TracinAnnError, UsageError
from tracin_ann.task import CheckpointLoader
from trainer_runs import ROWS, SAVE_EVERY, UPDATES, Run

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
NAMES = ("bert", "gpt2", "llama", "t5", "vit")
SMALL = BuildConfig(dim=64, device="cpu", yardstick=False)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("runs")
    return {name: trainer_runs.train(name, folder / name) for name in NAMES}


def brute_force(run: Run, rates: list[float]) -> np.ndarray[Any, Any]:
    """Return the TracInCP scores of all pairs of rows: autograd in float64, a batch of one, the model's own loss."""
    total = np.zeros((ROWS, ROWS))
    folders = [run.folder / f"checkpoint-{step}" for step in range(SAVE_EVERY, UPDATES + 1, SAVE_EVERY)]
    for folder, rate in zip(folders, rates, strict=True):
        name = json.loads((folder / "config.json").read_text())["architectures"][0]
        model = getattr(transformers, name).from_pretrained(folder, dtype=torch.float64).eval()
        gradients = []
        for row in run.encoded:
            inputs = {key: value.double() if value.is_floating_point() else value for key, value in row.items()}
            loss = model(**inputs).loss
            if "ForSequence" not in name and "ForImage" not in name:
                is_shifted = "ForConditional" not in name
                loss = loss * (row["labels"].numel() - is_shifted)
            found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
            gradients.append(torch.cat([g.flatten() for g in found if g is not None]).double().numpy())
        total += rate * np.stack(gradients) @ np.stack(gradients).T
    return total


def exact_scores(index: InfluenceIndex) -> np.ndarray[Any, Any]:
    scores = np.full((ROWS, ROWS), np.nan)
    for i, answer in enumerate(index.query(range(ROWS), options=QueryOptions(k=ROWS, exact=True))):
        for hit in (*answer.proponents, *answer.opponents):
            scores[i, hit.row] = hit.score
    return scores


@pytest.mark.parametrize("name", NAMES)
def test_exact_scores_of_a_run_equal_autograd(runs, name, tmp_path):
    run = runs[name]
    task = Task.from_transformers(run.folder, run.records)
    build(task, tmp_path / "index", SMALL)
    index = InfluenceIndex.open(tmp_path / "index", task, device="cpu")
    scores, truth = exact_scores(index), brute_force(run, [c.learning_rate for c in task.checkpoints])
    assert np.abs(scores - truth).max() <= 1e-4 * np.abs(truth).max()


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_has_a_layer_rule(runs, name, tmp_path):
    report = build(Task.from_transformers(runs[name].folder, runs[name].records), tmp_path / "index", SMALL)
    assert {step.step for step in report.manifest.steps} == {"layer rule"}


@pytest.mark.parametrize("name", NAMES)
def test_rates_are_those_of_the_scheduler_when_checkpoints_were_saved(runs, name):
    run = runs[name]
    task = Task.from_transformers(run.folder, run.records)
    assert [c.learning_rate for c in task.checkpoints] == [run.at_save[step] for step in sorted(run.at_save)]
    assert len(task.checkpoints) == UPDATES // SAVE_EVERY
