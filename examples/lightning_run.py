"""A run of Lightning: a small CNN on scikit-learn's digits, from its run folder to queries in three lines.

`python examples/lightning_run.py` takes a minute and needs the extras `lightning` and `examples`. TracInCallback saves
checkpoints while the loss falls, and records their learning rates. To query the index afterwards: `tracin-query
runs/lightning/index --ids 0-4`.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from tracin_ann import Description, InfluenceIndex, QueryOptions, Task, TracInCallback, build
from tracin_ann.report import write_report

EPOCHS, N_TRAIN = 6, 1437
Row = tuple[torch.Tensor, int]

# The task: the run folder, the data and the loss of each example.


def loss(net: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(net(batch[0]), batch[1], reduction="none")


def describe(row: Row) -> Description:
    return Description(text=f"a {row[1]}", image=row[0])


def task(out: str = "runs/lightning") -> Task:
    rows = data()
    return Task.from_lightning(Net, out, rows[:N_TRAIN], rows[N_TRAIN:], loss=loss, describe=describe)


# Training: any LightningModule.


def data() -> list[Row]:
    pixels, labels = load_digits(return_X_y=True)
    return [
        (torch.tensor(p / 16, dtype=torch.float32).view(1, 8, 8), int(y)) for p, y in zip(pixels, labels, strict=True)
    ]


class Net(lightning.LightningModule):
    def __init__(self, width: int = 16, rate: float = 4e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.body = nn.Sequential(
            *(nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.Flatten()),
        )
        self.head = nn.Linear(32 * width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        return loss(self, batch).mean()

    def configure_optimizers(self) -> Any:
        rate = self.hparams["rate"]
        groups = [{"params": self.body.parameters(), "lr": rate / 2}, {"params": self.head.parameters()}]
        optimizer = torch.optim.AdamW(groups, lr=rate)
        n_steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def train(out: str) -> Net:
    shutil.rmtree(out, ignore_errors=True)
    lightning.seed_everything(0, verbose=False)
    net = Net()
    trainer = lightning.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        callbacks=[TracInCallback(folder=out)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(net, torch.utils.data.DataLoader(data()[:N_TRAIN], 32, shuffle=True))
    return net.eval()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", default="runs/lightning", help="directory for checkpoints, index and report")
    out = parser.parse_args(arguments).out

    net = train(out)
    images, labels = torch.utils.data.default_collate(data()[N_TRAIN:])
    mistakes = (net(images).argmax(1) != labels).nonzero().flatten().tolist()
    checkpoints = task(out).checkpoints
    print(f"trained on {N_TRAIN} digits; {len(mistakes)} of {len(labels)} test digits are classified wrongly")
    print(f"{len(checkpoints)} checkpoints: {', '.join(Path(c.path).stem for c in checkpoints)}")

    build(f"{Path(__file__)}:task", f"{out}/index", arguments={"out": out})
    index = InfluenceIndex.open(f"{out}/index")
    answers = index.query((mistakes or [0])[:3], options=QueryOptions(k=3, rerank="exact"))
    for answer in answers:
        print(f"\ntest digit {answer.query}, {index.describe('query', answer.members[0]).text}")
        for hit in answer.hits:
            print(f"  {hit.score:+9.3f}  {hit.id}, {index.describe('train', hit.row).text}")
    print(f"\nreport: {write_report(answers, f'{out}/report.html', index, 'Training digits behind errors')}")


if __name__ == "__main__":
    main()
