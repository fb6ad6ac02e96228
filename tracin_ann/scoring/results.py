"""What an index answers with: lists that show themselves in a notebook, plot themselves, and become pandas frames."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from html import escape
from typing import Any, ClassVar, TypeVar

from tracin_ann.choices import SideName
from tracin_ann.scoring.answers import Answer, SelfInfluence
from tracin_ann.scoring.formats import (
    HITS,
    RANKED,
    Fields,
    Record,
    Texts,
    answer_line,
    answer_records,
    format_cells,
    to_frame,
    to_json_line,
)
from tracin_ann.scoring.plots import ranked_figure, scores_figure
from tracin_ann.task import Description
from tracin_ann.text import escape_control

T = TypeVar("T")
Describe = Callable[[SideName, int], Description | None]
_SHOWN = 20


class Answers(list[Answer]):
    """Answers in the order asked."""

    def __init__(self, answers: Iterable[Answer], describe: Describe) -> None:
        super().__init__(answers)
        self.texts = _texts(describe)

    def records(self) -> list[Record]:
        """Return a record for every hit, fields as `formats.HITS`."""
        return [record for answer in self for record in answer_records(answer, self.texts)]

    def lines(self) -> list[Record]:
        """Return the answers as JSON lines have them."""
        return [answer_line(answer, self.texts) for answer in self]

    def to_pandas(self) -> Any:
        """Return a DataFrame, one row a hit, columns as `formats.HITS`.

        Raises:
            MissingPackageError: pandas is not installed.
        """
        return to_frame(self.records(), HITS)

    def plot(self) -> Any:
        """Return a matplotlib Figure of the scores, query by query.

        Raises:
            MissingPackageError: matplotlib is not installed.
        """
        return scores_figure(self)

    def _repr_html_(self) -> str:
        return "".join(_answer_html(answer, self.texts) for answer in self[:_SHOWN]) + _more(len(self))


class RowList(ABC, list[T]):
    """Results of which each is one record: a line of JSON, a row of a table.

    `DETAILS` are fields that a table on a terminal leaves out, the first first, where its texts have too little room.
    `DATA_ONLY` are fields of JSON lines, CSV, Parquet and frames that tables and pages for people leave out.
    """

    FIELDS: ClassVar[Fields]
    DETAILS: ClassVar[tuple[str, ...]] = ()
    DATA_ONLY: ClassVar[tuple[str, ...]] = ()

    def __init__(self, rows: Iterable[T], describe: Describe) -> None:
        super().__init__(rows)
        self.texts = _texts(describe)

    @abstractmethod
    def record(self, row: T) -> Record:
        """Return one result's record, fields as `FIELDS`."""

    def records(self) -> list[Record]:
        """Return a record for every result, fields as `FIELDS`."""
        return [self.record(row) for row in self]

    def lines(self) -> list[Record]:
        """Return the results as JSON lines have them."""
        return [to_json_line(record) for record in self.records()]

    def to_pandas(self) -> Any:
        """Return a DataFrame, one row a result, columns as `FIELDS`.

        Raises:
            MissingPackageError: pandas is not installed.
        """
        return to_frame(self.records(), self.FIELDS)

    def _repr_html_(self) -> str:
        names = [name for name in self.FIELDS.names if name not in self.DATA_ONLY]
        records = [self.record(row) for row in self[:_SHOWN]]
        cells = [format_cells({name: record[name] for name in names}) for record in records]
        return _table("", names, cells) + _more(len(self))


class RankedRows(RowList[SelfInfluence]):
    """Training rows by rank."""

    FIELDS = RANKED

    def record(self, row: SelfInfluence) -> Record:
        """Return a row's record."""
        text = self.texts("train", row.row)
        return {"rank": row.rank, "id": row.id, "row": row.row, "score": row.score, "text": text}

    def plot(self) -> Any:
        """Return a matplotlib Figure of the scores by rank.

        Raises:
            MissingPackageError: matplotlib is not installed.
        """
        return ranked_figure(self)


def _texts(describe: Describe) -> Texts:
    def text(side: SideName, row: int) -> str | None:
        described = describe(side, row)
        return None if described is None else described.text

    return text


def _answer_html(answer: Answer, texts: Texts) -> str:
    shown = None if answer.row is None else texts(answer.side, answer.row)
    caption = f"{answer.side} {answer.query}" + (f": {shown}" if shown else "")
    rows = []
    for at in range(max(len(answer.proponents), len(answer.opponents))):
        cells: list[str] = []
        for hits in (answer.proponents, answer.opponents):
            hit = hits[at] if at < len(hits) else None
            cells += ["", "", ""] if hit is None else [str(hit.id), f"{hit.score:+.4g}", texts("train", hit.row) or ""]
        rows.append(cells)
    return _table(caption, ["proponent", "score", "text", "opponent", "score", "text"], rows)


def _table(caption: str, heads: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th scope='col'>{_safe(name)}</th>" for name in heads)
    body = "".join("<tr>" + "".join(f"<td>{_safe(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><caption>{_safe(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _safe(text: str) -> str:
    return escape(escape_control(text, "\n\t"))


def _more(n_rows: int) -> str:
    return f"<p>… {n_rows - _SHOWN:,} more</p>" if n_rows > _SHOWN else ""
