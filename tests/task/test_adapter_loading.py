"""Loading of adapters of PEFT over one base model: shared memory, strict loading, and files that are rejected."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_adapters import (
    CONFIGS,
    MARKS,
    SMALL,
    AdapterRun,
    change_config,
    check_error,
    copy_run,
    make_adapter,
    make_lora,
    make_task,
    peft,
    trainer_runs,
    transformers,
)
from tracin_ann import Checkpoint, InfluenceIndex, Task, build
from tracin_ann.errors import CheckpointError, TaskError
from tracin_ann.task import PartialLoad, WeightCache, make_model

pytestmark = MARKS


def test_the_base_is_loaded_once_and_not_copied(adapter_runs, tmp_path):
    adapter = adapter_runs["lora"]
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


def test_stored_weights_are_those_of_the_adapter_only(adapter_runs):
    task = adapter_runs["lora"].task()
    model = make_model(task)
    written = PartialLoad.list_written(task, model)
    assert set(written) == set(task.select_parameters(model))
    cache = WeightCache(model, 1 << 30, written)
    adapted = sum(p.nbytes for p in task.select_parameters(model).values())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert cache.store(0)
    assert cache.n_bytes == adapted
    task.load(model, adapter_runs["lora"].folders[-1])
    assert cache.store(1)
    assert cache.n_bytes == 2 * adapted
    assert cache.attach(0)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_the_trained_model_is_loaded_as_by_peft(adapter_runs):
    adapter = adapter_runs["dora"]
    task = adapter.task()
    model = make_model(task).eval()
    for folder in reversed(adapter.folders):
        task.load(model, str(folder))
        base = transformers.AutoModelForCausalLM.from_pretrained(adapter.base)
        theirs = peft.PeftModel.from_pretrained(base, folder).eval()
        row = adapter.run.encoded[0]
        assert torch.equal(model(**row).logits, theirs(**row).logits)


def test_adapters_saved_in_bfloat16_keep_their_dtype(tmp_path):
    base, folder = make_adapter(tmp_path, CONFIGS["lora"]())
    path = folder / "adapter_model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path)
    model = make_model(make_task(base, folder))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.bfloat16}


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


@pytest.mark.parametrize("change", ["missing", "unknown"])
def test_tensors_of_an_adapter_are_loaded_strictly(adapter_runs, tmp_path, change):
    folder = copy_run(adapter_runs["lora"], tmp_path / "run")
    path = folder / "checkpoint-4" / "adapter_model.safetensors"
    state = load_file(path)
    name = next(iter(state))
    if change == "missing":
        del state[name]
    else:
        state[name.replace("layers.0", "layers.7")] = torch.zeros_like(state[name])
    save_file(state, path)
    task = Task.from_transformers(folder, adapter_runs["lora"].run.records)
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
