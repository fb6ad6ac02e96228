"""tracin-mislabelled: training rows whose label is probably wrong, and how many of them to check."""

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
from tracin_ann.cli.output import Sink, expect_report, html_option, output_options, write_page
from tracin_ann.cli.parameters import show_progress


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
@click.option("--asked", default=20_000, show_default=True, type=click.IntRange(1), help="Rows whose neighbours vote.")
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
    """Rank training rows by how likely their label is wrong, and suggest another label for each.

    The score of a row is its loss, the mean over the checkpoints counted from the lowest of all rows, times the share
    of its neighbours' vote that is not for its label. Neighbours are the rows with the most similar and the most
    opposed gradients. `suggested_label` is the best-supported label other than the label of the row, and `support` is
    its share of the support of all labels.
    """
    from tracin_ann.analysis import Suspects, find_mislabelled

    sink = Sink.of(form, output, html)
    expect_report(html)
    index = open_index(directory, options)
    with sink.opened(Suspects.FIELDS) as write, show_progress("rows") as progress:
        found = find_mislabelled(
            index,
            None if options["no_labels"] else str(options["labels"]),
            options["k"],  # type: ignore[arg-type]
            options["neighbours"],  # type: ignore[arg-type]
            by=options["by"],  # type: ignore[arg-type]
            asked=options["asked"],  # type: ignore[arg-type]
            checkpoints=options["checkpoints"],  # type: ignore[arg-type]
            exact=bool(options["exact"]),
            rows=row_filter(index, options),
            progress=progress,
        )
        write(found)
    write_page(found, html, index, options["checkpoints"])  # type: ignore[arg-type]
    estimate = found.suspicion
    if estimate.look_at is None:
        note(
            f"{estimate.n_rows:,} rows by {estimate.by}; without labels there is no estimate of how many to look at",
            err=True,
        )
        return
    if not estimate.look_at:
        note(f"no wrong labels found: none of {estimate.n_asked:,} rows is outvoted by its neighbours", err=True)
        return
    known = "self-influence" if estimate.by == "self-influence" else "loss"
    asked = "" if estimate.n_asked == estimate.n_rows else f" of the {estimate.n_asked:,} with a vote"
    more = f" ({len(found):,} are here, -k for more)" if len(found) < estimate.look_at else ""
    note(
        f"look at about the first {estimate.look_at:,} of {estimate.n_rows:,} rows{more}: "
        f"{estimate.n_outvoted:,}{asked} are outvoted by their neighbours, and this many rows have as large a {known}",
        err=True,
    )
