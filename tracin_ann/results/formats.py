r"""Formats of results: records, JSON lines, CSV, Parquet and pandas frames.

Schema 1. In CSV, Parquet and frames, a record is a hit; in JSON lines, a line is a query with its hits.
`by_checkpoint` and `of_means` are lists; in CSV they are JSON text. Files are UTF-8 in every locale. UTF-8 cannot
encode lone surrogates: JSON lines contain JSON escapes for them, the other formats the text `\ud800`.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, TextIO, TypeVar

from tracin_ann.choices import SCORES, SIDE_NAMES, Format, SideName
from tracin_ann.errors import UsageError, problem
from tracin_ann.files import open_output
from tracin_ann.packages import import_pyarrow, make_missing_package_error
from tracin_ann.results.answers import Answer, Hit, Id
from tracin_ann.text import escape_control, escape_json, escape_surrogates

T = TypeVar("T")
SCHEMA = 1
Record = dict[str, Any]
# (side, position) -> the row's text from Task.describe, or None.
RowText = Callable[[SideName, int], str | None]
Kind = Literal["id", "int", "float", "bool", "text", "floats"]
_MOST_ROWS = 2**63
# Characters that begin a formula in spreadsheets, or that spreadsheets drop before they look for a formula.
_FORMULA = re.compile(r"[=+\-@\x00-\x1f\x7f-\x9f]")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


@dataclass(frozen=True)
class Fields:
    """The names and kinds of a record's fields, in order."""

    kinds: tuple[tuple[str, Kind], ...]

    @property
    def names(self) -> list[str]:
        """Return the names."""
        return [name for name, _ in self.kinds]


HITS = Fields(
    (
        ("query", "id"),
        ("query_row", "int"),
        ("side", "text"),
        ("kind", "text"),
        ("rank", "int"),
        ("id", "id"),
        ("row", "int"),
        ("score", "float"),
        ("stored_score", "float"),
        ("error", "float"),
        ("by_checkpoint", "floats"),
        ("of_means", "floats"),
        ("strange", "bool"),
        ("query_text", "text"),
        ("text", "text"),
    )
)
RANKED = Fields((("rank", "int"), ("id", "id"), ("row", "int"), ("score", "float"), ("text", "text")))


def choose_fields(*, tokens: bool, amounts: bool, partial: bool = False) -> Fields:
    """Return the fields of hits: `HITS`, `tokens` and `amount` if the scores have them, and `partial` with workers."""
    place = HITS.names.index("strange")
    by_token: list[tuple[str, Kind]] = [("tokens", "floats")] if tokens else []
    estimated: list[tuple[str, Kind]] = [("amount", "float")] if amounts else []
    of_workers: list[tuple[str, Kind]] = [("partial", "bool")] if partial else []
    return Fields((*HITS.kinds[:place], *by_token, *estimated, *of_workers, *HITS.kinds[place:]))


def answer_line(answer: Answer, texts: RowText) -> Record:
    """Return an answer as the object of a JSON line; fields without a value are left out."""
    content: Record = {"schema": SCHEMA, "query": answer.query, "side": answer.side}
    if answer.row is None:
        content["rows"] = list(answer.members)
        content["against"] = list(answer.against) or None
    else:
        content |= {"row": answer.row, "text": texts(answer.side, answer.row)}
    content["score"] = None if answer.score == "tracin" else answer.score
    content["strange"] = answer.strange or None
    content["shards"], content["missing_shards"] = list(answer.shards) or None, list(answer.missing_shards) or None
    for name, hits in (("proponents", answer.proponents), ("opponents", answer.opponents)):
        content[name] = [_drop_missing({**_hit_record(hit), "text": texts("train", hit.row)}) for hit in hits]
    return _drop_missing(content)


def parse_answer_line(line: Record) -> tuple[Answer, dict[tuple[SideName, int], str]]:
    """Return the answer of an object that `answer_line` made, and the texts of rows in it, by (side, position).

    What such an object does not have, `rows_scored` and `how`, is 0 and "".

    Raises:
        KeyError: a field is missing.
        TypeError: a field is of another type.
        ValueError: a value is not one of those that are possible.
        OverflowError: a number is too large.
    """
    side = _choose(line["side"], SIDE_NAMES)
    members = tuple(map(_parse_row, line["rows"])) if "rows" in line else (_parse_row(line["row"]),)
    if not members:
        raise ValueError("a query without rows")
    texts: dict[tuple[SideName, int], str] = {}
    if "text" in line:
        texts[side, members[0]] = str(line["text"])
    for record in (*line["proponents"], *line["opponents"]):
        if "text" in record:
            texts["train", _parse_row(record["row"])] = str(record["text"])
    answer = Answer(
        _parse_id(line["query"]),
        side,
        members,
        tuple(map(_parse_hit, line["proponents"])),
        tuple(map(_parse_hit, line["opponents"])),
        rows_scored=0,
        strange=bool(line.get("strange", False)),
        against=tuple(map(_parse_row, line.get("against", ()))),
        score=_choose(line.get("score", "tracin"), SCORES),
        shards=tuple(map(int, line.get("shards", ()))),
        missing_shards=tuple(map(int, line.get("missing_shards", ()))),
    )
    return answer, texts


