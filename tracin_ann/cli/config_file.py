"""Options of a command from a TOML file (`--config`), checked and passed to click as defaults."""

from __future__ import annotations

import difflib
import reprlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from tracin_ann.cli.parameters import Dimension
from tracin_ann.errors import UsageError, problem

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_NOT_ALLOWED = ("config", "help", "version")
_MAX_BYTES = 1 << 16
# A dotted key is on one line; parsing it takes time quadratic in the number of its parts.
_MAX_DOTS = 200
_INT64 = range(-(2**63), 2**63)
# Shortens deeply nested values for messages.
_brief = reprlib.Repr()
_brief.maxstring = _brief.maxother = 120


def read_config(path: Path, command: click.Command, context: click.Context) -> dict[str, Any]:
    """Return the options in a TOML file by the names of the command's parameters.

    A key is the long name of an option, with `_` or `-` between words, or the name of an argument (`dir`). A repeatable
    option takes a list; `task_arg` also takes a table. Paths are relative to the current directory, as on the command
    line.

    Raises:
        UsageError: the file cannot be read, a name is unknown, or a value has the wrong type.
    """
    from tracin_ann.files import read_user_text

    try:
        text = read_user_text(path, _MAX_BYTES)
        if any(line.count(".") > _MAX_DOTS for line in text.splitlines()):
            raise ValueError(f"a line with more than {_MAX_DOTS} dots")
        table = tomllib.loads(text)
    # A number with thousands of digits also raises ValueError.
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(
            problem(f"cannot read --config {path}", got=error, expected="a TOML file", remedy="correct it")
        ) from error
    known = _parameters_by_key(command)
    options: dict[str, Any] = {}
    for name, value in table.items():
        key = name.replace("-", "_")
        if key not in known:
            raise UsageError(_describe_unknown_key(path, name, sorted(known)))
        parameter = known[key]
        parsed = _parse_value(f"{path}: {name}", parameter, value, context)
        if parsed is not None:
            options[str(parameter.name)] = parsed
    return options


def _parameters_by_key(command: click.Command) -> dict[str, click.Parameter]:
    known: dict[str, click.Parameter] = {}
    for parameter in command.params:
        if isinstance(parameter, click.Argument):
            known[(parameter.metavar or str(parameter.name)).lower()] = parameter
        for option in parameter.opts:
            if isinstance(parameter, click.Option) and (option.startswith("--") or len(parameter.opts) == 1):
                known[option.lstrip("-").replace("-", "_")] = parameter
    return {name: parameter for name, parameter in known.items() if name not in _NOT_ALLOWED}


def _describe_unknown_key(path: Path, name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name.replace("-", "_"), known, 3, 0.5) or known
    return problem(f"{path}: unknown option", got=name, expected=" or ".join(near), remedy="correct the name")


def _parse_value(what: str, parameter: click.Parameter, value: object, context: click.Context) -> object:
    """Return a value in the form that click expects for the parameter, or None if it leaves the default unchanged."""
    if isinstance(parameter, click.Option) and parameter.is_flag:
        _require(what, isinstance(value, bool), value, "true or false")
        if parameter.is_bool_flag:
            return value
        return parameter.flag_value if value else None
    if isinstance(parameter, click.Option) and parameter.count:
        _require(what, type(value) is int and value in _INT64, value, "an integer")
        return value
    if parameter.multiple:
        if isinstance(value, Mapping):
            value = [f"{key}={_to_text(what, entry)}" for key, entry in value.items()]
        values = value if isinstance(value, list) else [value]
        return [_to_text(what, entry) for entry in values]
    return _parse_single_value(what, parameter, value, context)


def _parse_single_value(what: str, parameter: click.Parameter, value: Any, context: click.Context) -> object:
    kind = parameter.type
    if isinstance(kind, Dimension):
        is_valid = value == "auto" or (type(value) is int and value in _INT64)
        _require(what, is_valid, value, "an integer or auto")
    elif isinstance(kind, click.types.IntParamType):
        _require(what, type(value) is int and value in _INT64, value, "an integer")
    elif isinstance(kind, click.types.FloatParamType):
        _require(what, type(value) in (int, float), value, "a number")
    elif isinstance(kind, click.Choice | click.Path | click.types.StringParamType):
        _require(what, isinstance(value, str), value, "a string in quotes")
    elif isinstance(value, list):
        # A list of ids, equivalent to 0-9,17. click converts it later, when it knows whether --own-ids is set.
        return ",".join(_to_text(what, entry) for entry in value)
    else:
        return _to_text(what, value)
    try:
        kind.convert(value, parameter, context)
    except click.BadParameter as error:
        raise UsageError(
            problem(what, got=_shorten(value), expected=error.message.rstrip("."), remedy="change it")
        ) from error
    return value


def _to_text(what: str, value: object) -> str:
    """Return a string or a number as text, as the command line has it."""
    is_valid = isinstance(value, str | float) or (type(value) is int and value in _INT64)
    _require(what, is_valid, value, "a string in quotes or a number")
    return str(value)


def _shorten(value: object) -> str:
    try:
        return _brief.repr(value)
    except ValueError:
        return "a number with thousands of digits"


def _require(what: str, is_valid: bool, value: object, expected: str) -> None:
    if not is_valid:
        raise UsageError(problem(what, got=_shorten(value), expected=expected, remedy="change it"))
