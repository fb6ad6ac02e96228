"""The page of suspects: training rows whose label is probably wrong, and the decisions about them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial

from tracin_ann.analysis import RANKINGS, By, Suspects, Suspicion
from tracin_ann.errors import UnknownRowError, UsageError, problem
from tracin_ann.index import InfluenceIndex
from tracin_ann.report import (
    ScoredCheckpoints,
    SuspectView,
    ViewBuilder,
    build_suspect_views,
    find_neighbours,
    format_value,
)
from tracin_ann.serve.decisions import VERDICTS, Decision
from tracin_ann.serve.pages.addresses import make_address, read_choice, read_conditions, read_number, read_text
from tracin_ann.serve.pages.context import LABEL, Asked, Context, Wanted, download, redirect
from tracin_ann.serve.pages.listing import split_pages
from tracin_ann.serve.pages.site import Reply
from tracin_ann.serve.problems import IndexChangedError
from tracin_ann.serve.security import own_address
from tracin_ann.serve.service import Reader
from tracin_ann.serve.work import FindMislabelled, Result
from tracin_ann.store import RowFilter

_SHOWN, _RANKED = 20, 500
"""Suspects of a page, and of the pages that one job serves."""
_MOST_DIGITS = 18
_NONE = "none"
"""The value of a form for a ranking without labels."""
_LEAD = (
    "Training rows to check, the most suspicious first: rows that the model learned late and whose neighbours vote for "
    "another label. A decision is stored when it is made."
)


@dataclass(frozen=True)
class ShownSuspect:
    """A suspect with its decision as HTML."""

    row: int
    view: SuspectView
    decision: str


async def show_suspects(context: Context, asked: Asked, reader: Reader) -> Reply:
    """Return a page of suspects."""
    columns = await reader.run(_list_label_columns)
    default = LABEL if LABEL in columns else _NONE
    labels = read_choice(asked.given, "labels", (_NONE, *columns), default)
    by = read_choice(asked.given, "by", ("", *RANKINGS), "")
    conditions, start = read_conditions(asked.given), read_number(asked.given, "start", 0)
    values: dict[str, object] = {
        "labels": "" if labels == default else labels,
        "by": by,
        "where": "; ".join(conditions),
    }

    def address_from(at: int) -> str:
        return make_address("/suspects", {**values, "start": at or None})

    ranking: By | None = by or None  # type: ignore[assignment]
    column = None if labels == _NONE else labels
    most = context.service.settings.most_records
    n_needed = min(most, _RANKED * (start // _RANKED + 1))
    work = FindMislabelled(column, n_needed, by=ranking, where=RowFilter(where=conditions))
    address = address_from(start)
    result, progress = await context.compute(asked, reader, Wanted(work, "Ranking the training rows", address))
    if progress is not None and asked.is_partial:
        return context.show_progress(reader, progress)
    shown: list[ShownSuspect] = []
    if result is not None:
        build = partial(_build_suspects, context, asked, result, labels=labels, start=start, address=address)
        shown = await reader.run(build)
    return context.page(
        "suspects.html",
        reader,
        title="Suspects",
        here="/suspects",
        lead=_LEAD,
        layout="rows" if any(suspect.view.example.is_wide for suspect in shown) else "cards",
        permalink=address,
        progress=progress,
        columns=(_NONE, *columns),
        labels=labels,
        rankings=RANKINGS,
        by=by,
        where=values["where"],
        estimate="" if result is None else _describe_estimate(Suspicion(**result.summary), most),
        suspects=shown,
        pages=split_pages(0 if result is None else min(most, result.summary["n_rows"]), start, _SHOWN, address_from),
    )


async def decide(context: Context, asked: Asked, reader: Reader) -> Reply:
    """Store a decision about a training row, or remove it.

    Raises:
        UnknownRowError: there is no such row.
        IndexChangedError: the row is not the one that the page showed.
        UsageError: there is no such verdict.
    """
    name, verdict = read_text(asked.given, "row"), read_text(asked.given, "verdict")
    suggested, back = read_text(asked.given, "suggested"), own_address(read_text(asked.given, "back"))
    column = read_text(asked.given, "labels", LABEL)
    new_label = read_text(asked.given, "new_label") if verdict == "relabel" else ""
    is_incomplete = verdict == "relabel" and not new_label
    if is_incomplete and not asked.is_partial:
        expected, remedy = "the label to use", "type it, or choose another verdict"
        raise UsageError(problem("no new label", got="an empty label", expected=expected, remedy=remedy))

    def store(index: InfluenceIndex) -> str:
        row = find_training_row(index, name)
        shown, present = read_text(asked.given, "id"), json.dumps(index.rows.id_at(row))
        if shown and shown != present:
            expected, remedy = f"id {present[:60]} at position {row}", "load the page again"
            raise IndexChangedError(
                problem("the training data has changed", got=f"id {shown[:60]}", expected=expected, remedy=remedy)
            )
        if is_incomplete:
            note = "Type the new label first."
            return render_decision(context, asked, index, row, column, suggested=suggested, back=back, note=note)
        if verdict:
            label = format_value(index.columns[column][row]) if column in index.columns else ""
            decision = Decision(row, index.rows.id_at(row), verdict, label, new_label)  # type: ignore[arg-type]
            context.decisions.record(decision)
        else:
            context.decisions.forget(row)
        return render_decision(context, asked, index, row, column, suggested=suggested, back=back)

    form = await reader.run(store)
    return Reply(form) if asked.is_partial else redirect(back)


async def export_decisions(context: Context, asked: Asked, reader: Reader) -> Reply:
    """Return all decisions as a file.

    Raises:
        UsageError: there is no such format.
    """
    form, make = str(asked.places["form"]), {"csv": context.decisions.export_csv, "json": context.decisions.export_json}
    if form not in make:
        raise UsageError(problem("no such format", got=repr(form), expected="csv or json", remedy="change the address"))
    return download(make[form](), f"decisions.{form}")


def find_training_row(index: InfluenceIndex, name: str) -> int:
    """Return the position of the training row with a position, or else with an id.

    Raises:
        UnknownRowError: there is none.
    """
    if name.isascii() and name.isdecimal() and len(name) <= _MOST_DIGITS and int(name) < len(index):
        return int(name)
    ids = index.rows.ids
    places = [] if ids is None else [row for row, each in enumerate(ids.tolist()) if str(each) == name]
    if not places:
        expected = f"a position from 0 to {len(index) - 1}" + ("" if ids is None else ", or an id")
        raise UnknownRowError(
            problem("no such training row", got=repr(name[:60]), expected=expected, remedy="name another row")
        )
    return places[0]


def render_decision(  # noqa: PLR0913
    context: Context,
    asked: Asked,
    index: InfluenceIndex,
    row: int,
    column: str = LABEL,
    *,
    back: str,
    suggested: str = "",
    note: str = "",
) -> str:
    """Return the form of the decision about a training row, as HTML.

    Args:
        context: the decisions and the templates.
        asked: what the page was asked for.
        index: the index.
        row: position of the training row.
        column: the column with its label, if the index has one of this name.
        back: address of the page, for browsers without scripts.
        suggested: the label that is suggested for it.
        note: why the last decision was not stored.
    """
    decision, name = context.decisions.find(row), index.rows.id_at(row)
    return context.site.render(
        "decision.html",
        index.manifest.generation,
        row=row,
        id=name,
        id_json=json.dumps(name),
        decided=decision if decision is not None and decision.id == name else None,
        suggested=suggested,
        note=note,
        column=column,
        verdicts=VERDICTS,
        guard=asked.guard,
        back=back,
    )


def _build_suspects(  # noqa: PLR0913
    context: Context, asked: Asked, result: Result, index: InfluenceIndex, *, labels: str, start: int, address: str
) -> list[ShownSuspect]:
    chosen = Suspects(result.rows[start : start + _SHOWN], index.describe, Suspicion(**result.summary))
    records, examples = chosen.records(), context.make_examples(index)
    neighbours = {} if examples.runner is None else find_neighbours(index, records, None)
    builder = ViewBuilder(index, examples, ScoredCheckpoints.infer(index, 0, None))
    views = build_suspect_views(chosen, records, examples, builder, neighbours)
    return [
        ShownSuspect(
            suspect.row,
            view,
            render_decision(
                context,
                asked,
                index,
                suspect.row,
                labels,
                suggested="" if suspect.suggested_label is None else str(suspect.suggested_label),
                back=f"{address}#{view.anchor}",
            ),
        )
        for suspect, view in zip(chosen, views, strict=True)
    ]


def _list_label_columns(index: InfluenceIndex) -> list[str]:
    return [name for name, values in index.columns.items() if values.dtype.kind != "f"]


def _describe_estimate(suspicion: Suspicion, most: int) -> str:
    """Return how many rows to check, and how many are listed if `most` are fewer than those that were ranked."""
    listed = f" The first {most:,} are listed." if suspicion.n_rows > most else ""
    if suspicion.look_at is None:
        return f"{suspicion.n_rows:,} rows ranked by {suspicion.by}. Without labels, there is no estimate.{listed}"
    if not suspicion.look_at:
        return f"None of {suspicion.n_asked:,} rows is outvoted by its neighbours.{listed}"
    return (
        f"Check about the first {suspicion.look_at:,} of {suspicion.n_rows:,} rows: {suspicion.n_outvoted:,} are "
        f"outvoted by their neighbours.{listed}"
    )
