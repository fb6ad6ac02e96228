"""JSON files, and the conversion of their content to frozen dataclasses with a check of every field's type."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import lru_cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from tracin_ann.errors import DamagedIndexError, problem
from tracin_ann.files.durable import atomic_write
from tracin_ann.files.opening import open_regular, report_damage

R = TypeVar("R")
_MAX_BYTES = 64 << 20
_REMEDY = "name the directory of a finished index, or run the build again"


def write_json_atomic(path: Path, value: Mapping[str, object], *, exclusive: bool = False) -> None:
    """Replace `path` atomically by a JSON object; `exclusive`: create it.

    Raises:
        FileExistsError: the path exists, and the write is exclusive.
        ValueError: a number is NaN or infinite.
        OSError: the system cannot write the file.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    with atomic_write(path, exclusive=exclusive) as file:
        file.write((text + "\n").encode())


def read_json(path: Path, remedy: str = _REMEDY) -> dict[str, object]:
    """Return the JSON object in `path`.

    Raises:
        DamagedIndexError: the path is not a regular file, is larger than any file that is written, or does not contain
            a JSON object.
        OSError: the system cannot read it.
    """
    with report_damage(path, "a JSON file", remedy), open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > _MAX_BYTES:
            raise ValueError(f"more than {_MAX_BYTES:,} bytes")
        # read(n) allocates n bytes, however short the file is.
        data = file.read(size)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        message = problem(f"{path}", got=f"invalid JSON ({error})", expected="a JSON object", remedy=remedy)
        raise DamagedIndexError(message) from error
    if not isinstance(value, dict):
        got = f"a JSON {type(value).__name__}"
        raise DamagedIndexError(problem(f"{path}", got=got, expected="a JSON object", remedy=remedy))
    return value


def read_record(kind: type[R], content: object) -> R:
    """Return the dataclass instance that `dataclasses.asdict` turned into a JSON value.

    Fields may be numbers, strings, bools, literals, dataclasses, tuples or mappings of these, or None. A field with a
    default may be missing, because earlier versions did not write it.

    Raises:
        ValueError: a field is missing, unknown or of another type, or the dataclass rejects its values.
    """
    hints, optional = _field_types(kind)  # type: ignore[arg-type]
    if not isinstance(content, Mapping) or not hints.keys() - optional <= content.keys() <= hints.keys():
        got = f"fields {sorted(map(str, content))}" if isinstance(content, Mapping) else type(content).__name__
        raise ValueError(f"{kind.__name__} from {got}, expected fields {sorted(hints)}")
    return kind(**{name: _convert(hints[name], value, f"{kind.__name__}.{name}") for name, value in content.items()})


@lru_cache
def _field_types(kind: Any) -> tuple[dict[str, Any], set[str]]:
    """Return the types of a dataclass's fields by name, and the names of the fields with a default."""
    hints, defined = get_type_hints(kind), fields(kind)
    optional = {field.name for field in defined if (field.default, field.default_factory) != (MISSING, MISSING)}
    return {field.name: hints[field.name] for field in defined}, optional


def _convert(hint: Any, value: object, where: str) -> Any:
    """Return a JSON value as the type of a field; `where` is the field's name for errors."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        (other,) = (each for each in inner if each is not NoneType)
        return None if value is None else _convert(other, value, where)
    if is_dataclass(hint):
        return read_record(hint, value)  # type: ignore[arg-type]
    if origin is tuple and isinstance(value, list):
        return tuple(_convert(inner[0], item, where) for item in value)
    if origin is Mapping and isinstance(value, dict):
        return {name: _convert(inner[1], item, where) for name, item in value.items()}
    if hint is float and type(value) in (int, float) and math.isfinite(value):  # type: ignore[arg-type]
        return float(value)  # type: ignore[arg-type]
    if (origin is Literal and value in inner) or (hint in (int, str, bool) and type(value) is hint):
        return value
    raise ValueError(f"{where} is {str(value)[:100]!r}")
