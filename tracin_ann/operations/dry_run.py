"""The plan of a build (`--dry-run`): what it would do, and the time, memory and disk space that it would take."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tracin_ann.build import open_build
from tracin_ann.config import BuildConfig
from tracin_ann.features import BatchSettings, measure_row_seconds
from tracin_ann.gradients import Plan
from tracin_ann.search import estimate_bytes, expect_index
from tracin_ann.sketch import ParameterKey
from tracin_ann.store import FEATURES, FeatureStore, reject_foreign_files
from tracin_ann.task import Task

# Bytes of a row's columns in a feature file: id, exponent, squared norm, loss.
_COLUMN_BYTES = 8 + 2 + 8 + 4


@dataclass(frozen=True)
class BuildPlan:
    """The plan of a build.

    Attributes:
        rows: N.
        feature_dim: F = C·D.
        disk_bytes: size of the feature files and the index.
        memory_bytes: largest arrays in memory at the same time, including a batch's activations, without weights.
        seconds: time for all rows and checkpoints, estimated from a few timed batches.
        row_seconds: time for one row at one checkpoint, without reading the row.
        tuned: batch size and memory format.
        index_kind: kind of search index; `auto` if the build chooses it by the features.
        index_reason: why this kind is chosen.
        gradients: the gradient method of each parameter.
        sketches: how the sketch projects each parameter's gradients.
        frozen: parameters of the model whose gradients are not used.
        notes: how checkpoint files that are not plain state_dicts are read, one line each.
    """

    rows: int
    feature_dim: int
    disk_bytes: int
    memory_bytes: int
    seconds: float
    row_seconds: float
    tuned: BatchSettings
    index_kind: str
    index_reason: str
    gradients: Plan
    sketches: Mapping[str, str]
    frozen: tuple[str, ...]
    notes: tuple[str, ...] = ()


def plan(
    task: Task | str,
    out: str | os.PathLike[str],
    config: BuildConfig | None = None,
    *,
    arguments: Mapping[str, str] | None = None,
) -> BuildPlan:
    """Return what `build` with these arguments would do; writes nothing.

    Raises:
        TracinAnnError: every error that `build` raises before it starts to compute features.
    """
    config = config or BuildConfig()
    work = open_build(task, Path(out), config, arguments)
    with work.runner.model() as model:
        reject_foreign_files(work.out)
        start = work.prepare(model)
        missing = FeatureStore(work.out / FEATURES, start.record.layout).missing(start.trusted_files)
        record = config.agree_on_batches(start.record, len(missing), str(work.out))
        chosen = work.tune(model, record)
        row_seconds = measure_row_seconds(model, config.features(record.spec.rank_one))
        layout = record.layout
        n_rows, dim = layout.n_rows, layout.dim * layout.n_checkpoints
        choice = expect_index(config.index, n_rows, dim)
        stored = np.dtype(config.dtype).itemsize
        index_bytes = estimate_bytes(config.index, n_rows, dim, config.codes)
        block_bytes = min(n_rows, layout.partition_rows) * layout.dim * 4 * 3
        return BuildPlan(
            rows=n_rows,
            feature_dim=dim,
            disk_bytes=n_rows * dim * stored + n_rows * layout.n_checkpoints * _COLUMN_BYTES + index_bytes,
            memory_bytes=max(block_bytes + chosen.batch_bytes, 2 * index_bytes),
            seconds=n_rows
            * layout.n_checkpoints
            * (row_seconds + _visible_read_seconds(chosen, row_seconds, config.workers)),
            row_seconds=row_seconds,
            tuned=chosen,
            index_kind=choice.kind,
            index_reason=choice.reason,
            gradients=model.engine("train").plan,
            sketches={
                p.name: work.sketch.describe(ParameterKey(config.seed, 0, p.name, p.shape, p.rank_one))
                for p in record.spec.parameters
            },
            frozen=tuple(n for n, _ in model.module.named_parameters() if n not in model.parameters),
            notes=work.runner.loader.notes,
        )


def _visible_read_seconds(chosen: BatchSettings, row_seconds: float, workers: int) -> float:
    """Return the seconds that reading adds to a row; 0 if workers read as fast as features are computed."""
    hidden = workers > 0 and chosen.read_seconds / workers < row_seconds
    return 0.0 if hidden else chosen.read_seconds / max(1, workers)
