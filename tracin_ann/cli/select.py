"""tracin-select: a subset of the training rows for a set of queries."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from tracin_ann.cli.command import command, directory_argument, note
from tracin_ann.cli.index_options import (
    checkpoints_option,
    filter_options,
    index_options,
    open_index,
    own_ids_option,
    positions,
    row_filter,
)
from tracin_ann.cli.output import Sink, output_options, refuse_raw
from tracin_ann.cli.parameters import IdRanges, show_progress

if TYPE_CHECKING:
    from tracin_ann.analysis import Subset
    from tracin_ann.index import InfluenceIndex


@command(
    "tracin-select runs/mine --n 1000 --ids 0-99 --output chosen.txt",
    "tracin-query runs/mine --ids 0-9 --only @chosen.txt",
)
@directory_argument
@click.option("--n", required=True, type=click.IntRange(1), help="Training rows wanted.")
@click.option("--ids", type=IdRanges(), help="Rows of query_data to choose for; default all.")
@click.option(
    "--method",
    default="round-robin",
    show_default=True,
    type=click.Choice(["round-robin", "mean"]),
    help="Queries take rows in turn, or rows go by their mean score.",
)
@filter_options
@checkpoints_option
@own_ids_option
@output_options
@index_options
def main(directory: str, form: str | None, output: str | None, **options: object) -> None:
    """Choose the training rows that help a set of queries most.

    Round-robin: each query in turn takes the row of highest score that is not yet taken. Mean: the rows of highest mean
    score. Scores are the stored features', over all rows.

    To a name that ends in .txt go the rows alone, one a line, positions or with --own-ids the task's own ids, as
    options such as --only @chosen.txt read them.
    """
    from tracin_ann.analysis import Subset, select

    listed = form is None and output is not None and output.endswith(".txt")
    if listed:
        refuse_raw(f"--output {output}")
    sink = None if listed else Sink.of(form, output)
    index = open_index(directory, options)
    named = options["ids"]
    ids = None if named is None else positions(index, "query", named, options)  # type: ignore[arg-type]
    with show_progress("rows") as progress:
        found = select(
            index,
            options["n"],  # type: ignore[arg-type]
            ids,
            options["method"],  # type: ignore[arg-type]
            checkpoints=options["checkpoints"],  # type: ignore[arg-type]
            rows=row_filter(index, options),
            progress=progress,
        )
    if sink is None:
        _list(Path(str(output)), found, own=bool(options["own_ids"]))
    else:
        with sink.opened(Subset.FIELDS) as write:
            write(found)
    note(_summary(index, found, str(options["method"]), ids), err=True)


def _list(path: Path, found: Subset, *, own: bool) -> None:
    from tracin_ann.files import open_output

    text = "".join(f"{chosen.id if own else chosen.row}\n" for chosen in found)
    with open_output(path) as file:
        # As IdRanges reads it.
        file.write(text.encode("utf-8", "surrogatepass"))


def _summary(index: InfluenceIndex, found: Subset, method: str, ids: tuple[int, ...] | None) -> str:
    n_queries = index.passes.n_rows("query") if ids is None else len(ids)
    queries = "1 query" if n_queries == 1 else f"{n_queries:,} queries"
    negative = sum(chosen.score <= 0 for chosen in found)
    warned = f"; {negative:,} of them help none: their score is not above 0" if negative else ""
    return f"{len(found):,} of {len(index):,} rows for {queries}, by {method}{warned}"