def _parse_hit(record: Record) -> Hit:
    values: dict[str, Any] = {"id": _parse_id(record["id"]), "row": _parse_row(record["row"])}
    values["score"] = float(record["score"])
    values |= {name: float(record[name]) for name in ("stored_score", "error", "amount") if name in record}
    lists = ("by_checkpoint", "of_means", "tokens")
    values |= {name: tuple(map(float, record[name])) for name in lists if name in record}
    return Hit(**values)


def _parse_row(value: Any) -> int:
    row = int(value)
    if not 0 <= row < _MOST_ROWS:
        raise ValueError(f"row {row}")
    return row


def _parse_id(value: object) -> Id:
    if not isinstance(value, int | str):
        raise TypeError(f"an id of type {type(value).__name__}")
    return value


def _choose(value: object, choices: Iterable[T]) -> T:
    """Return the one of the choices that is equal to a value.

    Raises:
        ValueError: there is none.
    """
    for choice in choices:
        if choice == value:
            return choice
    raise ValueError(f"{value!r} is none of {', '.join(map(str, choices))}")


def answer_records(answer: Answer, texts: RowText) -> Iterator[Record]:
    """Yield a record for every hit."""
    shown = None if answer.row is None else texts(answer.side, answer.row)
    query = {"query": answer.query, "query_row": answer.row, "side": answer.side, "strange": answer.strange}
    if answer.shards:
        query["partial"] = bool(answer.missing_shards)
    for kind, hits in (("proponent", answer.proponents), ("opponent", answer.opponents)):
        for rank, hit in enumerate(hits, start=1):
            record = {**query, **_hit_record(hit), "kind": kind, "rank": rank}
            yield record | {"query_text": shown, "text": texts("train", hit.row)}


def to_json_line(record: Record) -> Record:
    """Return a record as the object of a JSON line."""
    return {"schema": SCHEMA, **_drop_missing(record)}


def format_cells(record: Record) -> list[str]:
    """Return a record's values as short text for people, one line each, without control characters."""
    return [_format_cell(value) for value in record.values()]


def _format_cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return " ".join(_format_cell(part) for part in value)
    return "" if value is None else join_lines(str(value))


def join_lines(text: str) -> str:
    """Return text in one line, without control characters."""
    return escape_control(" ".join(text.split()))


def _hit_record(hit: Hit) -> Record:
    record = {
        "id": hit.id,
        "row": hit.row,
        "score": hit.score,
        "stored_score": hit.stored_score,
        "error": hit.error,
        "by_checkpoint": list(hit.by_checkpoint) or None,
        "of_means": list(hit.of_means) or None,
    }
    if hit.tokens is not None:
        record["tokens"] = list(hit.tokens)
    if hit.amount is not None:
        record["amount"] = hit.amount
    return record


def _drop_missing(record: Record) -> Record:
    return {name: value for name, value in record.items() if value is not None}


@contextmanager
def open_writer(
    form: Format, out: Path | TextIO, fields: Fields, *, csv_raw: bool = False
) -> Iterator[Callable[[Sequence[Record]], None]]:
    """Yield a function that writes records, to a stream or to a file that appears complete or not at all.

    Args:
        form: the format.
        out: a file, as `files.open_output` opens it, or a text stream.
        fields: of the records.
        csv_raw: leave CSV cells unchanged; else `'` is put before those that spreadsheets would read as formulas.

    Raises:
        UsageError: Parquet for a stream, or the ids of a column are of two types.
        MissingPackageError: Parquet without pyarrow.
    """
    if not isinstance(out, Path):
        if form == "parquet":
            raise UsageError(
                problem("Parquet needs a file", got="a text stream", expected="--output FILE", remedy="name a file")
            )
        yield from _open_text(form, out, fields, csv_raw)
        return
    with open_output(out) as file:
        if form == "parquet":
            yield from _open_parquet(file, fields)
            return
        stream = io.TextIOWrapper(file, encoding="utf-8", errors="backslashreplace", newline="")
        try:
            yield from _open_text(form, stream, fields, csv_raw)
        finally:
            # Detaching flushes the stream and leaves the file open, which `open_output` closes.
            stream.detach()


