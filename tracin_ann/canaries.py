"""Canaries: feature rows of a few examples, kept to notice that a model's code, loss or data changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from tracin_ann.errors import DamagedIndexError, IndexMismatchError, problem
from tracin_ann.features import FeatureExtractor, FeatureOptions
from tracin_ann.files import atomic_path, hdf5_file, open_regular, own_dataset
from tracin_ann.loading import SideName
from tracin_ann.passes import LoadedModel
from tracin_ann.types import Float32, Int64

FILE = "canaries.h5"
COUNT = 4
TOLERANCE = 1e-2
_DIMENSIONS = 3
_MOST = 2**31
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
        hdf5_file(temporary) as opened,
        h5py.File(opened, "w", libver="earliest") as file,
    ):
        for side in canaries:
            group = file.create_group(side.side)
            group.create_dataset("id", data=side.ids_N, track_times=False)
            group.create_dataset("feature", data=side.feature_CND, track_times=False)


def read_canaries(path: Path) -> tuple[Canaries, ...]:
    """Return the canaries of both sides.

    Raises:
        DamagedIndexError: the file is missing or unreadable.
    """
    try:
        with open_regular(path) as opened, h5py.File(opened, "r") as file:
            return tuple(_read(side, file) for side in _SIDES)
    # What h5py raises depends on which byte of the file is damaged.
    except Exception as error:
        raise DamagedIndexError(
            problem(
                f"{path} cannot be read",
                got=" ".join(f"{type(error).__name__}: {error}".split())[:200],
                expected="the canaries that the build wrote",
                remedy="restore the file, or run tracin-verify --repair",
            )
        ) from error


def _read(side: SideName, file: h5py.File) -> Canaries:
    if not isinstance(file.get(side, getlink=True), h5py.HardLink):
        raise ValueError(f"{side} is no group of this file")
    group = file[side]
    ids, features = own_dataset(group, "id"), own_dataset(group, "feature")
    fine = (ids.dtype.str, features.dtype.str) == ("<i8", "<f4") and (ids.ndim, features.ndim) == (1, _DIMENSIONS)
    if not fine or ids.shape[0] != features.shape[1] or not 0 < ids.shape[0] <= COUNT or features.size > _MOST:
        raise ValueError(f"ids of {ids.shape} and features of {features.shape}")
    return Canaries(side, ids[()], features[()])
