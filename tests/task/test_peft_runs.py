"""Adapters of PEFT: runs of the Trainer that train an adapter, and adapter folders over a base model."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tracin_ann import BuildConfig, Checkpoint, InfluenceIndex, QueryOptions, Task, build
from tracin_ann.errors import CheckpointError, MissingPackageError, TaskError, UsageError
from tracin_ann.gradients import GradientEngine, materialise, require_grad
from tracin_ann.gradients.capture import LayerCapture
from tracin_ann.task import PartialLoad, WeightCache, make_model

if TYPE_CHECKING:
    from trainer_runs import Run

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
trainer_runs: Any = import_module("trainer_runs")
ROWS, SAVE_EVERY, UPDATES = trainer_runs.ROWS, trainer_runs.SAVE_EVERY, trainer_runs.UPDATES

pytestmark = [
    pytest.mark.xdist_group("adapters"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*torchao.*:UserWarning"),
]
SMALL = BuildConfig(dim=64, device="cpu", yardstick=False)
STEPS = range(SAVE_EVERY, UPDATES + 1, SAVE_EVERY)
LAYERS = ["q_proj", "v_proj", "down_proj"]
CONFIGS: dict[str, Any] = {
    "lora": lambda: peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=LAYERS, task_type="CAUSAL_LM"),
    "dora": lambda: peft.LoraConfig(r=4, target_modules=LAYERS, use_dora=True, task_type="CAUSAL_LM"),
    "ia3": lambda: peft.IA3Config(target_modules=LAYERS, feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
}


@dataclass
class AdapterRun:
    """A run that trained an adapter, and the folder of its base model."""

    run: Run
    base: Path

    @property
    def folders(self) -> list[Path]:
        return [self.run.folder / f"checkpoint-{step}" for step in STEPS]

    def task(self, **options: Any) -> Task:
        return Task.from_transformers(self.run.folder, self.run.records, **options)


def train_adapter(folder: Path, config: Any, model: str = "llama") -> AdapterRun:
    base = folder / "base"

    def add_adapter(plain: Any) -> Any:
        plain.save_pretrained(base)
        return peft.get_peft_model(type(plain).from_pretrained(base), config)

    return AdapterRun(trainer_runs.train(model, folder / "run", change=add_adapter, learning_rate=0.05), base)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, AdapterRun]:
    folder = tmp_path_factory.mktemp("adapters")
    return {name: train_adapter(folder / name, make()) for name, make in CONFIGS.items()}


def compute_gradients(adapter: AdapterRun, folder: Path) -> torch.Tensor:
    """Return the gradients [N, P] of the trained parameters: autograd in float64, a batch of one, the model's own loss.

    The model is loaded by PEFT itself.
    """
    base = transformers.AutoModelForCausalLM.from_pretrained(adapter.base, dtype=torch.float64)
    model = peft.PeftModel.from_pretrained(base, folder, is_trainable=True, autocast_adapter_dtype=False)
    model = model.double().eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for row in adapter.run.encoded:
        loss = model(**row).loss * (row["labels"].numel() - 1)
        rows.append(torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, parameters)]))
    return torch.stack(rows)


def compute_scores(adapter: AdapterRun, rates: list[float]) -> np.ndarray[Any, Any]:
    total = np.zeros((ROWS, ROWS))
    for folder, rate in zip(adapter.folders, rates, strict=True):
        gradients = compute_gradients(adapter, folder).numpy()
        total += rate * gradients @ gradients.T
    return total


def exact_scores(index: InfluenceIndex) -> np.ndarray[Any, Any]:
    scores = np.full((ROWS, ROWS), np.nan)
    for i, answer in enumerate(index.query(range(ROWS), options=QueryOptions(k=ROWS, exact=True, score="tracin"))):
        for hit in (*answer.proponents, *answer.opponents):
            scores[i, hit.row] = hit.score
    return scores


@pytest.mark.parametrize("name", CONFIGS)
def test_exact_scores_of_adapters_equal_autograd_and_use_layer_rules(runs, name, tmp_path):
    task = runs[name].task()
    report = build(task, tmp_path / "index", SMALL)
    assert {step.step for step in report.manifest.steps} == {"layer rule"}
    index = InfluenceIndex.open(tmp_path / "index", task, device="cpu")
    scores = exact_scores(index)
    truth = compute_scores(runs[name], [runs[name].run.at_save[step] for step in STEPS])
    assert np.abs(truth).max() > 0
    assert np.abs(scores - truth).max() <= 1e-4 * np.abs(truth).max()


@pytest.mark.parametrize("name", CONFIGS)
def test_only_parameters_of_the_adapter_are_selected(runs, name):
    task = runs[name].task()
    model = make_model(task)
    selected = task.select_parameters(model)
    assert selected
    assert all("lora_" in name or "ia3_" in name for name in selected)
    saved = load_file(runs[name].folders[0] / "adapter_model.safetensors")
    assert len(selected) == len(saved)
    assert sum(p.numel() for p in selected.values()) == sum(tensor.numel() for tensor in saved.values())


def test_the_base_is_loaded_once_and_not_copied(runs, tmp_path):
    adapter = runs["lora"]
    made = []

    def make_base():
        made.append(transformers.AutoModelForCausalLM.from_pretrained(adapter.base))
        return made[-1]

    task = replace_base(adapter, make_base)
    build(task, tmp_path / "index", SMALL)
    index = InfluenceIndex.open(tmp_path / "index", task, device="cpu")
    first, again = (index.query([1])[0] for _ in range(2))
    assert [hit.score for hit in first.hits] == [hit.score for hit in again.hits]
    assert len(made) == 1
    # The user's own model gets no adapter, and the models of the task share its memory.
    assert type(made[0]).__name__ == "LlamaForCausalLM"
    assert not any("lora" in name for name, _ in made[0].named_parameters())
    memory = {p.data_ptr() for p in made[0].parameters()}
    models = [task.model() for _ in range(2)]
    frozen = [[p.data_ptr() for p in model.parameters() if not p.requires_grad] for model in models]
    assert frozen[0] == frozen[1]
    assert set(frozen[0]) == memory
    trained = [{p.data_ptr() for p in model.parameters() if p.requires_grad} for model in models]
    assert not trained[0] & trained[1]


def replace_base(adapter: AdapterRun, make_base: Any) -> Task:
    task = adapter.task()
    plain = replace(task, model=make_base, load=None, checkpoints=[Checkpoint(f, 0.5) for f in adapter.folders])
    return plain.with_adapters()


def test_stored_weights_are_those_of_the_adapter_only(runs):
    task = runs["lora"].task()
    model = make_model(task)
    written = PartialLoad.list_written(task, model)
    assert set(written) == set(task.select_parameters(model))
    cache = WeightCache(model, 1 << 30, written)
    adapted = sum(p.nbytes for p in task.select_parameters(model).values())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert cache.store(0)
    assert cache.n_bytes == adapted
    task.load(model, runs["lora"].folders[-1])
    assert cache.store(1)
    assert cache.n_bytes == 2 * adapted
    assert cache.attach(0)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_the_trained_model_is_loaded_as_by_peft(runs):
    adapter = runs["dora"]
    task = adapter.task()
    model = make_model(task).eval()
    for folder in reversed(adapter.folders):
        task.load(model, str(folder))
        base = transformers.AutoModelForCausalLM.from_pretrained(adapter.base)
        theirs = peft.PeftModel.from_pretrained(base, folder).eval()
        row = adapter.run.encoded[0]
        assert torch.equal(model(**row).logits, theirs(**row).logits)


def test_dora_needs_no_second_backward(runs, monkeypatch):
    # DoRA calls the matrices of LoRA on the identity, whose rows are not examples.
    adapter = runs["dora"]
    task = adapter.task()
    model = make_model(task).eval()
    parameters = task.select_parameters(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    engine = GradientEngine(model, parameters, task.loss, task.collate_rows)
    rows = task.train_data()
    batch = engine.batch(range(4), [rows[i] for i in range(4)])
    engine.choose_methods(batch)

    def fail(*_: Any) -> None:
        raise AssertionError("a second backward")

    monkeypatch.setattr(LayerCapture, "_run_weighted_backward", fail)
    engine.run(batch, lambda: lambda name, form, part: None)


def test_frozen_weights_get_no_gradient(runs):
    task = runs["lora"].task()
    model = make_model(task).eval()
    rows = task.train_data()
    batch = task.collate_rows([rows[i] for i in range(4)])
    with require_grad(task.select_parameters(model).values()):
        task.loss(model, batch).sum().backward()
    assert all((p.grad is None) == ("lora_" not in name) for name, p in model.named_parameters())


def make_adapter(folder: Path, config: Any, base: str = "llama") -> tuple[Any, Path]:
    """Return a base model, and the folder of an adapter with random weights for it."""
    plain = trainer_runs.make_model(base)
    model = peft.get_peft_model(trainer_runs.make_model(base), config)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return plain, folder


def make_lora(**options: Any) -> Any:
    return peft.LoraConfig(r=4, task_type="CAUSAL_LM", **options)


def make_ia3(**options: Any) -> Any:
    return peft.IA3Config(task_type="CAUSAL_LM", **options)


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
    model = make_model(task).eval()
    parameters = task.select_parameters(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    engine = GradientEngine(model, parameters, task.loss, task.collate_rows)
    rows = task.train_data()
    batch = engine.batch(range(5), rows[:5])
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


def compute_loss(model: Any, batch: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=batch).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none").sum(1)


def make_task(base: Any, *folders: Path, quantization: Any = None) -> Task:
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randint(0, 35, (8,), generator=generator) for _ in range(ROWS)]
    return Task(
        model=lambda: base,
        loss=compute_loss,
        train_data=lambda: rows,
        query_data=lambda: rows,
        checkpoints=[Checkpoint(folder, 0.5) for folder in folders],
        collate=torch.stack,
    ).with_adapters(quantization=quantization)


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


def test_a_list_of_folders_and_one_folder_are_runs(runs):
    adapter = runs["lora"]
    task = Task.from_transformers(adapter.folders, adapter.run.records)
    assert [c.learning_rate for c in task.checkpoints] == [adapter.run.at_save[step] for step in STEPS]
    given = Task.from_transformers(adapter.folders, adapter.run.records, rates=[1.0, 2.0, 3.0])
    assert [c.learning_rate for c in given.checkpoints] == [1.0, 2.0, 3.0]
    single = Task.from_transformers(adapter.folders[1], adapter.run.records)
    assert [c.learning_rate for c in single.checkpoints] == [adapter.run.at_save[4]]
    with pytest.raises(UsageError, match="rates='sum'"):
        Task.from_transformers(adapter.folders, adapter.run.records, rates="sum")


def test_a_run_of_gradient_descent_has_steps_and_a_list_of_folders_has_none(runs, tmp_path):
    records, folder = runs["lora"].run.records, copy_run(runs["lora"], tmp_path / "run")
    for path in folder.glob("checkpoint-*"):
        torch.save(torch.optim.SGD([torch.ones(1)], lr=0.1, momentum=0.5).state_dict(), path / "optimizer.pt")
    task = Task.from_transformers(folder, records, rates="sum", loss="mean")
    assert [c.steps * c.learning_rate for c in task.checkpoints] == [pytest.approx(sum(runs["lora"].run.used) * 2)] * 3
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


# Errors: one line each, with the remedy.


def copy_run(adapter: AdapterRun, folder: Path) -> Path:
    shutil.copytree(adapter.run.folder, folder)
    return folder


def change_config(folder: Path, **changes: Any) -> None:
    for path in folder.glob("checkpoint-*/adapter_config.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def check_error(error: Exception, *parts: str) -> None:
    assert "\n" not in str(error)
    assert "; " in str(error)
    for part in parts:
        assert part in str(error)


def test_a_base_model_that_is_not_on_this_machine(runs, tmp_path):
    folder = copy_run(runs["lora"], tmp_path / "run")
    change_config(folder, base_model_name_or_path="some-org/some-model")
    with pytest.raises(CheckpointError) as error:
        Task.from_transformers(folder, runs["lora"].run.records)
    check_error(error.value, "some-org/some-model", "pass base=", "nothing is downloaded")
    # The user names it.
    task = Task.from_transformers(folder, runs["lora"].run.records, base=runs["lora"].base)
    assert make_model(task)


def test_a_base_folder_that_does_not_exist(runs, tmp_path):
    with pytest.raises(CheckpointError) as error:
        runs["lora"].task(base=tmp_path / "nothing")
    check_error(error.value, "the base model is missing", "correct base=")


def test_the_base_of_another_size_is_rejected(runs, tmp_path):
    other = trainer_runs.make_model("llama").config
    other.num_hidden_layers = 1
    transformers.LlamaForCausalLM(other).save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError) as error:
        runs["lora"].task(base=tmp_path / "other")
    check_error(error.value, "num_hidden_layers", "pass base=")
    # Also if the base model of the training run is not on this machine.
    folder = copy_run(runs["lora"], tmp_path / "run")
    change_config(folder, base_model_name_or_path="some-org/some-model")
    task = Task.from_transformers(folder, runs["lora"].run.records, base=tmp_path / "other")
    with pytest.raises(CheckpointError) as error:
        make_model(task)
    check_error(error.value, "unknown base_model.model.model.layers.1", "base model on which the adapter was trained")


def test_an_adapter_of_another_architecture_is_rejected(tmp_path):
    _, folder = make_adapter(tmp_path, CONFIGS["lora"]())
    task = make_task(trainer_runs.make_model("gpt2"), folder)
    with pytest.raises(CheckpointError) as error:
        make_model(task)
    check_error(error.value, "GPT2LMHeadModel", "q_proj", "base model on which the adapter was trained")


def test_an_adapter_of_another_width_is_rejected(tmp_path):
    _, folder = make_adapter(tmp_path, CONFIGS["lora"]())
    config = trainer_runs.make_model("llama").config
    config.hidden_size, config.head_dim = 32, 16
    with pytest.raises(CheckpointError) as error:
        make_model(make_task(transformers.LlamaForCausalLM(config), folder))
    check_error(error.value, "4, 16", "4, 32", "base model on which the adapter was trained")


def test_a_missing_weights_file(runs, tmp_path):
    folder = copy_run(runs["lora"], tmp_path / "run")
    (folder / "checkpoint-4" / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError) as error:
        Task.from_transformers(folder, runs["lora"].run.records)
    check_error(error.value, "checkpoint-4", "adapter_model.safetensors")


@pytest.mark.parametrize("change", ["missing", "unknown"])
def test_tensors_of_an_adapter_are_loaded_strictly(runs, tmp_path, change):
    folder = copy_run(runs["lora"], tmp_path / "run")
    path = folder / "checkpoint-4" / "adapter_model.safetensors"
    state = load_file(path)
    name = next(iter(state))
    if change == "missing":
        del state[name]
    else:
        state[name.replace("layers.0", "layers.7")] = torch.zeros_like(state[name])
    save_file(state, path)
    task = Task.from_transformers(folder, runs["lora"].run.records)
    model = make_model(task)
    with pytest.raises(CheckpointError) as error:
        task.load(model, str(path))
    check_error(error.value, f"{change} base_model.model.model.layers.")


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.parametrize("without", [0, 1])
def test_all_adapters_set_the_same_tensors(tmp_path, without):
    """Otherwise the embedding of one checkpoint would stay in the model for the next one."""
    config = make_lora(target_modules=["embed_tokens", "v_proj"])
    base, folder = make_adapter(tmp_path / "0", config)
    folders = [folder, make_adapter(tmp_path / "1", config)[1]]
    path = folders[without] / "adapter_model.safetensors"
    state = load_file(path)
    name = next(name for name in state if name.endswith("embed_tokens.base_layer.weight"))
    save_file({key: value for key, value in state.items() if key != name}, path)
    task = make_task(base, *folders)
    model = make_model(task)
    task.load(model, str(folders[0]))
    with pytest.raises(CheckpointError) as error:
        task.load(model, str(folders[1]))
    what = "missing" if without else "unknown"
    check_error(error.value, "sets other tensors than", f"got {what} base_model.model.model.embed_tokens.base_layer")


def test_adapters_with_other_scales_are_rejected(runs, tmp_path):
    folder = copy_run(runs["lora"], tmp_path / "run")
    path = folder / "checkpoint-6" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 16}))
    with pytest.raises(CheckpointError) as error:
        Task.from_transformers(folder, runs["lora"].run.records)
    check_error(error.value, "lora_alpha = 16", "lora_alpha = 8", "adapters of one training run")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"peft_type": "NOTHING"}'])
def test_a_damaged_configuration(runs, tmp_path, content):
    folder = copy_run(runs["lora"], tmp_path / "run")
    for path in folder.glob("checkpoint-*/adapter_config.json"):
        path.write_text(content)
    with pytest.raises(CheckpointError) as error:
        make_model(Task.from_transformers(folder, runs["lora"].run.records, base=runs["lora"].base))
    check_error(error.value, "adapter_config.json", "save the adapter again")


def test_prompts_are_rejected(tmp_path):
    config = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    base, folder = make_adapter(tmp_path, config)
    with pytest.raises(TaskError) as error:
        make_model(make_task(base, folder))
    check_error(error.value, "PROMPT_TUNING", "LoRA, DoRA, IA3")


@pytest.mark.parametrize(
    ("entries", "got"),
    [
        ({"peft_type": "XLORA", "hidden_size": 16, "adapters": {"0": "name/adapter"}}, "peft_type XLORA with adapters"),
        ({"megatron_config": {"a": 1}, "megatron_core": "megatron.evil"}, "peft_type LORA with megatron_config"),
    ],
)
def test_configurations_that_load_other_files_or_modules_are_rejected(tmp_path, monkeypatch, entries, got):
    base, folder = make_adapter(tmp_path / "checkpoint-1", make_lora(target_modules=["v_proj"]))
    change_config(tmp_path, **entries)
    (tmp_path / "megatron").mkdir()
    (tmp_path / "megatron" / "evil.py").write_text("raise SystemExit\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: pytest.fail("a name is looked up"))
    with pytest.raises(TaskError) as error:
        make_task(base, folder).model()
    check_error(error.value, "cannot be used", got)
    assert "megatron.evil" not in sys.modules


def test_code_in_a_file_of_weights_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "executed"),)

    base, folder = make_adapter(tmp_path / "adapter", make_lora(target_modules=["v_proj"]))
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"base_model.x": Evil()}, folder / "adapter_model.bin")
    with pytest.raises(CheckpointError) as error:
        make_task(base, folder).model()
    check_error(error.value, "adapter_model.bin cannot be read", "an object of posix.mkdir, which weights_only=True")
    assert not (tmp_path / "executed").exists()


def test_another_base_of_the_same_sizes_is_a_warning(runs, tmp_path, caplog):
    adapter = runs["lora"]
    other = shutil.copytree(adapter.base, tmp_path / "other")
    with caplog.at_level(logging.WARNING, "tracin_ann"):
        adapter.task(base=other)
    assert f"was trained on {adapter.base}; its base model is now {other}" in caplog.text


def test_without_peft_the_extra_is_named(runs, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingPackageError, match=r"tracin-ann\[peft\]"):
        runs["lora"].task()


# Precision of the base model.


def test_a_base_in_bfloat16_keeps_its_dtype(runs, tmp_path):
    task = runs["lora"].task(dtype="bfloat16")
    model = make_model(task)
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    report = build(task, tmp_path / "index", SMALL)
    assert {step.step for step in report.manifest.steps} == {"layer rule"}
    scores = exact_scores(InfluenceIndex.open(tmp_path / "index", task, device="cpu"))
    truth = compute_scores(runs["lora"], [c.learning_rate for c in task.checkpoints])
    assert np.linalg.norm(scores - truth) <= 0.1 * np.linalg.norm(truth)


def test_adapters_saved_in_bfloat16_keep_their_dtype(tmp_path):
    base, folder = make_adapter(tmp_path, CONFIGS["lora"]())
    path = folder / "adapter_model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path)
    model = make_model(make_task(base, folder))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.bfloat16}


def test_a_base_in_int8(runs, tmp_path):
    pytest.importorskip("torchao")
    task = runs["lora"].task(quantization="int8")
    report = build(task, tmp_path / "index", SMALL)
    assert {step.step for step in report.manifest.steps} == {"layer rule"}
    quantised = [type(p).__name__ for p in task.model().parameters() if type(p) is not torch.nn.Parameter]
    assert quantised
    scores = exact_scores(InfluenceIndex.open(tmp_path / "index", task, device="cpu"))
    truth = compute_scores(runs["lora"], [c.learning_rate for c in task.checkpoints])
    assert np.linalg.norm(scores - truth) <= 0.1 * np.linalg.norm(truth)
