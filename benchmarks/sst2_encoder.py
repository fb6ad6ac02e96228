"""A pretrained sentence encoder of Hugging Face, fine-tuned whole on the sentences of SST-2."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import nn

from tracin_ann import Checkpoint, Task

RATE, RUNS, EPOCHS, BATCH, LONGEST = 1e-4, 2, 2, 32, 64
"""RATE: AdamW's highest, reached after a tenth of the steps; RUNS: fine-tuned apart, a checkpoint after each epoch of
each; LONGEST: tokens of a sentence, cut there."""
Row = tuple[str, int, str]
Collate = Callable[[list[Row]], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


class Encoder(nn.Module):
    """The mean of an encoder's last states over a sentence's tokens, and a line through it."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        from transformers import AutoModel  # noqa: PLC0415 - only this benchmark needs it

        self.body = AutoModel.from_pretrained(folder, attn_implementation="eager", add_pooling_layer=False)
        self.out = nn.Linear(self.body.config.hidden_size, 2)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        states = self.body(input_ids=tokens, attention_mask=mask).last_hidden_state
        weight = mask.unsqueeze(2).to(states)
        return self.out((states * weight).sum(1) / weight.sum(1))


def loss(net: nn.Module, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(net(batch[0], batch[1]), batch[2], reduction="none")


def fine_tuned(folder: str, rows: list[Row], dev: list[Row], out: Path, seed: int) -> tuple[Task, float]:
    """Fine-tune on the rows, RUNS times; return the task of all checkpoints and the mean accuracy on others."""
    from transformers import AutoTokenizer  # noqa: PLC0415

    tokenizer = AutoTokenizer.from_pretrained(folder)

    def collate_rows(given: list[Row]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        texts = [text for text, _, _ in given]
        made = tokenizer(texts, padding=True, truncation=True, max_length=LONGEST, return_tensors="pt")
        return made["input_ids"], made["attention_mask"], torch.tensor([label for _, label, _ in given])

    kept: list[Checkpoint] = []
    accuracies = []
    for run in range(RUNS):
        torch.manual_seed(RUNS * seed + run)
        net = Encoder(folder)
        kept += one_run(net, collated, rows, out, f"run-{run}")
        accuracies.append(accuracy(net, collated, dev))
    task = Task(lambda: Encoder(folder), loss, lambda: rows, lambda: dev, kept, collate=collated)
    return task, mean(accuracies)


def one_run(net: Encoder, collated: Collate, rows: list[Row], out: Path, name: str) -> list[Checkpoint]:
    """Fine-tune once, the learning rate falling to a twentieth; return a checkpoint of each epoch."""
    optimiser = torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=0.01)
    steps, step, kept = EPOCHS * -(-len(rows) // BATCH), 0, []
    words = torch.tensor([float(len(text.split())) for text, _, _ in rows])
    net.train()
    for epoch in range(1, EPOCHS + 1):
        # Sentences of like length share a batch, which are drawn anew each epoch.
        batches = (words + 5 * torch.rand(len(rows))).argsort().split(BATCH)
        for i in torch.randperm(len(batches)):
            warm = min(1.0, (step + 1) / (0.1 * steps))
            now = optimiser.param_groups[0]["lr"] = RATE * warm * (1 - 0.95 * step / steps)
            optimiser.zero_grad()
            loss(net, collated([rows[j] for j in batches[i]])).mean().backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimiser.step()
            step += 1
        path = out / f"{name}-epoch-{epoch}.pt"
        torch.save(net.state_dict(), path)
        kept.append(Checkpoint(path, now))
    return kept


def accuracy(net: Encoder, collated: Collate, rows: list[Row]) -> float:
    """Return the share of rows whose label is the likeliest."""
    net.eval()
    right = 0
    with torch.no_grad():
        for start in range(0, len(rows), BATCH):
            tokens, mask, labels = collated(rows[start : start + BATCH])
            right += int((net(tokens, mask).argmax(1) == labels).sum())
    return right / len(rows)
