"""query.py, tracin-query: which training rows pushed a prediction up or down, and which stand out by themselves."""

from __future__ import annotations

import json
from collections.abc import Mapping

import click
from click.core import ParameterSource

from tracin_ann.answers import SEARCHES, Answer, QueryOptions, SelfInfluence
from tracin_ann.cli.common import IdRanges, parsed_arguments, progress_shown, refusals
from tracin_ann.cli.table import print_answers, print_self_influence
from tracin_ann.columns import RowFilter
from tracin_ann.device import DEVICE_NAMES
from tracin_ann.errors import UsageError, problem
from tracin_ann.index import InfluenceIndex
from tracin_ann.loading import SideName

_IDS = IdRanges()
_SHOWN = 8


@click.command(context_settings={"max_content_width": 100})
@click.argument("directory", type=click.Path(), metavar="DIR")
@click.option("--ids", type=_IDS, default=(), help="Rows of query_data, such as 0-9,17.")
@click.option("--train-ids", type=_IDS, default=(), help="Rows of train_data as queries.")
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
@click.option("--checkpoints", type=_IDS, default=None, help="Positions to sum over, such as 0,2; default all.")
@click.option("--cosine", is_flag=True, help="Cosine at each checkpoint, weighted by its learning rate.")
@click.option("--format", "form", default="table", show_default=True, type=click.Choice(["table", "jsonl"]))
@click.option("--task", metavar="FILE.py:NAME", help="Where the task is now, if it moved.")
@click.option("--task-arg", "task_args", multiple=True, metavar="KEY=VALUE", help="Instead of the build's; repeatable.")
@click.option("--sketch", help="Refuse an index built with another sketch.")
@click.option("--dim", type=int, help="Refuse an index of another dimension a checkpoint.")
@click.option("--seed", type=int, help="Refuse an index built with another seed.")
@click.option("--batch-size", default=64, show_default=True, type=click.IntRange(1), help="Examples a forward.")
@click.option("--device", default="auto", show_default=True, help=DEVICE_NAMES)
@refusals
def main(directory: str, form: str, **options: object) -> None:
    """Ask the index in DIR which training rows are proponents and opponents of a query.

    A proponent's score is positive: training on it lowered the query's loss; an opponent's is negative.

    Example: query.py runs/mnist --ids 0-9 -k 5 --rerank exact
    """
    _refuse_idle(options)
    index = _opened(directory, options)
    if options["self_influence"]:
        _self_influence(index, options, form)
    else:
        _query(index, options, form)


def _refuse_idle(options: Mapping[str, object]) -> None:
    """Refuse options that were given and would do nothing beside the others."""
    context = click.get_current_context()
    given = {name for name in options if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    for asked, idle in (
        ("self_influence", ("ids", "train_ids", "cosine", "rerank", "candidates", "search", "recall")),
        ("exact", ("rerank", "candidates", "search", "recall")),
    ):
        for name in idle:
            if options[asked] and name in given:
                flag, other = (f"--{word.replace('_', '-')}" for word in (asked, name))
                raise UsageError(
                    problem(
                        f"{flag} ranks all training rows",
                        got=other,
                        expected=f"{flag} without it",
                        remedy="drop one of the two",
                    )
                )


def _opened(directory: str, options: Mapping[str, object]) -> InfluenceIndex:
    task, arguments = options["task"], parsed_arguments(options["task_args"])  # type: ignore[arg-type]
    index = InfluenceIndex.open(
        directory,
        task,  # type: ignore[arg-type]
        arguments=arguments or ({} if task else None),
        device=str(options["device"]),
        batch_size=int(options["batch_size"]),  # type: ignore[call-overload]
    )
    index.expect(options["sketch"], options["dim"], options["seed"])  # type: ignore[arg-type]
    return index


def _query(index: InfluenceIndex, options: Mapping[str, object], form: str) -> None:
    names = ("k", "candidates", "rerank", "exact", "checkpoints", "cosine", "search", "recall")
    chosen = QueryOptions(**{name: options[name] for name in names}, rows=_filter(options))  # type: ignore[arg-type]
    with progress_shown("rows") as progress:
        answers = index.query(options["ids"], options["train_ids"], chosen, progress)  # type: ignore[arg-type]
    if form == "jsonl":
        for answer in answers:
            click.echo(json.dumps(_answer_json(index, answer), ensure_ascii=False))
    else:
        print_answers(index, answers)
    scored = sum(answer.rows_scored for answer in answers) / (2 * len(answers))
    queries = "1 query" if len(answers) == 1 else f"{len(answers)} queries"
    click.echo(f"{queries}, {scored:,.0f} of {len(index):,} rows scored a side; {answers[0].how}", err=True)
    strange = [answer.query for answer in answers if answer.strange]
    if strange:
        shown = ", ".join(strange[:_SHOWN]) + (", ..." if len(strange) > _SHOWN else "")
        click.echo(f"unlike the queries that recall was measured on: {shown}", err=True)


def _self_influence(index: InfluenceIndex, options: Mapping[str, object], form: str) -> None:
    with progress_shown("rows") as progress:
        rows = index.self_influence(
            int(options["k"]),  # type: ignore[call-overload]
            checkpoints=options["checkpoints"],  # type: ignore[arg-type]
            exact=bool(options["exact"]),
            rows=_filter(options),
            progress=progress,
        )
    if form == "jsonl":
        for row in rows:
            click.echo(json.dumps(_row_json(row)))
    else:
        print_self_influence(index, rows)
    if len(index.skipped):
        click.echo(index.skipped.counted, err=True)


def _filter(options: Mapping[str, object]) -> RowFilter:
    return RowFilter(options["only"], options["without"], options["where"])  # type: ignore[arg-type]


def _row_json(row: SelfInfluence) -> dict[str, object]:
    return {"id": row.id, "score": row.score, "rank": row.rank}


def _answer_json(index: InfluenceIndex, answer: Answer) -> dict[str, object]:
    content: dict[str, object] = {"query": answer.query, "side": answer.side}
    if answer.strange:
        content["strange"] = True
    _add_text(content, index, answer.side, answer.query)
    for name in ("proponents", "opponents"):
        hits = []
        for hit in getattr(answer, name):
            shown: dict[str, object] = {"id": hit.id, "score": hit.score}
            if hit.stored_score is not None:
                shown["stored_score"] = hit.stored_score
            if hit.error is not None:
                shown["error"] = hit.error
            _add_text(shown, index, "train", hit.id)
            hits.append(shown)
        content[name] = hits
    return content


def _add_text(content: dict[str, object], index: InfluenceIndex, side: SideName, row: str) -> None:
    described = index.described(side, int(row))
    if described is not None and described.text is not None:
        content["text"] = described.text
