"""SST-2: train a bag of word vectors on film reviews with 10% wrong labels, and find the reviews behind predictions.

`python examples/sst2.py --data DIR` takes a minute; DIR holds sst2_train.tsv and sst2_dev.tsv, or the train.tsv and
dev.tsv of the GLUE download (`sentence<TAB>label` per line). To query the index afterwards:
`python query.py runs/sst2/6000-rows/index --ids 0-4`; to build an index: `python build_index.py
--task examples/sst2.py:task --task-arg data=DIR --task-arg out=runs/sst2/6000-rows --out runs/sst2/6000-rows/index`.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from tracin_ann import Checkpoint, InfluenceIndex, QueryOptions, Task, build
from tracin_ann.analysis import find_mislabelled
from tracin_ann.report import write_report

Row = tuple[str, int, str]  # sentence, label, name

# The task: the definition that an index is built from.

EPOCHS, RATE, ROWS, FLIPPED = (2, 3, 4), 2.0, 6000, 0.10
NAMES = ("negative", "positive")


class Bag(nn.Module):
    """A linear classifier of the mean word vector of a sentence."""

    def __init__(self, n_words: int, width: int = 64) -> None:
        super().__init__()
        self.words, self.out = nn.Embedding(n_words + 1, width, padding_idx=0), nn.Linear(width, 2)
        self.words.weight.data.mul_(0.1)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.out(self.words(words).sum(1) / (words > 0).sum(1, keepdim=True).clamp(min=1))


def loss(net: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(net(batch[0]), batch[1], reduction="none")


def collate(rows: list[Row], places: dict[str, int]) -> tuple[torch.Tensor, torch.Tensor]:
    known = [torch.tensor([places[word] for word in row[0].split() if word in places] or [0]) for row in rows]
    return nn.utils.rnn.pad_sequence(known, batch_first=True), torch.tensor([row[1] for row in rows])


def task(data: str, out: str = "runs/sst2/6000-rows", rows: str = str(ROWS)) -> Task:
    train_rows, test_rows, _ = read(data, int(rows))
    places = vocabulary(train_rows)
    return Task(
        model=lambda: Bag(len(places)),
        loss=loss,
        train_data=lambda: train_rows,
        query_data=lambda: test_rows,
        checkpoints=[Checkpoint(f"{out}/epoch-{e}.pt", learning_rate=RATE) for e in EPOCHS],
        collate=lambda batch: collate(batch, places),
        describe=lambda row: f"{NAMES[row[1]]}: {row[0]}",
        columns=lambda row: {"label": row[1], "words": len(row[0].split())},
        ids=lambda row: row[2],
    )


# Its data, training, building the index, queries.


def read(data: str, rows: int) -> tuple[list[Row], list[Row], np.ndarray]:
    """Return training sentences (some labels flipped), dev sentences, and the positions of the flipped labels."""
    train_rows, test_rows = _read_sentences(data, "train")[:rows], _read_sentences(data, "dev")
    random = np.random.default_rng(0)
    flipped = np.sort(random.choice(len(train_rows), round(FLIPPED * len(train_rows)), replace=False))
    for i in flipped.tolist():
        sentence, label, name = train_rows[i]
        train_rows[i] = (sentence, 1 - label, name)
    return train_rows, test_rows, flipped


def _read_sentences(data: str, part: str) -> list[Row]:
    found = [path for name in (f"sst2_{part}.tsv", f"{part}.tsv") if (path := Path(data) / name).is_file()]
    if not found:
        raise SystemExit(f"no sst2_{part}.tsv or {part}.tsv in {data}")
    lines = [line.rsplit("\t", 1) for line in found[0].read_text(encoding="utf-8").splitlines()]
    return [
        (text.strip(), int(label), f"{part}-{n}") for n, (text, label) in enumerate(lines, 1) if label in ("0", "1")
    ]


def vocabulary(rows: list[Row]) -> dict[str, int]:
    """Return an index from 1 for every word that occurs at least twice."""
    counts = Counter(word for row in rows for word in row[0].split())
    return {word: place for place, word in enumerate((w for w, n in counts.items() if n > 1), 1)}


def train(data: str, out: str, rows: int) -> float:
    """Train, save checkpoints, and return the accuracy on the dev set."""
    train_rows, test_rows, _ = read(data, rows)
    places = vocabulary(train_rows)
    torch.manual_seed(0)
    net = Bag(len(places))
    optimiser = torch.optim.SGD(net.parameters(), lr=RATE)
    order = torch.utils.data.DataLoader(train_rows, 16, shuffle=True, collate_fn=lambda batch: collate(batch, places))
    Path(out).mkdir(parents=True, exist_ok=True)
    for epoch in range(1, max(EPOCHS) + 1):
        for batch in order:
            optimiser.zero_grad()
            loss(net, batch).mean().backward()
            optimiser.step()
        if epoch in EPOCHS:
            torch.save(net.state_dict(), f"{out}/epoch-{epoch}.pt")
    words, labels = collate(test_rows, places)
    return float((net(words).argmax(1) == labels).float().mean())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True, help="folder of the sentences")
    parser.add_argument("--out", default="runs/sst2", help="directory for checkpoints, index and report")
    parser.add_argument("--rows", type=int, default=ROWS, help="training sentences to use")
    options = parser.parse_args(arguments)
    out = f"{options.out}/{options.rows}-rows"

    accuracy = train(options.data, out, options.rows)
    print(f"trained on {options.rows:,} sentences, 10% with a wrong label; dev accuracy {accuracy:.1%}")

    named = {"data": str(Path(options.data).resolve()), "out": out, "rows": str(options.rows)}
    build(f"{Path(__file__)}:task", f"{out}/index", arguments=named)
    index = InfluenceIndex.open(f"{out}/index")
    answers = index.query(range(3), options=QueryOptions(k=3, rerank="exact"))
    for answer in answers:
        print(f"\n{answer.query}, {index.describe('query', answer.members[0]).text}")
        for hit in answer.hits:
            print(f"  {hit.score:+7.3f}  {hit.id}, {index.describe('train', hit.row).text}")

    _, _, flipped = read(options.data, options.rows)
    suspects = find_mislabelled(index, labels="label", k=len(flipped))
    found = np.isin([row.row for row in suspects], flipped).mean()
    print(f"\nof the {len(flipped)} most suspicious labels, {found:.0%} are wrong (random order: 10%); the first are")
    for row in suspects[:5]:
        wrong = "wrong" if row.row in flipped else "right"
        print(f"  {wrong}: {index.describe('train', row.row).text}")
    print(
        f"\nreport: {write_report(answers, f'{out}/report.html', index, 'Training reviews behind three predictions')}"
    )


if __name__ == "__main__":
    main()
