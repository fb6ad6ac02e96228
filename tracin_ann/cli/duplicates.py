"""tracin-duplicates: find groups of training rows with nearly parallel gradients."""

from __future__ import annotations

import click

from tracin_ann.cli.command import command, directory_argument
from tracin_ann.cli.imports import pause_collector
from tracin_ann.cli.index_options import (
    checkpoints_option,
    filter_options,
    index_options,
    make_row_filter,
    open_index,
    own_ids_option,
)
from tracin_ann.cli.messages import format_count, print_note, show_progress
from tracin_ann.cli.output import Sink, output_options


@command(
    "tracin-duplicates runs/mnist --threshold .999",
    "tracin-duplicates runs/mnist --threshold .99 --where 'label=3' --output duplicates.csv",
)
@directory_argument
@click.option(
    "--threshold", default=0.999, show_default=True, type=float, help="Minimum cosine of a pair of duplicates."
)
@filter_options
@checkpoints_option
@own_ids_option
@output_options
@index_options
def main(directory: str, form: str | None, output: str | None, **options: object) -> None:
    """Find groups of training rows whose stored features have nearly the same direction.

    The cosine is computed over all checkpoints together, weighted as in a score. Pairs with a cosine of at least the
    threshold are linked, and linked rows form a group; its lowest cosine is the minimum over all pairs in the group.
    Rows with a zero gradient are excluded and counted. Every pair is compared: the time is quadratic in the number of
    rows.
    """
    with pause_collector():
        from tracin_ann.analysis import Duplicates, find_duplicates

    sink = Sink.from_options(form, output)
    index = open_index(directory, options)
    with sink.open(Duplicates.FIELDS) as write, show_progress("units") as progress:
        duplicates = find_duplicates(
            index,
            options["threshold"],  # type: ignore[arg-type]
            make_row_filter(index, options),
            checkpoints=options["checkpoints"],  # type: ignore[arg-type]
            progress=progress,
        )
        write(duplicates)
    extent, groups = duplicates.extent, format_count(len(duplicates.groups), "group")
    rows = f"{len(duplicates):,} of {extent.n_rows:,} rows, cosine at least {extent.threshold:g}"
    zero = f"; {format_count(extent.n_zero, 'row')} with a zero gradient excluded" if extent.n_zero else ""
    print_note(f"duplicates: {groups}, {rows}{zero}", err=True)
