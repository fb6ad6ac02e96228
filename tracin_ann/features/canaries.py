"""Canaries: feature rows of a few examples, kept to notice that a model's code, loss or data changed."""

from __future__ import annotations

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
from tracin_ann.features.passes import LoadedModel
from tracin_ann.files import atomic_path, open_plain, report_damage, require_own_dataset, require_own_object, write_hdf5
from tracin_ann.store import Manifest, check_file, generation_folder
from tracin_ann.types import Float32, Int64

CANARY_FILE = "canaries.h5"
COUNT = 4
TOLERANCE = 1e-2
_SIDES: tuple[SideName, ...] = ("train", "query")


@dataclass(frozen=True)
class Canaries:
    """Rows of one side: ids [n], features [C, n, D] in float32 with √η."""

    side: SideName
    ids_N: Int64
    feature_CND: Float32

    def refuse_unlike(self, extractor: FeatureExtractor, checkpoint: int, where: str) -> None:
        """Compute the rows again at a checkpoint and refuse any that differ.

        Raises:
            IndexMismatchError: a row is further from the stored one than rounding explains.
        """
        asked_ND = extractor.rows(self.side, self.ids_N.tolist()).feature_ND
        built_ND = self.feature_CND[checkpoint]
        norms = np.linalg.norm(built_ND.astype(np.float64), axis=1)
        floor = 1e-3 * float(norms.max())
        for i, (built, asked, norm) in enumerate(zip(built_ND, asked_ND, norms, strict=True)):
            off = float(np.linalg.norm(built.astype(np.float64) - asked)) / max(float(norm), floor, 1e-30)
            if off > TOLERANCE:
                raise IndexMismatchError(
                    problem(
                        f"{self.side} row {self.ids_N[i]} has another gradient than when index {where} was built",
                        got=f"a feature at checkpoint {checkpoint} that is {off:.2g} of its norm away",
                        expected=f"at most {TOLERANCE:g}",
                        remedy="restore the task's model code, loss and data, or build a new index",
                    )
                )


def refuse_changed(model: LoadedModel, features: FeatureOptions, canaries: Sequence[Canaries], where: str) -> None:
    """Refuse to put rows beside those of a finished index that this model and data would make otherwise.

    Raises:
        IndexMismatchError: a canary among the training rows shows it.
    """
    for train in (kept for kept in canaries if kept.side == "train"):
        for checkpoint in range(len(train.feature_CND)):
            model.load(checkpoint)
            train.refuse_unlike(FeatureExtractor(model, features), checkpoint, where)


def canary_ids(n_rows: int, without: Int64 | None = None) -> list[int]:
    """Return a few ids spread over n rows, or over those of them that are not left out; of no rows, none."""
    rows = range(n_rows) if without is None or not len(without) else np.setdiff1d(np.arange(n_rows), without).tolist()
    return sorted({rows[round(i * (len(rows) - 1) / (COUNT - 1))] for i in range(COUNT if len(rows) else 0)})


def write_canaries(path: Path, canaries: Sequence[Canaries]) -> None:
    """Write the canaries of both sides, durably."""
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
    """Return the canaries of both sides of an index of so many training rows and checkpoints of D dimensions.

    Raises:
        DamagedIndexError: the file is missing, unreadable or another index's.
        OSError: the system cannot read it.
    """
    expected = "the canaries that the build wrote"
    with report_damage(path, expected, "restore the file, or run tracin-verify --repair"), open_plain(path) as opened:
        found = tuple(_read(side, opened, (n_checkpoints, dim)) for side in _SIDES)
        if found[0].ids_N[-1] >= n_rows:
            raise ValueError(f"row {found[0].ids_N[-1]} of {n_rows}")
        return found


def _read(side: SideName, opened: BinaryIO, shape: tuple[int, int]) -> Canaries:
    size = os.fstat(opened.fileno()).st_size
    with h5py.File(opened, "r") as file:
        group = require_own_object(file, side, h5py.Group)
        n_ids = require_own_object(group, "id", h5py.Dataset).size
        if not 0 < n_ids <= COUNT:
            raise ValueError(f"{n_ids} canaries of {side}_data")
        ids_N: Int64 = require_own_dataset(group, "id", (n_ids,), "<i8", size)[()]
        feature_CND: Float32 = require_own_dataset(group, "feature", (shape[0], n_ids, shape[1]), "<f4", size)[()]
    if (np.diff(ids_N, prepend=-1) <= 0).any() or not np.isfinite(feature_CND).all():
        raise ValueError(f"canaries of {side}_data that are no rows, or not finite")
    return Canaries(side, ids_N, feature_CND)


def read_kept_canaries(directory: Path, manifest: Manifest) -> tuple[Canaries, ...]:
    """Return a generation's canaries, or none where their file is damaged."""
    folder = generation_folder(directory, manifest.generation)
    try:
        check_file(folder, manifest.canaries, deep=True)
        return read_generation_canaries(folder, manifest)
    except DamagedIndexError:
        return ()


def read_generation_canaries(folder: Path, manifest: Manifest) -> tuple[Canaries, ...]:
    """Return the canaries in a generation's directory.

    Raises:
        DamagedIndexError: their file is missing, damaged or another index's.
    """
    layout = manifest.build.layout
    return read_canaries(folder / manifest.canaries.name, layout.n_rows, layout.n_checkpoints, layout.dim)
