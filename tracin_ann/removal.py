"""Rows taken out of the answers: their ids are kept with the index, from one generation to the next."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from tracin_ann.errors import DamagedIndexError, UsageError, problem
from tracin_ann.files import atomic_write, save_array
from tracin_ann.generations import carried, current, folder_of, generation_of, next_folder, published, settled
from tracin_ann.locks import writing
from tracin_ann.manifest import Manifest, record_of
from tracin_ann.types import Int64

FILE = "removed.npy"


def remove(directory: str | os.PathLike[str], ids: Sequence[int]) -> Manifest:
    """Take training rows out of every answer from now on; return the current generation's manifest.

    Their features stay on disk until a new index is built, and `train_data` must keep them in their places. Where
    all were removed before, nothing changes.

    Args:
        directory: of a finished index.
        ids: rows of train_data.

    Raises:
        UsageError: an id is out of range, there is none, or no row would be left.
        BusyIndexError: another process is writing the index.
        DamagedIndexError: there is no finished index.
    """
    out = Path(directory)
    manifest = Manifest.read(out)
    with writing(out):
        manifest = current(out) or manifest
        n_rows = manifest.build.layout.n_rows
        wrong = [i for i in ids if not 0 <= i < n_rows]
        if wrong or not ids:
            got: object = wrong[0] if wrong else "no ids"
            raise UsageError(problem("bad --ids", got=got, expected=f"0 to {n_rows - 1}", remedy="change --ids"))
        before = removed_ids(out, manifest)
        removed = np.union1d(before, np.array(ids, dtype=np.int64))
        if len(removed) == n_rows:
            raise UsageError(
                problem("no row would be left", got=f"{n_rows} rows to remove", expected="some", remedy="change --ids")
            )
        if len(removed) == len(before):
            settled(out, manifest)
            return manifest
        folder = next_folder(out, manifest)
        kept = [record for record in manifest.besides if record != manifest.removed]
        carried(out, manifest, folder, kept)
        with atomic_write(folder / FILE) as file:
            save_array(file, removed)
        made = replace(manifest, generation=generation_of(folder), removed=record_of(folder / FILE))
        published(out, made)
    return made


def removed_ids(directory: Path, manifest: Manifest) -> Int64:
    """Return the ids of the removed rows, rising.

    Raises:
        DamagedIndexError: their file is missing or cannot be read.
    """
    if manifest.removed is None:
        return np.zeros(0, np.int64)
    path = folder_of(directory, manifest.generation) / manifest.removed.name
    try:
        with path.open("rb") as file:
            ids: Int64 = np.load(file, allow_pickle=False)
        n_rows = manifest.build.layout.n_rows
        if ids.dtype != np.int64 or ids.ndim != 1 or (np.diff(ids, prepend=-1) <= 0).any() or (ids >= n_rows).any():
            raise ValueError(f"{ids.dtype} of shape {ids.shape}")
    except Exception as error:
        raise DamagedIndexError(
            problem(
                f"cannot read {path}",
                got=f"{type(error).__name__}: {error}",
                expected="the ids of removed rows",
                remedy="restore the file, or build a new index",
            )
        ) from error
    return ids
