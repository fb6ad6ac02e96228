"""Tasks of runs that train adapters of PEFT: rates and steps, the base model, and errors of a run's folders."""

from __future__ import annotations

import json
import logging
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file

from peft_adapters import (
    MARKS,
    STEPS,
    change_config,
    check_error,
    copy_run,
    peft,
    trainer_runs,
    transformers,
)
from tracin_ann import Task
from tracin_ann.errors import CheckpointError, MissingPackageError, UsageError
from tracin_ann.task import make_model

pytestmark = MARKS


def test_a_list_of_folders_and_one_folder_are_runs(adapter_runs):
    adapter = adapter_runs["lora"]
    task = Task.from_transformers(adapter.folders, adapter.run.records)
    assert [c.learning_rate for c in task.checkpoints] == [adapter.run.at_save[step] for step in STEPS]
    given = Task.from_transformers(adapter.folders, adapter.run.records, rates=[1.0, 2.0, 3.0])
    assert [c.learning_rate for c in given.checkpoints] == [1.0, 2.0, 3.0]
    single = Task.from_transformers(adapter.folders[1], adapter.run.records)
    assert [c.learning_rate for c in single.checkpoints] == [adapter.run.at_save[4]]
    with pytest.raises(UsageError, match="rates='sum'"):
        Task.from_transformers(adapter.folders, adapter.run.records, rates="sum")


def test_a_run_of_gradient_descent_has_steps_and_a_list_of_folders_has_none(adapter_runs, tmp_path):
    records, folder = adapter_runs["lora"].run.records, copy_run(adapter_runs["lora"], tmp_path / "run")
    for path in folder.glob("checkpoint-*"):
        torch.save(torch.optim.SGD([torch.ones(1)], lr=0.1, momentum=0.5).state_dict(), path / "optimizer.pt")
    task = Task.from_transformers(folder, records, rates="sum", loss="mean")
    assert [c.steps * c.learning_rate for c in task.checkpoints] == [
        pytest.approx(sum(adapter_runs["lora"].run.used) * 2)
    ] * 3
    folders = [folder / f"checkpoint-{step}" for step in STEPS]
    listed = Task.from_transformers(folders, records, loss="mean")
    assert {c.steps for c in listed.checkpoints} == {None}


def test_a_classifier_over_a_language_model(tmp_path):
    # The base model has no classification head; the adapter saves it.
    base = trainer_runs.make_model("llama")
    base.save_pretrained(tmp_path / "base")
    trainer_runs.make_tokenizer(tmp_path / "adapter")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="SEQ_CLS")
    plain = transformers.LlamaForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3, pad_token_id=0)
    peft.get_peft_model(plain, config).save_pretrained(tmp_path / "adapter")
    rows = [{"text": "w1 w2 w3", "label": 2}, {"text": "w4", "label": 0}]
    task = Task.from_transformers([tmp_path / "adapter"], rows, rates=[0.1])
    model = make_model(task).eval()
    names = [name for name in task.select_parameters(model) if "score" in name]
    assert names
    batch = task.collate_rows([task.train_data()[i] for i in range(2)])
    losses = task.loss(model, batch)
    head = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert torch.equal(dict(model.named_parameters())[names[0]], next(v for k, v in head.items() if "score" in k))
    assert losses.shape == (2,)
    assert model.config.num_labels == 3


def test_a_base_model_that_is_not_on_this_machine(adapter_runs, tmp_path):
    folder = copy_run(adapter_runs["lora"], tmp_path / "run")
    change_config(folder, base_model_name_or_path="some-org/some-model")
    with pytest.raises(CheckpointError) as error:
        Task.from_transformers(folder, adapter_runs["lora"].run.records)
    check_error(error.value, "some-org/some-model", "pass base=", "nothing is downloaded")
    # The user names it.
    task = Task.from_transformers(folder, adapter_runs["lora"].run.records, base=adapter_runs["lora"].base)
    assert make_model(task)


def test_a_base_folder_that_does_not_exist(adapter_runs, tmp_path):
    with pytest.raises(CheckpointError) as error:
        adapter_runs["lora"].task(base=tmp_path / "nothing")
    check_error(error.value, "the base model is missing", "correct base=")


def test_the_base_of_another_size_is_rejected(adapter_runs, tmp_path):
    other = trainer_runs.make_model("llama").config
    other.num_hidden_layers = 1
    transformers.LlamaForCausalLM(other).save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError) as error:
        adapter_runs["lora"].task(base=tmp_path / "other")
    check_error(error.value, "num_hidden_layers", "pass base=")
    # Also if the base model of the training run is not on this machine.
    folder = copy_run(adapter_runs["lora"], tmp_path / "run")
    change_config(folder, base_model_name_or_path="some-org/some-model")
    task = Task.from_transformers(folder, adapter_runs["lora"].run.records, base=tmp_path / "other")
    with pytest.raises(CheckpointError) as error:
        make_model(task)
    check_error(error.value, "unknown base_model.model.model.layers.1", "base model on which the adapter was trained")


def test_another_base_of_the_same_sizes_is_a_warning(adapter_runs, tmp_path, caplog):
    adapter = adapter_runs["lora"]
    other = shutil.copytree(adapter.base, tmp_path / "other")
    with caplog.at_level(logging.WARNING, "tracin_ann"):
        adapter.task(base=other)
    assert f"was trained on {adapter.base}; its base model is now {other}" in caplog.text


def test_a_missing_weights_file(adapter_runs, tmp_path):
    folder = copy_run(adapter_runs["lora"], tmp_path / "run")
    (folder / "checkpoint-4" / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError) as error:
        Task.from_transformers(folder, adapter_runs["lora"].run.records)
    check_error(error.value, "checkpoint-4", "adapter_model.safetensors")


def test_adapters_with_other_scales_are_rejected(adapter_runs, tmp_path):
    folder = copy_run(adapter_runs["lora"], tmp_path / "run")
    path = folder / "checkpoint-6" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 16}))
    with pytest.raises(CheckpointError) as error:
        Task.from_transformers(folder, adapter_runs["lora"].run.records)
    check_error(error.value, "lora_alpha = 16", "lora_alpha = 8", "adapters of one training run")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"peft_type": "NOTHING"}'])
def test_a_damaged_configuration(adapter_runs, tmp_path, content):
    folder = copy_run(adapter_runs["lora"], tmp_path / "run")
    for path in folder.glob("checkpoint-*/adapter_config.json"):
        path.write_text(content)
    with pytest.raises(CheckpointError) as error:
        make_model(Task.from_transformers(folder, adapter_runs["lora"].run.records, base=adapter_runs["lora"].base))
    check_error(error.value, "adapter_config.json", "save the adapter again")


def test_without_peft_the_extra_is_named(adapter_runs, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingPackageError, match=r"tracin-ann\[peft\]"):
        adapter_runs["lora"].task()
