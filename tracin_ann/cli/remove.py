"""tracin-remove: take training rows out of an index's answers."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import click

from tracin_ann.cli.command import command, directory_argument, note
from tracin_ann.cli.parameters import IdRanges, Positions


@command("tracin-remove runs/mnist --ids 17,40-59", "tracin-remove runs/mnist --ids @bad-rows.txt")
@directory_argument
@click.option("--ids", type=IdRanges(), required=True, help="Rows of train_data, such as 0-9,17.")
def main(directory: str, ids: Positions) -> None:
    """Take training rows out of every answer of the index in DIR, from now on.

    Answers under way keep the index as they opened it. The rows' features stay on disk until a new index is built,
    and train_data must keep the rows in their places.
    """
    from tracin_ann.operations import remove
    from tracin_ann.store import Manifest, read_removed_ids, take_lease

    n_rows = Manifest.read(Path(directory)).build.layout.n_rows
    remove(directory, ids.within(n_rows, "bad --ids"))
    # As it is now: another writer may already have been here.
    manifest, lease = take_lease(Path(directory))
    with closing(lease):
        n_removed, n_rows = len(read_removed_ids(Path(directory), manifest)), manifest.build.layout.n_rows
    note(f"{directory}: {n_removed:,} of {n_rows:,} rows are removed; generation {manifest.generation}")
