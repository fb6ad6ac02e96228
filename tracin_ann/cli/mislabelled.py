"""tracin-mislabelled: training rows whose label is probably wrong, and how many of them to check."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from tracin_ann.choices import CURVATURES
from tracin_ann.cli.command import command, directory_argument
from tracin_ann.cli.imports import pause_collector
from tracin_ann.cli.index_options import (
    checkpoints_option,
    damping_option,
    filter_options,
    index_options,
    make_row_filter,
    open_index,
    own_ids_option,
)
from tracin_ann.cli.messages import print_note, show_progress
from tracin_ann.cli.output import Sink, check_report_path, html_option, output_options, write_html

if TYPE_CHECKING:
    from tracin_ann.analysis import Suspects


@command(
    "tracin-mislabelled runs/mnist -k 50",
    "tracin-mislabelled runs/mnist -k 200 --html suspects.html",
    "tracin-mislabelled runs/mnist --labels digit --where digit=3 --output suspects.csv",
)
@directory_argument
@click.option("--labels", default="label", show_default=True, metavar="COLUMN", help="Column with the labels.")
@click.option("--no-labels", is_flag=True, help="Rank without labels and votes.")
@click.option("-k", default=50, show_default=True, type=click.IntRange(1), help="Rows to print or write.")
@click.option(
    "--neighbours",
    default=30,
    show_default=True,
    type=click.IntRange(1),
    help="Neighbours that vote, among proponents and among opponents.",
)
@click.option(
    "--by",
    type=click.Choice(["loss-and-votes", "loss", "votes", "self-influence"]),
    help="Ranking criterion.  [default: loss-and-votes; with --no-labels, loss]",
)
@click.option(
    "--asked", default=20_000, show_default=True, type=click.IntRange(1), help="Number of rows whose neighbours vote."
)
@click.option(
    "--exact",
    is_flag=True,
    help="Compute the exact self-influence of every row; rank by it with --by self-influence.",
)
@click.option(
    "--score",
    default="tracin",
    show_default=True,
    type=click.Choice(["tracin", *CURVATURES]),
    help="Score of self-influence; with a curvature matrix, it is a leverage.",
)
@damping_option
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
    with pause_collector():
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
            score=options["score"],  # type: ignore[arg-type]
            damping=options["damping"],  # type: ignore[arg-type]
            progress=progress,
        )
        write(found)
    write_html(found, html, index, options["checkpoints"])  # type: ignore[arg-type]
    print_note(f"estimate: {_describe_estimate(found)}", err=True)


def _describe_estimate(suspects: Suspects) -> str:
    """Return in one line how many rows to check, and why."""
    estimate = suspects.suspicion
    if estimate.look_at is None:
        return f"none without labels; {estimate.n_rows:,} rows ranked by {estimate.by}"
    if not estimate.look_at:
        return f"none of {estimate.n_asked:,} rows is outvoted by its neighbours"
    known = "self-influence" if estimate.by == "self-influence" else "loss"
    asked = "" if estimate.n_asked == estimate.n_rows else f" of the {estimate.n_asked:,} with a vote"
    more = f" ({len(suspects):,} are listed, -k lists more)" if len(suspects) < estimate.look_at else ""
    return (
        f"check about the first {estimate.look_at:,} of {estimate.n_rows:,} rows{more}; "
        f"{estimate.n_outvoted:,}{asked} are outvoted by their neighbours, "
        f"about {estimate.look_at:,} have as large a {known}"
    )
