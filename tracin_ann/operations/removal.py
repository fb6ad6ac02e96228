"""Rows taken out of the answers: their ids are kept with the index, from one generation to the next."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from tracin_ann.errors import UsageError, problem
from tracin_ann.store import (
    Manifest,
    carried,
    check,
    current,
    generation_of,
    next_folder,
    published,
    removed_ids,
    settled,
    skipped_rows,
    write_removed,
    writing,
)


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
        check(out, manifest, deep=True)
        before = removed_ids(out, manifest)
        removed = np.union1d(before, np.array(ids, dtype=np.int64))
        if len(np.union1d(removed, skipped_rows(out, manifest).row_S)) == n_rows:
            raise UsageError(
                problem("no row would be left", got=f"{n_rows} rows to remove", expected="some", remedy="change --ids")
            )
        if len(removed) == len(before):
            settled(out, manifest)
            return manifest
        folder = next_folder(out, manifest)
        kept = [record for record in manifest.besides if record != manifest.removed]
        carried(out, manifest, folder, kept)
        made = replace(manifest, generation=generation_of(folder), removed=write_removed(folder, removed))
        published(out, made)
    return made
