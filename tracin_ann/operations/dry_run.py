"""The plan of a build (`--dry-run`): what it would do, and the time, memory and disk space that it would take."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from tracin_ann.build_job import open_build
from tracin_ann.config import BuildConfig
from tracin_ann.features import BatchSettings, measure_row_seconds
from tracin_ann.gradients import Plan
from tracin_ann.scoring import DimChoice
from tracin_ann.sketch import ParameterKey, make_sketch
from tracin_ann.store import FEATURES, FeatureStore, reject_foreign_files
from tracin_ann.task import Task
from tracin_ann.types import ignore_progress


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
        dim_choice: the choice of D, if it is to be chosen and there is no index yet.
        dim_seconds: `seconds` for each D of its table.
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
    dim_choice: DimChoice | None = None
    dim_seconds: tuple[float, ...] = ()


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
    work = open_build(task, Path(out), config or BuildConfig(), arguments)
    reject_foreign_files(work.out)
    dim_choice = work.choose_dim(ignore_progress, compares=True)
    config = work.config
    with work.runner.model() as model:
        start = work.prepare(model)
        missing = FeatureStore(work.out / FEATURES, start.record.layout).missing(start.trusted_files)
        record = config.agree_on_batches(start.record, len(missing), str(work.out))
        chosen = work.tune(model, record)
        features = config.features(record.spec.rank_one)
        row_seconds = measure_row_seconds(model, features)
        layout = record.layout
        n_rows = layout.n_rows
        size = config.shape(n_rows, layout.n_checkpoints, layout.partition_rows).estimate_size(layout.dim)

        def estimate_seconds(row_seconds: float) -> float:
            read_seconds = _visible_read_seconds(chosen, row_seconds, config.workers)
            return n_rows * layout.n_checkpoints * (row_seconds + read_seconds)

        return BuildPlan(
            rows=n_rows,
            feature_dim=layout.dim * layout.n_checkpoints,
            disk_bytes=size.disk_bytes,
            memory_bytes=max(size.block_bytes + chosen.batch_bytes, size.index_bytes),
            seconds=estimate_seconds(row_seconds),
            row_seconds=row_seconds,
            tuned=chosen,
            index_kind=size.kind,
            index_reason=size.reason,
            gradients=model.engine("train").plan,
            sketches={
                p.name: features.sketch.describe(ParameterKey(config.seed, 0, p.name, p.shape, p.rank_one))
                for p in record.spec.parameters
            },
            frozen=tuple(n for n, _ in model.module.named_parameters() if n not in model.parameters),
            notes=work.runner.loader.notes,
            dim_choice=dim_choice,
            dim_seconds=()
            if dim_choice is None
            else tuple(
                estimate_seconds(
                    measure_row_seconds(model, replace(features, sketch=make_sketch(config.sketch, row.dim)))
                )
                for row in dim_choice.table
            ),
        )


def _visible_read_seconds(chosen: BatchSettings, row_seconds: float, workers: int) -> float:
    """Return the seconds that reading adds to a row; 0 if workers read as fast as features are computed."""
    hidden = workers > 0 and chosen.read_seconds / workers < row_seconds
    return 0.0 if hidden else chosen.read_seconds / max(1, workers)
