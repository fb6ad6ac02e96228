"""Tables of results for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from functools import singledispatch

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tracin_ann.results import Answers, Hit, RowList, RowText, TokenTexts, format_cells, join_lines, match_tokens

_MAX_TEXT, _GOOD_TEXT, _MIN_TEXT, _GAP = 48, 20, 8, 3
"""Widths of a text column: maximum, the width that detail columns are dropped for, minimum; and the gap of columns."""

_MOST_TOKENS = 3
"""Tokens of a hit in a table."""


@singledispatch
def print_results(results: object) -> None:
    """Print results as tables: one table per query for answers, one table for anything else."""
    raise TypeError(f"no table for {type(results).__name__}")


@print_results.register
def _(answers: Answers) -> None:
    """Print one table per query: proponents on the left, opponents on the right."""
    console = Console(highlight=False)
    for answer in answers:
        query_text = [] if answer.row is None else [answers.texts(answer.side, answer.row)]
        title = ": ".join(join_lines(text) for text in (f"{answer.side} {answer.query}", *query_text) if text)
        texts = answers.texts if any(answers.texts("train", hit.row) for hit in answer.hits) else None
        scores = ("score", "for", "against") if answer.against else ("score",)
        tokens = answers.tokens if any(hit.tokens for hit in answer.hits) else None
        columns = [*scores, *([] if texts is None else ["text"]), *([] if tokens is None else ["tokens"])]
        heads = [(head, head in ("text", "tokens")) for side in ("proponent", "opponent") for head in (side, *columns)]
        lines = []
        for place in range(max(len(answer.proponents), len(answer.opponents))):
            cells = (_cells(texts, tokens, hits, place, len(scores)) for hits in (answer.proponents, answer.opponents))
            lines.append([cell for side in cells for cell in side])
        console.print(_table(console, heads, lines, title))
        if not answer.hits:
            console.print("no hits: all scores are 0")
        console.print()


@print_results.register
def _(rows: RowList) -> None:  # type: ignore[type-arg]
    """Print one table with a line per result, without `DATA_ONLY` fields, empty fields, and positions equal to ids."""
    records = rows.records()
    cells = [format_cells(record) for record in records]
    hidden = set(rows.DATA_ONLY)
    if all(record.get("row") == record.get("id") for record in records):
        hidden.add("row")
    filled = [at for at, name in enumerate(rows.FIELDS.names) if name not in hidden and any(line[at] for line in cells)]
    console = Console(highlight=False)
    details = [rows.FIELDS.names.index(name) for name in rows.DETAILS]
    while True:
        heads = [(rows.FIELDS.kinds[at][0], rows.FIELDS.kinds[at][1] == "text") for at in filled]
        lines = [[line[at] for at in filled] for line in cells]
        if not details or _text_width(console, heads, lines) >= _preferred_text_width(heads, lines):
            break
        dropped = details.pop(0)
        filled = [at for at in filled if at != dropped]
    console.print(_table(console, heads, lines))


def _table(
    console: Console, heads: Sequence[tuple[str, bool]], lines: Sequence[Sequence[str]], title: str | None = None
) -> Table:
    """Return a table with one line per row; text columns (marked in `heads`) are cut to the width that is left."""
    table = Table(title=title and escape(title), title_justify="left", show_edge=False, pad_edge=False)
    texts = [at for at, (_, is_text) in enumerate(heads) if is_text]
    text_width = _text_width(console, heads, lines)
    shown = [at for at in range(len(heads)) if at not in texts or text_width >= _MIN_TEXT]
    for at in shown:
        if at in texts:
            table.add_column(heads[at][0], overflow="ellipsis", no_wrap=True, max_width=min(_MAX_TEXT, text_width))
        else:
            table.add_column(heads[at][0], justify="right")
    for line in lines:
        table.add_row(*(escape(line[at]) for at in shown))
    return table


def _widths(heads: Sequence[tuple[str, bool]], lines: Sequence[Sequence[str]]) -> list[int]:
    return [max(cell_len(text) for text in (head, *(line[at] for line in lines))) for at, (head, _) in enumerate(heads)]


def _text_width(console: Console, heads: Sequence[tuple[str, bool]], lines: Sequence[Sequence[str]]) -> int:
    """Return the width that the other columns leave for each text column."""
    taken = sum(width for width, (_, is_text) in zip(_widths(heads, lines), heads, strict=True) if not is_text)
    left = console.width - taken - _GAP * (len(heads) - 1)
    return left // max(1, sum(is_text for _, is_text in heads))


def _preferred_text_width(heads: Sequence[tuple[str, bool]], lines: Sequence[Sequence[str]]) -> int:
    """Return the width that a text column should have: its longest text, within limits."""
    widths = [width for width, (_, is_text) in zip(_widths(heads, lines), heads, strict=True) if is_text]
    return max(_MIN_TEXT, min(_GOOD_TEXT, max(widths))) if widths else 0


def _cells(
    texts: RowText | None, tokens: TokenTexts | None, hits: Sequence[Hit], place: int, n_scores: int
) -> list[str]:
    if place >= len(hits):
        return [""] * (1 + n_scores + (texts is not None) + (tokens is not None))
    hit = hits[place]
    scores = (hit.score, *hit.of_means, *[None] * n_scores)[:n_scores]
    shown = ["" if score is None else f"{score:+.4g}" for score in scores]
    shown += [] if texts is None else [join_lines(texts("train", hit.row) or "")]
    shown += [] if tokens is None else [_format_tokens(tokens("train", hit.row), hit.tokens or ())]
    return [join_lines(str(hit.id)), *shown]


def _format_tokens(texts: Sequence[str] | None, parts: Sequence[float]) -> str:
    """Return the tokens with the largest absolute parts, the largest first."""
    largest = sorted(match_tokens(texts, parts), key=lambda token: -abs(token[1]))[:_MOST_TOKENS]
    return ", ".join(f"{join_lines(text)} {part:+.2g}" for text, part in largest if part)
