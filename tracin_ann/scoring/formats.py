r"""Answers as records, and records as JSON lines, CSV, Parquet and pandas frames.

Schema 1. A hit is one record of CSV, Parquet and frames; in JSON lines a line is a query with its hits inside.
`by_checkpoint` and `of_means` are lists; in CSV they are JSON text. Files are UTF-8, whatever the locale. Of lone
surrogates, which UTF-8 has no bytes for, JSON lines have JSON's escapes; in the others the text says `\ud800`.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, TextIO

from tracin_ann.choices import Format, SideName
from tracin_ann.errors import MissingPackageError, UsageError, problem
from tracin_ann.files import open_output
from tracin_ann.scoring.answers import Answer, Hit
from tracin_ann.text import escape_control, escape_json, escape_surrogates

SCHEMA = 1
Record = dict[str, Any]
# (side, position) -> what the task shows people of it, or None.
Texts = Callable[[SideName, int], str | None]
Kind = Literal["id", "int", "float", "bool", "text", "floats"]
# What spreadsheets take for the beginning of a formula, or drop before they look for one.
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


def answer_line(answer: Answer, texts: Texts) -> Record:
    """Return an answer as a JSON line has it; what there is none of is left out."""
    content: Record = {"schema": SCHEMA, "query": answer.query, "side": answer.side}
    if answer.row is None:
        content["rows"] = list(answer.members)
        content["against"] = list(answer.against) or None
    else:
        content |= {"row": answer.row, "text": texts(answer.side, answer.row)}
    content["strange"] = answer.strange or None
    for name, hits in (("proponents", answer.proponents), ("opponents", answer.opponents)):
        content[name] = [_present({**_hit(hit), "text": texts("train", hit.row)}) for hit in hits]
    return _present(content)


def answer_records(answer: Answer, texts: Texts) -> Iterator[Record]:
    """Yield a record for every hit."""
    shown = None if answer.row is None else texts(answer.side, answer.row)
    query = {"query": answer.query, "query_row": answer.row, "side": answer.side, "strange": answer.strange}
    for kind, hits in (("proponent", answer.proponents), ("opponent", answer.opponents)):
        for rank, hit in enumerate(hits, start=1):
            record = {**query, **_hit(hit), "kind": kind, "rank": rank}
            yield record | {"query_text": shown, "text": texts("train", hit.row)}


def to_json_line(record: Record) -> Record:
    """Return a record as a JSON line has it."""
    return {"schema": SCHEMA, **_present(record)}


def format_cells(record: Record) -> list[str]:
    """Return a record as people read it, a text a field, in one line and without control characters."""
    return [_shown(value) for value in record.values()]


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return " ".join(_shown(part) for part in value)
    return "" if value is None else join_lines(str(value))


def join_lines(text: str) -> str:
    """Return a text in one line, without control characters."""
    return escape_control(" ".join(text.split()))


def _hit(hit: Hit) -> Record:
    return {
        "id": hit.id,
        "row": hit.row,
        "score": hit.score,
        "stored_score": hit.stored_score,
        "error": hit.error,
        "by_checkpoint": list(hit.by_checkpoint) or None,
        "of_means": list(hit.of_means) or None,
    }


def _present(record: Record) -> Record:
    return {name: value for name, value in record.items() if value is not None}


@contextmanager
def open_writer(
    form: Format, out: Path | TextIO, fields: Fields, *, csv_raw: bool = False
) -> Iterator[Callable[[Sequence[Record]], None]]:
    """Yield what writes records on and on: lines to a stream, or a file that is there whole or not at all.

    Args:
        form: the format.
        out: where to, as `named_files.output_file` takes it, or a stream.
        fields: of the records.
        csv_raw: leave CSV cells as they are; else those that a spreadsheet would take for formulas begin with `'`.

    Raises:
        UsageError: Parquet is to go to a stream, or a column's ids are not of one kind.
        MissingPackageError: Parquet, and pyarrow is not installed.
    """
    if not isinstance(out, Path):
        if form == "parquet":
            raise UsageError(
                problem("Parquet is no text", got="no file", expected="--output FILE", remedy="name a file")
            )
        yield from _texts(form, out, fields, csv_raw)
        return
    with open_output(out) as file:
        if form == "parquet":
            yield from _parquet(file, fields)
            return
        stream = io.TextIOWrapper(file, encoding="utf-8", errors="backslashreplace", newline="")
        try:
            yield from _texts(form, stream, fields, csv_raw)
        finally:
            # Flushed, and left open: who opened the file closes it.
            stream.detach()


def _texts(form: Format, stream: TextIO, fields: Fields, csv_raw: bool) -> Iterator[Callable[[Sequence[Record]], None]]:
    yield from (_lines(stream) if form == "jsonl" else _csv(stream, fields, csv_raw))


def _lines(stream: TextIO) -> Iterator[Callable[[Sequence[Record]], None]]:
    # JSON is UTF-8; where the stream is not, JSON's escapes are right in every encoding.
    in_ascii = (stream.encoding or "utf-8").lower().replace("-", "") != "utf8"

    def write(records: Sequence[Record]) -> None:
        for record in records:
            stream.write(escape_json(json.dumps(record, ensure_ascii=in_ascii)) + "\n")
        stream.flush()

    yield write


def _csv(stream: TextIO, fields: Fields, raw: bool) -> Iterator[Callable[[Sequence[Record]], None]]:
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
    """Return a text that no spreadsheet takes for a formula: one that it could, and is no number, begins with `'`."""
    return f"'{text}" if _FORMULA.match(text) and not _NUMBER.fullmatch(text) else text


def _parquet(file: BinaryIO, fields: Fields) -> Iterator[Callable[[Sequence[Record]], None]]:
    pa, pq = _pyarrow()
    kinds = {
        "int": pa.int64(),
        "float": pa.float64(),
        "bool": pa.bool_(),
        "text": pa.string(),
        "floats": pa.list_(pa.float64()),
    }
    opened: list[tuple[Any, Any]] = []

    def begun(records: Sequence[Record]) -> tuple[Any, Any]:
        columns = []
        for name, kind in fields.kinds:
            given = [record[name] for record in records if record[name] is not None]
            whole = (bool(given) or not records) and all(isinstance(value, int) for value in given)
            columns.append((name, (pa.int64() if whole else pa.string()) if kind == "id" else kinds[kind]))
        schema = pa.schema(columns, metadata={"tracin_ann.schema": str(SCHEMA)})
        return schema, pq.ParquetWriter(file, schema)

    def write(records: Sequence[Record]) -> None:
        if not records and opened:
            return
        if not opened:
            opened.append(begun(records))
        schema, rows = opened[0]
        texts = [field.name for field in schema if field.type == pa.string()]
        plain = [{**r, **{n: None if r[n] is None else escape_surrogates(str(r[n])) for n in texts}} for r in records]
        try:
            table = pa.Table.from_pylist(plain, schema=schema)
        except pa.ArrowInvalid as error:
            what, expected = "ids of two kinds in one Parquet file", "all of the first's kind"
            remedy = "return one kind from Task.ids, or write csv or jsonl"
            raise UsageError(problem(what, got=error, expected=expected, remedy=remedy)) from error
        rows.write_table(table)

    try:
        yield write
        write([])
    finally:
        for _, rows in opened:
            rows.close()


def to_frame(records: Sequence[Record], fields: Fields) -> Any:
    """Return records as a pandas DataFrame; its `attrs` hold the schema's version.

    Raises:
        MissingPackageError: pandas is not installed.
    """
    try:
        import pandas as pd  # noqa: PLC0415
    except ImportError as error:
        raise _missing("pandas") from error
    # Texts of pandas are UTF-8 as well.
    plain = [{n: escape_surrogates(v) if isinstance(v, str) else v for n, v in record.items()} for record in records]
    made = pd.DataFrame.from_records(plain, columns=fields.names)
    kinds = {"int": "Int64", "float": "float64", "bool": "bool"}
    made = made.astype({name: kinds[kind] for name, kind in fields.kinds if kind in kinds})
    made.attrs["tracin_ann.schema"] = SCHEMA
    return made


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow  # noqa: PLC0415
        from pyarrow import parquet  # noqa: PLC0415
    except ImportError as error:
        raise _missing("pyarrow") from error
    return pyarrow, parquet


def _missing(package: str) -> MissingPackageError:
    return MissingPackageError(
        problem(
            f"{package} is not installed",
            got=f"no module {package}",
            expected="it, for frames and Parquet",
            remedy="pip install 'tracin-ann[tables]'",
        )
    )
