"""Shakespeare: train a small GPT on characters, and ask which passages taught it to continue a text.

`python examples/shakespeare.py --data DIR` takes a minute; DIR holds tinyshakespeare.txt, or the input.txt of the
char-rnn download. From the command line afterwards: `python query.py runs/shakespeare/2000-rows/index --ids 0-4`;
to build: `python build_index.py --task examples/shakespeare.py:task --task-arg data=DIR
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

Row = tuple[torch.Tensor, int]  # LENGTH + 1 characters, and where they begin in the text

# The task: all that an index needs to know. An example is a sequence; its loss is the mean over its characters.

EPOCHS, RATE, ROWS, LENGTH, WIDTH = (2, 4, 6), 4e-3, 2000, 64, 64
CHARACTERS = "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


class Block(nn.Module):
    """Causal attention of four heads, then two layers at each place."""

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


# Its data, training it, building the index, asking.


def read(data: str, rows: int) -> tuple[list[Row], list[Row]]:
    """Return sequences spread over the first nine tenths of the text, and 100 of the last tenth."""
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
    """Train, save checkpoints, and return the mean loss of the last tenth, in nats a character."""
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
    print(f"trained on {options.rows:,} sequences of {LENGTH} characters; {nats:.2f} nats a character on unseen text")

    named = {"data": str(Path(options.data).resolve()), "out": out, "rows": str(options.rows)}
    build(f"{Path(__file__)}:task", f"{out}/index", arguments=named)
    index = InfluenceIndex.open(f"{out}/index")
    answers = index.query([0, 40, 80], options=QueryOptions(k=3, rerank="exact", candidates=50))
    for answer in answers:
        print(f"\n{answer.query}: {index.described('query', answer.members[0]).text}")
        for hit in answer.hits:
            print(f"  {hit.score:+.5f} {hit.id:>8}: {index.described('train', hit.row).text}")
    parts = explain(index, answers[0].proponents[0].row, answers[0].members[0]).by_layer
    shares = [f"{layer} {part:+.5f}" for layer, part in sorted(parts.items(), key=lambda item: -item[1])[:4]]
    print(f"\nthe first score comes most from the layers {', '.join(shares)}")
    print(f"report: {write_report(answers, f'{out}/report.html', index, 'Which passages taught it these')}")


if __name__ == "__main__":
    main()
