"""Canaries: stored feature rows of a few examples, which detect changes of the model's code, the loss or the data.

Shapes: n canaries of one side, C checkpoints, D sketch dimension.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import h5py
import numpy as np

from tracin_ann.choices import SideName
from tracin_ann.errors import DamagedIndexError, IndexMismatchError, problem
from tracin_ann.features.extractor import FeatureExtractor, FeatureOptions
from tracin_ann.features.loaded_model import LoadedModel
from tracin_ann.files import (
    atomic_path,
    locate_own_dataset,
    open_own_dataset,
    open_own_group,
    open_regular,
    read_dataset,
    report_damage,
    write_hdf5,
)
from tracin_ann.store import Manifest, check_file, generation_folder
from tracin_ann.types import Float32, Int64

CANARY_FILE = "canaries.h5"
N_CANARIES = 4
"""Largest number of canaries of each side."""
TOLERANCE = 1e-2
"""Largest difference of a recomputed canary, relative to its norm, that rounding explains."""
_ID, _FEATURE = np.dtype("<i8"), np.dtype("<f4")
_SIDES: tuple[SideName, ...] = ("train", "query")


@dataclass(frozen=True)
class Canaries:
    """The canaries of one side.

    Attributes:
        side: the data set.
        ids_N: row ids [n], ascending.
        feature_CND: features [C, n, D] in float32, scaled by √η.
    """

    side: SideName
    ids_N: Int64
    feature_CND: Float32

    def check(
        self,
        extractor: FeatureExtractor,
        checkpoint: int,
        where: str,
        rows: Sequence[tuple[SideName, int]] | None = None,
    ) -> dict[tuple[SideName, int], float]:
        """Recompute the canaries at a checkpoint, compare them with the stored ones, and return their losses.

        Args:
            extractor: the extractor of the task at the checkpoint.
            checkpoint: the position of the checkpoint.
            where: the directory of the index, for the message.
            rows: side and row of those that are compared; None: all.

        Raises:
            IndexMismatchError: a canary differs by more than rounding.
        """
        chosen = [i for i, row in enumerate(self.ids_N.tolist()) if rows is None or (self.side, row) in rows]
        if not chosen:
            return {}
        found = extractor.rows(self.side, self.ids_N[chosen].tolist())
        built_ND = self.feature_CND[checkpoint]
        norms = np.linalg.norm(built_ND.astype(np.float64), axis=1)
        floor = 1e-3 * float(norms.max())
        for i, task_D in zip(chosen, found.feature_ND, strict=True):
            change = float(np.linalg.norm(built_ND[i].astype(np.float64) - task_D))
            difference = change / max(float(norms[i]), floor, 1e-30)
            if difference > TOLERANCE:
                raise IndexMismatchError(
                    problem(
                        f"the gradient of {self.side} row {self.ids_N[i]} has changed since index {where} was built",
                        got=f"a relative difference of {difference:.2g} at checkpoint {checkpoint}",
                        expected=f"at most {TOLERANCE:g}",
                        remedy="restore the task's model code, loss and data, or build a new index",
                    )
                )
        return {(self.side, int(row)): float(loss) for row, loss in zip(found.ids_N, found.loss_N, strict=True)}


def check_canaries(model: LoadedModel, features: FeatureOptions, canaries: Sequence[Canaries], where: str) -> None:
    """Check that the task still computes the rows of a finished index, before new rows are added to it.

    Raises:
        IndexMismatchError: a canary of the training data differs.
    """
    for train in (each for each in canaries if each.side == "train"):
        for checkpoint in range(len(train.feature_CND)):
            model.load(checkpoint)
            train.check(FeatureExtractor(model, features), checkpoint, where)


def canary_ids(n_rows: int, without: Int64 | None = None) -> list[int]:
    """Return at most 4 row ids, spread evenly over n rows except those in `without`."""
    rows = range(n_rows) if without is None or not len(without) else np.setdiff1d(np.arange(n_rows), without).tolist()
    return sorted({rows[round(i * (len(rows) - 1) / (N_CANARIES - 1))] for i in range(N_CANARIES if len(rows) else 0)})


def write_canaries(path: Path, canaries: Sequence[Canaries]) -> None:
    """Write the canaries of both sides, atomically and durably."""
    with (
        atomic_path(path) as temporary,
        write_hdf5(temporary) as opened,
        h5py.File(opened, "w", libver="earliest") as file,
    ):
        for side in canaries:
            group = file.create_group(side.side)
            group.create_dataset("id", data=side.ids_N, track_times=False)
            group.create_dataset("feature", data=side.feature_CND, track_times=False)


def read_canaries(path: Path, n_rows: int, n_checkpoints: int, dim: int) -> tuple[Canaries, ...]:
    """Return the canaries of both sides, checked against the shape of the index.

    Args:
        path: the canary file.
        n_rows: number of training rows of the index.
        n_checkpoints: C.
        dim: D.

    Raises:
        DamagedIndexError: the file is missing, unreadable or does not belong to the index.
        OSError: the system cannot read the file.
    """
    expected = "the canaries written by the build"
    with report_damage(path, expected, "restore the file, or run tracin-verify --repair"), open_regular(path) as opened:
        found = tuple(_read_side(side, opened, (n_checkpoints, dim)) for side in _SIDES)
        if found[0].ids_N[-1] >= n_rows:
            raise ValueError(f"a canary of train row {found[0].ids_N[-1]} in an index of {n_rows} rows")
        return found


def _read_side(side: SideName, opened: BinaryIO, shape: tuple[int, int]) -> Canaries:
    size = os.fstat(opened.fileno()).st_size
    with h5py.File(opened, "r") as file:
        group = open_own_group(file.id, side)
        n_ids = math.prod(open_own_dataset(group, "id").shape or ())
        if not 0 < n_ids <= N_CANARIES:
            raise ValueError(f"{n_ids} canaries of {side}_data")
        id_shape, feature_shape = (n_ids,), (shape[0], n_ids, shape[1])
        id_offset = locate_own_dataset(group, "id", id_shape, _ID, size)
        feature_offset = locate_own_dataset(group, "feature", feature_shape, _FEATURE, size)
    ids_N: Int64 = read_dataset(opened, id_offset, id_shape, _ID)
    feature_CND: Float32 = read_dataset(opened, feature_offset, feature_shape, _FEATURE)
    if (np.diff(ids_N, prepend=-1) <= 0).any() or not np.isfinite(feature_CND).all():
        raise ValueError(f"canaries of {side}_data with unsorted or negative row ids, or with non-finite features")
    return Canaries(side, ids_N, feature_CND)


def read_intact_canaries(directory: Path, manifest: Manifest) -> tuple[Canaries, ...]:
    """Return the canaries of the current generation; an empty tuple if their file is damaged."""
    folder = generation_folder(directory, manifest.generation)
    try:
        check_file(folder, manifest.canaries, deep=True)
        return read_generation_canaries(folder, manifest)
    except DamagedIndexError:
        return ()


def read_generation_canaries(folder: Path, manifest: Manifest) -> tuple[Canaries, ...]:
    """Return the canaries in the directory of a generation.

    Raises:
        DamagedIndexError: their file is missing, damaged or does not belong to the index.
    """
    layout = manifest.build.layout
    return read_canaries(folder / manifest.canaries.name, layout.n_rows, layout.n_checkpoints, layout.dim)
