"""Records of JSON Lines, CSV and Parquet files as map-style data sets, without a copy in memory (`read_records`)."""

from __future__ import annotations

import codecs
import csv
import io
import json
import operator
import os
import re
import threading
from abc import abstractmethod
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, overload

import numpy as np

from tracin_ann.errors import TaskError, TracinAnnError, first_line, problem
from tracin_ann.files import NotRegularFileError, require_regular
from tracin_ann.packages import import_pyarrow
from tracin_ann.task.nested import is_instance_of

Record = dict[str, Any]
Transform = Callable[[Any], Any]
Identity = tuple[int, int]
"""The size of a file and the time of its last change, in nanoseconds."""
_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_INTEGER = re.compile(r"[+-]?(0|[1-9][0-9]{0,17})")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?|[nN]a[nN]|[+-]?inf")
_LONGEST_CELL = 1 << 30
_CACHED_BYTES = 1 << 28
"""Memory of the decoded row groups of a Parquet file that are kept; the last one is always kept."""


def read_records(path: str | os.PathLike[str], transform: Transform | None = None) -> Rows:
    """Return the records of a file as a map-style data set of dicts (`len`, `[i]`), which reads a record when asked.

    Formats, by suffix: JSON Lines (`.jsonl`, `.ndjson`, `.json`), one object a line; CSV (`.csv`, `.tsv`) in UTF-8 with
    a header; Parquet (`.parquet`). A file of text is indexed in one pass, of which 8 bytes per record stay in memory;
    of a Parquet file, the last row groups that were read stay in memory. The data set may be pickled, and used by
    several threads.

    In a CSV file, a column whose cells are all whole numbers gives ints, one of numbers gives floats, with None for
    empty cells; any other column gives the text of its cells. A number with a leading zero is text.

    Args:
        path: of the file.
        transform: record -> example; None: the record.

    Raises:
        TaskError: the file is missing, empty, malformed, or of another format; a record's error names its line.
        MissingPackageError: a Parquet file, and pyarrow is not installed.
    """
    file = Path(path)
    suffix = file.suffix.lower()
    if suffix not in (*_JSON_SUFFIXES, *_DELIMITERS, ".parquet"):
        raise TaskError(
            problem(
                f"{file} is in no format of records",
                got=f"suffix {suffix!r}",
                expected=".jsonl, .csv, .tsv or .parquet",
                remedy="convert the file, or write a data set class that reads it",
            )
        )
    check_file(file)
    if suffix == ".parquet":
        return ParquetRecords(file, transform)
    return CsvRecords(file, transform) if suffix in _DELIMITERS else JsonRecords(file, transform)


class Rows(Sequence[Any]):
    """A map-style data set of rows that are read when they are accessed; a slice is a list of its rows.

    Args:
        transform: row -> example; None: the row.
    """

    def __init__(self, transform: Transform | None = None) -> None:
        self._transform = transform

    @abstractmethod
    def read(self, row: int) -> Any:
        """Return a row, by its position from 0, before `transform`."""

    @overload
    def __getitem__(self, place: int) -> Any: ...
    @overload
    def __getitem__(self, place: slice) -> list[Any]: ...
    def __getitem__(self, place: int | slice) -> Any:
        """Return an example, or the list of the examples of a slice."""
        if isinstance(place, slice):
            return [self[row] for row in range(*place.indices(len(self)))]
        row = operator.index(place)
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        read = self.read(row % len(self))
        return read if self._transform is None else self._transform(read)


class JsonRecords(Rows):
    """The objects of a JSON Lines file; see `read_records`."""

    def __init__(self, path: Path, transform: Transform | None = None) -> None:
        super().__init__(transform)
        self._lines = _Lines(path, _find_lines(path))

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self._lines)

    def read(self, row: int) -> Record:
        """Return a record.

        Raises:
            TaskError: its line is not a JSON object; the message names the line.
        """
        text = self._lines.read(row).strip()
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            raise self._malformed(row, f"{error.msg} at column {error.colno}") from error
        except (ValueError, RecursionError) as error:
            raise self._malformed(row, first_line(error)) from error
        if not isinstance(record, dict):
            is_array = text.startswith(b"[")
            raise self._malformed(row, "an array" if is_array else f"a {type(record).__name__}")
        return record

    def _malformed(self, row: int, got: str) -> TaskError:
        return TaskError(
            problem(
                f"line {self._lines.number(row)} of {self._lines.path} is malformed",
                got=got,
                expected='one JSON object per line, such as {"text": "...", "label": 1}',
                remedy="correct the line",
            )
        )


