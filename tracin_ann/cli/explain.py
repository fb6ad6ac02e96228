"""tracin-explain: which layers and checkpoints make the score of a training row for a query."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from tracin_ann.cli.command import command, directory_argument, note
from tracin_ann.cli.index_options import checkpoints_option, index_options, one_position, open_index, own_ids_option
from tracin_ann.cli.output import Sink, output_options
from tracin_ann.cli.parameters import IdRanges, show_progress
from tracin_ann.errors import UsageError, problem
from tracin_ann.text import escape_control

if TYPE_CHECKING:
    from tracin_ann.analysis import Explanation
    from tracin_ann.choices import SideName

_MOST_COLUMNS = 6


@command(
    "tracin-explain runs/mnist --train-id 17 --id 3",
    "tracin-explain runs/mnist --train-id 17 --query-train-id 40 --by parameter",
    "tracin-explain runs/mnist --train-id 17 --id 3 --output parts.csv",
)
@directory_argument
@click.option("--train-id", type=IdRanges(), required=True, help="The training row.")
@click.option("--id", type=IdRanges(), help="The query, a row of query_data.")
@click.option("--query-train-id", type=IdRanges(), help="Instead of --id: a row of train_data as the query.")
@click.option(
    "--by", default="layer", show_default=True, type=click.Choice(["layer", "parameter"]), help="A line of the table."
)
@checkpoints_option
@own_ids_option
@output_options
@index_options
def main(directory: str, form: str | None, output: str | None, by: str, **options: object) -> None:
    """Say which layers and checkpoints make the true score of a training row for a query.

    Both gradients are computed now, over all parameters. The parts add up to the score that `tracin-query --exact`
    gives. A share is a part's, with its sign, of all parts' sizes. Files have a line for every parameter at every
    checkpoint.
    """
    from tracin_ann.analysis import Explanation, explain

    side, name = _query_option(options)
    sink = Sink.of(form, output)
    index = open_index(directory, options)
    row, query = one_position(index, "train", "train_id", options), one_position(index, side, name, options)
    with show_progress("checkpoints") as progress:
        found = explain(index, row, query, side, progress, checkpoints=options["checkpoints"])  # type: ignore[arg-type]
    if sink.form == "table":
        _print(found, by)
    else:
        with sink.opened(Explanation.FIELDS) as write:
            write(found)
    pair = found.pair
    said = f"{found.score:+.6g} of row {pair.id} for {side} {pair.query}"
    note(f"{said}; the stored features say {found.stored_score:+.6g}, off by {found.difference:+.3g}", err=True)


def _query_option(options: dict[str, object]) -> tuple[SideName, str]:
    given = [name for name in ("id", "query_train_id") if options[name]]
    if len(given) != 1:
        raise UsageError(
            problem(
                "no query" if not given else "two queries",
                got="neither of --id and --query-train-id" if not given else "--id and --query-train-id",
                expected="one of the two",
                remedy="name one row",
            )
        )
    return ("query" if given == ["id"] else "train"), given[0]


def _print(found: Explanation, by: str) -> None:
    """Print a line a layer or parameter, a column a checkpoint where they are few, and the sums."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    checkpoints = list(found.by_checkpoint) if len(found.by_checkpoint) <= _MOST_COLUMNS else []
    lines: dict[str, dict[int, float]] = {}
    for part in found:
        at = lines.setdefault(part.layer if by == "layer" else part.parameter, {})
        at[part.checkpoint] = at.get(part.checkpoint, 0.0) + part.contribution
    whole = sum(abs(part.contribution) for part in found) or 1.0
    table = Table(show_edge=False, pad_edge=False)
    table.add_column(by, overflow="fold")
    for heading in [*(f"checkpoint {c}" for c in checkpoints), "all", "share"]:
        table.add_column(heading, justify="right")
    sums = found.by_layer if by == "layer" else found.by_parameter
    for name, parts in lines.items():
        cells = [f"{parts[c]:+.4g}" for c in checkpoints]
        table.add_row(escape(escape_control(name)), *cells, f"{sums[name]:+.4g}", f"{sums[name] / whole:+.1%}")
    table.add_section()
    shares = f"{found.score / whole:+.1%}"
    table.add_row("all", *(f"{found.by_checkpoint[c]:+.4g}" for c in checkpoints), f"{found.score:+.4g}", shares)
    Console(highlight=False).print(table)
