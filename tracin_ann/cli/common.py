"""What the commands share: option types, errors of one line with their exit status, progress."""

from __future__ import annotations

import errno
import functools
import os
import re
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, ParamSpec, TypeVar

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeRemainingColumn

from tracin_ann.errors import TracinAnnError, problem
from tracin_ann.types import ProgressCallback

P = ParamSpec("P")
R = TypeVar("R")
_PLAIN_SECONDS = 10.0
_REMEDIES = {
    errno.ENOSPC: "free some space there",
    errno.EDQUOT: "free some of the quota",
    errno.EACCES: "get the right to it",
    errno.EPERM: "get the right to it",
    errno.EROFS: "name a place that can be written",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.EIO: "look after the disk",
}


class IdRanges(click.ParamType):  # type: ignore[type-arg]
    """Ids and ranges of ids, both ends included: `0-9,17`; or `@file` with such on its lines.

    With the command's flag `--own-ids`, the task's own ids, in the same two ways, as text.
    """

    name = "ids"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...] | tuple[str, ...]:
        """Return the ids in the order given, each once."""
        if isinstance(value, tuple):
            return value
        text = str(value)
        if text.startswith("@"):
            try:
                text = ",".join(
                    line for line in Path(text[1:]).read_text(encoding="utf-8").splitlines() if line.strip()
                )
            except (OSError, UnicodeDecodeError) as error:
                self.fail(f"cannot read {text[1:]} ({error}), expected a file with ids on its lines", param, ctx)
        if ctx is not None and ctx.params.get("own_ids") and param is not None and param.name != "checkpoints":
            return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
        ids: list[int] = []
        for part in text.split(","):
            first, dash, last = part.strip().partition("-")
            if not first.isdecimal() or (dash and not last.isdecimal()):
                self.fail(f"got {part.strip()!r}, expected ids and ranges such as 0-9,17", param, ctx)
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


class Stopped(BaseException):
    """The process was told to stop (SIGTERM)."""


@contextmanager
def stoppable() -> Iterator[None]:
    """Raise Stopped where SIGTERM finds the process, so that what is open is closed and temporaries are removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def stop(signum: int, frame: object) -> None:
        if os.getpid() != owner:
            # A forked worker: to be ended as if it had never inherited this.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
            return
        raise Stopped

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def refusals(function: Callable[P, R]) -> Callable[P, R]:
    """Turn a TracinAnnError, an error of the system, and being told to stop, into a line on stderr and the status."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            with stoppable():
                return function(*args, **kwargs)
        except TracinAnnError as error:
            click.echo(f"error: {' '.join(str(error).split())}", err=True)
            raise click.exceptions.Exit(error.exit_code) from error
        except BrokenPipeError:
            # Whoever read the output has read enough.
            raise
        except OSError as error:
            click.echo(f"error: {' '.join(_told(error).split())}", err=True)
            raise click.exceptions.Exit(TracinAnnError.exit_code) from error
        except (KeyboardInterrupt, Stopped) as stop:
            click.echo(f"stopped: nothing is half-written; again: {shlex.join(sys.argv)}", err=True)
            number = signal.SIGTERM if isinstance(stop, Stopped) else signal.SIGINT
            raise click.exceptions.Exit(128 + number) from stop

    return wrapper


def _told(error: OSError) -> str:
    number = error.errno
    return problem(
        f"cannot read or write {error.filename or 'a file'}",
        got=str(error) if number is None else f"{error.strerror} ({errno.errorcode.get(number, number)})",
        expected="a file system that does as it is asked",
        remedy=f"{_REMEDIES.get(number or 0, 'mend that')} and run this command again: what is whole is kept",
    )


@contextmanager
def progress_shown(unit: str) -> Iterator[ProgressCallback]:
    """Yield a progress callback that draws a bar on a terminal, and prints a line now and then elsewhere."""
    if sys.stderr.isatty():
        yield from _bar(unit)
    else:
        yield _lines(unit)


def _bar(unit: str) -> Iterator[ProgressCallback]:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[rate]}"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, tuple[TaskID, float]] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total, rate=""), time.perf_counter()
            task, began = tasks[stage]
            rate = _rate(done, began, unit) if total > 1 else ""
            bar.update(task, completed=done, total=total, rate=rate)

        yield show


def _lines(unit: str) -> ProgressCallback:
    began: dict[str, float] = {}
    last = 0.0

    def show(stage: str, done: int, total: int) -> None:
        nonlocal last
        now = time.perf_counter()
        first = stage not in began
        began.setdefault(stage, now)
        if first or now - last < _PLAIN_SECONDS:
            last = now if first else last
            return
        last = now
        left = (now - began[stage]) / max(done, 1) * (total - done)
        rate = _rate(done, began[stage], unit)
        click.echo(f"{stage}: {done:,} of {total:,}, {rate}, {duration(left)} left", err=True)

    return show


def _rate(done: int, began: float, unit: str) -> str:
    return f"{done / max(time.perf_counter() - began, 1e-9):,.0f} {unit}/s"


def duration(seconds: float) -> str:
    """Return seconds as people read them: 41 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:  # noqa: PLR2004
        return f"{whole} s"
    if whole < 3600:  # noqa: PLR2004
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def sized(n_bytes: float) -> str:
    """Return a number of bytes as people read it."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if n_bytes < 1000:  # noqa: PLR2004
            return f"{n_bytes:.0f} {unit}" if unit == "bytes" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.1f} TB"
