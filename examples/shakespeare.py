"""Shakespeare: train a small character-level GPT, and find the training passages behind its continuations.

`python examples/shakespeare.py --data DIR` takes a minute; DIR holds tinyshakespeare.txt, or the input.txt of the
char-rnn download. To query the index afterwards: `python query.py runs/shakespeare/2000-rows/index --ids 0-4`;
to build an index: `python build_index.py --task examples/shakespeare.py:task --task-arg data=DIR
--task-arg out=runs/shakespeare/2000-rows --out runs/shakespeare/2000-rows/index`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from tracin_ann import Checkpoint, InfluenceIndex, QueryOptions, Task, build
from tracin_ann.analysis import explain
from tracin_ann.report import write_report

Row = tuple[torch.Tensor, int]  # LENGTH + 1 characters, and their offset in the text

# The task: the definition that an index is built from. Examples are sequences; losses are means over their characters.

EPOCHS, RATE, ROWS, LENGTH, WIDTH = (2, 4, 6), 4e-3, 2000, 64, 64
CHARACTERS = "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


class Block(nn.Module):
    """Causal attention with four heads, then a two-layer MLP at each position."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(2, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.characters, self.places = nn.Embedding(len(CHARACTERS), WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(Block(), Block(), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, len(CHARACTERS)))

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        places = torch.arange(text.shape[1], device=text.device).expand_as(text)
        return self.blocks(self.characters(text) + self.places(places))


def loss(net: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    logits = net(batch[0][:, :-1]).transpose(1, 2)
    return F.cross_entropy(logits, batch[0][:, 1:], reduction="none").mean(1)


def describe(row: Row) -> str:
    return "".join(CHARACTERS[i] for i in row[0]).replace("\n", " / ")


def task(data: str, out: str = "runs/shakespeare/2000-rows", rows: str = str(ROWS)) -> Task:
    return Task(
        model=GPT,
        loss=loss,
        train_data=lambda: read(data, int(rows))[0],
        query_data=lambda: read(data, int(rows))[1],
        checkpoints=[Checkpoint(f"{out}/epoch-{e}.pt", learning_rate=RATE) for e in EPOCHS],
        describe=describe,
        columns=lambda row: {"place": row[1], "speeches": describe(row).count(": / ")},
        ids=lambda row: row[1],
    )


# Its data, training, building the index, queries.


def read(data: str, rows: int) -> tuple[list[Row], list[Row]]:
    """Return sequences spread over the first 90% of the text, and 100 sequences of the last 10%."""
    found = [path for name in ("tinyshakespeare.txt", "input.txt") if (path := Path(data) / name).is_file()]
    if not found:
        raise SystemExit(f"no tinyshakespeare.txt or input.txt in {data}")
    place_of = {character: place for place, character in enumerate(CHARACTERS)}
    text = torch.tensor([place_of[character] for character in found[0].read_text(encoding="utf-8")])
    end = len(text) * 9 // 10

    def spread(first: int, last: int, n: int) -> list[Row]:
        starts = torch.linspace(first, last - LENGTH - 1, n).long().tolist()
        return [(text[at : at + LENGTH + 1], at) for at in starts]

    return spread(0, end, rows), spread(end, len(text), 100)


def train(data: str, out: str, rows: int) -> float:
    """Train, save checkpoints, and return the mean test loss in nats per character."""
    train_rows, test_rows = read(data, rows)
    torch.manual_seed(0)
    net = GPT()
    optimiser = torch.optim.AdamW(net.parameters(), lr=RATE)
    order = torch.utils.data.DataLoader(train_rows, 32, shuffle=True)
    Path(out).mkdir(parents=True, exist_ok=True)
    for epoch in range(1, max(EPOCHS) + 1):
        for batch in order:
            optimiser.zero_grad()
            loss(net, batch).mean().backward()
            optimiser.step()
        if epoch in EPOCHS:
            torch.save(net.state_dict(), f"{out}/epoch-{epoch}.pt")
    with torch.no_grad():
        return float(loss(net, torch.utils.data.default_collate(test_rows)).mean())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True, help="folder of the text")
    parser.add_argument("--out", default="runs/shakespeare", help="directory for checkpoints, index and report")
    parser.add_argument("--rows", type=int, default=ROWS, help="sequences to train on")
    options = parser.parse_args(arguments)
    out = f"{options.out}/{options.rows}-rows"

    nats = train(options.data, out, options.rows)
    print(f"trained on {options.rows:,} sequences of {LENGTH} characters; test loss {nats:.2f} nats per character")

    named = {"data": str(Path(options.data).resolve()), "out": out, "rows": str(options.rows)}
    build(f"{Path(__file__)}:task", f"{out}/index", arguments=named)
    index = InfluenceIndex.open(f"{out}/index")
    answers = index.query([0, 40, 80], options=QueryOptions(k=3, rerank="exact", candidates=50))
    for answer in answers:
        print(f"\n{answer.query}: {index.describe('query', answer.members[0]).text}")
        for hit in answer.hits:
            print(f"  {hit.score:+.5f} {hit.id:>8}: {index.describe('train', hit.row).text}")
    parts = explain(index, answers[0].proponents[0].row, answers[0].members[0]).by_layer
    shares = [f"{layer} {part:+.5f}" for layer, part in sorted(parts.items(), key=lambda item: -item[1])[:4]]
    print(f"\nlayers with the largest part of the first score: {', '.join(shares)}")
    print(f"report: {write_report(answers, f'{out}/report.html', index, 'Training passages behind continuations')}")


if __name__ == "__main__":
    main()
