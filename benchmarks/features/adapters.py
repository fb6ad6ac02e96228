"""Time per row of feature extraction for adapters of a 12-layer Llama, compared with a training step of the same rows.

The training step is a batched forward and backward of the adapter's parameters alone, without dropout. Extraction reads
and collates rows, and computes their features as in a build, without writing them. Batches of extraction and training
steps alternate, and medians over batches are reported. Times are CPU times of the process: with one thread, they are
those of a machine without other load. Every 64th batch of a build also has a check, with one more backward.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common.results import report_results
from tracin_ann import Checkpoint, Task
from tracin_ann.features import RunOptions, TaskRunner
from tracin_ann.features.extractor import FeatureExtractor, FeatureOptions
from tracin_ann.sketch import make_sketch

RESULT = "adapters"
WIDTH, LAYERS, VOCABULARY, LENGTH, RANK = 288, 12, 512, 64, 8
ATTENTION = ["q_proj", "v_proj"]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Batches before the measured ones: the first batches are verified and checked.
EARLY = 18
CASES: dict[str, dict[str, Any]] = {
    "LoRA of queries and values": {"target_modules": ATTENTION},
    "LoRA of all linear layers": {"target_modules": LINEAR},
    "DoRA of queries and values": {"target_modules": ATTENTION, "use_dora": True},
}


def make_base() -> nn.Module:
    """Return a Llama with 12 layers of width 288, 12 million parameters."""
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 768, "num_hidden_layers": LAYERS, "num_attention_heads": 9}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, use_cache=False, num_key_value_heads=9, **sizes))


def make_adapted(name: str) -> nn.Module:
    """Return the base with an adapter whose weights are random, so that all its gradients differ from zero."""
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, task_type="CAUSAL_LM", **CASES[name])
    model = get_peft_model(make_base(), config)
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            nn.init.normal_(parameter, std=0.02)
    return model.eval()


def make_rows(n: int) -> list[Tensor]:
    """Return random texts of the same length."""
    generator = torch.Generator().manual_seed(1)
    distinct = [torch.randint(0, VOCABULARY, (LENGTH,), generator=generator) for _ in range(min(n, 512))]
    return [distinct[i % len(distinct)] for i in range(n)]


def compute_loss(model: Any, batch: Tensor) -> Tensor:
    """Return the mean cross-entropy over the tokens of each row [B]."""
    logits = model(input_ids=batch).logits[:, :-1]
    return F.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none").mean(1)


def run_step(model: nn.Module, rows: list[Tensor]) -> None:
    """Run forward and backward of the adapter for one batch, with collating."""
    model.zero_grad()
    compute_loss(model, torch.stack(rows)).sum().backward()


def measure_case(name: str, options: argparse.Namespace) -> dict[str, Any]:
    model, size = make_adapted(name), options.batch_size
    rows = make_rows(size * (EARLY + options.batches))
    plain_s, extract_s = [], []
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        task = Task(
            model=make_base,
            loss=compute_loss,
            train_data=lambda: rows,
            query_data=lambda: rows[:4],
            checkpoints=[Checkpoint(folder, learning_rate=0.1)],
            collate=torch.stack,
        ).with_adapters()
        runner = TaskRunner(task, RunOptions(torch.device("cpu"), size))
        with runner.model() as loaded:
            loaded.load(0)
            extractor = FeatureExtractor(
                loaded, FeatureOptions(make_sketch("factored", options.dim), 0, rank_one=frozenset())
            )
            features = extractor.stream("train", runner.read("train", range(len(rows))))
            for _ in range(EARLY):
                next(features)
            for _ in range(options.batches):
                start_s = time.process_time()
                next(features)
                middle_s = time.process_time()
                run_step(model, rows[:size])
                extract_s.append(middle_s - start_s)
                plain_s.append(time.process_time() - middle_s)
    ratios = [step / own for step, own in zip(plain_s, extract_s, strict=True)]
    return {
        "adapter": name,
        "rank": RANK,
        "base_parameters": sum(p.numel() for p in make_base().parameters()),
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "row_us": median(extract_s) / size * 1e6,
        "plain_us": median(plain_s) / size * 1e6,
        "ratio": median(ratios),
        "batches_ratio": ratios,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--adapters", nargs="+", default=list(CASES), choices=list(CASES), help="adapters to measure")
    parser.add_argument("--batch-size", type=int, default=8, help="rows per batch")
    parser.add_argument("--dim", type=int, default=1024, help="sketch dimensions per checkpoint")
    parser.add_argument("--batches", type=int, default=20, help="number of measured batches")
    parser.add_argument("--threads", type=int, default=1, help="number of CPU threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    report_results(RESULT, vars(options), (measure_case(name, options) for name in options.adapters))


if __name__ == "__main__":
    main()
