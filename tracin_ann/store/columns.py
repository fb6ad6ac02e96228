"""Columns and ids of the training rows, kept with the index, and which rows a query's filter lets pass.

`Task.columns(example) -> {name: number, bool or text}` and `Task.ids(example)` are asked once a row when the index is
built.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tracin_ann.errors import DamagedIndexError, TaskError, UsageError, problem
from tracin_ann.files import report_damage
from tracin_ann.store.arrays import read_arrays, text_array, write_arrays
from tracin_ann.text import escape_surrogates
from tracin_ann.types import Int64, ProgressCallback

COLUMN_FILE = "columns.npz"
_PREFIX, _IDS = "column ", "ids"
Columns = Mapping[str, npt.NDArray[Any]]
_KINDS = (bool, int, float, str)
_INT64 = range(-(2**63), 2**63)
_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "!=": operator.ne,
    "<=": operator.le,
    ">=": operator.ge,
    "=": operator.eq,
    "<": operator.lt,
    ">": operator.gt,
}
_CONDITION = re.compile(r"\s*([^\s<>=!]+)\s*(!=|<=|>=|=|<|>)\s*(.*?)\s*", re.DOTALL)


@dataclass(frozen=True)
class RowFilter:
    """Which training rows may be among the hits: all conditions together.

    Attributes:
        only: ids; None: all.
        without: ids left out.
        where: conditions on columns, `label=3`, `label=3,5`, `length>=10`, `split!=test`.
    """

    only: tuple[int, ...] | None = None
    without: tuple[int, ...] = ()
    where: tuple[str, ...] = ()

    def allowed(self, n_rows: int, columns: Columns, absent: Int64) -> Int64 | None:
        """Return the ids that pass, rising, or None where all do; absent ones never do.

        Raises:
            UsageError: an id out of range, a column that there is not, or a condition that cannot be read.
        """
        if self.only is None and not self.without and not self.where and not len(absent):
            return None
        for option, ids in (("--only", self.only or ()), ("--without", self.without)):
            wrong = [i for i in ids if not 0 <= i < n_rows]
            if wrong:
                raise UsageError(
                    problem(f"bad {option}", got=wrong[0], expected=f"0 to {n_rows - 1}", remedy=f"change {option}")
                )
        passing_N = np.ones(n_rows, dtype=bool)
        if self.only is not None:
            passing_N[:] = False
            passing_N[list(self.only)] = True
        passing_N[list(self.without)] = False
        passing_N[absent] = False
        for condition in self.where:
            passing_N &= _match_condition(condition, columns)
        return np.flatnonzero(passing_N).astype(np.int64)


@dataclass(frozen=True)
class RowTable:
    """What is kept of the training rows beside their features.

    Attributes:
        columns: by name, [N] each; those of texts are arrays of str, of dtype object.
        ids: the task's own ids [N], int64 or text, each once; None: rows go by their positions.
    """

    columns: Columns
    ids: npt.NDArray[Any] | None = None

    def __post_init__(self) -> None:
        """Check shapes and kinds.

        Raises:
            DamagedIndexError: an array is no column of numbers, bools or texts, ids are neither int64 nor text, or
                lengths differ.
        """
        for name, values in self.arrays.items():
            if values.ndim != 1 or not (values.dtype.kind in "bif" or _is_text(values)):
                raise DamagedIndexError(f"{name!r} is {values.dtype} {values.shape}, no column; build a new index")
        if self.ids is not None and self.ids.dtype != np.int64 and not _is_text(self.ids):
            raise DamagedIndexError(f"ids are {self.ids.dtype}, not int64 or text; build a new index")
        lengths = {len(values) for values in self.arrays.values()}
        if len(lengths) > 1:
            raise DamagedIndexError(f"columns of {sorted(lengths)} rows cannot be of one index; build a new one")

    @property
    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return all arrays, by their names in the file: a column may be called as an argument of savez is."""
        held = {f"{_PREFIX}{name}": column for name, column in self.columns.items()}
        return held if self.ids is None else {**held, _IDS: self.ids}

    def __len__(self) -> int:
        """Return N, or 0 where nothing is kept."""
        return max((len(values) for values in self.arrays.values()), default=0)

    def check_unique_ids(self) -> None:
        """Refuse ids that two rows have; reads them all, which a query need not.

        Raises:
            DamagedIndexError: names such an id.
        """
        if self.ids is None:
            return
        order = np.argsort(self.ids, kind="stable")
        twins = np.flatnonzero(self.ids[order][1:] == self.ids[order][:-1])
        if len(twins):
            first, second = (int(row) for row in order[twins[0] : twins[0] + 2])
            raise DamagedIndexError(f"rows {first} and {second} both have id {self.id_at(first)!r}; build a new index")

    def id_at(self, row: int) -> int | str:
        """Return the id of the row at a position."""
        if self.ids is None:
            return row
        own = self.ids[row]
        return own if isinstance(own, str) else int(own)


