"""tracin-select: select a subset of the training rows for a set of queries."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from tracin_ann.cli.command import command, directory_argument
from tracin_ann.cli.imports import pause_collector
from tracin_ann.cli.index_options import (
    checkpoints_option,
    choose_score,
    filter_options,
    index_options,
    make_row_filter,
    open_index,
    own_ids_option,
    resolve_positions,
    score_options,
)
from tracin_ann.cli.messages import format_count, print_note, show_progress
from tracin_ann.cli.output import Sink, output_options, reject_csv_raw
from tracin_ann.cli.parameters import IdRanges

if TYPE_CHECKING:
    from tracin_ann.analysis import Subset
    from tracin_ann.index import InfluenceIndex


@command(
    "tracin-select runs/mine --n 1000 --ids 0-99 --output chosen.txt",
    "tracin-query runs/mine --ids 0-9 --only @chosen.txt",
)
@directory_argument
@click.option("--n", required=True, type=click.IntRange(1), help="Number of training rows to select.")
@click.option("--ids", type=IdRanges(), help="Queries: rows of query_data.  [default: all]")
@click.option(
    "--method",
    default="round-robin",
    show_default=True,
    type=click.Choice(["round-robin", "mean"]),
    help="Queries take rows in turn, or rows are ranked by their mean score.",
)
@filter_options
@checkpoints_option
@score_options
@own_ids_option
@output_options
@index_options
def main(directory: str, form: str | None, output: str | None, **options: object) -> None:
    """Select the training rows with the highest scores for a set of queries.

    Round-robin: each query in turn takes the row with the highest score that is not yet taken. Mean: the rows with the
    highest mean score. Scores come from the stored features of all rows.

    A file with the suffix .txt gets the rows only, one per line: positions, or the task's own ids with --own-ids.
    Options such as --only @chosen.txt read this format.
    """
    with pause_collector():
        from tracin_ann.analysis import Subset, select

    is_list = form is None and output is not None and output.endswith(".txt")
    if is_list:
        reject_csv_raw(f"--output {output}")
    sink = None if is_list else Sink.from_options(form, output)
    index = open_index(directory, options)
    given = options["ids"]
    ids = None if given is None else resolve_positions(index, "query", given, options)  # type: ignore[arg-type]
    with show_progress("rows") as progress:
        subset = select(
            index,
            options["n"],  # type: ignore[arg-type]
            ids,
            options["method"],  # type: ignore[arg-type]
            checkpoints=options["checkpoints"],  # type: ignore[arg-type]
            rows=make_row_filter(index, options),
            score=choose_score(options),
            damping=options["damping"],  # type: ignore[arg-type]
            progress=progress,
        )
    if sink is None:
        _write_list(Path(str(output)), subset, own=bool(options["own_ids"]))
    else:
        with sink.open(Subset.FIELDS) as write:
            write(subset)
    print_note(f"subset: {_summarise(index, subset, str(options['method']), ids)}", err=True)


def _write_list(path: Path, subset: Subset, *, own: bool) -> None:
    from tracin_ann.files import open_output

    text = "".join(f"{chosen.id if own else chosen.row}\n" for chosen in subset)
    with open_output(path) as file:
        # The encoding in which IdRanges reads the file.
        file.write(text.encode("utf-8", "surrogatepass"))


def _summarise(index: InfluenceIndex, subset: Subset, method: str, ids: tuple[int, ...] | None) -> str:
    n_queries = index.runner.n_rows("query") if ids is None else len(ids)
    queries = format_count(n_queries, "query", "queries")
    n_negative = sum(chosen.score <= 0 for chosen in subset)
    warning = f"; {n_negative:,} of them have a score of 0 or less" if n_negative else ""
    return f"{len(subset):,} of {len(index):,} rows for {queries}, by {method}{warning}"
