"""Columns of the training rows, kept with the index, and which rows a query's filter lets pass.

`Task.columns(example) -> {name: number, bool or text}` is asked once a row when the index is built.
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
from tracin_ann.files import atomic_path
from tracin_ann.types import Int64, ProgressCallback

FILE = "columns.npz"
_PREFIX = "column "
Columns = Mapping[str, npt.NDArray[Any]]
_KINDS = (bool, int, float, str)
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
            passing_N &= _matching(condition, columns)
        return np.flatnonzero(passing_N).astype(np.int64)


def gathered(
    columns: Callable[[Any], Mapping[str, Any]], rows: Any, n_rows: int, progress: ProgressCallback
) -> dict[str, npt.NDArray[Any]]:
    """Return the columns of all rows, by name.

    Raises:
        TaskError: a row gives no mapping, other names than the first, or a value of another kind.
    """
    found: dict[str, list[Any]] = {}
    for i in range(n_rows):
        given: object = columns(rows[i])
        if not isinstance(given, Mapping) or (i and given.keys() != found.keys()) or not all(map(_fine, given)):
            raise TaskError(_unlike(i, given, list(found)))
        for name, value in given.items():
            plain = value.item() if hasattr(value, "item") else value
            kept = found.setdefault(name, [])
            if type(plain) not in _KINDS or (kept and type(plain) is not type(kept[0])):
                raise TaskError(_unlike(i, {name: value}, list(found)))
            kept.append(plain)
        if i % 1000 == 0 or i + 1 == n_rows:
            progress("columns", i + 1, n_rows)
    return {name: np.array(values) for name, values in found.items()}


def write_columns(path: Path, columns: Columns) -> None:
    """Write the columns durably."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        # Prefixed: a column may be called as an argument of savez is.
        np.savez(file, **{f"{_PREFIX}{name}": column for name, column in columns.items()})  # type: ignore[arg-type]


def read_columns(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Return the columns that `write_columns` wrote.

    Raises:
        DamagedIndexError: the file is missing or cannot be read.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {name.removeprefix(_PREFIX): arrays[name] for name in arrays.files}
    except Exception as error:
        raise DamagedIndexError(
            problem(
                f"cannot read {path}",
                got=f"{type(error).__name__}: {error}",
                expected="the columns that a build writes",
                remedy="restore the file, or build a new index",
            )
        ) from error


def _matching(condition: str, columns: Columns) -> npt.NDArray[np.bool_]:
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
    values = [_value(t.strip(), column, condition) for t in texts]
    if sign in ("=", "!="):
        equal = np.isin(column, np.array(values))
        return equal if sign == "=" else ~equal
    matching: npt.NDArray[np.bool_] = _OPERATORS[sign](column, values[0])
    return matching


def _value(text: str, column: npt.NDArray[Any], condition: str) -> Any:
    kind = column.dtype.kind
    try:
        if kind == "b":
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        return text if kind == "U" else float(text)
    except (KeyError, ValueError) as error:
        expected = "true or false" if kind == "b" else "a number"
        raise UsageError(
            problem("bad --where", got=repr(condition), expected=expected, remedy="change its value")
        ) from error


def _fine(name: object) -> bool:
    return isinstance(name, str) and _CONDITION.fullmatch(f"{name}=0") is not None


def _unlike(row: int, given: object, names: Sequence[str]) -> str:
    return problem(
        f"Task.columns gives something else for row {row}",
        got=repr(given)[:160],
        expected=f"a number, bool or text for each of {', '.join(names)}" if names else "a dict of numbers and texts",
        remedy="return the same names and kinds for every row; no spaces or <>=! in names",
    )
