"""tracin-explain: split the exact score of a training row for a query by layer or token, and by checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import click

from tracin_ann.cli.command import command, directory_argument
from tracin_ann.cli.imports import pause_collector
from tracin_ann.cli.index_options import (
    checkpoints_option,
    choose_score,
    index_options,
    open_index,
    own_ids_option,
    resolve_one_position,
    score_options,
)
from tracin_ann.cli.inputs import input_options, open_inputs
from tracin_ann.cli.messages import print_field_notes, show_progress
from tracin_ann.cli.output import Sink, check_report_path, html_option, output_options, write_html
from tracin_ann.cli.parameters import IdRanges
from tracin_ann.errors import UsageError, problem
from tracin_ann.text import escape_control

if TYPE_CHECKING:
    from tracin_ann.analysis import Explanation, TokenExplanation
    from tracin_ann.choices import SideName
    from tracin_ann.index import InfluenceIndex

_MAX_COLUMNS, _MAX_TOKENS = 6, 40


@command(
    "tracin-explain runs/mnist --train-id 17 --id 3",
    "tracin-explain runs/mnist --train-id 17 --query-train-id 40 --by parameter",
    "tracin-explain runs/mnist --train-id 17 --id 3 --output parts.csv",
    "tracin-explain runs/reviews --train-id 17 --text 'a slow start, then a fine film'",
    "tracin-explain runs/text --train-id 17 --id 3 --by token --html tokens.html",
)
@directory_argument
@click.option("--train-id", type=IdRanges(), required=True, help="The training row.")
@click.option("--id", type=IdRanges(), help="The query, a row of query_data.")
@click.option("--query-train-id", type=IdRanges(), help="The query, a row of train_data, instead of --id.")
@input_options
@click.option(
    "--by",
    default="layer",
    show_default=True,
    type=click.Choice(["layer", "parameter", "token"]),
    help="One line of the table per layer, per parameter, or per token of both rows (needs Task.token_losses).",
)
@checkpoints_option
@score_options
@own_ids_option
@output_options
@html_option
@index_options
def main(directory: str, form: str | None, output: str | None, html: str | None, by: str, **options: object) -> None:
    """Split the exact score of a training row for a query by layer or token, and by checkpoint.

    The gradients of both rows are computed over all parameters. The parts sum to the score of `tracin-query --exact`.
    A share is a part divided by the sum of the absolute values of all parts. Files have one line per parameter and
    checkpoint; with `--by token`, one line per token and checkpoint, for the training row and for the query.
    """
    with pause_collector():
        from tracin_ann.analysis import explain

    side, name = _query_option(options)
    sink = Sink.from_options(form, output, html)
    check_report_path(html)
    index = open_index(directory, options)
    row = resolve_one_position(index, "train", "train_id", options)
    examples = _open_single_input(index, options) if side == "input" else None
    query = 0 if side == "input" else resolve_one_position(index, side, name, options)
    with show_progress("checkpoints") as progress, nullcontext() if examples is None else index.lend(examples):
        explanation = explain(  # type: ignore[call-overload]
            index,
            row,
            query,
            side,
            progress,
            checkpoints=options["checkpoints"],
            by="token" if by == "token" else "layer",
            score=choose_score(options),
            damping=options["damping"],
        )
    if sink.form == "table":
        _print_token_tables(explanation) if by == "token" else _print_table(explanation, by)
    else:
        with sink.open(explanation.FIELDS) as write:
            write(explanation)
    pair = explanation.pair
    print_field_notes(
        [
            ("exact score", f"{explanation.score:+.6g} of row {pair.id} for {side} {pair.query}"),
            ("stored score", f"{explanation.stored_score:+.6g}, difference {explanation.difference:+.3g}"),
            *_describe_unsplit(explanation, by),
        ]
    )
    write_html(explanation, html, index, options["checkpoints"])  # type: ignore[arg-type]


def _describe_unsplit(explanation: Explanation | TokenExplanation, by: str) -> list[tuple[str, str]]:
    """Return a note if the query's score is not split by token."""
    if by != "token" or "query" in explanation.examples:  # type: ignore[union-attr]
        return []
    return [("query", "not split by token: the task has a query_loss and no query_token_losses")]


