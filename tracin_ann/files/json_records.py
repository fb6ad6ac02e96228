"""Frozen dataclasses from what JSON holds: every field of its own kind, and no other."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import lru_cache
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

R = TypeVar("R")


def read_record(kind: type[R], content: object) -> R:
    """Return the record that `dataclasses.asdict` made into JSON.

    Fields may be numbers, texts, bools, literals, records, tuples or mappings of these, or None. A field that has a
    default may be missing: earlier versions wrote none.

    Raises:
        ValueError: a field is missing, unknown or of another kind, or the record refuses its values.
    """
    hints, optional = _fields(kind)  # type: ignore[arg-type]
    if not isinstance(content, Mapping) or not hints.keys() - optional <= content.keys() <= hints.keys():
        got = sorted(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
        raise ValueError(f"{kind.__name__} of {got}, not of {sorted(hints)}")
    return kind(**{name: _value(hints[name], value, f"{kind.__name__}.{name}") for name, value in content.items()})


@lru_cache
def _fields(kind: Any) -> tuple[dict[str, Any], set[str]]:
    """Return the types of a record's fields by name, and which may be missing: those with a default."""
    hints, held = get_type_hints(kind), fields(kind)
    optional = {field.name for field in held if (field.default, field.default_factory) != (MISSING, MISSING)}
    return {field.name: hints[field.name] for field in held}, optional


def _value(hint: Any, value: object, where: str) -> Any:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        (other,) = (each for each in inner if each is not NoneType)
        return None if value is None else _value(other, value, where)
    if is_dataclass(hint):
        return read_record(hint, value)  # type: ignore[arg-type]
    if origin is tuple and isinstance(value, list):
        return tuple(_value(inner[0], item, where) for item in value)
    if origin is Mapping and isinstance(value, dict):
        return {name: _value(inner[1], item, where) for name, item in value.items()}
    if hint is float and type(value) in (int, float) and math.isfinite(value):  # type: ignore[arg-type]
        return float(value)  # type: ignore[arg-type]
    if (origin is Literal and value in inner) or (hint in (int, str, bool) and type(value) is hint):
        return value
    raise ValueError(f"{where} is {str(value)[:100]!r}")
