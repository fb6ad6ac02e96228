"""tracin-duplicates: which training rows have gradients that point the same way."""

from __future__ import annotations

import click

from tracin_ann.cli.command import command, directory_argument, note
from tracin_ann.cli.index_options import (
    checkpoints_option,
    filter_options,
    index_options,
    open_index,
    own_ids_option,
    row_filter,
)
from tracin_ann.cli.output import Sink, output_options
from tracin_ann.cli.parameters import show_progress


@command(
    "tracin-duplicates runs/mnist --threshold .999",
    "tracin-duplicates runs/mnist --threshold .99 --where 'label=3' --output duplicates.csv",
)
@directory_argument
@click.option("--threshold", default=0.999, show_default=True, type=float, help="The least cosine of a pair.")
@filter_options
@checkpoints_option
@own_ids_option
@output_options
@index_options
def main(directory: str, form: str | None, output: str | None, **options: object) -> None:
    """Say which training rows are duplicates as the model sees them: stored features of one direction.

    The cosine is that of whole feature rows, all checkpoints side by side, weighted as in a score. A group is all that
    pairs of at least the threshold link; its lowest cosine is that of any two of its rows. Rows without a gradient are
    left out and counted. Every pair is compared: time grows with the square of the rows.
    """
    from tracin_ann.analysis import Duplicates, find_duplicates

    sink = Sink.of(form, output)
    index = open_index(directory, options)
    with sink.opened(Duplicates.FIELDS) as write, show_progress("units") as progress:
        found = find_duplicates(
            index,
            options["threshold"],  # type: ignore[arg-type]
            row_filter(index, options),
            checkpoints=options["checkpoints"],  # type: ignore[arg-type]
            progress=progress,
        )
        write(found)
    extent, n_groups = found.extent, len(found.groups)
    groups = "1 group" if n_groups == 1 else f"{n_groups:,} groups"
    zero = f"; {extent.n_zero:,} without a gradient left out" if extent.n_zero else ""
    note(f"{groups}, {len(found):,} of {extent.n_rows:,} rows, cosine {extent.threshold:g} or more{zero}", err=True)
