"""Addresses of the pages: what a query string requests, and the permalink of a view.

A permalink has the values that differ from the defaults, in a fixed order, so equal views have equal addresses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol
from urllib.parse import urlencode

from tracin_ann.choices import SCORES, ScoreName, SideName
from tracin_ann.errors import UsageError, problem
from tracin_ann.scoring import QueryOptions
from tracin_ann.store import RowFilter

RERANKS = ("stored", "exact", "none")
_MOST_DIGITS = 15
_SIDES: tuple[SideName, ...] = ("query", "train", "input")


class Parameters(Protocol):
    """The values of a query string or of a form, several for a name."""

    def getlist(self, key: Any) -> list[Any]:
        """Return the values of a name, in order."""


def make_address(path: str, values: Mapping[str, object]) -> str:
    """Return a path with a query string of the values that are neither None, False, nor empty; lists repeat a name."""
    pairs = [
        (name, "yes" if value is True else value)
        for name, given in values.items()
        for value in (given if isinstance(given, Sequence) and not isinstance(given, str) else [given])
        if value is not None and value is not False and value != ""
    ]
    return f"{path}?{urlencode(pairs, errors='backslashreplace')}" if pairs else path


@dataclass(frozen=True)
class QueryForm:
    """What the pages of queries and of comparisons show.

    Attributes:
        side: where the queries are from: `query`, `train`, or `input` for `text` or `upload`.
        rows: positions of the queries in the data set of the side.
        text: a text that is the query, read by `Task.read_query`.
        upload: the name of an example that was uploaded.
        find: words that listed rows contain.
        label: the label of listed rows.
        start: position of the first row that is listed.
        browse: list rows to choose from, instead of the answers.
        together: one answer, for the mean gradient.
        k: proponents and opponents of a query.
        rerank: as in QueryOptions.
        candidates: as in QueryOptions.
        score: as in QueryOptions; "" is the index's default.
        checkpoints: positions of checkpoints; empty: all.
        where: conditions on the columns of hits.
    """

    side: SideName = "query"
    rows: tuple[int, ...] = ()
    text: str = ""
    upload: str = ""
    find: str = ""
    label: str = ""
    start: int = 0
    browse: bool = False
    together: bool = False
    k: int = 10
    rerank: str = "stored"
    candidates: int = 200
    score: str = ""
    checkpoints: tuple[int, ...] = ()
    where: tuple[str, ...] = ()

    @classmethod
    def parse(cls, given: Parameters) -> QueryForm:
        """Return what a query string requests.

        Raises:
            UsageError: a value cannot be parsed.
        """
        text, upload = read_text(given, "text"), read_text(given, "upload")
        is_input = bool(text or upload)
        side = "input" if is_input else read_choice(given, "side", _SIDES[:2], "query")
        # Rows that were ticked in the list of one side are not rows of another one.
        is_other = is_input or read_text(given, "listed", side) != side
        return cls(
            side=side,  # type: ignore[arg-type]
            rows=() if is_other else read_ranges(given, "rows"),
            text=text,
            upload=upload,
            find=read_text(given, "find"),
            label=read_text(given, "label"),
            # The buttons of the list send `page`.
            start=read_number(given, "page", read_number(given, "start", 0)),
            browse=bool(read_text(given, "browse") or read_text(given, "page")),
            together=bool(read_text(given, "together")),
            k=read_number(given, "k", cls.k),
            rerank=read_choice(given, "rerank", RERANKS, cls.rerank),
            candidates=read_number(given, "candidates", cls.candidates),
            score=read_choice(given, "score", ("", *SCORES), ""),
            checkpoints=read_ranges(given, "checkpoints"),
            where=read_conditions(given),
        )

    @property
    def has_queries(self) -> bool:
        """Return whether it names queries."""
        return bool(self.rows or self.text or self.upload)

    @property
    def options(self) -> QueryOptions:
        """Return the options of the query.

        Raises:
            UsageError: an option is out of range.
        """
        score: ScoreName | None = self.score or None  # type: ignore[assignment]
        return QueryOptions(
            k=self.k,
            candidates=max(self.k, self.candidates),
            rerank=self.rerank,  # type: ignore[arg-type]
            checkpoints=self.checkpoints or None,
            rows=RowFilter(where=self.where),
            score=score,
        )

    def address(self, path: str = "/query", **changes: Any) -> str:
        """Return the permalink of the view on a page, with changed values."""
        changed, default = replace(self, **changes), QueryForm()
        values = {
            each.name: getattr(changed, each.name)
            for each in fields(self)
            if getattr(changed, each.name) != getattr(default, each.name)
        }
        for name in ("rows", "checkpoints"):
            if name in values:
                values[name] = format_ranges(values[name])
        if changed.text or changed.upload:
            values.pop("side", None)
        return make_address(path, values)


def name_query(form: QueryForm, query: int) -> dict[str, object]:
    """Return the values that name one query of a form, and how it is scored, in the address of another page.

    Args:
        form: names the side, or the text or picture; and the score and the checkpoints.
        query: position of the query in the data set of the side.
    """
    return {
        "side": form.side if form.side == "train" else "",
        "query": None if form.side == "input" else query,
        "text": form.text,
        "upload": form.upload,
        "score": form.score,
        "checkpoints": format_ranges(form.checkpoints),
    }


def read_conditions(given: Parameters, name: str = "where") -> tuple[str, ...]:
    """Return conditions on columns, which are separated by semicolons."""
    return tuple(part.strip() for text in given.getlist(name) for part in str(text).split(";") if part.strip())


def read_text(given: Parameters, name: str, default: str = "") -> str:
    """Return the last value of a name, without spaces at its ends."""
    values = given.getlist(name)
    return str(values[-1]).strip() if values else default


def read_choice(given: Parameters, name: str, allowed: Sequence[str], default: str) -> str:
    """Return the value of a name, which is one of the allowed ones.

    Raises:
        UsageError: it is not.
    """
    value = read_text(given, name) or default
    if value not in allowed:
        expected = " or ".join(filter(None, allowed))
        raise UsageError(problem(f"bad {name}", got=repr(value), expected=expected, remedy=f"change {name}"))
    return value


def read_number(given: Parameters, name: str, default: int) -> int:
    """Return the value of a name as a number of at least 0.

    Raises:
        UsageError: it is not a number.
    """
    value = read_text(given, name)
    if not value:
        return default
    if not _is_number(value):
        raise UsageError(problem(f"bad {name}", got=repr(value), expected="a number", remedy=f"change {name}"))
    return int(value)


def read_ranges(given: Parameters, name: str) -> tuple[int, ...]:
    """Return positions from values such as `0-9,17`, each once, in the given order.

    Raises:
        UsageError: a part is neither a position nor a range, or the positions are too many for a page.
    """
    found: dict[int, None] = {}
    for part in (part.strip() for value in given.getlist(name) for part in str(value).split(",")):
        if not part:
            continue
        first, dash, last = part.partition("-")
        if not _is_number(first) or (dash and not _is_number(last)):
            expected = "positions and ranges such as 0-9,17"
            raise UsageError(problem(f"bad {name}", got=repr(part), expected=expected, remedy=f"change {name}"))
        rows = range(int(first), int(last or first) + 1)
        if len(found) + len(rows) > MOST_ROWS:
            expected, remedy = f"at most {MOST_ROWS} rows on a page", "name fewer rows"
            raise UsageError(problem(f"too many {name}", got=repr(part), expected=expected, remedy=remedy))
        found |= dict.fromkeys(rows)
    return tuple(found)


MOST_ROWS = 100
"""Rows that a page can name."""


def format_ranges(rows: Sequence[int]) -> str:
    """Return positions as text that `read_ranges` reads, with ranges where they ascend one by one."""
    parts: list[tuple[int, int]] = []
    for row in rows:
        if parts and parts[-1][1] == row - 1:
            parts[-1] = parts[-1][0], row
        else:
            parts.append((row, row))
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= _MOST_DIGITS
