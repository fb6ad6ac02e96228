"""`--config FILE.toml`: a command's options in a file, checked, as click's defaults for them."""

from __future__ import annotations

import difflib
import reprlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from tracin_ann.errors import UsageError, problem

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_NEVER = ("config", "help", "version")
_MOST_BYTES = 1 << 16
# A key of many parts, which has to be in one line, takes the parser time that grows with their square.
_MOST_DOTS = 200
_INT64 = range(-(2**63), 2**63)
# Of values nested however deep.
_brief = reprlib.Repr()
_brief.maxstring = _brief.maxother = 120


def read_config(path: Path, command: click.Command, context: click.Context) -> dict[str, Any]:
    """Return the options in a TOML file, by the names of the command's parameters.

    A name is an option's long one, with `_` or `-` between words, or an argument's (`dir`). A repeatable option takes a
    list, `task_arg` a table as well. Paths are relative to the current directory, as on the command line.

    Raises:
        UsageError: the file cannot be read, a name is unknown, or a value is of the wrong type.
    """
    from tracin_ann.files import read_user_text

    try:
        text = read_user_text(path, _MOST_BYTES)
        if any(line.count(".") > _MOST_DOTS for line in text.splitlines()):
            raise ValueError(f"a line with more than {_MOST_DOTS} dots")
        table = tomllib.loads(text)
    # A number of thousands of digits is a ValueError as well.
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(
            problem(f"cannot read --config {path}", got=error, expected="a TOML file", remedy="correct it")
        ) from error
    known = _names(command)
    found: dict[str, Any] = {}
    for name, value in table.items():
        word = name.replace("-", "_")
        if word not in known:
            raise UsageError(_unknown(path, name, sorted(known)))
        parameter = known[word]
        taken = _value(f"{path}: {name}", parameter, value, context)
        if taken is not None:
            found[str(parameter.name)] = taken
    return found


def _names(command: click.Command) -> dict[str, click.Parameter]:
    known: dict[str, click.Parameter] = {}
    for parameter in command.params:
        if isinstance(parameter, click.Argument):
            known[(parameter.metavar or str(parameter.name)).lower()] = parameter
        for option in parameter.opts:
            if isinstance(parameter, click.Option) and (option.startswith("--") or len(parameter.opts) == 1):
                known[option.lstrip("-").replace("-", "_")] = parameter
    return {name: parameter for name, parameter in known.items() if name not in _NEVER}


def _unknown(path: Path, name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name.replace("-", "_"), known, 3, 0.5) or known
    return problem(
        f"{path}: no option of this command", got=name, expected=" or ".join(near), remedy="correct the name"
    )


def _value(what: str, parameter: click.Parameter, value: object, context: click.Context) -> object:
    """Return a value as click takes it of the parameter, or None for one that leaves it as it is."""
    if isinstance(parameter, click.Option) and parameter.is_flag:
        _expect(what, isinstance(value, bool), value, "true or false")
        if parameter.is_bool_flag:
            return value
        return parameter.flag_value if value else None
    if isinstance(parameter, click.Option) and parameter.count:
        _expect(what, type(value) is int and value in _INT64, value, "a whole number")
        return value
    if parameter.multiple:
        if isinstance(value, Mapping):
            value = [f"{key}={_plain(what, entry)}" for key, entry in value.items()]
        values = value if isinstance(value, list) else [value]
        return [_plain(what, entry) for entry in values]
    return _single(what, parameter, value, context)


def _single(what: str, parameter: click.Parameter, value: Any, context: click.Context) -> object:
    kind = parameter.type
    if isinstance(kind, click.types.IntParamType):
        _expect(what, type(value) is int and value in _INT64, value, "a whole number")
    elif isinstance(kind, click.types.FloatParamType):
        _expect(what, type(value) in (int, float), value, "a number")
    elif isinstance(kind, click.Choice | click.Path | click.types.StringParamType):
        _expect(what, isinstance(value, str), value, "a text in quotes")
    elif isinstance(value, list):
        # Ids: a list of them is as good as 0-9,17. They are converted later, when it is known whose ids they are.
        return ",".join(_plain(what, entry) for entry in value)
    else:
        return _plain(what, value)
    try:
        kind.convert(value, parameter, context)
    except click.BadParameter as error:
        raise UsageError(
            problem(what, got=_shown(value), expected=error.message.rstrip("."), remedy="change it")
        ) from error
    return value


def _plain(what: str, value: object) -> str:
    """Return a text or a number as the command line has it."""
    fine = isinstance(value, str | float) or (type(value) is int and value in _INT64)
    _expect(what, fine, value, "a text in quotes or a number")
    return str(value)


def _shown(value: object) -> str:
    try:
        return _brief.repr(value)
    except ValueError:
        return "a number of thousands of digits"


def _expect(what: str, right: bool, value: object, expected: str) -> None:
    if not right:
        raise UsageError(problem(what, got=_shown(value), expected=expected, remedy="change it"))
