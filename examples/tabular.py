"""Tabular data: train a small network on breast-cancer measurements, and find the training rows behind its mistakes.

`python examples/tabular.py` takes half a minute and needs no download: scikit-learn includes the data (Wisconsin
diagnostic breast cancer, 569 tumours × 30 measurements). To query the index afterwards:
`python query.py runs/tabular/index --ids 0-4`; to build an index: `python build_index.py
--task examples/tabular.py:task --task-arg out=runs/tabular --out runs/tabular/index`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer
from torch import nn
from torch.nn import functional as F

from tracin_ann import Checkpoint, InfluenceIndex, QueryOptions, Task, build
from tracin_ann.report import write_report

Row = tuple[torch.Tensor, int, int]  # measurements in standard deviations from the mean, 1 if benign, tumour number

# The task: the definition that an index is built from.

EPOCHS, RATE, N_TRAIN = (2, 5, 10, 20), 0.05, 420
TABLE = load_breast_cancer()


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(30, 32), nn.ReLU(), nn.Linear(32, 2))


def loss(net: nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return F.cross_entropy(net(batch[0]), batch[1], reduction="none")


def data() -> tuple[list[Row], list[Row]]:
    order = np.random.default_rng(0).permutation(len(TABLE.target))
    known = TABLE.data[order[:N_TRAIN]]
    values = torch.tensor((TABLE.data - known.mean(0)) / known.std(0), dtype=torch.float32)
    rows = [(values[n], int(TABLE.target[n]), int(n)) for n in order]
    return rows[:N_TRAIN], rows[N_TRAIN:]


def describe(row: Row) -> str:
    odd = row[0].abs().argsort(descending=True)[:3].tolist()
    shown = [f"{TABLE.feature_names[i]} {TABLE.data[row[2], i]:.4g} ({row[0][i]:+.1f} sd)" for i in odd]
    return f"{TABLE.target_names[row[1]]}: {', '.join(shown)}"


def task(out: str = "runs/tabular") -> Task:
    return Task(
        model=model,
        loss=loss,
        train_data=lambda: data()[0],
        query_data=lambda: data()[1],
        checkpoints=[Checkpoint(f"{out}/epoch-{e}.pt", learning_rate=RATE) for e in EPOCHS],
        describe=describe,
        columns=lambda row: {"label": row[1], "radius": float(TABLE.data[row[2], 0])},
        ids=lambda row: f"tumour-{row[2]}",
    )


# Training, building the index, queries.


def train(out: str) -> nn.Module:
    torch.manual_seed(0)
    net = model()
    optimiser = torch.optim.SGD(net.parameters(), lr=RATE)
    loader = torch.utils.data.DataLoader(data()[0], 16, shuffle=True)
    Path(out).mkdir(parents=True, exist_ok=True)
    for epoch in range(1, max(EPOCHS) + 1):
        for batch in loader:
            optimiser.zero_grad()
            loss(net, batch).mean().backward()
            optimiser.step()
        if epoch in EPOCHS:
            torch.save(net.state_dict(), f"{out}/epoch-{epoch}.pt")
    return net


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", default="runs/tabular", help="directory for checkpoints, index and report")
    out = parser.parse_args(arguments).out

    net = train(out)
    values, labels, _ = torch.utils.data.default_collate(data()[1])
    mistakes = (net(values).argmax(1) != labels).nonzero().flatten().tolist()
    print(f"trained on {N_TRAIN} tumours; {len(mistakes)} of {len(labels)} test tumours are classified wrongly")

    build(f"{Path(__file__)}:task", f"{out}/index", arguments={"out": out})
    index = InfluenceIndex.open(f"{out}/index")
    answers = index.query((mistakes or [0])[:3], options=QueryOptions(k=3, rerank="exact"))
    for answer in answers:
        print(f"\n{answer.query}, {index.describe('query', answer.members[0]).text}")
        for hit in answer.hits:
            print(f"  {hit.score:+7.3f}  {hit.id}, {index.describe('train', hit.row).text}")

    print("\ntraining rows with the largest self-influence:")
    for row in index.self_influence(5):
        print(f"  {row.score:7.3f}  {row.id}, {index.describe('train', row.row).text}")
    print(
        f"\nreport: {write_report(answers, f'{out}/report.html', index, 'Training rows behind misclassified tumours')}"
    )


if __name__ == "__main__":
    main()
