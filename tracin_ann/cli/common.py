"""What the commands share: option types, `--task-arg` as a dict, progress."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import click

from tracin_ann.cli.manners import is_quiet

if TYPE_CHECKING:
    from tracin_ann.types import ProgressCallback


class IdRanges(click.ParamType):  # type: ignore[type-arg]
    """Ids and ranges of ids, both ends included: `0-9,17`; or `@file` with such on its lines.

    With the command's flag `--own-ids`, the task's own ids as text: parted by commas, or one a line of the file.
    """

    name = "ids"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...] | tuple[str, ...]:
        """Return the ids in the order given, each once."""
        if isinstance(value, tuple):
            return value
        text = str(value)
        own = ctx is not None and ctx.params.get("own_ids") and param is not None and param.name != "checkpoints"
        if text.startswith("@"):
            try:
                lines = Path(text[1:]).read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                self.fail(f"cannot read {text[1:]} ({error}), expected a file with ids on its lines", param, ctx)
            # An own id may have a comma in it: a line is one.
            parts = [part for line in lines if line.strip() for part in ([line] if own else line.split(","))]
        else:
            parts = text.split(",")
        if own:
            return tuple(dict.fromkeys(part.strip() for part in parts if part.strip()))
        ids: list[int] = []
        for part in parts:
            first, dash, last = part.strip().partition("-")
            if not first.isdecimal() or (dash and not last.isdecimal()):
                more = "" if ctx is None or "own_ids" not in ctx.params else "; with --own-ids the task's own ids"
                self.fail(f"got {part.strip()!r}, expected positions and ranges such as 0-9,17{more}", param, ctx)
            start, stop = int(first), int(last or first)
            if stop < start:
                self.fail(f"got {part.strip()!r}, expected a range that rises", param, ctx)
            ids.extend(range(start, stop + 1))
        return tuple(dict.fromkeys(ids))


class MemorySize(click.ParamType):  # type: ignore[type-arg]
    """A number of bytes: `512MB`, `8GB`, `1.5g`."""

    name = "size"
    _UNITS: ClassVar[dict[str, int]] = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the bytes."""
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kmgt]?)i?b?", str(value).strip().lower())
        if found is None:
            self.fail(f"got {value!r}, expected a size such as 512MB or 8GB", param, ctx)
        return int(float(found[1]) * self._UNITS[found[2]])


def parsed_arguments(pairs: Sequence[str]) -> dict[str, str]:
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
def progress_shown(unit: str) -> Iterator[ProgressCallback]:
    """Yield a progress callback that draws a bar on a terminal, and prints a line now and then elsewhere."""
    if is_quiet():
        yield _nothing
        return
    from tracin_ann.progress import progress_bar

    with progress_bar(unit) as progress:
        yield progress


def _nothing(stage: str, done: int, total: int) -> None:
    """Show no progress."""
