"""A pretrained sentence encoder of Hugging Face, fine-tuned on SST-2."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import nn

from tracin_ann import Checkpoint, Task

RATE, RUNS, EPOCHS, BATCH, MAX_TOKENS = 1e-4, 2, 2, 32, 64
"""RATE: the highest learning rate of AdamW, reached after 10% of the steps; RUNS: independent runs, each with one
checkpoint per epoch; MAX_TOKENS: where sentences are truncated."""
Row = tuple[str, int, str]
Collate = Callable[[list[Row]], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


class Encoder(nn.Module):
    """A linear layer on the mean of the last hidden states of a sentence."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        from transformers import AutoModel  # noqa: PLC0415 - only this benchmark needs it

        self.body = AutoModel.from_pretrained(folder, attn_implementation="eager", add_pooling_layer=False)
        self.out = nn.Linear(self.body.config.hidden_size, 2)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        states = self.body(input_ids=tokens, attention_mask=mask).last_hidden_state
        weight = mask.unsqueeze(2).to(states)
        return self.out((states * weight).sum(1) / weight.sum(1))


def compute_loss(net: nn.Module, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(net(batch[0], batch[1]), batch[2], reduction="none")


def fine_tune(folder: str, rows: list[Row], dev: list[Row], out: Path, seed: int) -> tuple[Task, float]:
    """Fine-tune RUNS times; return the task with all checkpoints, and the mean accuracy on `dev`."""
    from transformers import AutoTokenizer  # noqa: PLC0415

    tokenizer = AutoTokenizer.from_pretrained(folder)

    def collate(batch: list[Row]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        texts = [text for text, _, _ in batch]
        encoded = tokenizer(texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        return encoded["input_ids"], encoded["attention_mask"], torch.tensor([label for _, label, _ in batch])

    checkpoints: list[Checkpoint] = []
    accuracies = []
    for run in range(RUNS):
        torch.manual_seed(RUNS * seed + run)
        net = Encoder(folder)
        checkpoints += fine_tune_once(net, collate, rows, out, f"run-{run}")
        accuracies.append(measure_accuracy(net, collate, dev))
    task = Task(lambda: Encoder(folder), compute_loss, lambda: rows, lambda: dev, checkpoints, collate=collate)
    return task, mean(accuracies)


def fine_tune_once(net: Encoder, collate: Collate, rows: list[Row], out: Path, name: str) -> list[Checkpoint]:
    """Fine-tune with a learning rate that decays to 5%; return one checkpoint per epoch."""
    optimiser = torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=0.01)
    steps, step, checkpoints = EPOCHS * -(-len(rows) // BATCH), 0, []
    words = torch.tensor([float(len(text.split())) for text, _, _ in rows])
    net.train()
    for epoch in range(1, EPOCHS + 1):
        # A batch has sentences of similar length; the batches are drawn again in each epoch.
        batches = (words + 5 * torch.rand(len(rows))).argsort().split(BATCH)
        for i in torch.randperm(len(batches)):
            warm = min(1.0, (step + 1) / (0.1 * steps))
            now = optimiser.param_groups[0]["lr"] = RATE * warm * (1 - 0.95 * step / steps)
            optimiser.zero_grad()
            compute_loss(net, collate([rows[j] for j in batches[i]])).mean().backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimiser.step()
            step += 1
        path = out / f"{name}-epoch-{epoch}.pt"
        torch.save(net.state_dict(), path)
        checkpoints.append(Checkpoint(path, now))
    return checkpoints


def measure_accuracy(net: Encoder, collate: Collate, rows: list[Row]) -> float:
    """Return the share of rows whose label has the highest score."""
    net.eval()
    right = 0
    with torch.no_grad():
        for start in range(0, len(rows), BATCH):
            tokens, mask, labels = collate(rows[start : start + BATCH])
            right += int((net(tokens, mask).argmax(1) == labels).sum())
    return right / len(rows)
