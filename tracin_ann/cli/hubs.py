"""tracin-hubs: find training rows that are proponents or opponents of unusually many queries."""

from __future__ import annotations

import click

from tracin_ann.choices import SEARCHES
from tracin_ann.cli.command import command, directory_argument
from tracin_ann.cli.imports import pause_collector
from tracin_ann.cli.index_options import (
    checkpoints_option,
    filter_options,
    index_options,
    make_row_filter,
    open_index,
    own_ids_option,
    resolve_positions,
    score_options,
)
from tracin_ann.cli.messages import print_field_notes, show_progress
from tracin_ann.cli.output import Sink, output_options
from tracin_ann.cli.parameters import IdRanges
from tracin_ann.errors import UsageError, problem


@command(
    "tracin-hubs runs/mnist -k 10 --top 20",
    "tracin-hubs runs/mnist --ids 0-999 --by opponents --output hubs.csv",
)
@directory_argument
@click.option("--ids", type=IdRanges(), help="Queries: rows of query_data.  [default: all]")
@click.option("--train-ids", type=IdRanges(), help="Queries: rows of train_data; a row does not count for itself.")
@click.option(
    "-k", default=10, show_default=True, type=click.IntRange(1), help="Proponents and opponents per query that count."
)
@click.option("--top", default=20, show_default=True, type=click.IntRange(1), help="Rows to print or write.")
@click.option(
    "--by",
    default="proponents",
    show_default=True,
    type=click.Choice(["proponents", "opponents"]),
    help="Count to rank the rows by.",
)
@score_options
@click.option(
    "--search",
    default="auto",
    show_default=True,
    type=click.Choice(SEARCHES),
    help="Inverted lists or exact scan; auto chooses the faster one.",
)
@filter_options
@checkpoints_option
@own_ids_option
@output_options
@index_options
def main(directory: str, form: str | None, output: str | None, **options: object) -> None:
    """Rank training rows by the number of queries that have them among their top k proponents or opponents.

    A row that is a hit of nearly every query does not explain any of them. If the counts are skewed, inspect the first
    rows, or use --cosine: rows with large gradients are often hubs of the inner product.
    """
    with pause_collector():
        from tracin_ann.analysis import Hubs, find_hubs
        from tracin_ann.scoring import QueryOptions

    if options["ids"] and options["train_ids"]:
        what, got = "queries from two data sets", "--ids and --train-ids"
        raise UsageError(problem(what, got=got, expected="one of the two", remedy="remove one of them"))
    sink = Sink.from_options(form, output)
    index = open_index(directory, options)
    side, name = ("train", "train_ids") if options["train_ids"] else ("query", "ids")
    given = options[name]
    ids = None if given is None else resolve_positions(index, side, given, options)  # type: ignore[arg-type]
    chosen = QueryOptions(
        checkpoints=options["checkpoints"],  # type: ignore[arg-type]
        score=options["score"],  # type: ignore[arg-type]
        cosine=bool(options["cosine"]),
        damping=options["damping"],  # type: ignore[arg-type]
        search=options["search"],  # type: ignore[arg-type]
        rows=make_row_filter(index, options),
    )
    with sink.open(Hubs.FIELDS) as write, show_progress("queries") as progress:
        hubs = find_hubs(index, ids, options["k"], side, chosen, progress)  # type: ignore[arg-type]
        write(hubs.ranked(options["by"], options["top"]))  # type: ignore[arg-type]
    census = hubs.census
    fields = []
    for kind, counts in (("proponents", census.proponents), ("opponents", census.opponents)):
        zero = f"{(counts.count_N == 0).mean():.0%}" if len(counts.count_N) else "none"
        count = f"count per row: mean {counts.expected:.3g}, maximum {counts.largest:,}, zero for {zero} of the rows"
        fields.append((kind, f"{count}; skewness {counts.skewness:.2f}"))
    fields += [("queries", f"{census.n_queries:,}, k = {census.k}"), ("search", census.how)]
    print_field_notes(fields)
