"""What a build would do and take, by `--dry-run`: the plan, from the probes and a few timed batches."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np

from tracin_ann.build import BuildConfig, BuildWork, opened
from tracin_ann.features import FeatureExtractor, FeatureOptions
from tracin_ann.passes import LoadedModel
from tracin_ann.plan import Plan
from tracin_ann.search import choose_index
from tracin_ann.sketch import ParameterKey
from tracin_ann.task import Task

_TIMED_BATCHES = 3
_BESIDES_BYTES = 8 + 2 + 4 + 4


@dataclass(frozen=True)
class BuildPlan:
    """What a build would do, by `--dry-run`: nothing is written.

    Attributes:
        rows: N.
        feature_dim: F = C·D.
        disk_bytes: size of the feature files and the index.
        memory_bytes: largest arrays that the build holds at once, the model's own working memory not counted.
        seconds: time for all rows and checkpoints, from a few timed batches.
        index_kind: the search index and why.
        gradients: which step of the ladder serves which parameter.
        sketches: what the sketch does with each parameter.
        frozen: parameters of the model that do not take part.
    """

    rows: int
    feature_dim: int
    disk_bytes: int
    memory_bytes: int
    seconds: float
    index_kind: str
    index_reason: str
    gradients: Plan
    sketches: Mapping[str, str]
    frozen: tuple[str, ...]


def plan(
    task: Task | str,
    out: str | os.PathLike[str],
    config: BuildConfig | None = None,
    *,
    arguments: Mapping[str, str] | None = None,
) -> BuildPlan:
    """Return what `build` with these arguments would do; writes nothing.

    Raises:
        TracinAnnError: whatever `build` would refuse before any work.
    """
    config = config or BuildConfig()
    work = opened(task, Path(out), config, arguments)
    with work.passes.model() as model:
        record, begun = work.prepared(model)
        if begun:
            work.examine(model)
        features = config.features(record.spec.rank_one)
        seconds = _seconds_a_row(work, model, features) * record.spec.train_rows * len(record.spec.checkpoints)
        layout = record.layout
        n_rows, dim = layout.n_rows, layout.dim * layout.n_checkpoints
        choice = choose_index(config.index, n_rows, dim)
        stored = np.dtype(config.dtype).itemsize
        index_bytes = n_rows * dim * 2 if choice.kind == "ivf" else 0
        block_bytes = min(n_rows, layout.partition_rows) * layout.dim * 4 * 3
        return BuildPlan(
            rows=n_rows,
            feature_dim=dim,
            disk_bytes=n_rows * dim * stored + n_rows * layout.n_checkpoints * _BESIDES_BYTES + index_bytes,
            memory_bytes=max(block_bytes, 2 * index_bytes),
            seconds=seconds,
            index_kind=choice.kind,
            index_reason=choice.reason,
            gradients=model.engine("train").plan,
            sketches={
                p.name: work.sketch.describe(ParameterKey(config.seed, 0, p.name, p.shape, p.rank_one))
                for p in record.spec.parameters
            },
            frozen=tuple(n for n, _ in model.module.named_parameters() if n not in model.parameters),
        )


def _seconds_a_row(work: BuildWork, model: LoadedModel, features: FeatureOptions) -> float:
    extractor = FeatureExtractor(model, features)
    n_rows = work.passes.n_rows("train")
    ids = [i % n_rows for i in range(work.config.batch_size)]
    extractor.rows("train", ids)
    times = []
    for _ in range(_TIMED_BATCHES):
        began = perf_counter()
        extractor.rows("train", ids)
        times.append(perf_counter() - began)
    return median(times) / len(ids)
