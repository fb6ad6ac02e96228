"""A ResNet-9 of 2.44 million parameters over the images of CIFAR-10; the queries are test images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from benchmarks.common.trained_models import SUBJECTS
from tracin_ann import Task

QUERIES = 200
_TRAINING_ROWS = 10_000


def make_task(data: str, folder: str, rows: int) -> Task:
    """Train the model on the first 10,000 images if necessary, and return the task with this number of rows."""
    subject = replace(SUBJECTS["ResNet-9"], rows=rows, queries=QUERIES)
    train_rows, query_rows = subject.data(Path(data), rows, QUERIES, 0)
    runs = Path(folder) / "runs"
    if not runs.exists():
        runs.mkdir(parents=True)
        subject.train(train_rows[:_TRAINING_ROWS], str(runs), 0)
    return subject.make_task(train_rows, query_rows, str(runs))
