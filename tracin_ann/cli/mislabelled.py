"""tracin-mislabelled: which training rows look as if their label were wrong, and how many to look at."""

from __future__ import annotations

import click

from tracin_ann.cli.command import command, directory_argument
from tracin_ann.cli.index_options import (
    checkpoints_option,
    filter_options,
    index_options,
    make_row_filter,
    open_index,
    own_ids_option,
)
from tracin_ann.cli.messages import print_note, show_progress
from tracin_ann.cli.output import Sink, check_report_path, html_option, output_options, write_html


@command(
    "tracin-mislabelled runs/mnist -k 50",
    "tracin-mislabelled runs/mnist -k 200 --html suspects.html",
    "tracin-mislabelled runs/mnist --labels digit --where digit=3 --output suspects.csv",
)
@directory_argument
@click.option("--labels", default="label", show_default=True, metavar="COLUMN", help="The column with the labels.")
@click.option("--no-labels", is_flag=True, help="There are none: rank without votes.")
@click.option("-k", default=50, show_default=True, type=click.IntRange(1), help="Rows shown or written.")
@click.option("--neighbours", default=30, show_default=True, type=click.IntRange(1), help="Rows a side that vote.")
@click.option(
    "--by",
    type=click.Choice(["loss-and-votes", "loss", "votes", "self-influence"]),
    help="What rows are ranked by.  [default: loss-and-votes, without labels loss]",
)
@click.option(
    "--asked", default=20_000, show_default=True, type=click.IntRange(1), help="Rows whose neighbours are asked."
)
@click.option(
    "--exact",
    is_flag=True,
    help="True self-influence of every row, computed now; --by tells whether it ranks.",
)
@filter_options
@checkpoints_option
@own_ids_option
@html_option
@output_options
@index_options
def main(directory: str, form: str | None, output: str | None, html: str | None, **options: object) -> None:
    """Rank training rows by how likely their label is wrong, and say what label speaks against it.

    A row's score is its loss, over the checkpoints and counted from the lowest of all rows, times the share of its
    neighbours' vote that is not for its label. Neighbours are the rows whose gradients are most alike and most opposed
    to its own; `speaks_for` is the label that most of them have.
    """
    from tracin_ann.analysis import Suspects, find_mislabelled

    sink = Sink.from_options(form, output, html)
    check_report_path(html)
    index = open_index(directory, options)
    with sink.open(Suspects.FIELDS) as write, show_progress("rows") as progress:
        found = find_mislabelled(
            index,
            None if options["no_labels"] else str(options["labels"]),
            options["k"],  # type: ignore[arg-type]
            options["neighbours"],  # type: ignore[arg-type]
            by=options["by"],  # type: ignore[arg-type]
            asked=options["asked"],  # type: ignore[arg-type]
            checkpoints=options["checkpoints"],  # type: ignore[arg-type]
            exact=bool(options["exact"]),
            rows=make_row_filter(index, options),
            progress=progress,
        )
        write(found)
    write_html(found, html, index, options["checkpoints"])  # type: ignore[arg-type]
    told = found.suspicion
    if told.look_at is None:
        print_note(f"{told.n_rows:,} rows by {told.by}; without labels nobody votes on how many to look at", err=True)
        return
    if not told.look_at:
        print_note(f"no label looks wrong: none of {told.n_asked:,} rows is outvoted by its neighbours", err=True)
        return
    known = "self-influence" if told.by == "self-influence" else "loss"
    asked = "" if told.n_asked == told.n_rows else f" of the {told.n_asked:,} asked"
    more = f" ({len(found):,} are here, -k for more)" if len(found) < told.look_at else ""
    print_note(
        f"look at about the first {told.look_at:,} of {told.n_rows:,} rows{more}: "
        f"{told.n_outvoted:,}{asked} are outvoted by their neighbours, and so many rows have as large a {known}",
        err=True,
    )
