"""A character GPT of 110,529 parameters over windows of text that do not overlap.

The rows are the windows of the first 90% of tinyshakespeare, then windows that the trained model writes itself, so that
any number of rows has no text twice. The queries are windows of the last 10%.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from benchmarks.common import models
from tracin_ann import Checkpoint, Task

LENGTH = 32
QUERIES = 1000
RATE = 3e-3
_EPOCHS, _BATCH = 3, 64
_WRITERS, _WRITTEN_ROWS = 1000, 100_000

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


class Writer:
    """A GPT that computes one place of a window after another, with the keys and values of the places before."""

    def __init__(self, net: models.GPT, n_streams: int) -> None:
        self.net = net
        self.shape = (2, n_streams, net.blocks[0].heads, LENGTH, net.places.embedding_dim // net.blocks[0].heads)
        self.stored = [torch.empty(self.shape) for _ in net.blocks]

    def compute_logits(self, character_W: torch.Tensor, place: int) -> torch.Tensor:
        """Return the logits [W, characters] of what follows the characters at a place of W windows."""
        net, (_, n_streams, heads, _, width) = self.net, self.shape
        x = net.characters(character_W) + net.places.weight[place]
        for block, stored in zip(net.blocks, self.stored, strict=True):
            q, k, v = block.qkv(block.before(x)).view(n_streams, 3, heads, 1, width).unbind(1)
            stored[:, :, :, place] = torch.stack([k, v])[:, :, :, 0]
            keys, values = stored[:, :, :, : place + 1]
            x = x + block.out(F.scaled_dot_product_attention(q, keys, values).reshape(x.shape))
            x = x + block.down(F.gelu(block.up(block.after(x))))
        return net.head(net.norm(x))


@torch.no_grad()
def write_text(checkpoint: Path, n_windows: int, seed: int) -> torch.Tensor:
    """Return text of so many windows and one character, sampled from the trained model by streams, which are joined.

    A window depends on the last character of the one before it; the first window of a stream is left out.
    """
    net, random = make_model().eval(), torch.Generator().manual_seed(seed)
    net.load_state_dict(torch.load(checkpoint, weights_only=True))
    writer, windows_of_stream = Writer(net, _WRITERS), -(-n_windows // _WRITERS)
    last, written = torch.randint(0, 65, (_WRITERS, 1), generator=random), []
    for _ in range(windows_of_stream + 1):
        for place in range(LENGTH):
            logits = writer.compute_logits(last[:, 0], place)
            last = torch.multinomial(logits.softmax(1), 1, generator=random)
            written.append(last)
    text = torch.cat(written[LENGTH:], 1).flatten()[: n_windows * LENGTH]
    return torch.cat([text, text[:1]])


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
            np.save(path, write_text(runs / f"{_EPOCHS}.pt", _WRITTEN_ROWS, seed).numpy())
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