class CsvRecords(Rows):
    """The rows of a CSV file; see `read_records`."""

    def __init__(self, path: Path, transform: Transform | None = None) -> None:
        super().__init__(transform)
        self._delimiter = _DELIMITERS[path.suffix.lower()]
        starts, self._names, self._kinds = _scan_table(path, self._delimiter)
        self._lines = _Lines(path, starts)

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self._lines)

    def read(self, row: int) -> Record:
        """Return a record."""
        text = self._lines.read(row).decode("utf-8")
        cells = next(csv.reader(io.StringIO(text, newline=""), delimiter=self._delimiter, strict=True))
        values = (_convert(cell, kind) for cell, kind in zip(cells, self._kinds, strict=True))
        return dict(zip(self._names, values, strict=True))


class ParquetRecords(Rows):
    """The rows of a Parquet file; see `read_records`. Values are Python's: lists, dicts, dates, bytes."""

    def __init__(self, path: Path, transform: Transform | None = None) -> None:
        super().__init__(transform)
        self._path, self._identity = path, identify(path)
        self._open()
        if not len(self):
            raise TaskError(_empty_message(path))

    def _open(self) -> None:
        import_pyarrow("Parquet files")
        self._lock = threading.Lock()
        self._groups: OrderedDict[int, Any] = OrderedDict()
        self._owner = os.getpid()
        with _report_parquet(self._path):
            self._file = _open_parquet(self._path)
            counts = [self._file.metadata.row_group(g).num_rows for g in range(self._file.num_row_groups)]
        self._ends = [sum(counts[: g + 1]) for g in range(len(counts))]

    def __getstate__(self) -> Record:
        """Return the state without the open file and its rows."""
        return {name: vars(self)[name] for name in ("_path", "_identity", "_transform")}

    def __setstate__(self, state: Record) -> None:
        """Open the file again."""
        vars(self).update(state)
        check_identity(self._path, self._identity)
        self._open()

    def __len__(self) -> int:
        """Return the number of records."""
        return self._ends[-1] if self._ends else 0

    def read(self, row: int) -> Record:
        """Return a record.

        Raises:
            TaskError: the file is damaged.
        """
        group = bisect_right(self._ends, row)
        place = row - (self._ends[group - 1] if group else 0)
        record: Record = self._load(group).slice(place, 1).to_pylist()[0]
        return record

    def _load(self, group: int) -> Any:
        """Return a row group, decoded."""
        if self._owner != os.getpid():
            # A forked process: the lock and the reader of the parent may be in use.
            self._open()
        with self._lock:
            if group not in self._groups:
                with _report_parquet(self._path):
                    self._groups[group] = self._file.read_row_group(group, use_threads=False)
            self._groups.move_to_end(group)
            while len(self._groups) > 1 and sum(table.nbytes for table in self._groups.values()) > _CACHED_BYTES:
                self._groups.popitem(last=False)
            return self._groups[group]


class FrameRows(Rows):
    """The rows of a pandas DataFrame as dicts of Python values; the frame is not copied."""

    def __init__(self, frame: Any) -> None:
        super().__init__()
        names = list(frame.columns)
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise TaskError(
                problem(
                    "the rows of a DataFrame are dicts by column",
                    got=f"the column {twice[0]!r} twice",
                    expected="columns of distinct names",
                    remedy="rename one of them",
                )
            )
        self._n_rows = len(frame)
        self._columns = [(name, frame.iloc[:, place]) for place, name in enumerate(names)]

    def __len__(self) -> int:
        """Return the number of rows."""
        return self._n_rows

    def read(self, row: int) -> Record:
        """Return a row."""
        values = ((name, column.iat[row]) for name, column in self._columns)
        return {name: value.item() if isinstance(value, np.generic) else value for name, value in values}


