"""Columns and ids of the training rows, stored with an index, and the row filters that use them.

The build calls `Task.columns(example) -> {name: number, bool or string}` and `Task.ids(example)` once for each row.
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
from tracin_ann.store.arrays import make_text_array, read_arrays, write_arrays
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
    """The training rows that may be hits: those that meet all conditions.

    Attributes:
        only: the positions allowed; None allows all.
        without: the positions excluded.
        where: conditions on columns, such as `label=3`, `label=3,5`, `length>=10`, `split!=test`.
    """

    only: tuple[int, ...] | None = None
    without: tuple[int, ...] = ()
    where: tuple[str, ...] = ()

    def allowed(self, n_rows: int, columns: Columns, absent: Int64) -> Int64 | None:
        """Return the positions of the rows that pass, ascending, or None if all pass; `absent` rows never pass.

        Raises:
            UsageError: a position is out of range, a column does not exist, or a condition cannot be parsed.
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
    """The data stored for the training rows besides their features.

    Attributes:
        columns: arrays [N] by name; columns of strings have dtype object.
        ids: the task's ids [N], int64 or strings, all different; None: rows are identified by their positions.
    """

    columns: Columns
    ids: npt.NDArray[Any] | None = None

    def __post_init__(self) -> None:
        """Check shapes and dtypes.

        Raises:
            DamagedIndexError: an array is not a column of numbers, bools or strings, ids are neither int64 nor
                strings, or lengths differ.
        """
        for name, values in self.arrays.items():
            if values.ndim != 1 or not (values.dtype.kind in "bif" or _is_text(values)):
                raise DamagedIndexError(f"{name!r} is {values.dtype} {values.shape}, not a column; build a new index")
        if self.ids is not None and self.ids.dtype != np.int64 and not _is_text(self.ids):
            raise DamagedIndexError(f"ids are {self.ids.dtype}, not int64 or text; build a new index")
        lengths = {len(values) for values in self.arrays.values()}
        if len(lengths) > 1:
            raise DamagedIndexError(f"columns have different numbers of rows: {sorted(lengths)}; build a new index")

    @property
    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return all arrays by their names in the file; a prefix separates columns from the ids and savez arguments."""
        columns = {f"{_PREFIX}{name}": column for name, column in self.columns.items()}
        return columns if self.ids is None else {**columns, _IDS: self.ids}

    def __len__(self) -> int:
        """Return N, or 0 if there are neither columns nor ids."""
        return max((len(values) for values in self.arrays.values()), default=0)

    def check_unique_ids(self) -> None:
        """Check that no two rows have the same id. Queries skip this check, which sorts all ids.

        Raises:
            DamagedIndexError: two rows have the same id; the message names it.
        """
        if self.ids is None:
            return
        order = np.argsort(self.ids, kind="stable")
        repeated = np.flatnonzero(self.ids[order][1:] == self.ids[order][:-1])
        if len(repeated):
            first, second = (int(row) for row in order[repeated[0] : repeated[0] + 2])
            raise DamagedIndexError(f"rows {first} and {second} both have id {self.id_at(first)!r}; build a new index")

    def id_at(self, row: int) -> int | str:
        """Return the id of the row at a position."""
        return self.ids_at([row])[0]

    def ids_at(self, rows_N: npt.ArrayLike) -> list[int | str]:
        """Return the ids of the rows at these positions."""
        at_N = np.asarray(rows_N)
        ids: list[int | str] = (at_N if self.ids is None else self.ids[at_N]).tolist()
        return ids


def collect_columns(
    rows: Any,
    n_rows: int,
    columns: Callable[[Any], Mapping[str, Any]] | None,
    id_of: Callable[[Any], Any] | None,
    progress: ProgressCallback,
) -> RowTable | None:
    """Return the columns and ids of all rows; None if the task defines neither.

    Args:
        rows: the training data, indexed by position.
        n_rows: N.
        columns: `Task.columns`, or None.
        id_of: returns the id of an example, or None where it has none; None if the task defines no ids.
        progress: called with ("columns", rows done, N).

    Raises:
        TaskError: `columns` does not return a mapping, or returns other names than for the first row, or a value of
            another type; an id has another type than the first, or repeats; an integer exceeds int64.
    """
    if columns is None and id_of is None:
        return None
    values_of: dict[str, list[Any]] = {}
    ids: dict[int | str, int] = {}
    for i in range(n_rows):
        row = rows[i]
        if columns is not None:
            _append_values(values_of, columns(row), i)
        if id_of is not None and (own := id_of(row)) is not None:
            _check_id(ids, own, i)
            ids[own] = i
        if i % 1000 == 0 or i + 1 == n_rows:
            progress("columns", i + 1, n_rows)
    arrays = {name: _make_array(values) for name, values in values_of.items()}
    return RowTable(arrays, _make_array(list(ids)) if ids else None)


def _make_array(values: list[Any]) -> npt.NDArray[Any]:
    return make_text_array(values) if isinstance(values[0], str) else np.array(values)


def _is_text(values: npt.NDArray[Any]) -> bool:
    return values.dtype == object and all(type(value) is str for value in values.flat)


def _append_values(values_of: dict[str, list[Any]], given: object, row: int) -> None:
    names = list(values_of)
    if not isinstance(given, Mapping) or (row and given.keys() != values_of.keys()):
        raise TaskError(_describe_bad_columns(row, given, names))
    if not all(map(_is_valid_name, given)):
        raise TaskError(_describe_bad_columns(row, given, names))
    for name, value in given.items():
        plain = value.item() if hasattr(value, "item") else value
        values = values_of.setdefault(name, [])
        if type(plain) not in _KINDS or (values and type(plain) is not type(values[0])) or not _is_storable(plain):
            raise TaskError(_describe_bad_columns(row, {name: value}, list(values_of)))
        values.append(plain)


def _is_storable(value: object) -> bool:
    """Return whether an array can store the value: integers must fit into int64."""
    return type(value) is not int or value in _INT64


def _check_id(ids: Mapping[int | str, int], own: int | str, row: int) -> None:
    first = next(iter(ids), own)
    if own in ids or type(own) is not type(first) or not _is_storable(own):
        why = f", the id of row {ids[own]}" if own in ids else f", the first row's is {first!r}" if row else ""
        raise TaskError(
            problem(
                f"Task.ids returns an invalid id for row {row}",
                got=f"{own!r}{why}",
                expected="ids of one type, text or int64, all different",
                remedy="fix Task.ids",
            )
        )


def write_columns(path: Path, table: RowTable) -> None:
    """Write the columns and ids durably."""
    write_arrays(path, table.arrays)


def read_columns(path: Path, n_rows: int) -> RowTable:
    """Return the columns and ids of N rows that `write_columns` wrote.

    Raises:
        DamagedIndexError: the file is missing, cannot be read, or has another number of rows.
    """
    with report_damage(path, "the columns that a build writes", "restore the file, or build a new index"):
        arrays = read_arrays(path)
        ids = arrays.pop(_IDS, None)
        table = RowTable({name.removeprefix(_PREFIX): column for name, column in arrays.items()}, ids)
        if table.arrays and len(table) != n_rows:
            raise DamagedIndexError(f"columns of {len(table)} rows, the index has {n_rows}")
        return table


def _match_condition(condition: str, columns: Columns) -> npt.NDArray[np.bool_]:
    """Return which rows [N] meet a condition.

    Raises:
        UsageError: the condition cannot be parsed, or there is no such column.
    """
    match = _CONDITION.fullmatch(condition)
    if match is None:
        raise UsageError(
            problem(
                "bad --where",
                got=repr(condition),
                expected="COLUMN=VALUE, or one of != < <= > >=, or COLUMN=A,B",
                remedy="change --where",
            )
        )
    name, sign, text = match.groups()
    if name not in columns:
        raise UsageError(
            problem(
                f"no column {name!r} in this index",
                got=repr(condition),
                expected=f"one of {', '.join(columns)}" if columns else "an index with columns",
                remedy="change --where" if columns else "define Task.columns and build again",
            )
        )
    column = columns[name]
    texts = text.split(",") if sign in ("=", "!=") else [text]
    values = [_parse_value(t.strip(), column, condition) for t in texts]
    if sign in ("=", "!="):
        equal = np.isin(column, make_text_array(values) if column.dtype == object else np.array(values))
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
    # The name is part of a member's name in the file.
    return name == escape_surrogates(name) and "\0" not in name


def _describe_bad_columns(row: int, given: object, names: Sequence[str]) -> str:
    return problem(
        f"Task.columns returns an invalid value for row {row}",
        got=repr(given)[:160],
        expected=f"a number, bool or string for each of {', '.join(names)}" if names else "a dict of numbers, strings",
        remedy="return the same names and types for every row; no spaces or <>=! in names",
    )
