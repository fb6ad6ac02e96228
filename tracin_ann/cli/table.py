"""Answers as tables on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from functools import singledispatch

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tracin_ann.scoring import Answers, Hit, RowList, Texts, format_cells, join_lines

_TEXT_WIDTH, _GOOD_TEXT, _LEAST_TEXT, _BETWEEN = 48, 20, 8, 3
"""The most columns of a text, those for which details give way, the least, and those between two cells."""


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
        title = ": ".join(join_lines(text) for text in (f"{answer.side} {answer.query}", *shown) if text)
        texts = answers.texts if any(answers.texts("train", hit.row) for hit in answer.hits) else None
        scores = ("score", "for", "against") if answer.against else ("score",)
        columns = [*scores, *([] if texts is None else ["text"])]
        heads = [(head, head == "text") for side in ("proponent", "opponent") for head in (side, *columns)]
        lines = []
        for place in range(max(len(answer.proponents), len(answer.opponents))):
            cells = (_cells(texts, hits, place, len(scores)) for hits in (answer.proponents, answer.opponents))
            lines.append([cell for side in cells for cell in side])
        console.print(_table(console, heads, lines, title))
        if not answer.hits:
            console.print("no row has a score other than 0")
        console.print()


@print_results.register
def _(rows: RowList) -> None:  # type: ignore[type-arg]
    """Print one table, a line a result, without `DATA_ONLY` fields, empty fields, and positions that equal the ids."""
    records = rows.records()
    cells = [format_cells(record) for record in records]
    idle = set(rows.DATA_ONLY)
    if all(record.get("row") == record.get("id") for record in records):
        idle.add("row")
    filled = [at for at, name in enumerate(rows.FIELDS.names) if name not in idle and any(line[at] for line in cells)]
    console = Console(highlight=False)
    details = [rows.FIELDS.names.index(name) for name in rows.DETAILS]
    while True:
        heads = [(rows.FIELDS.kinds[at][0], rows.FIELDS.kinds[at][1] == "text") for at in filled]
        lines = [[line[at] for at in filled] for line in cells]
        if not details or _room(console, heads, lines) >= _wanted(heads, lines):
            break
        spared = details.pop(0)
        filled = [at for at in filled if at != spared]
    console.print(_table(console, heads, lines))


def _table(
    console: Console, heads: Sequence[tuple[str, bool]], lines: Sequence[Sequence[str]], title: str | None = None
) -> Table:
    """Return a table of one line a row; columns of text, marked in `heads`, are cut to what the others leave."""
    table = Table(title=title and escape(title), title_justify="left", show_edge=False, pad_edge=False)
    texts = [at for at, (_, is_text) in enumerate(heads) if is_text]
    room = _room(console, heads, lines)
    kept = [at for at in range(len(heads)) if at not in texts or room >= _LEAST_TEXT]
    for at in kept:
        if at in texts:
            table.add_column(heads[at][0], overflow="ellipsis", no_wrap=True, max_width=min(_TEXT_WIDTH, room))
        else:
            table.add_column(heads[at][0], justify="right")
    for line in lines:
        table.add_row(*(escape(line[at]) for at in kept))
    return table


def _widths(heads: Sequence[tuple[str, bool]], lines: Sequence[Sequence[str]]) -> list[int]:
    return [max(cell_len(text) for text in (head, *(line[at] for line in lines))) for at, (head, _) in enumerate(heads)]


def _room(console: Console, heads: Sequence[tuple[str, bool]], lines: Sequence[Sequence[str]]) -> int:
    """Return the columns that the other cells leave to each text."""
    taken = sum(width for width, (_, is_text) in zip(_widths(heads, lines), heads, strict=True) if not is_text)
    left = console.width - taken - _BETWEEN * (len(heads) - 1)
    return left // max(1, sum(is_text for _, is_text in heads))


def _wanted(heads: Sequence[tuple[str, bool]], lines: Sequence[Sequence[str]]) -> int:
    """Return the columns that a text should have: all that it needs, or a good many."""
    widths = [width for width, (_, is_text) in zip(_widths(heads, lines), heads, strict=True) if is_text]
    return max(_LEAST_TEXT, min(_GOOD_TEXT, max(widths))) if widths else 0


def _cells(texts: Texts | None, hits: Sequence[Hit], place: int, n_scores: int) -> list[str]:
    if place >= len(hits):
        return [""] * (1 + n_scores + (texts is not None))
    hit = hits[place]
    scores = (hit.score, *hit.of_means, *[None] * n_scores)[:n_scores]
    shown = ["" if score is None else f"{score:+.4g}" for score in scores]
    return [join_lines(str(hit.id)), *shown, *([] if texts is None else [join_lines(texts("train", hit.row) or "")])]
