"""Option types of the commands: positions and ids of rows, checkpoints, sizes, and `--task-arg` pairs."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import click

from tracin_ann.errors import UsageError, problem

TOKEN_VARIABLE = "TRACIN_SERVE_TOKEN"
"""The environment variable from which a server and its clients take the token."""
_MAX_BYTES = 1 << 28
_MAX_DIGITS = 18
_MAX_CHECKPOINTS = 100_000
_MAX_SHOWN = 60


@dataclass(frozen=True)
class Positions:
    """Positions of rows as ranges, which take no memory for their rows until the number of rows is known."""

    ranges: tuple[range, ...]

    def __bool__(self) -> bool:
        """Return whether there is a range."""
        return bool(self.ranges)

    def expand(self, n_rows: int, what: str) -> tuple[int, ...]:
        """Return the positions in the given order, each once.

        Raises:
            UsageError: a position is not below `n_rows`; the message begins with `what`.
        """
        beyond = next((part for part in self.ranges if part.stop > n_rows), None)
        if beyond is not None:
            got, expected = max(beyond.start, n_rows), f"0 to {n_rows - 1}"
            raise UsageError(problem(what, got=got, expected=expected, remedy="change the ids"))
        return tuple(dict.fromkeys(chain.from_iterable(self.ranges)))


class IdRanges(click.ParamType):  # type: ignore[type-arg]
    """Positions and inclusive ranges such as `0-9,17`, or `@file` with positions and ranges on its lines.

    With the flag `--own-ids` of the command: the task's own ids, separated by commas, or one per line of the file.
    """

    name = "ids"
    takes_own_ids: ClassVar[bool] = True

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Positions | tuple[int, ...] | tuple[str, ...]:
        """Return `Positions`, or the task's own ids in the given order, each once; a default is returned unchanged."""
        if isinstance(value, tuple | Positions):
            return value
        own = self.takes_own_ids and ctx is not None and ctx.params.get("own_ids")
        parts = self._parts(str(value), bool(own), param, ctx)
        if own:
            return tuple(dict.fromkeys(part.strip() for part in parts if part.strip()))
        return Positions(tuple(self._range(part.strip(), param, ctx) for part in parts))

    def _parts(self, text: str, own: bool, param: click.Parameter | None, ctx: click.Context | None) -> list[str]:
        if not text.startswith("@"):
            return text.split(",")
        from tracin_ann.files import read_user_text

        try:
            lines = read_user_text(Path(text[1:]), _MAX_BYTES).splitlines()
        except (OSError, ValueError) as error:
            self.fail(f"cannot read {text[1:]} ({error}), expected a file with one id or range per line", param, ctx)
        # One of the task's own ids may contain a comma: a line holds one id.
        return [part for line in lines if line.strip() for part in ([line] if own else line.split(","))]

    def _range(self, part: str, param: click.Parameter | None, ctx: click.Context | None) -> range:
        first, dash, last = part.partition("-")
        shown = repr(part) if len(part) <= _MAX_SHOWN else f"{part[:_MAX_SHOWN]!r}..."
        if not first.isdecimal() or (dash and not last.isdecimal()):
            more = "" if ctx is None or "own_ids" not in ctx.params else "; with --own-ids the task's own ids"
            self.fail(f"got {shown}, expected positions and ranges such as 0-9,17{more}", param, ctx)
        if max(len(first), len(last)) > _MAX_DIGITS:
            self.fail(f"got {shown}, expected positions of at most {_MAX_DIGITS} digits", param, ctx)
        start, stop = int(first), int(last or first)
        if stop < start:
            self.fail(f"got {shown}, expected a range from low to high", param, ctx)
        return range(start, stop + 1)


class CheckpointRanges(IdRanges):
    """Positions of checkpoints, in the syntax of `IdRanges`; always positions, also with `--own-ids`."""

    name = "checkpoints"
    takes_own_ids = False

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Positions | tuple[int, ...] | tuple[str, ...]:
        """Return the positions in the given order, each once."""
        parsed = super().convert(value, param, ctx)
        try:
            return parsed.expand(_MAX_CHECKPOINTS, "no such checkpoint") if isinstance(parsed, Positions) else parsed
        except UsageError as error:
            self.fail(str(error), param, ctx)


class MemorySize(click.ParamType):  # type: ignore[type-arg]
    """A number of bytes: `512MB`, `8GB`, `1.5g`."""

    name = "size"
    _UNITS: ClassVar[dict[str, int]] = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number of bytes."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kmgt]?)i?b?", str(value).strip().lower())
        size = math.inf if match is None else float(match[1]) * self._UNITS[match[2]]
        if not math.isfinite(size):
            self.fail(f"got {str(value)[:_MAX_SHOWN]!r}, expected a size such as 512MB or 8GB", param, ctx)
        return int(size)


class Dimension(click.IntRange):
    """A sketch dimension, or `auto`."""

    name = "dimension"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number or `auto`."""
        return value if value == "auto" else super().convert(value, param, ctx)


def parse_arguments(pairs: Sequence[str]) -> dict[str, str]:
    """Return `--task-arg key=value` pairs as a dict.

    Raises:
        click.BadParameter: a pair has no `=`, or a key occurs twice.
    """
    arguments: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier():
            raise click.BadParameter(f"got {pair!r}, expected key=value", param_hint="--task-arg")
        if key in arguments:
            raise click.BadParameter(f"got {key} twice, expected each key once", param_hint="--task-arg")
        arguments[key] = value
    return arguments
