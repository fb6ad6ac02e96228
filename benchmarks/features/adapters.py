"""Time per row of a build for LoRA adapters of a 12-layer Llama, compared with a LoRA training step of the same rows.

The plain step is a batched forward and backward of the adapter's parameters alone, as in training without dropout. The
time per row of a build is the difference between builds of two sizes, which excludes the fixed costs: start, the base
model, probes, proofs and the checks of the first batches. Rounds (large build, small build, plain step) are interleaved in one process; the medians are
reported. Times are CPU times of the process: with one thread, they are those of a machine without other load.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common.results import report_results
from tracin_ann import BuildConfig, Checkpoint, Task, build

RESULT = "adapters"
WIDTH, LAYERS, VOCABULARY, LENGTH, RANK = 288, 12, 512, 64, 8
ATTENTION = ["q_proj", "v_proj"]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Batches of the smaller build: the checks of the first batches are in both builds.
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


def time_plain_step(model: nn.Module, rows: list[Tensor], size: int) -> float:
    """Return the CPU seconds per row of batched forward and backward of the adapter, with collating."""
    start_s = time.process_time()
    for start in range(0, len(rows), size):
        model.zero_grad()
        compute_loss(model, torch.stack(rows[start : start + size])).sum().backward()
    return (time.process_time() - start_s) / len(rows)


def time_build(folder: str, rows: list[Tensor], size: int, dim: int) -> float:
    """Return the CPU seconds of a complete build over the adapter in a folder."""
    task = Task(
        model=make_base,
        loss=compute_loss,
        train_data=lambda: rows,
        query_data=lambda: rows[:4],
        checkpoints=[Checkpoint(folder, learning_rate=0.1)],
        collate=torch.stack,
    ).with_adapters()
    with tempfile.TemporaryDirectory() as out:
        start_s = time.process_time()
        build(task, Path(out) / "index", BuildConfig(dim=dim, batch_size=size, yardstick=False))
        return time.process_time() - start_s


def measure_case(name: str, options: argparse.Namespace) -> dict[str, Any]:
    model, size = make_adapted(name), options.batch_size
    step = time_plain_step(model, make_rows(4 * size), size)
    batches = max(4, round(options.seconds / step / size))
    small, large = make_rows(size * EARLY), make_rows(size * (EARLY + batches))
    build_s, plain_s = [], []
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)

        def time_row() -> float:
            seconds = [time_build(folder, rows, size, options.dim) for rows in (large, small)]
            return (seconds[0] - seconds[1]) / (len(large) - len(small))

        measures: tuple[tuple[list[float], Callable[[], float]], ...] = (
            (build_s, time_row),
            (plain_s, lambda: time_plain_step(model, large[len(small) :], size)),
        )
        for round_ in range(options.rounds + 1):
            for times, measure in measures:
                seconds = measure()
                if round_:  # the first round is a warm-up
                    times.append(seconds)
    return {
        "adapter": name,
        "rank": RANK,
        "base_parameters": sum(p.numel() for p in make_base().parameters()),
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "row_us": median(build_s) * 1e6,
        "plain_us": median(plain_s) * 1e6,
        "ratio": median(p / o for p, o in zip(plain_s, build_s, strict=True)),
        "rounds_ratio": [p / o for p, o in zip(plain_s, build_s, strict=True)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--adapters", nargs="+", default=list(CASES), choices=list(CASES), help="adapters to measure")
    parser.add_argument("--batch-size", type=int, default=8, help="rows per batch")
    parser.add_argument("--dim", type=int, default=1024, help="sketch dimensions per checkpoint")
    parser.add_argument(
        "--seconds",
        type=float,
        default=4.0,
        help="seconds of plain steps that correspond to the difference between the two builds",
    )
    parser.add_argument("--rounds", type=int, default=5, help="number of measured rounds")
    parser.add_argument("--threads", type=int, default=1, help="number of CPU threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    report_results(RESULT, vars(options), (measure_case(name, options) for name in options.adapters))


if __name__ == "__main__":
    main()
