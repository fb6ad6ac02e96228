"""What the commands share: option types, `--task-arg` as a dict, progress."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import click

from tracin_ann.cli.command import is_quiet
from tracin_ann.errors import UsageError, problem

if TYPE_CHECKING:
    from tracin_ann.types import ProgressCallback

_MOST_BYTES = 1 << 28
_MOST_DIGITS = 18
_MOST_CHECKPOINTS = 100_000
_LONGEST = 60


@dataclass(frozen=True)
class Positions:
    """Rows by their positions, as ranges: a billion take no memory before it is known how many rows there are."""

    ranges: tuple[range, ...]

    def __bool__(self) -> bool:
        """Return whether there is one."""
        return bool(self.ranges)

    def within(self, n_rows: int, what: str) -> tuple[int, ...]:
        """Return the positions in the order given, each once.

        Raises:
            UsageError: one is not below `n_rows`; begins with `what`.
        """
        beyond = next((part for part in self.ranges if part.stop > n_rows), None)
        if beyond is not None:
            got, expected = max(beyond.start, n_rows), f"0 to {n_rows - 1}"
            raise UsageError(problem(what, got=got, expected=expected, remedy="change the ids"))
        return tuple(dict.fromkeys(chain.from_iterable(self.ranges)))


class IdRanges(click.ParamType):  # type: ignore[type-arg]
    """Positions and ranges of them, both ends included: `0-9,17`; or `@file` with such on its lines.

    With the command's flag `--own-ids`, the task's own ids as text: parted by commas, or one a line of the file.
    """

    name = "ids"
    takes_own_ids: ClassVar[bool] = True

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Positions | tuple[int, ...] | tuple[str, ...]:
        """Return the ids in the order given: `Positions`, or the own ids, each once; a default as it is."""
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
            lines = read_user_text(Path(text[1:]), _MOST_BYTES).splitlines()
        except (OSError, ValueError) as error:
            self.fail(f"cannot read {text[1:]} ({error}), expected a file with ids on its lines", param, ctx)
        # An own id may have a comma in it: a line is one.
        return [part for line in lines if line.strip() for part in ([line] if own else line.split(","))]

    def _range(self, part: str, param: click.Parameter | None, ctx: click.Context | None) -> range:
        first, dash, last = part.partition("-")
        shown = repr(part) if len(part) <= _LONGEST else f"{part[:_LONGEST]!r}..."
        if not first.isdecimal() or (dash and not last.isdecimal()):
            more = "" if ctx is None or "own_ids" not in ctx.params else "; with --own-ids the task's own ids"
            self.fail(f"got {shown}, expected positions and ranges such as 0-9,17{more}", param, ctx)
        if max(len(first), len(last)) > _MOST_DIGITS:
            self.fail(f"got {shown}, expected positions of at most {_MOST_DIGITS} digits", param, ctx)
        start, stop = int(first), int(last or first)
        if stop < start:
            self.fail(f"got {shown}, expected a range that rises", param, ctx)
        return range(start, stop + 1)


class CheckpointRanges(IdRanges):
    """Positions of checkpoints, which are never so many that they could not be held."""

    name = "checkpoints"
    takes_own_ids = False

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Positions | tuple[int, ...] | tuple[str, ...]:
        """Return the positions in the order given, each once."""
        found = super().convert(value, param, ctx)
        try:
            return found.within(_MOST_CHECKPOINTS, "no such checkpoint") if isinstance(found, Positions) else found
        except UsageError as error:
            self.fail(str(error), param, ctx)


class MemorySize(click.ParamType):  # type: ignore[type-arg]
    """A number of bytes: `512MB`, `8GB`, `1.5g`."""

    name = "size"
    _UNITS: ClassVar[dict[str, int]] = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the bytes."""
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kmgt]?)i?b?", str(value).strip().lower())
        size = math.inf if found is None else float(found[1]) * self._UNITS[found[2]]
        if not math.isfinite(size):
            self.fail(f"got {str(value)[:_LONGEST]!r}, expected a size such as 512MB or 8GB", param, ctx)
        return int(size)


def parse_arguments(pairs: Sequence[str]) -> dict[str, str]:
    """Return `--task-arg key=value` pairs as a dict.

    Raises:
        click.BadParameter: a pair has no `=`, or a key comes twice.
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


@contextmanager
def show_progress(unit: str) -> Iterator[ProgressCallback]:
    """Yield a progress callback that draws a bar on a terminal, and prints a line now and then elsewhere."""
    if is_quiet():
        yield _nothing
        return
    from tracin_ann.progress import progress_bar

    with progress_bar(unit) as progress:
        yield progress


def _nothing(stage: str, done: int, total: int) -> None:
    """Show no progress."""
