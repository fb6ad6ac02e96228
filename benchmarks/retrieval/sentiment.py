"""A transformer of one block and about half a million parameters over spans of SST-2 sentences.

The rows are the training sentences, then spans of them of at least four words, which overlap, so that their number is
not bounded by that of the sentences. The queries are sentences of the development and test sets.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.common import models
from tracin_ann import Checkpoint, Task

QUERIES = 1000
RATE = 1e-3
_EPOCHS = (2, 4, 6)
"""The epochs, counted from 1, after which a checkpoint is saved."""
_BATCH, _WIDTH, _LENGTH = 64, 64, 64
_LEAST_WORDS = 4
_PADDING, _UNKNOWN = 0, 1

Row = tuple[tuple[str, ...], int]
Batch = tuple[Tensor, Tensor]


class Reader(nn.Module):
    """One transformer block over words, the mean over positions, and a linear layer."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(vocabulary, _WIDTH), nn.Embedding(_LENGTH, _WIDTH)
        self.block, self.out = models.Block(_WIDTH, 2), nn.Linear(_WIDTH, 2)

    def forward(self, words: Tensor) -> Tensor:
        # Attention is causal and padding is at the end, so that no word attends to it.
        positions = torch.arange(words.shape[1]).expand_as(words)
        states = self.block(self.words(words) + self.places(positions))
        weight = (words != _PADDING)[:, :, None].to(states)
        return self.out((states * weight).sum(1) / weight.sum(1))


def compute_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the cross-entropy of each row [B]."""
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def read_sentences(data: Path, part: str) -> list[Row]:
    """Return the words and labels of a part: train, dev or test."""
    lines = (data / f"sst2_{part}.tsv").read_text(encoding="utf-8").splitlines()
    pairs = (line.rsplit("\t", 1) for line in lines)
    return [(tuple(text.split()[:_LENGTH]), int(label)) for text, label in pairs]


def number_words(sentences: list[Row]) -> dict[str, int]:
    """Return the numbers of the words that occur at least twice."""
    counts = Counter(word for words, _ in sentences for word in words)
    return {word: i for i, word in enumerate((w for w, n in counts.items() if n > 1), start=2)}


def collate(rows: list[Row], numbers: dict[str, int]) -> Batch:
    """Return the numbers of words, padded to the longest row [B, T], and the labels [B]."""
    sentences = [torch.tensor([numbers.get(word, _UNKNOWN) for word in words]) for words, _ in rows]
    padded = nn.utils.rnn.pad_sequence(sentences, batch_first=True, padding_value=_PADDING)
    return padded, torch.tensor([label for _, label in rows])


def draw_spans(sentences: list[Row]) -> Iterator[Row]:
    """Yield different spans of at least four words of random sentences, with the labels of their sentences."""
    random, seen = np.random.default_rng(0), {words for words, _ in sentences}
    while True:
        words, label = sentences[random.integers(len(sentences))]
        if len(words) <= _LEAST_WORDS:
            continue
        length = int(random.integers(_LEAST_WORDS, len(words)))
        start = int(random.integers(len(words) - length + 1))
        span = words[start : start + length]
        if span not in seen:
            seen.add(span)
            yield span, label


def train(sentences: list[Row], numbers: dict[str, int], runs: Path) -> None:
    """Train with AdamW and save a checkpoint after some epochs."""
    torch.manual_seed(0)
    net, order = Reader(len(numbers) + 2), torch.Generator().manual_seed(0)
    optimiser = torch.optim.AdamW(net.parameters(), lr=RATE)
    loader = torch.utils.data.DataLoader(
        sentences, _BATCH, shuffle=True, generator=order, collate_fn=partial(collate, numbers=numbers)
    )
    for epoch in range(1, _EPOCHS[-1] + 1):
        for batch in loader:
            optimiser.zero_grad()
            compute_loss(net, batch).mean().backward()
            optimiser.step()
        if epoch in _EPOCHS:
            torch.save(net.state_dict(), runs / f"{epoch}.pt")


def make_task(data: str, folder: str, rows: int) -> Task:
    """Train the model if necessary, and return the task with this number of rows."""
    sentences = read_sentences(Path(data), "train")
    numbers = number_words(sentences)
    runs = Path(folder) / "runs"
    if not (runs / f"{_EPOCHS[-1]}.pt").exists():
        runs.mkdir(parents=True, exist_ok=True)
        train(sentences, numbers, runs)
    spans = draw_spans(sentences)
    train_rows = sentences[:rows] + [next(spans) for _ in range(rows - len(sentences))]
    held_out = [row for part in ("dev", "test") for row in read_sentences(Path(data), part)]
    chosen = np.random.default_rng(0).permutation(len(held_out))[:QUERIES]
    query_rows = [held_out[i] for i in chosen.tolist()]
    return Task(
        model=lambda: Reader(len(numbers) + 2),
        loss=compute_loss,
        train_data=lambda: train_rows,
        query_data=lambda: query_rows,
        checkpoints=[Checkpoint(str(runs / f"{e}.pt"), learning_rate=RATE) for e in _EPOCHS],
        collate=partial(collate, numbers=numbers),
    )