def as_map_style(data: Any) -> Any:
    """Return the rows of a pandas DataFrame as a map-style data set of dicts; any other data set unchanged."""
    return FrameRows(data) if is_instance_of(data, "pandas", "DataFrame") else data


class FileReader:
    """Reads bytes of files by their position, in any thread or process; each thread keeps its last file open."""

    def __init__(self) -> None:
        self._last = threading.local()

    def __reduce__(self) -> tuple[type[FileReader], tuple[()]]:
        """Return a new reader for another process."""
        return FileReader, ()

    def read(self, path: Path, start: int, size: int) -> bytes:
        """Return bytes of a file.

        Raises:
            TaskError: the file is missing, cannot be read, or is shorter.
        """
        try:
            if getattr(self._last, "path", None) != path:
                self._last.path, self._last.file = None, None
                self._last.file = _Descriptor(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
                self._last.path = path
            parts = list(_read_fully(self._last.file.number, start, size))
        except OSError as error:
            raise TaskError(unreadable_message(path, error.strerror)) from error
        found = b"".join(parts)
        if len(found) < size:
            raise TaskError(_changed_message(path, "a shorter file"))
        return found


class _Descriptor:
    """An open file, closed with the last reference to this object."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)


def _read_fully(descriptor: int, start: int, size: int) -> Iterator[bytes]:
    while size > 0:
        part = os.pread(descriptor, size, start)
        if not part:
            return
        yield part
        start, size = start + len(part), size - len(part)


class _Lines:
    """The text of each record of a file.

    Args:
        path: of the file.
        starts: positions of the first bytes of the records.
    """

    def __init__(self, path: Path, starts: array[int]) -> None:
        self.path, self._starts, self._identity = path, starts, identify(path)
        self._reader = FileReader()
        if not starts:
            raise TaskError(_empty_message(path))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Check that the file is the one that was indexed."""
        vars(self).update(state)
        check_identity(self.path, self._identity)

    def __len__(self) -> int:
        return len(self._starts)

    def read(self, row: int) -> bytes:
        """Return the text of a record, with its line end and blank lines after it."""
        end = self._starts[row + 1] if row + 1 < len(self) else self._identity[0]
        return self._reader.read(self.path, self._starts[row], end - self._starts[row])

    def number(self, row: int) -> int:
        """Return the number of a record's first line, from 1."""
        return 1 + sum(part.count(b"\n") for part in _read_parts(self.path, self._starts[row]))


def _read_parts(path: Path, size: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        while size > 0:
            part = file.read(min(size, 1 << 20))
            yield part
            size -= len(part) or size


def _find_lines(path: Path) -> array[int]:
    """Return the positions of the lines that are not blank."""
    starts = array("q")
    position = 0
    with _report_unreadable(path), path.open("rb") as file:
        for line in file:
            skipped = len(codecs.BOM_UTF8) if not position and line.startswith(codecs.BOM_UTF8) else 0
            if line[skipped:].strip():
                starts.append(position + skipped)
            position += len(line)
    return starts


def _scan_table(path: Path, delimiter: str) -> tuple[array[int], list[str], list[str]]:
    """Return the positions of the rows of a CSV file, the names of its columns, and their kinds.

    Raises:
        TaskError: a row has another number of cells than the header, or is not CSV in UTF-8.
    """
    csv.field_size_limit(_LONGEST_CELL)
    starts = array("q")
    kinds: list[str] = []
    names: list[str] = []
    with _report_unreadable(path), path.open("rb") as file:
        lines = _CountedLines(file)
        rows = csv.reader(lines, delimiter=delimiter, strict=True)
        while True:
            start, number = lines.position, lines.number + 1
            try:
                cells = next(rows)
            except StopIteration:
                break
            except (csv.Error, UnicodeDecodeError) as error:
                raise TaskError(_malformed_table(path, number, first_line(error), "a row of CSV in UTF-8")) from error
            if not cells:
                continue
            if not names:
                names, kinds = _check_header(path, number, cells), ["" for _ in cells]
                continue
            if len(cells) != len(names):
                got, expected = f"{len(cells)} cell{'s' * (len(cells) > 1)}", f"{len(names)}, as in the header"
                raise TaskError(_malformed_table(path, number, got, expected))
            starts.append(start)
            kinds = [_join_kinds(kind, cell) for kind, cell in zip(kinds, cells, strict=True)]
    return starts, names, [kind or "text" for kind in kinds]


class _CountedLines:
    """Decoded lines of a file, with the position and number of the last one."""

    def __init__(self, file: Iterable[bytes]) -> None:
        self._lines, self.position, self.number = iter(file), 0, 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        is_first = not self.position
        self.position, self.number = self.position + len(line), self.number + 1
        return line.decode("utf-8-sig" if is_first else "utf-8")


def _check_header(path: Path, number: int, names: list[str]) -> list[str]:
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise TaskError(_malformed_table(path, number, f"the column {twice[0]!r} twice", "a header of distinct names"))
    return names


def _malformed_table(path: Path, number: int, got: str, expected: str) -> str:
    return problem(f"line {number} of {path} is malformed", got=got, expected=expected, remedy="correct the line")


def _join_kinds(kind: str, cell: str) -> str:
    """Return the kind of a column with one more cell: "" (all cells empty), "int", "float" or "text"."""
    if kind == "text" or not cell:
        return kind
    if kind != "float" and _INTEGER.fullmatch(cell):
        return "int"
    has_zeros = cell.lstrip("+-")[:1] == "0" and cell.lstrip("+-")[1:2].isdigit()
    return "float" if _NUMBER.fullmatch(cell) and not has_zeros else "text"


def _convert(cell: str, kind: str) -> Any:
    if kind == "text":
        return cell
    return (int(cell) if kind == "int" else float(cell)) if cell else None


def check_file(path: Path) -> None:
    """Check that a path is a file that can be read.

    Raises:
        TaskError: it is missing, or not a regular file.
    """
    try:
        require_regular(path)
        with path.open("rb"):
            pass
    except NotRegularFileError as error:
        raise TaskError(unreadable_message(path, error)) from error
    except OSError as error:
        raise TaskError(unreadable_message(path, error.strerror)) from error


@contextmanager
def _report_unreadable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TaskError(unreadable_message(path, error.strerror)) from error


@contextmanager
def _report_parquet(path: Path) -> Iterator[None]:
    """Turn errors of pyarrow into a TaskError that names the file."""
    try:
        yield
    except (TracinAnnError, MemoryError):
        raise
    # ArrowInvalid is a ValueError, ArrowIOError an OSError; other errors depend on which byte is damaged.
    except Exception as error:
        raise TaskError(
            problem(
                f"{path} cannot be read",
                got=first_line(error),
                expected="a Parquet file",
                remedy="write or download the file again",
            )
        ) from error


def _open_parquet(path: Path) -> Any:
    _, parquet = import_pyarrow("Parquet files")
    return parquet.ParquetFile(path)


def unreadable_message(path: Path, got: object) -> str:
    """Return the message for a file that cannot be opened or read."""
    return problem(f"{path} cannot be read", got=got, expected="a file", remedy="correct the path")


def identify(path: Path) -> Identity:
    """Return the size and the time of the last change of a file."""
    with _report_unreadable(path):
        status = path.stat()
    return status.st_size, status.st_mtime_ns


def check_identity(path: Path, identity: Identity) -> None:
    """Check that a file is unchanged.

    Raises:
        TaskError: it has changed, or is missing.
    """
    if identify(path) != identity:
        raise TaskError(_changed_message(path, "another size or time"))


def _changed_message(path: Path, got: str) -> str:
    return problem(
        f"{path} has changed since its records were counted",
        got=got,
        expected="the same file",
        remedy="open it again when nothing writes to it",
    )


def _empty_message(path: Path) -> str:
    return problem(f"{path} has no records", got="none", expected="at least one", remedy="correct the path or the file")
