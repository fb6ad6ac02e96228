"""A ResNet-9 of half the usual width, 0.61 million parameters, over the images of CIFAR-10; queries are test images."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from benchmarks.common import models
from benchmarks.common.trained_models import SUBJECTS, Training
from tracin_ann import Task

QUERIES = 400
_IMAGES, _TRAINING_ROWS = 50_000, 10_000


def make_task(data: str, folder: str, rows: int) -> Task:
    """Train the model on the first 10,000 images if necessary, and return the task with this number of rows."""
    make = partial(models.make_resnet9, width=32)
    subject = replace(SUBJECTS["ResNet-9"], make=make, training=Training(0.01, 25, (1, 3)))
    train_rows, query_rows = subject.data(Path(data), _IMAGES, QUERIES, 0)
    runs = Path(folder) / "runs"
    if not runs.exists():
        runs.mkdir(parents=True)
        subject.train(train_rows[:_TRAINING_ROWS], str(runs), 0)
    return subject.make_task(train_rows[:rows], query_rows, str(runs))
