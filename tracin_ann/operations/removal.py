"""Removal of training rows from the answers of an index."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from tracin_ann.errors import UsageError, problem
from tracin_ann.store import (
    Manifest,
    check_generation,
    clean_up,
    copy_files,
    generation_number,
    hold_writer_lock,
    make_next_folder,
    publish,
    read_current,
    read_removed_ids,
    read_skipped_rows,
    write_removed,
)


def remove(directory: str | os.PathLike[str], ids: Sequence[int]) -> Manifest:
    """Remove training rows from all later answers, and return the manifest of the new generation.

    The features of removed rows remain on disk until a new index is built, and `train_data` must still contain the
    rows at their positions. If all rows are removed already, there is no new generation.

    Args:
        directory: a finished index.
        ids: positions of the rows in `train_data`.

    Raises:
        UsageError: an id is out of range, `ids` is empty, or no row would be left.
        BusyIndexError: another process is writing the index.
        DamagedIndexError: there is no finished index.
    """
    out = Path(directory)
    manifest = Manifest.read(out)
    with hold_writer_lock(out):
        manifest = read_current(out) or manifest
        n_rows = manifest.build.layout.n_rows
        wrong = [i for i in ids if not 0 <= i < n_rows]
        if wrong or not ids:
            got: object = wrong[0] if wrong else "no ids"
            raise UsageError(problem("bad --ids", got=got, expected=f"0 to {n_rows - 1}", remedy="change --ids"))
        check_generation(out, manifest, deep=True)
        before = read_removed_ids(out, manifest)
        removed = np.union1d(before, np.array(ids, dtype=np.int64))
        if len(np.union1d(removed, read_skipped_rows(out, manifest).row_S)) == n_rows:
            raise UsageError(
                problem("no row would be left", got=f"{n_rows} rows to remove", expected="some", remedy="change --ids")
            )
        if len(removed) == len(before):
            clean_up(out, manifest)
            return manifest
        folder = make_next_folder(out, manifest)
        unchanged = [record for record in manifest.own_files if record != manifest.removed]
        copy_files(out, manifest, folder, unchanged)
        # Curvature matrices are those of the rows that are left, so that their scores have not been measured.
        next_manifest = replace(
            manifest,
            generation=generation_number(folder),
            removed=write_removed(folder, removed),
            score_fidelity=None,
        )
        publish(out, next_manifest)
    return next_manifest
