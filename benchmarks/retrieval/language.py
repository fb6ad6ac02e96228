"""A character GPT of 110,529 parameters over windows of text that do not overlap.

The rows are the windows of the first 90% of tinyshakespeare, then windows that the trained model writes itself, so that
any number of rows has no text twice. The queries are windows of the last 10%.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from benchmarks.common import models
from tracin_ann import Checkpoint, Task

LENGTH = 32
QUERIES = 1000
RATE = 3e-3
_EPOCHS, _BATCH = 3, 64
_WRITERS, _WARM_UP = 1000, 8
_WRITTEN_ROWS = 100_000

Windows = list[tuple[torch.Tensor, torch.Tensor]]


def make_model() -> models.GPT:
    """Return a GPT of two layers of width 64."""
    return models.GPT(width=64, layers=2, length=LENGTH)


def read_text(data: Path) -> torch.Tensor:
    """Return the characters of tinyshakespeare as numbers."""
    text = (data / "tinyshakespeare.txt").read_text()
    number = {character: i for i, character in enumerate(sorted(set(text)))}
    return torch.tensor([number[c] for c in text])


def cut_windows(text: torch.Tensor) -> Windows:
    """Return the windows of a text, each with its next characters; one starts where the last one ends."""
    starts = range(0, len(text) - LENGTH, LENGTH)
    return [(text[s : s + LENGTH], text[s + 1 : s + LENGTH + 1]) for s in starts]


def train(windows: Windows, runs: Path) -> None:
    """Train with AdamW and save a checkpoint after each epoch."""
    torch.manual_seed(0)
    net, order = make_model(), torch.Generator().manual_seed(0)
    optimiser = torch.optim.AdamW(net.parameters(), lr=RATE)
    for epoch in range(1, _EPOCHS + 1):
        for batch in torch.utils.data.DataLoader(windows, _BATCH, shuffle=True, generator=order):
            optimiser.zero_grad()
            models.compute_language_loss(net, batch).mean().backward()
            optimiser.step()
        torch.save(net.state_dict(), runs / f"{epoch}.pt")


@torch.no_grad()
def write_text(checkpoint: Path, n_characters: int, seed: int) -> torch.Tensor:
    """Return text sampled from the trained model: 1,000 streams, joined."""
    net, random = make_model().eval(), torch.Generator().manual_seed(seed)
    net.load_state_dict(torch.load(checkpoint, weights_only=True))
    steps = -(-n_characters // _WRITERS) + _WARM_UP
    stream = torch.randint(0, 65, (_WRITERS, 1), generator=random)
    for _ in range(steps):
        logits = net(stream[:, -LENGTH:])[:, -1]
        stream = torch.cat([stream, torch.multinomial(logits.softmax(1), 1, generator=random)], 1)
    return stream[:, _WARM_UP + 1 :].flatten()[:n_characters]


def make_task(data: str, folder: str, rows: int) -> Task:
    """Train the model and write its text if necessary, and return the task with this number of rows."""
    text = read_text(Path(data))
    border = len(text) * 9 // 10
    windows, queries = cut_windows(text[:border]), cut_windows(text[border:])
    runs = Path(folder) / "runs"
    if not (runs / f"{_EPOCHS}.pt").exists():
        runs.mkdir(parents=True, exist_ok=True)
        train(windows, runs)
    for seed in range(-(-max(0, rows - len(windows)) // _WRITTEN_ROWS)):
        path = Path(folder) / f"written-{seed}.npy"
        if not path.exists():
            np.save(path, write_text(runs / f"{_EPOCHS}.pt", _WRITTEN_ROWS * LENGTH + 1, seed).numpy())
        windows += cut_windows(torch.from_numpy(np.load(path)))
    chosen = np.random.default_rng(0).permutation(len(queries))[:QUERIES]
    query_rows = [queries[i] for i in chosen.tolist()]
    return Task(
        model=make_model,
        loss=models.compute_language_loss,
        train_data=lambda: windows[:rows],
        query_data=lambda: query_rows,
        checkpoints=[Checkpoint(str(runs / f"{e}.pt"), learning_rate=RATE) for e in range(1, _EPOCHS + 1)],
    )
