"""query.py, tracin-query: find proponents and opponents of predictions, or rank training rows by self-influence."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tracin_ann.choices import CURVATURES, SEARCHES
from tracin_ann.cli.command import command, directory_argument, find_given_options
from tracin_ann.cli.imports import wait_passively
from tracin_ann.cli.index_options import (
    checkpoints_option,
    choose_workers,
    filter_options,
    index_options,
    make_row_filter,
    open_index,
    own_ids_option,
    resolve_positions,
    score_options,
    worker_options,
)
from tracin_ann.cli.inputs import input_options, open_inputs
from tracin_ann.cli.messages import format_count, print_field_notes, show_progress
from tracin_ann.cli.output import Sink, check_report_path, html_option, output_options, write_html
from tracin_ann.cli.parameters import TOKEN_VARIABLE, IdRanges
from tracin_ann.cli.self_influence import write_self_influence
from tracin_ann.errors import UsageError, problem

if TYPE_CHECKING:
    from tracin_ann.choices import SideName
    from tracin_ann.index import InfluenceIndex
    from tracin_ann.results import Answers, Fields
    from tracin_ann.scoring import QueryOptions
    from tracin_ann.types import ProgressCallback

_MAX_SHOWN = 8
_HOST = re.compile(r"[\w.-]+:[0-9]+/?")
_LOT = 512
"""Queries answered at once."""
_EXCLUSIVE = {
    "self_influence": (
        "ranks all training rows",
        (
            *("ids", "train_ids", "input", "text", "together", "against"),
            *("rerank", "candidates", "search", "recall", "tokens"),
            *("shard_workers", "ray_address", "deadline", "allow_partial"),
        ),
    ),
    "exact": (
        "scores all training rows, without a search",
        ("rerank", "candidates", "search", "recall", "deadline", "allow_partial"),
    ),
    "against": ("compares two sets of rows of query_data", ("train_ids", "input", "text", "together")),
}
"""By option: its effect, and the options that have no effect together with it."""


@command(
    "tracin-query runs/mnist --ids 0-9 -k 5 --rerank exact",
    "tracin-query runs/mnist --ids 0-999 --where 'label=3' --output hits.parquet",
    "tracin-query runs/reviews --text 'a slow start, then a fine film' -k 3",
    "tracin-query runs/mnist --self-influence -k 100 --format jsonl",
    "tracin-query runs/mnist --ids 0-99 --html report.html",
    "tracin-query http://127.0.0.1:8321 --text 'a slow start, then a fine film'",
)
@directory_argument
@click.option("--ids", type=IdRanges(), default=(), help="Queries: rows of query_data, such as 0-9,17.")
@click.option("--train-ids", type=IdRanges(), default=(), help="Queries: rows of train_data.")
@input_options
@click.option("--together", is_flag=True, help="Use the mean gradient of all rows as a single query.")
@click.option(
    "--against",
    type=IdRanges(),
    default=(),
    help="Rows of query_data to contrast with --ids: find training rows that help --ids and hurt these.",
)
@click.option("--self-influence", is_flag=True, help="Rank training rows by self-influence; by tracin without --score.")
@click.option(
    "-k",
    default=10,
    show_default=True,
    type=click.IntRange(1),
    help="Number of proponents and of opponents (with --self-influence: of rows).",
)
@click.option(
    "--candidates",
    default=200,
    show_default=True,
    type=click.IntRange(1),
    help="Rows to re-score, for proponents and for opponents.",
)
@click.option(
    "--rerank",
    default="stored",
    show_default=True,
    type=click.Choice(["none", "stored", "exact"]),
    help="Scores of the candidates: from the search index, from the stored features, or exact, over all parameters.",
)
@click.option("--exact", is_flag=True, help="Compute the exact score of every training row, without a search index.")
@click.option(
    "--search",
    default="auto",
    show_default=True,
    type=click.Choice(SEARCHES),
    help="Search index or exact scan; auto chooses the faster one. lists: the earlier name of index.",
)
@click.option("--recall", type=float, help="Target recall of the search index.  [default: the build's --target-recall]")
@filter_options
@checkpoints_option
@score_options
@worker_options
@click.option("--tokens", is_flag=True, help="Split the exact scores of the hits over their tokens.")
@own_ids_option
@click.option(
    "--token", envvar=TOKEN_VARIABLE, show_envvar=True, help="With a URL: the token of the server, if it needs one."
)
@output_options
@html_option
@click.option("--sketch", help="Fail if the index was built with another sketch.")
@click.option("--dim", type=int, help="Fail if the index has another sketch dimension.")
@click.option("--seed", type=int, help="Fail if the index was built with another seed.")
@index_options
def main(directory: str, form: str | None, output: str | None, html: str | None, **options: object) -> None:
    """Find proponents and opponents of queries in the index in DIR, or that of a server if DIR is a URL.

    Proponents have a positive score: training on them lowered the loss of the query. Opponents have a negative score.
    """
    _reject_unused_options(options)
    sink = Sink.from_options(form, output, html)
    check_report_path(html)
    if directory.lower().startswith(("http://", "https://")):
        from tracin_ann.cli.remote import ask_server

        reply = ask_server(directory, options)
        print_field_notes(_write_batches(reply.batches, reply.fields, reply.n_rows, sink))
        return
    if _HOST.fullmatch(directory) and not Path(directory).exists():
        what, expected = "no index there", "DIR, or the address of a server with http://"
        raise UsageError(problem(what, got=directory, expected=expected, remedy=f"write http://{directory}"))
    if "token" in find_given_options():
        what, remedy = "--token is for a server", "remove it, or name the address of the server"
        raise UsageError(problem(what, got=directory, expected="a URL", remedy=remedy))
    # With --exact, the model runs on all rows, and threads wait by PyTorch's default.
    with nullcontext() if options["exact"] else wait_passively():
        index = open_index(directory, options, choose_workers(options))
    with index:
        index.expect(options["sketch"], options["dim"], options["seed"])  # type: ignore[arg-type]
        if options["self_influence"]:
            write_self_influence(index, options, sink, html)
        else:
            _write_answers(index, options, sink, html)


def _reject_unused_options(options: Mapping[str, object]) -> None:
    """Reject options that were given but have no effect together with the others."""
    given = find_given_options()
    for name, (effect, unused) in _EXCLUSIVE.items():
        for other in unused:
            if options[name] and other in given:
                flag, other_flag = (f"--{word.replace('_', '-')}" for word in (name, other))
                what, expected = f"{flag} {effect}", f"{flag} without it"
                raise UsageError(problem(what, got=other_flag, expected=expected, remedy="remove one of the two"))


def _write_answers(index: InfluenceIndex, options: Mapping[str, object], sink: Sink, html: str | None) -> None:
    """Answer the queries, write the answers and print a summary."""
    from tracin_ann.results import Answers, choose_fields
    from tracin_ann.scoring import QueryOptions

    sides: dict[str, SideName] = {"ids": "query", "train_ids": "train", "against": "query"}
    rows = {name: resolve_positions(index, side, options[name], options) for name, side in sides.items()}  # type: ignore[arg-type]
    names = (
        *("k", "candidates", "rerank", "exact", "checkpoints", "search", "recall", "tokens"),
        *("score", "cosine", "damping"),
    )
    chosen = QueryOptions(**{name: options[name] for name in names}, rows=make_row_filter(index, options))  # type: ignore[arg-type]
    inputs, together = open_inputs(index, options), bool(options["together"])
    fields = choose_fields(
        tokens=chosen.tokens, amounts=index.name_score(chosen) in CURVATURES, partial=bool(options["shard_workers"])
    )
    reported = Answers((), partial(index.describe, examples=inputs), inputs)

    def collect(answers: Answers) -> Answers:
        if html is not None:
            reported.extend(answers)
        return answers

    with show_progress("rows") as progress:
        batches = _answer_in_batches(index, rows, inputs, chosen, together, progress)
        notes = _write_batches(map(collect, batches), fields, len(index), sink)
    print_field_notes(notes)
    write_html(reported, html, index, chosen.checkpoints)


def _write_batches(batches: Iterable[Answers], fields: Fields, n_rows: int, sink: Sink) -> list[tuple[str, str]]:
    """Write answers as they come, and return their summary as labels and values.

    Args:
        batches: the answers.
        fields: the fields of their records.
        n_rows: number of training rows.
        sink: where they are written.
    """
    summary = _Summary(n_rows)
    with sink.open(fields) as write:
        for answers in batches:
            write(answers)
            summary.add(answers)
    return summary.fields


def _answer_in_batches(
    index: InfluenceIndex,
    rows: Mapping[str, tuple[int, ...]],
    inputs: Sequence[Any] | None,
    chosen: QueryOptions,
    together: bool,
    progress: ProgressCallback,
) -> Iterator[Answers]:
    """Yield the answers in batches, so that memory does not grow with the number of queries."""
    ids, train_ids = rows["ids"], rows["train_ids"]
    if inputs is not None:
        yield from _answer_inputs(index, inputs, chosen, together, progress)
        if not (ids or train_ids):
            return
    if rows["against"]:
        yield index.contrast(ids, rows["against"], options=chosen, progress=progress)
    elif together or not (ids or train_ids):
        yield index.query(ids, train_ids, chosen, progress, together=True)
    else:
        for start in range(0, len(ids), _LOT):
            yield index.query(ids[start : start + _LOT], (), chosen, progress)
        for start in range(0, len(train_ids), _LOT):
            yield index.query((), train_ids[start : start + _LOT], chosen, progress)


def _answer_inputs(
    index: InfluenceIndex,
    inputs: Sequence[Any],
    chosen: QueryOptions,
    together: bool,
    progress: ProgressCallback,
) -> Iterator[Answers]:
    """Yield the answers to the examples of `--input` and `--text` in batches."""
    lot = len(inputs) if together else _LOT
    for start in range(0, len(inputs), lot):
        ids = range(start, min(start + lot, len(inputs)))
        yield index.query_examples(inputs, chosen, progress, ids=ids, together=together)


@dataclass
class _Summary:
    """The summary of all answers: number of queries, rows scored, and how candidates were found."""

    n_rows: int
    queries: int = 0
    scored: int = 0
    how: str = ""
    unlike: list[str] = field(default_factory=list)

    def add(self, answers: Answers) -> None:
        """Add a batch of answers."""
        self.queries += len(answers)
        self.scored += sum(answer.rows_scored for answer in answers)
        self.how = answers[0].how
        self.unlike += [str(answer.query) for answer in answers if answer.strange]

    @property
    def fields(self) -> list[tuple[str, str]]:
        """Return the summary as labels and values."""
        scored = self.scored / (2 * self.queries)
        fields = [
            ("queries", f"{self.queries:,}; {scored:,.0f} of {self.n_rows:,} rows scored per direction"),
            ("search", self.how),
        ]
        if self.unlike:
            shown = ", ".join(self.unlike[:_MAX_SHOWN]) + (", ..." if len(self.unlike) > _MAX_SHOWN else "")
            count = format_count(len(self.unlike), "query", "queries")
            fields.append(("warning", f"{count} unlike the calibration queries, recall may differ: {shown}"))
        return fields
