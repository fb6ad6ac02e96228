"""tracin-hubs: which training rows are among the first proponents or opponents of unusually many queries."""

from __future__ import annotations

import click

from tracin_ann.choices import SEARCHES
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
from tracin_ann.cli.output import Sink, output_options
from tracin_ann.cli.parameters import IdRanges, show_progress
from tracin_ann.errors import UsageError, problem


@command(
    "tracin-hubs runs/mnist -k 10 --top 20",
    "tracin-hubs runs/mnist --ids 0-999 --by opponents --output hubs.csv",
)
@directory_argument
@click.option("--ids", type=IdRanges(), help="Rows of query_data to ask for; default all.")
@click.option("--train-ids", type=IdRanges(), help="Rows of train_data to ask for, each left out for itself.")
@click.option("-k", default=10, show_default=True, type=click.IntRange(1), help="Hits a side that count.")
@click.option("--top", default=20, show_default=True, type=click.IntRange(1), help="Rows shown or written.")
@click.option(
    "--by",
    default="proponents",
    show_default=True,
    type=click.Choice(["proponents", "opponents"]),
    help="The count that rows are ranked by.",
)
@click.option("--cosine", is_flag=True, help="Hits by cosine at each checkpoint, weighted by its learning rate.")
@click.option(
    "--search", default="auto", show_default=True, type=click.Choice(SEARCHES), help="Lists, a scan, or the cheaper."
)
@filter_options
@checkpoints_option
@own_ids_option
@output_options
@index_options
def main(directory: str, form: str | None, output: str | None, **options: object) -> None:
    """Say which training rows are among the first k proponents, or opponents, of the most queries.

    Rows that answer nearly every query say little of any. Where the counts are skewed, look at those first, or ask by
    cosine: rows of large gradients are hubs of inner products.
    """
    from tracin_ann.analysis import Hubs, find_hubs
    from tracin_ann.scoring import QueryOptions

    if options["ids"] and options["train_ids"]:
        what, got = "hubs of one data set's queries", "--ids and --train-ids"
        raise UsageError(problem(what, got=got, expected="one of the two", remedy="drop one of them"))
    sink = Sink.of(form, output)
    index = open_index(directory, options)
    side, name = ("train", "train_ids") if options["train_ids"] else ("query", "ids")
    named = options[name]
    ids = None if named is None else positions(index, side, named, options)  # type: ignore[arg-type]
    chosen = QueryOptions(
        checkpoints=options["checkpoints"],  # type: ignore[arg-type]
        cosine=bool(options["cosine"]),
        search=options["search"],  # type: ignore[arg-type]
        rows=row_filter(index, options),
    )
    with sink.opened(Hubs.FIELDS) as write, show_progress("queries") as progress:
        found = find_hubs(index, ids, options["k"], side, chosen, progress)  # type: ignore[arg-type]
        write(found.ranked(options["by"], options["top"]))  # type: ignore[arg-type]
    census = found.census
    for kind, counts in (("proponents", census.proponents), ("opponents", census.opponents)):
        idle = f"{(counts.count_N == 0).mean():.0%}" if len(counts.count_N) else "none"
        expected = f"{counts.expected:.3g} expected a row, {counts.largest:,} at most, {idle} of the rows in no answer"
        note(f"{kind}: {expected}; skewness {counts.skewness:.2f}", err=True)
    note(
        f"{census.n_queries:,} {'query' if census.n_queries == 1 else 'queries'}, k = {census.k}; {census.how}",
        err=True,
    )