def _open_text(
    form: Format, stream: TextIO, fields: Fields, csv_raw: bool
) -> Iterator[Callable[[Sequence[Record]], None]]:
    yield from (_open_json_lines(stream) if form == "jsonl" else _open_csv(stream, fields, csv_raw))


def _open_json_lines(stream: TextIO) -> Iterator[Callable[[Sequence[Record]], None]]:
    # JSON escapes are valid in every encoding; they are used if the stream is not UTF-8.
    in_ascii = (stream.encoding or "utf-8").lower().replace("-", "") != "utf8"

    def write(records: Sequence[Record]) -> None:
        for record in records:
            stream.write(escape_json(json.dumps(record, ensure_ascii=in_ascii)) + "\n")
        stream.flush()

    yield write


def _open_csv(stream: TextIO, fields: Fields, raw: bool) -> Iterator[Callable[[Sequence[Record]], None]]:
    rows = csv.DictWriter(stream, fields.names, lineterminator="\n")
    rows.writeheader()

    def cell(value: object) -> object:
        if isinstance(value, list):
            return json.dumps(value)
        return guard_formula(value) if isinstance(value, str) and not raw else value

    def write(records: Sequence[Record]) -> None:
        for record in records:
            rows.writerow({name: cell(value) for name, value in record.items()})
        stream.flush()

    yield write


def guard_formula(text: str) -> str:
    """Return text that no spreadsheet reads as a formula: `'` is put before text that it could, except numbers."""
    return f"'{text}" if _FORMULA.match(text) and not _NUMBER.fullmatch(text) else text


def _open_parquet(file: BinaryIO, fields: Fields) -> Iterator[Callable[[Sequence[Record]], None]]:
    pa, pq = import_pyarrow()
    kinds = {
        "int": pa.int64(),
        "float": pa.float64(),
        "bool": pa.bool_(),
        "text": pa.string(),
        "floats": pa.list_(pa.float64()),
    }
    writers: list[tuple[Any, Any]] = []

    def open_file(records: Sequence[Record]) -> tuple[Any, Any]:
        columns = []
        for name, kind in fields.kinds:
            ids = [record[name] for record in records if record.get(name) is not None]
            is_int = (bool(ids) or not records) and all(isinstance(value, int) for value in ids)
            columns.append((name, (pa.int64() if is_int else pa.string()) if kind == "id" else kinds[kind]))
        schema = pa.schema(columns, metadata={"tracin_ann.schema": str(SCHEMA)})
        return schema, pq.ParquetWriter(file, schema)

    def write(records: Sequence[Record]) -> None:
        if not records and writers:
            return
        if not writers:
            writers.append(open_file(records))
        schema, rows = writers[0]
        text_names = [field.name for field in schema if field.type == pa.string()]
        plain = [
            {**r, **{n: None if r[n] is None else escape_surrogates(str(r[n])) for n in text_names}} for r in records
        ]
        try:
            table = pa.Table.from_pylist(plain, schema=schema)
        except pa.ArrowInvalid as error:
            what, expected = "ids of two types in one Parquet file", "ids of the type of the first"
            remedy = "return one type from Task.ids, or write csv or jsonl"
            raise UsageError(problem(what, got=error, expected=expected, remedy=remedy)) from error
        rows.write_table(table)

    try:
        yield write
        write([])
    finally:
        for _, rows in writers:
            rows.close()


def to_frame(records: Sequence[Record], fields: Fields) -> Any:
    """Return records as a pandas DataFrame; its `attrs` contain the version of the schema.

    Raises:
        MissingPackageError: pandas is not installed.
    """
    try:
        import pandas as pd  # noqa: PLC0415
    except ImportError as error:
        raise make_missing_package_error("pandas", "pandas", "frames and Parquet", "tables") from error
    # Strings of pandas are UTF-8 as well.
    plain = [{n: escape_surrogates(v) if isinstance(v, str) else v for n, v in record.items()} for record in records]
    frame = pd.DataFrame.from_records(plain, columns=fields.names)
    kinds = {"int": "Int64", "float": "float64", "bool": "bool"}
    frame = frame.astype({name: kinds[kind] for name, kind in fields.kinds if kind in kinds})
    frame.attrs["tracin_ann.schema"] = SCHEMA
    return frame
