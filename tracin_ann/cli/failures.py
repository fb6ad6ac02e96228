"""What a command that fails says, in one line, and its exit status."""

from __future__ import annotations

import errno
import functools
import os
import re
import shlex
import signal
import sys
import sysconfig
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ParamSpec, TypeVar

import click

from tracin_ann.cli.streams import abandon_stdout, usable_streams
from tracin_ann.errors import TracinAnnError, problem
from tracin_ann.text import escape_control

P = ParamSpec("P")
R = TypeVar("R")
DEBUG = "tracin_ann.debug"
_LONGEST = 300
_FRAME = re.compile(r'^ *File "(.+)", line (\d+), in (.+)$', re.M)
_REMEDIES = {
    errno.ENOSPC: "free some space there",
    errno.EDQUOT: "free some of the quota",
    errno.EACCES: "get the right to it",
    errno.EPERM: "get the right to it",
    errno.EROFS: "name a place that can be written",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "close programs that hold files open",
    errno.ENOMEM: "free some memory",
    errno.EIO: "look after the disk",
    errno.EBADF: "leave it open, or name a file by --output",
}


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
    """Turn whatever a command raises, and being told to stop, into a line on stderr and the status.

    With `--debug` the traceback comes before the line.
    """

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            with usable_streams(), stoppable():
                return function(*args, **kwargs)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except TracinAnnError as error:
            raise refused(error, str(error), error.exit_code) from error
        except BrokenPipeError:
            # Whoever read the output has read enough.
            raise
        except OSError as error:
            abandon_stdout()
            raise refused(error, _told(error), TracinAnnError.exit_code) from error
        except Exception as error:
            raise refused(error, _unforeseen(error), TracinAnnError.exit_code) from error
        except (KeyboardInterrupt, Stopped) as stop:
            click.echo(escape_control(f"stopped: nothing is half-written; again: {shlex.join(sys.argv)}"), err=True)
            number = signal.SIGTERM if isinstance(stop, Stopped) else signal.SIGINT
            raise click.exceptions.Exit(128 + number) from stop

    return wrapper


def refused(error: Exception, said: str, status: int) -> click.exceptions.Exit:
    """Say why in one line, below the traceback with `--debug`; return what ends the command."""
    context = click.get_current_context(silent=True)
    if context is not None and context.meta.get(DEBUG):
        click.echo(escape_control("".join(traceback.format_exception(error)), "\n"), err=True, nl=False)
    click.echo(f"error: {escape_control(' '.join(said.split()))}", err=True)
    return click.exceptions.Exit(status)


def _told(error: OSError) -> str:
    number = error.errno
    return problem(
        f"cannot read or write {error.filename or 'a file'}",
        got=str(error) if number is None else f"{error.strerror} ({errno.errorcode.get(number, number)})",
        expected="a system that does as it is asked",
        remedy=f"{_REMEDIES.get(number or 0, 'mend that')} and run this command again: what is whole is kept",
    )


def _unforeseen(error: Exception) -> str:
    """Return the line for what no one meant to raise: whose code did, and where."""
    # As text: of an exception in a worker process only the text of its traceback came back.
    frames: list[tuple[str, str, str]] = _FRAME.findall("".join(traceback.format_exception(error)))
    message = " ".join(str(error).split())
    said = type(error).__name__ + (f": {message[:_LONGEST]}{'...' * (len(message) > _LONGEST)}" if message else "")
    theirs = [frame for frame in frames if not _is_installed(frame[0])]
    if theirs:
        file, line, function = theirs[-1]
        return f"{_near(file)}:{line}, in {function}, raised {said}; --debug shows the traceback"
    if isinstance(error, ModuleNotFoundError):
        found = f"no module {error.name} in {sys.executable}"
        remedy = "activate the environment that it was installed in (here . .venv/bin/activate), or install it"
        return problem("tracin_ann is not installed whole", got=found, expected="all that it needs", remedy=remedy)
    ours = [frame for frame in frames if Path(frame[0]).is_relative_to(_OURS)] or [("tracin_ann", "?", "?")]
    file, line, function = ours[-1]
    return f"unforeseen, in {Path(file).name}:{line}, {function}: {said}; --debug shows the traceback"


def _near(file: str) -> str:
    """Return a file's path, from the current directory on if it lies below."""
    path = Path(file)
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


_OURS = Path(__file__).resolve().parent.parent
_INSTALLED = tuple(Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib"))


def _is_installed(file: str) -> bool:
    """Return whether code is Python's, a package's or this library's, and so not the task's."""
    path = Path(file)
    return file.startswith("<") or any(path.resolve().is_relative_to(folder) for folder in (_OURS, *_INSTALLED))
