"""Messages of a command: lines on stdout, notes that `--quiet` suppresses, and progress bars."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from tracin_ann.text import escape_control

if TYPE_CHECKING:
    from tracin_ann.types import ProgressCallback

QUIET = "tracin_ann.quiet"
"""Key of click's `Context.meta` under which `--quiet` is stored."""


def is_quiet() -> bool:
    """Return whether the command was called with `--quiet`: it prints results and errors only."""
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.meta.get(QUIET))


def print_line(line: str, *, err: bool = False) -> None:
    """Print one line with its control characters escaped: parts of it may come from untrusted files or data."""
    click.echo(escape_control(line), err=err)


def print_note(line: str, *, err: bool = False) -> None:
    """Print a line that is neither a result nor an error; with `--quiet`, print nothing."""
    if not is_quiet():
        print_line(line, err=err)


def print_fields(fields: Sequence[tuple[str, str]]) -> None:
    """Print `label: value` lines with aligned values; a line with an empty label continues the field above it."""
    for line in _align(fields):
        print_line(line)


def print_field_notes(fields: Sequence[tuple[str, str]]) -> None:
    """Print `label: value` lines as notes on stderr, with aligned values."""
    for line in _align(fields):
        print_note(line, err=True)


def _align(fields: Sequence[tuple[str, str]]) -> list[str]:
    width = max(len(label) for label, _ in fields) + 2
    return [f"{f'{label}:' if label else '':<{width}}{value}" for label, value in fields]


def format_count(n: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun: `1 row`, `1,200 rows`."""
    return f"{n:,} {noun if n == 1 else plural or f'{noun}s'}"


@contextmanager
def show_progress(unit: str) -> Iterator[ProgressCallback]:
    """Yield a progress callback: a bar on a terminal, a line every few seconds elsewhere, nothing with `--quiet`."""
    if is_quiet():
        yield _show_nothing
        return
    from tracin_ann.progress import progress_bar

    with progress_bar(unit) as progress:
        yield progress


def _show_nothing(stage: str, done: int, total: int) -> None:
    """Show no progress."""
