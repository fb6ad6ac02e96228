"""Answers as tables on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from functools import singledispatch

from rich.console import Console, JustifyMethod
from rich.markup import escape
from rich.table import Table

from tracin_ann.answers import Hit
from tracin_ann.formats import Texts, shown_cells
from tracin_ann.results import Answers, Listed

_TEXT_WIDTH = 48


@singledispatch
def print_results(results: object) -> None:
    """Print results as people read them: answers a table a query, anything else in one table."""
    raise TypeError(f"no table for {type(results).__name__}")


@print_results.register
def _(answers: Answers) -> None:
    """Print one table a query: proponents on the left, opponents on the right."""
    console = Console(highlight=False)
    for answer in answers:
        shown = [] if answer.row is None else [answers.texts(answer.side, answer.row)]
        title = ": ".join([f"{answer.side} {answer.query}", *(_line(text) for text in shown if text)])
        table = Table(title=escape(title), title_justify="left", show_edge=False, pad_edge=False)
        texts = answers.texts if any(answers.texts("train", hit.row) for hit in answer.hits) else None
        scores = ("score", "for", "against") if answer.against else ("score",)
        for side in ("proponent", "opponent"):
            for name in (side, *scores):
                table.add_column(name, justify="right")
            if texts is not None:
                table.add_column("", overflow="ellipsis", max_width=_TEXT_WIDTH)
        for place in range(max(len(answer.proponents), len(answer.opponents))):
            cells = (_cells(texts, hits, place, len(scores)) for hits in (answer.proponents, answer.opponents))
            table.add_row(*(cell for side in cells for cell in side))
        console.print(table)
        if not answer.hits:
            console.print("no row has a score other than 0")
        console.print()


@print_results.register
def _(rows: Listed) -> None:  # type: ignore[type-arg]
    """Print one table, a line a result, without fields that are empty everywhere and rows that are the ids."""
    records = rows.records()
    cells = [shown_cells(record) for record in records]
    table = Table(show_edge=False, pad_edge=False)
    idle = {"row"} if all(record.get("row") == record.get("id") for record in records) else set()
    filled = [at for at, name in enumerate(rows.FIELDS.names) if name not in idle and any(line[at] for line in cells)]
    for at in filled:
        name, kind = rows.FIELDS.kinds[at]
        justify: JustifyMethod = "left" if kind == "text" else "right"
        table.add_column(name, justify=justify, overflow="ellipsis", max_width=_TEXT_WIDTH)
    for line in cells:
        table.add_row(*(escape(line[at]) for at in filled))
    Console(highlight=False).print(table)


def _cells(texts: Texts | None, hits: Sequence[Hit], place: int, n_scores: int) -> list[str]:
    if place >= len(hits):
        return [""] * (1 + n_scores + (texts is not None))
    hit = hits[place]
    scores = (hit.score, *hit.of_means, *[None] * n_scores)[:n_scores]
    shown = ["" if score is None else f"{score:+.4g}" for score in scores]
    return [escape(str(hit.id)), *shown, *([] if texts is None else [_line(texts("train", hit.row))])]


def _line(text: str | None) -> str:
    """Return a text in one line, harmless to rich."""
    return escape(" ".join((text or "").split()))
