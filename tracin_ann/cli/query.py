"""query.py, tracin-query: which training rows pushed a prediction up or down, and which stand out by themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import click

from tracin_ann.choices import SEARCHES
from tracin_ann.cli.command import command, device_option, directory_argument, given, note, task_options
from tracin_ann.cli.index_options import checkpoints_option, open_index, positions
from tracin_ann.cli.output import Sink, expect_report, html_option, output_options, write_page
from tracin_ann.cli.parameters import IdRanges, show_progress
from tracin_ann.errors import UsageError, problem

if TYPE_CHECKING:
    from tracin_ann.choices import SideName
    from tracin_ann.index import InfluenceIndex
    from tracin_ann.scoring import Answers, QueryOptions
    from tracin_ann.store import RowFilter
    from tracin_ann.types import ProgressCallback

_IDS = IdRanges()
_SHOWN = 8
_LOT = 512
_WHOLE = {
    "self_influence": "ranks all training rows",
    "exact": "ranks all training rows",
    "against": "asks of two sets of query_data",
}


@command(
    "tracin-query runs/mnist --ids 0-9 -k 5 --rerank exact",
    "tracin-query runs/mnist --ids 0-999 --where 'label=3' --output hits.parquet",
    "tracin-query runs/mnist --self-influence -k 100 --format jsonl",
    "tracin-query runs/mnist --ids 0-99 --html report.html",
)
@directory_argument
@click.option("--ids", type=_IDS, default=(), help="Rows of query_data, such as 0-9,17.")
@click.option("--train-ids", type=_IDS, default=(), help="Rows of train_data as queries.")
@click.option("--together", is_flag=True, help="The rows as one query: the mean of their gradients.")
@click.option("--against", type=_IDS, default=(), help="Rows of query_data: who helps --ids and hurts these?")
@click.option("--self-influence", is_flag=True, help="Training rows by their own score, largest first.")
@click.option("-k", default=10, show_default=True, type=click.IntRange(1), help="Hits a side (or rows).")
@click.option("--candidates", default=200, show_default=True, type=click.IntRange(1), help="Rows re-scored a side.")
@click.option("--rerank", default="stored", show_default=True, type=click.Choice(["none", "stored", "exact"]))
@click.option("--exact", is_flag=True, help="Score every training row exactly; no index is asked.")
@click.option(
    "--search",
    default="auto",
    show_default=True,
    type=click.Choice(SEARCHES),
    help="Lists, an exact scan, or the cheaper.",
)
@click.option("--recall", type=float, help="That lists are to reach.  [default: the build's --target-recall]")
@click.option("--only", type=_IDS, default=None, help="Training rows that may be hits; default all.")
@click.option("--without", type=_IDS, default=(), help="Training rows that may not be hits.")
@click.option("--where", multiple=True, metavar="COLUMN=VALUE", help="Of hits; also != < <= > >=; repeatable.")
@checkpoints_option
@click.option("--cosine", is_flag=True, help="Cosine at each checkpoint, weighted by its learning rate.")
@click.option("--own-ids", is_flag=True, is_eager=True, help="Rows are named by the task's own ids, not positions.")
@output_options
@html_option
@task_options
@click.option("--sketch", help="Refuse an index built with another sketch.")
@click.option("--dim", type=int, help="Refuse an index of another dimension a checkpoint.")
@click.option("--seed", type=int, help="Refuse an index built with another seed.")
@click.option("--batch-size", default=64, show_default=True, type=click.IntRange(1), help="Examples a forward.")
@device_option
def main(directory: str, form: str | None, output: str | None, html: str | None, **options: object) -> None:
    """Ask the index in DIR which training rows are proponents and opponents of a query.

    A proponent's score is positive: training on it lowered the query's loss; an opponent's is negative.
    """
    _refuse_idle(options)
    sink = Sink.of(form, output, html)
    expect_report(html)
    index = open_index(directory, options)
    index.expect(options["sketch"], options["dim"], options["seed"])  # type: ignore[arg-type]
    options |= _at_positions(index, options)
    if options["self_influence"]:
        _self_influence(index, options, sink, html)
    else:
        _query(index, options, sink, html)


def _refuse_idle(options: Mapping[str, object]) -> None:
    """Refuse options that were given and would do nothing beside the others."""
    asked_for = given()
    ranking = ("cosine", "rerank", "candidates", "search", "recall")
    for asked, idle in (
        ("self_influence", ("ids", "train_ids", "together", "against", *ranking)),
        ("exact", ("rerank", "candidates", "search", "recall")),
        ("against", ("train_ids", "together")),
    ):
        for name in idle:
            if options[asked] and name in asked_for:
                flag, other = (f"--{word.replace('_', '-')}" for word in (asked, name))
                what, expected = f"{flag} {_WHOLE[asked]}", f"{flag} without it"
                raise UsageError(problem(what, got=other, expected=expected, remedy="drop one of the two"))


def _at_positions(index: InfluenceIndex, options: Mapping[str, object]) -> dict[str, object]:
    """Return the options that name rows, by their positions."""
    sides: dict[str, SideName] = {"ids": "query", "against": "query"}
    sides |= {"train_ids": "train", "only": "train", "without": "train"}
    named = {name: options[name] for name in sides if options[name]}
    return {name: positions(index, sides[name], ids, options) for name, ids in named.items()}  # type: ignore[arg-type]


def _query(index: InfluenceIndex, options: Mapping[str, object], sink: Sink, html: str | None) -> None:
    from tracin_ann.scoring import HITS, Answers, QueryOptions

    names = ("k", "candidates", "rerank", "exact", "checkpoints", "cosine", "search", "recall")
    chosen = QueryOptions(**{name: options[name] for name in names}, rows=_filter(options))  # type: ignore[arg-type]
    summary, kept = _Summary(len(index)), Answers((), index.described)
    with sink.opened(HITS) as write, show_progress("rows") as progress:
        for answers in _lots(index, options, chosen, progress):
            write(answers)
            summary.add(answers)
            if html is not None:
                kept += answers
    note(summary.line, err=True)
    if summary.strange:
        shown = ", ".join(summary.strange[:_SHOWN]) + (", ..." if len(summary.strange) > _SHOWN else "")
        note(f"unlike the queries that recall was measured on: {shown}", err=True)
    write_page(kept, html, index, chosen.checkpoints)


def _lots(
    index: InfluenceIndex, options: Mapping[str, object], chosen: QueryOptions, progress: ProgressCallback
) -> Iterator[Answers]:
    """Yield the answers lot by lot, so that thousands of queries need no more memory than some."""
    ids: tuple[int, ...] = options["ids"]  # type: ignore[assignment]
    train_ids: tuple[int, ...] = options["train_ids"]  # type: ignore[assignment]
    against: tuple[int, ...] = options["against"]  # type: ignore[assignment]
    if against:
        yield index.contrast(ids, against, options=chosen, progress=progress)
    elif options["together"] or not (ids or train_ids):
        yield index.query(ids, train_ids, chosen, progress, together=True)
    else:
        for start in range(0, len(ids), _LOT):
            yield index.query(ids[start : start + _LOT], (), chosen, progress)
        for start in range(0, len(train_ids), _LOT):
            yield index.query((), train_ids[start : start + _LOT], chosen, progress)


@dataclass
class _Summary:
    """What is said of all answers at the end."""

    n_rows: int
    queries: int = 0
    scored: int = 0
    how: str = ""
    strange: list[str] = field(default_factory=list)

    def add(self, answers: Answers) -> None:
        """Take a lot of answers."""
        self.queries += len(answers)
        self.scored += sum(answer.rows_scored for answer in answers)
        self.how = answers[0].how
        self.strange += [str(answer.query) for answer in answers if answer.strange]

    @property
    def line(self) -> str:
        """Return it in one line."""
        queries = "1 query" if self.queries == 1 else f"{self.queries:,} queries"
        scored = self.scored / (2 * self.queries)
        return f"{queries}, {scored:,.0f} of {self.n_rows:,} rows scored a side; {self.how}"


def _self_influence(index: InfluenceIndex, options: Mapping[str, object], sink: Sink, html: str | None) -> None:
    from tracin_ann.scoring import RANKED

    with sink.opened(RANKED) as write, show_progress("rows") as progress:
        rows = index.self_influence(
            int(options["k"]),  # type: ignore[call-overload]
            checkpoints=options["checkpoints"],  # type: ignore[arg-type]
            exact=bool(options["exact"]),
            rows=_filter(options),
            progress=progress,
        )
        write(rows)
    if len(index.skipped):
        note(index.skipped.counted, err=True)
    write_page(rows, html, index, options["checkpoints"])  # type: ignore[arg-type]


def _filter(options: Mapping[str, object]) -> RowFilter:
    from tracin_ann.store import RowFilter

    return RowFilter(options["only"], options["without"], options["where"])  # type: ignore[arg-type]