def _query_option(options: dict[str, object]) -> tuple[SideName, str]:
    """Return the query's data set and the option that names the query.

    Raises:
        UsageError: no query was given, or two.
    """
    sides: dict[str, SideName] = {"id": "query", "query_train_id": "train", "input": "input", "text": "input"}
    given = [name for name in sides if options[name]]
    if len(given) != 1:
        *first, last = [f"--{name.replace('_', '-')}" for name in given or sides]
        listed = f"{', '.join(first)} and {last}"
        raise UsageError(
            problem(
                f"{len(given)} queries" if given else "no query",
                got=listed if given else f"none of {listed}",
                expected="one of them",
                remedy="name one query with one of them",
            )
        )
    return sides[given[0]], given[0]


def _open_single_input(index: InfluenceIndex, options: dict[str, object]) -> Sequence[Any]:
    """Return the example of `--input` or `--text` as a data set of one.

    Raises:
        UsageError: there are several.
    """
    examples = open_inputs(index, options) or ()
    if len(examples) != 1:
        flag, got = "--input" if options["input"] else "--text", f"{len(examples):,} examples"
        raise UsageError(problem(f"{flag} takes one example", got=got, expected="one", remedy=f"change {flag}"))
    return examples


def _print_table(explanation: Explanation, by: str) -> None:
    """Print a line per layer or parameter with the sum over checkpoints, and a column per checkpoint if they fit."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    checkpoints = list(explanation.by_checkpoint) if len(explanation.by_checkpoint) <= _MAX_COLUMNS else []
    lines: dict[str, dict[int, float]] = {}
    for part in explanation:
        cells = lines.setdefault(part.layer if by == "layer" else part.parameter, {})
        cells[part.checkpoint] = cells.get(part.checkpoint, 0.0) + part.contribution
    total = sum(abs(part.contribution) for part in explanation) or 1.0
    table = Table(show_edge=False, pad_edge=False)
    table.add_column(by, overflow="fold")
    for heading in [*(f"checkpoint {c}" for c in checkpoints), "all", "share"]:
        table.add_column(heading, justify="right")
    sums = explanation.by_layer if by == "layer" else explanation.by_parameter
    for name, parts in lines.items():
        values = [f"{parts[c]:+.4g}" for c in checkpoints]
        table.add_row(escape(escape_control(name)), *values, f"{sums[name]:+.4g}", f"{sums[name] / total:+.1%}")
    table.add_section()
    net_share = f"{explanation.score / total:+.1%}"
    table.add_row(
        "all", *(f"{explanation.by_checkpoint[c]:+.4g}" for c in checkpoints), f"{explanation.score:+.4g}", net_share
    )
    Console(highlight=False).print(table)


def _print_token_tables(explanation: TokenExplanation) -> None:
    """Print a table for the row and one for the query: a line per token, the largest ones if there are many."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from tracin_ann.results import join_lines

    console, pair = Console(highlight=False), explanation.pair
    titles = {"row": f"row {pair.id}", "query": f"{pair.side} {pair.query}"}
    for example in explanation.examples:
        tokens = explanation.by_token(example)
        total = sum(abs(part) for _, part in tokens) or 1.0
        order = sorted(range(len(tokens)), key=lambda at: -abs(tokens[at][1]))
        shown, rest = sorted(order[:_MAX_TOKENS]), order[_MAX_TOKENS:]
        table = Table(title=escape(join_lines(titles[example])), title_justify="left", show_edge=False, pad_edge=False)
        table.add_column("position", justify="right")
        table.add_column("token", overflow="fold")
        for heading in ("part", "share"):
            table.add_column(heading, justify="right")
        for at in shown:
            text, part = tokens[at]
            table.add_row(str(at), escape(escape_control(text)), f"{part:+.4g}", f"{part / total:+.1%}")
        if rest:
            left = sum(tokens[at][1] for at in rest)
            table.add_row("", f"{len(rest):,} smaller parts", f"{left:+.4g}", f"{left / total:+.1%}")
        table.add_section()
        table.add_row("", "all", f"{explanation.score:+.4g}", f"{explanation.score / total:+.1%}")
        console.print(table)
        console.print()
