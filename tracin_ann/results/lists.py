"""Lists of results, with notebook display, plots and pandas frames."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, TypeVar

from tracin_ann.choices import SideName
from tracin_ann.results.answers import Answer, SelfInfluence
from tracin_ann.results.formats import (
    RANKED,
    Fields,
    Record,
    RowText,
    answer_line,
    answer_records,
    choose_fields,
    format_cells,
    to_frame,
    to_json_line,
)
from tracin_ann.results.plots import ranked_figure, scores_figure
from tracin_ann.text import escape_control

if TYPE_CHECKING:
    from tracin_ann.task import Description

T = TypeVar("T")
Describe: TypeAlias = "Callable[[SideName, int], Description | None]"
TokenTexts = Callable[[SideName, int], Sequence[str] | None]
_SHOWN = 20


class Answers(list[Answer]):
    """Answers in the order of the queries.

    Args:
        answers: the answers.
        describe: returns the description of a row of a side.
        examples: the map-style data set of the queries of the side `input`, for reports; None: there are none.
    """

    def __init__(self, answers: Iterable[Answer], describe: Describe, examples: Any = None) -> None:
        super().__init__(answers)
        self.texts, self.examples = _make_texts(describe), examples
        self.tokens = make_token_texts(describe)

    @property
    def fields(self) -> Fields:
        """Return the fields of the records: `formats.HITS`, and those that only some scores and options have."""
        hits = [hit for answer in self for hit in answer.hits]
        return choose_fields(
            tokens=any(hit.tokens is not None for hit in hits),
            amounts=any(hit.amount is not None for hit in hits),
            partial=bool(self) and all(answer.shards for answer in self),
        )

    def records(self) -> list[Record]:
        """Return a record for every hit, with the fields of `fields`."""
        return [record for answer in self for record in answer_records(answer, self.texts)]

    def lines(self) -> list[Record]:
        """Return the answers as the objects of JSON lines."""
        return [answer_line(answer, self.texts) for answer in self]

    def to_pandas(self) -> Any:
        """Return a DataFrame with one row per hit and the columns of `fields`.

        Raises:
            MissingPackageError: pandas is not installed.
        """
        return to_frame(self.records(), self.fields)

    def plot(self) -> Any:
        """Return a matplotlib Figure of the scores of each query.

        Raises:
            MissingPackageError: matplotlib is not installed.
        """
        return scores_figure(self)

    def _repr_html_(self) -> str:
        return "".join(_render_answer(answer, self.texts) for answer in self[:_SHOWN]) + _render_rest(len(self))


class RowList(ABC, list[T]):
    """Results that have one record each: a line of JSON, a row of a table.

    `DETAILS` are fields that a terminal table leaves out, in this order, until its text columns have enough space.
    `DATA_ONLY` are fields of JSON lines, CSV, Parquet and frames that tables and HTML pages leave out.
    """

    FIELDS: ClassVar[Fields]
    DETAILS: ClassVar[tuple[str, ...]] = ()
    DATA_ONLY: ClassVar[tuple[str, ...]] = ()

    def __init__(self, rows: Iterable[T], describe: Describe) -> None:
        super().__init__(rows)
        self.texts = _make_texts(describe)

    @abstractmethod
    def record(self, row: T) -> Record:
        """Return the record of a result, with the fields of `FIELDS`."""

    def records(self) -> list[Record]:
        """Return a record for every result, with the fields of `FIELDS`."""
        return [self.record(row) for row in self]

    def lines(self) -> list[Record]:
        """Return the results as the objects of JSON lines."""
        return [to_json_line(record) for record in self.records()]

    def to_pandas(self) -> Any:
        """Return a DataFrame with one row per result and the columns of `FIELDS`.

        Raises:
            MissingPackageError: pandas is not installed.
        """
        return to_frame(self.records(), self.FIELDS)

    def _repr_html_(self) -> str:
        names = [name for name in self.FIELDS.names if name not in self.DATA_ONLY]
        records = [self.record(row) for row in self[:_SHOWN]]
        cells = [format_cells({name: record[name] for name in names}) for record in records]
        return _render_table("", names, cells) + _render_rest(len(self))


class RankedRows(RowList[SelfInfluence]):
    """Training rows by descending self-influence."""

    FIELDS = RANKED

    def record(self, row: SelfInfluence) -> Record:
        """Return the record of a row."""
        text = self.texts("train", row.row)
        return {"rank": row.rank, "id": row.id, "row": row.row, "score": row.score, "text": text}

    def plot(self) -> Any:
        """Return a matplotlib Figure of the scores by rank.

        Raises:
            MissingPackageError: matplotlib is not installed.
        """
        return ranked_figure(self)


def _make_texts(describe: Describe) -> RowText:
    def text(side: SideName, row: int) -> str | None:
        described = describe(side, row)
        return None if described is None else described.text

    return text


def make_token_texts(describe: Describe) -> TokenTexts:
    """Return a function that returns the tokens of a row, or None if it has none."""

    def tokens(side: SideName, row: int) -> list[str] | None:
        described = describe(side, row)
        return None if described is None or not described.tokens else [str(token) for token in described.tokens]

    return tokens


def match_tokens(texts: Sequence[str] | None, parts: Iterable[float]) -> Iterator[tuple[str, float]]:
    """Yield the text of each token and its part.

    Positions without a text are named by their number; those at the end without a part are left out. A token without a
    position has the part 0.
    """
    left, numbers = list(texts or ()), list(parts)
    while len(numbers) > len(left) and not numbers[-1]:
        numbers.pop()
    for position in range(max(len(left), len(numbers))):
        text = left[position] if position < len(left) else str(position)
        yield text, numbers[position] if position < len(numbers) else 0.0


def _render_answer(answer: Answer, texts: RowText) -> str:
    shown = None if answer.row is None else texts(answer.side, answer.row)
    caption = f"{answer.side} {answer.query}" + (f": {shown}" if shown else "")
    rows = []
    for at in range(max(len(answer.proponents), len(answer.opponents))):
        cells: list[str] = []
        for hits in (answer.proponents, answer.opponents):
            hit = hits[at] if at < len(hits) else None
            cells += ["", "", ""] if hit is None else [str(hit.id), f"{hit.score:+.4g}", texts("train", hit.row) or ""]
        rows.append(cells)
    return _render_table(caption, ["proponent", "score", "text", "opponent", "score", "text"], rows)


def _render_table(caption: str, heads: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th scope='col'>{_escape(name)}</th>" for name in heads)
    body = "".join("<tr>" + "".join(f"<td>{_escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><caption>{_escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _escape(text: str) -> str:
    return escape(escape_control(text, "\n\t"))


def _render_rest(n_rows: int) -> str:
    return f"<p>… {n_rows - _SHOWN:,} more</p>" if n_rows > _SHOWN else ""