def collect_columns(
    rows: Any,
    n_rows: int,
    columns: Callable[[Any], Mapping[str, Any]] | None,
    id_of: Callable[[Any], Any] | None,
    progress: ProgressCallback,
) -> RowTable | None:
    """Return the columns and ids of all rows, as far as the task gives them; None where it gives neither.

    Raises:
        TaskError: a row gives no mapping, other names than the first, or a value of another kind; an id is of another
            kind than the first, or another row's; a whole number is no int64.
    """
    if columns is None and id_of is None:
        return None
    found: dict[str, list[Any]] = {}
    ids: dict[int | str, int] = {}
    for i in range(n_rows):
        row = rows[i]
        if columns is not None:
            _append_values(found, columns(row), i)
        if id_of is not None and (own := id_of(row)) is not None:
            _check_id(ids, own, i)
            ids[own] = i
        if i % 1000 == 0 or i + 1 == n_rows:
            progress("columns", i + 1, n_rows)
    return RowTable({name: _make_array(values) for name, values in found.items()}, _make_array(list(ids)) if ids else None)


def _make_array(values: list[Any]) -> npt.NDArray[Any]:
    return text_array(values) if isinstance(values[0], str) else np.array(values)


def _is_text(values: npt.NDArray[Any]) -> bool:
    return values.dtype == object and all(type(value) is str for value in values.flat)


def _append_values(found: dict[str, list[Any]], given: object, row: int) -> None:
    if not isinstance(given, Mapping) or (row and given.keys() != found.keys()) or not all(map(_is_valid_name, given)):
        raise TaskError(_describe_bad_columns(row, given, list(found)))
    for name, value in given.items():
        plain = value.item() if hasattr(value, "item") else value
        kept = found.setdefault(name, [])
        if type(plain) not in _KINDS or (kept and type(plain) is not type(kept[0])) or not _is_storable(plain):
            raise TaskError(_describe_bad_columns(row, {name: value}, list(found)))
        kept.append(plain)


def _is_storable(value: object) -> bool:
    """Return whether an array can hold the value: whole numbers are int64."""
    return type(value) is not int or value in _INT64


def _check_id(ids: Mapping[int | str, int], own: int | str, row: int) -> None:
    first = next(iter(ids), own)
    if own in ids or type(own) is not type(first) or not _is_storable(own):
        why = f", that of row {ids[own]}" if own in ids else f", the first row's is {first!r}" if row else ""
        raise TaskError(
            problem(
                f"Task.ids gives row {row} an id that it cannot have",
                got=f"{own!r}{why}",
                expected="one kind of id, text or int64, each once",
                remedy="mend Task.ids",
            )
        )


def write_columns(path: Path, table: RowTable) -> None:
    """Write the columns and ids durably."""
    write_arrays(path, table.arrays)


def read_columns(path: Path, n_rows: int) -> RowTable:
    """Return the columns and ids of so many rows that `write_columns` wrote.

    Raises:
        DamagedIndexError: the file is missing, cannot be read, or is of other rows.
    """
    with report_damage(path, "the columns that a build writes", "restore the file, or build a new index"):
        held = read_arrays(path)
        ids = held.pop(_IDS, None)
        table = RowTable({name.removeprefix(_PREFIX): column for name, column in held.items()}, ids)
        if table.arrays and len(table) != n_rows:
            raise DamagedIndexError(f"columns of {len(table)} rows, the index has {n_rows}")
        return table


def _match_condition(condition: str, columns: Columns) -> npt.NDArray[np.bool_]:
    found = _CONDITION.fullmatch(condition)
    if found is None:
        raise UsageError(
            problem(
                "bad --where",
                got=repr(condition),
                expected="COLUMN=VALUE, or one of != < <= > >=, or COLUMN=A,B",
                remedy="change --where",
            )
        )
    name, sign, text = found.groups()
    if name not in columns:
        raise UsageError(
            problem(
                f"no column {name!r} in this index",
                got=repr(condition),
                expected=f"one of {', '.join(columns)}" if columns else "an index with columns",
                remedy="change --where" if columns else "give Task.columns and build again",
            )
        )
    column = columns[name]
    texts = text.split(",") if sign in ("=", "!=") else [text]
    values = [_parse_value(t.strip(), column, condition) for t in texts]
    if sign in ("=", "!="):
        equal = np.isin(column, text_array(values) if column.dtype == object else np.array(values))
        return equal if sign == "=" else ~equal
    matching: npt.NDArray[np.bool_] = _OPERATORS[sign](column, values[0])
    return matching


def _parse_value(text: str, column: npt.NDArray[Any], condition: str) -> Any:
    kind = column.dtype.kind
    try:
        if kind == "b":
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        return text if kind == "O" else float(text)
    except (KeyError, ValueError) as error:
        expected = "true or false" if kind == "b" else "a number"
        raise UsageError(
            problem("bad --where", got=repr(condition), expected=expected, remedy="change its value")
        ) from error


def _is_valid_name(name: object) -> bool:
    if not isinstance(name, str) or _CONDITION.fullmatch(f"{name}=0") is None:
        return False
    # The file of columns has it as a member's name.
    return name == escape_surrogates(name) and "\0" not in name


def _describe_bad_columns(row: int, given: object, names: Sequence[str]) -> str:
    return problem(
        f"Task.columns gives something else for row {row}",
        got=repr(given)[:160],
        expected=f"a number, bool or text for each of {', '.join(names)}" if names else "a dict of numbers and texts",
        remedy="return the same names and kinds for every row; no spaces or <>=! in names",
    )
