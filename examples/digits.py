"""Digits with wrong labels: train a small classifier, build and query an index, and find the wrong labels.

`python examples/digits.py` takes a minute, prints the commands that it runs, and writes a report. To build an index:
`python build_index.py --task examples/digits.py:task --task-arg runs=runs/digits/seed0 --out runs/mine`.
The data is scikit-learn's copy of the UCI handwritten digits (1,797 images of 8×8 pixels) with 10% of the training
labels changed at random.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from tracin_ann import Checkpoint, Description, InfluenceIndex, QueryOptions, Task
from tracin_ann.report import write_report

N_TRAIN, FLIPPED, EPOCHS, RATE = 1437, 0.10, 9, 0.1
Row = tuple[torch.Tensor, int]

# The task: the definition that an index is built from.


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def loss(net: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(net(batch[0]), batch[1], reduction="none")


def describe(row: Row) -> Description:
    return Description(text=f"labelled {row[1]}", image=row[0].view(8, 8))


def task(runs: str = "runs/digits", seed: str = "0") -> Task:
    train_rows, test_rows, _ = data(int(seed))
    return Task(
        model=model,
        loss=loss,
        train_data=lambda: train_rows,
        query_data=lambda: test_rows,
        checkpoints=[Checkpoint(f"{runs}/epoch-{e}.pt", learning_rate=RATE) for e in range(EPOCHS)],
        describe=describe,
        columns=lambda row: {"label": row[1]},
    )


# Its data, training, building the index, queries.


def data(seed: int) -> tuple[list[Row], list[Row], np.ndarray]:
    """Return training rows (some labels flipped), test rows, and the ids of the flipped ones."""
    pixels, labels = load_digits(return_X_y=True)
    random = np.random.default_rng(seed)
    order = random.permutation(len(labels))
    pixels, labels = torch.tensor(pixels[order] / 16, dtype=torch.float32), labels[order].copy()
    flipped = np.sort(random.choice(N_TRAIN, round(FLIPPED * N_TRAIN), replace=False))
    labels[flipped] = (labels[flipped] + random.integers(1, 10, len(flipped))) % 10
    rows = list(zip(pixels, labels.tolist(), strict=True))
    return rows[:N_TRAIN], rows[N_TRAIN:], flipped


def train(runs: Path, seed: int) -> float:
    """Train, save a checkpoint per epoch, and return the accuracy on the test rows."""
    train_rows, test_rows, _ = data(seed)
    random = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    net = model()
    optimiser = torch.optim.SGD(net.parameters(), lr=RATE)
    runs.mkdir(parents=True, exist_ok=True)
    for epoch in range(EPOCHS):
        for batch in torch.utils.data.DataLoader(train_rows, 16, shuffle=True, generator=random):
            optimiser.zero_grad()
            loss(net, batch).mean().backward()
            optimiser.step()
        torch.save(net.state_dict(), runs / f"epoch-{epoch}.pt")
    pixels, labels = torch.utils.data.default_collate(test_rows)
    return float((net(pixels).argmax(1) == labels).float().mean())


def find_share(ranking: list[int], flipped: np.ndarray, share: float) -> float:
    """Return the share of flipped labels among the first rows of a ranking."""
    checked = ranking[: round(share * N_TRAIN)]
    return len(set(checked) & set(flipped.tolist())) / len(flipped)


def run_command(*words: str) -> str:
    """Print a command of the project, run it, and return its output."""
    root = Path(__file__).resolve().parent.parent
    print(f"\n$ python {shlex.join(words)}", flush=True)
    done = subprocess.run([sys.executable, root / words[0], *words[1:]], check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout


def draw_digits(rows: list[tuple[str, Row]]) -> str:
    """Return 8×8 images side by side as text, two characters per pixel, with captions above."""
    shades = " .:-=+*#%@"
    lines = ["   ".join(f"{caption:<16}" for caption, _ in rows)]
    lines.append("   ".join(f"{f'labelled {row[1]}':<16}" for _, row in rows))
    for y in range(8):
        line = []
        for _, (pixels, _) in rows:
            line.append("".join(shades[min(9, int(v * 10))] * 2 for v in pixels.view(8, 8)[y]))
        lines.append("   ".join(line))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", default="runs/digits", help="directory for checkpoints and the index")
    parser.add_argument("--seed", type=int, default=0, help="seed of the wrong labels and of training")
    options = parser.parse_args()
    runs, index = Path(options.runs), f"{options.runs}/index-seed{options.seed}"
    train_rows, test_rows, flipped = data(options.seed)

    accuracy = train(runs / f"seed{options.seed}", options.seed)
    print(f"trained on {N_TRAIN} digits, {len(flipped)} of them with a wrong label; test accuracy {accuracy:.1%}")

    named = ["--task", f"{Path(__file__)}:task", "--task-arg", f"runs={runs}/seed{options.seed}"]
    named += ["--task-arg", f"seed={options.seed}"]
    print(run_command("build_index.py", *named, "--out", index), end="")
    print(run_command("query.py", index, "--ids", "0-1", "-k", "5", "--rerank", "exact"), end="")

    answer = json.loads(run_command("query.py", index, "--ids", "0", "-k", "3", "--format", "jsonl"))
    shown = [("query 0", test_rows[0])]
    shown += [(f"proponent {hit['id']}", train_rows[int(hit["id"])]) for hit in answer["proponents"]]
    shown += [(f"opponent {hit['id']}", train_rows[int(hit["id"])]) for hit in answer["opponents"][:2]]
    print("\n" + draw_digits(shown))

    lines = run_command("query.py", index, "--self-influence", "-k", str(N_TRAIN), "--format", "jsonl").splitlines()
    ranking = [int(json.loads(line)["id"]) for line in lines]
    print("".join(f"{line}\n" for line in lines[:3]) + f"... {len(lines) - 3} more")
    shares = [find_share(ranking, flipped, share) for share in (0.1, 0.2)]
    print(f"\nself-influence: the first 10% of the rows contain {shares[0]:.1%} of the wrong labels,")
    print(f"the first 20% contain {shares[1]:.1%} (random order: 10% and 20%)")

    opened = InfluenceIndex.open(index)
    answers = opened.query(range(6), options=QueryOptions(k=5, rerank="exact"))
    report = write_report(
        answers, runs / f"report-seed{options.seed}.html", opened, "Digits: training rows behind six predictions"
    )
    print(f"\nreport: {report}")


if __name__ == "__main__":
    main()
