"""Lists of rows to pick queries from, with a search for words and a label, and the pages of lists."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tracin_ann.choices import SideName
from tracin_ann.index import InfluenceIndex
from tracin_ann.report import Examples
from tracin_ann.serve.pages.addresses import QueryForm
from tracin_ann.serve.pages.context import RowCard

SHOWN = 24
"""Rows of a page of a list."""
_SEARCHED = 3000
"""Rows that one request searches: reading a row can take long."""


@dataclass(frozen=True)
class Pages:
    """The previous and the next page of a list, "" if there is none, and where this page is in it.

    They are addresses, or the positions of their first rows, for the buttons of a form.
    """

    caption: str
    previous: str = ""
    next: str = ""


@dataclass(frozen=True)
class RowList:
    """A page of a list of rows; `chosen` are positions of rows that were chosen and are not on it."""

    cards: tuple[RowCard, ...]
    pages: Pages
    chosen: tuple[int, ...] = ()


def list_rows(index: InfluenceIndex, examples: Examples, form: QueryForm) -> RowList:
    """Return the rows of a side, from `form.start`, that contain all words and have the label of the form."""
    side: SideName = "train" if form.side == "train" else "query"
    n_rows = len(index) if side == "train" else index.runner.n_rows("query")
    words, row = form.find.lower().split(), form.start
    found: list[RowCard] = []
    stop = n_rows if not (words or form.label) else min(n_rows, form.start + _SEARCHED)
    while row < stop and len(found) < SHOWN:
        if _matches(index, examples, side, row, words, form.label):
            found.append(RowCard(row, index.id_of(side, row), examples.view(side, row)))
        row += 1
    ends = f"rows {form.start:,} to {row - 1:,} of {n_rows:,}" if row > form.start else f"no row from {form.start:,}"
    caption = f"{ends}: {len(found)} found" if words or form.label else ends
    # Without a search, the previous page is known; with one, the list begins again.
    before = 0 if words or form.label else max(0, form.start - SHOWN)
    pages = Pages(caption, str(before) if form.start else "", str(row) if row < n_rows else "")
    return RowList(tuple(found), pages, tuple(row for row in form.rows if row not in {card.row for card in found}))


def split_pages(total: int, start: int, shown: int, address_of: Callable[[int], str]) -> Pages:
    """Return the pages of a list of known length; `address_of` returns the address of the page from a position."""
    last = min(total, start + shown)
    return Pages(
        f"{start + 1:,} to {last:,} of {total:,}" if total else "none",
        address_of(max(0, start - shown)) if start else "",
        address_of(last) if last < total else "",
    )


def _matches(index: InfluenceIndex, examples: Examples, side: SideName, row: int, words: list[str], label: str) -> bool:
    if label and examples.label(side, row) != label:
        return False
    if not words:
        return True
    text = f"{examples.text(side, row)} {index.id_of(side, row)}".lower()
    return all(word in text for word in words)
