"""Runs of a small model that `RunRecorder` records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from runs import Small, batches, cross_entropy, make_images
from tracin_ann import LossFall, RunRecorder
from tracin_ann.task import read_run_record

ROWS = make_images(12)


def train(
    folder: Path, losses: list[float], *, scheduled: bool = True, **options: Any
) -> tuple[RunRecorder, nn.Module]:
    """Take one step of a small model for each of these losses, which are given to the recorder."""
    torch.manual_seed(0)
    model = Small()
    optimizer = torch.optim.Adam([{"params": model.head.parameters(), "lr": 0.02}, {"params": model.body.parameters()}])
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5 if scheduled else 1.0)
    recorder = RunRecorder(folder, model, optimizer, **options)
    for batch, loss in zip(batches(ROWS * len(losses), 12), losses, strict=False):
        cross_entropy(model, batch).mean().backward()
        optimizer.step()
        scheduler.step()
        recorder.step(torch.tensor(loss))
    return recorder, model


def steps_of(folder: Path) -> list[int]:
    return [checkpoint.step for checkpoint in read_run_record(folder).checkpoints]


def plain(*fractions: float, **options: Any) -> LossFall:
    return LossFall(fractions, smoothing=options.pop("smoothing", 0.0), **options)
