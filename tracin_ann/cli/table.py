"""Answers as tables on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tracin_ann.answers import Answer, Hit, SelfInfluence
from tracin_ann.errors import UsageError
from tracin_ann.index import InfluenceIndex
from tracin_ann.loading import SideName

_TEXT_WIDTH = 48


def print_answers(index: InfluenceIndex, answers: Sequence[Answer]) -> None:
    """Print one table a query: proponents on the left, opponents on the right."""
    console = Console(highlight=False)
    for answer in answers:
        text = _text(index, answer.side, answer.query)
        title = f"{answer.side} {answer.query}" + (f": {text}" if text else "")
        table = Table(title=escape(title), title_justify="left", show_edge=False, pad_edge=False)
        for side in ("proponent", "opponent"):
            table.add_column(side, justify="right")
            table.add_column("score", justify="right")
            if _describes(index):
                table.add_column("", overflow="ellipsis", max_width=_TEXT_WIDTH)
        for place in range(max(len(answer.proponents), len(answer.opponents))):
            table.add_row(*_cells(index, answer.proponents, place), *_cells(index, answer.opponents, place))
        console.print(table)
        if not answer.proponents and not answer.opponents:
            console.print("no row has a score other than 0")
        console.print()


def print_self_influence(index: InfluenceIndex, rows: Sequence[SelfInfluence]) -> None:
    """Print training rows by rank."""
    try:
        described = _describes(index)
    except UsageError:
        described = False
    table = Table(show_edge=False, pad_edge=False)
    for name in ("rank", "row", "self-influence"):
        table.add_column(name, justify="right")
    if described:
        table.add_column("", overflow="ellipsis", max_width=_TEXT_WIDTH)
    for row in rows:
        cells = [str(row.rank), row.id, f"{row.score:.6g}"]
        table.add_row(*cells, *([escape(_text(index, "train", row.id))] if described else []))
    Console(highlight=False).print(table)


def _cells(index: InfluenceIndex, hits: Sequence[Hit], place: int) -> list[str]:
    width = 3 if _describes(index) else 2
    if place >= len(hits):
        return [""] * width
    hit = hits[place]
    return [hit.id, f"{hit.score:+.4g}", escape(_text(index, "train", hit.id))][:width]


def _describes(index: InfluenceIndex) -> bool:
    return index.task.describe is not None


def _text(index: InfluenceIndex, side: SideName, row: str) -> str:
    described = index.described(side, int(row))
    return " ".join((described.text or "").split()) if described is not None else ""
