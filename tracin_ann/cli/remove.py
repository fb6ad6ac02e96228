"""tracin-remove: remove training rows from the answers of an index."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import click

from tracin_ann.cli.command import command, directory_argument
from tracin_ann.cli.imports import pause_collector
from tracin_ann.cli.messages import print_note
from tracin_ann.cli.parameters import IdRanges, Positions


@command("tracin-remove runs/mnist --ids 17,40-59", "tracin-remove runs/mnist --ids @bad-rows.txt")
@directory_argument
@click.option("--ids", type=IdRanges(), required=True, help="Rows of train_data, such as 0-9,17.")
def main(directory: str, ids: Positions) -> None:
    """Remove training rows from all future answers of the index in DIR.

    Processes that have opened the index continue to use it unchanged. The features of the rows stay on disk until a new
    index is built, and train_data must keep the rows at their positions.
    """
    with pause_collector():
        from tracin_ann.operations import remove
        from tracin_ann.store import Manifest, read_removed_ids, take_lease

    n_rows = Manifest.read(Path(directory)).build.layout.n_rows
    remove(directory, ids.expand(n_rows, "bad --ids"))
    # Read again: another process may have changed the index in the meantime.
    manifest, lease = take_lease(Path(directory))
    with closing(lease):
        n_removed, n_rows = len(read_removed_ids(Path(directory), manifest)), manifest.build.layout.n_rows
    print_note(f"{directory}: {n_removed:,} of {n_rows:,} rows removed; generation {manifest.generation}")
