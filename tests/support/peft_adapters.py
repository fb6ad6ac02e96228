"""Adapters of PEFT: runs of the Trainer that train them, adapters with random weights, and their true scores.

A test module that imports this module is skipped where PEFT, transformers or accelerate is not installed.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from tracin_ann import BuildConfig, Checkpoint, Task

if TYPE_CHECKING:
    from trainer_runs import Run

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
trainer_runs: Any = import_module("trainer_runs")
ROWS, SAVE_EVERY, UPDATES = trainer_runs.ROWS, trainer_runs.SAVE_EVERY, trainer_runs.UPDATES

MARKS = [
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


def copy_run(adapter: AdapterRun, folder: Path) -> Path:
    shutil.copytree(adapter.run.folder, folder)
    return folder


def change_config(folder: Path, **changes: Any) -> None:
    for path in folder.glob("checkpoint-*/adapter_config.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))


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


def compute_loss(model: Any, batch: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=batch).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none").sum(1)


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


def check_error(error: Exception, *parts: str) -> None:
    assert "\n" not in str(error)
    assert "; " in str(error)
    for part in parts:
        assert part in str(error)
