"""Error messages in one line and exit statuses of commands."""

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

from tracin_ann.cli.streams import discard_stdout, prepare_streams
from tracin_ann.errors import TracinAnnError, problem
from tracin_ann.text import escape_control

P = ParamSpec("P")
R = TypeVar("R")
DEBUG = "tracin_ann.debug"
"""Key of click's `Context.meta` under which `--debug` is stored."""
_LONGEST_MESSAGE = 300
_FRAME = re.compile(r'^ *File "(.+)", line (\d+), in (.+)$', re.M)
_REMEDIES = {
    errno.ENOSPC: "free disk space",
    errno.EDQUOT: "free space in the quota",
    errno.EACCES: "change the permissions",
    errno.EPERM: "change the permissions",
    errno.EROFS: "choose a writable location",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "close programs that have many files open",
    errno.ENOMEM: "free memory",
    errno.EIO: "check the disk",
    errno.EBADF: "keep it open, or name a file with --output",
}
_LIBRARY = Path(__file__).resolve().parent.parent
_INSTALLED = tuple(Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib"))


class TerminationRequest(BaseException):
    """SIGTERM was received."""


@contextmanager
def catch_sigterm() -> Iterator[None]:
    """Raise TerminationRequest on SIGTERM, so that open files are closed and temporary files are removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def handle(signum: int, frame: object) -> None:
        if os.getpid() != owner:
            # A forked worker inherits this handler, but ends by the default action.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
            return
        raise TerminationRequest

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def handle_failures(function: Callable[P, R]) -> Callable[P, R]:
    """Wrap a command: an exception or an interruption ends it with one line on stderr and an exit status.

    With `--debug` the traceback precedes the line.
    """

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            with prepare_streams(), catch_sigterm():
                return function(*args, **kwargs)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except TracinAnnError as error:
            raise print_error(error, str(error), error.exit_code) from error
        except BrokenPipeError:
            # The reader of the output closed it; click ends the command without a message.
            raise
        except OSError as error:
            discard_stdout()
            raise print_error(error, _describe_os_error(error), TracinAnnError.exit_code) from error
        except Exception as error:
            raise print_error(error, _describe_unexpected(error), TracinAnnError.exit_code) from error
        except (KeyboardInterrupt, TerminationRequest) as stop:
            line = f"stopped: no incomplete file is left; to run it again: {shlex.join(sys.argv)}"
            click.echo(escape_control(line), err=True)
            number = signal.SIGTERM if isinstance(stop, TerminationRequest) else signal.SIGINT
            raise click.exceptions.Exit(128 + number) from stop

    return wrapper


def print_error(error: Exception, message: str, status: int) -> click.exceptions.Exit:
    """Print an error in one line, with `--debug` its traceback first; return the exception that ends the command."""
    context = click.get_current_context(silent=True)
    if context is not None and context.meta.get(DEBUG):
        click.echo(escape_control("".join(traceback.format_exception(error)), "\n"), err=True, nl=False)
    click.echo(f"error: {escape_control(' '.join(message.split()))}", err=True)
    return click.exceptions.Exit(status)


def _describe_os_error(error: OSError) -> str:
    number = error.errno
    return problem(
        f"cannot read or write {error.filename or 'a file'}",
        got=str(error) if number is None else f"{error.strerror} ({errno.errorcode.get(number, number)})",
        expected="the operation to succeed",
        remedy=f"{_REMEDIES.get(number or 0, 'fix the cause')} and run this command again: complete files are reused",
    )


def _describe_unexpected(error: Exception) -> str:
    """Return the message for an unexpected exception: its type, its text, and where it was raised."""
    # From the formatted text: of an exception in a worker process, only the text of its traceback is available.
    frames: list[tuple[str, str, str]] = _FRAME.findall("".join(traceback.format_exception(error)))
    text = " ".join(str(error).split())
    cut = f"{text[:_LONGEST_MESSAGE]}{'...' * (len(text) > _LONGEST_MESSAGE)}"
    raised = type(error).__name__ + (f": {cut}" if text else "")
    user_frames = [frame for frame in frames if not _is_installed(frame[0])]
    if user_frames:
        file, line, function = user_frames[-1]
        return f"{_shorten_path(file)}:{line}, in {function}, raised {raised}; --debug shows the traceback"
    if isinstance(error, ModuleNotFoundError):
        return problem(
            "the installation of tracin_ann is incomplete",
            got=f"no module {error.name} in {sys.executable}",
            expected="all its dependencies",
            remedy="activate the environment that has it (here . .venv/bin/activate), or install it",
        )
    own_frames = [frame for frame in frames if Path(frame[0]).is_relative_to(_LIBRARY)] or [("tracin_ann", "?", "?")]
    file, line, function = own_frames[-1]
    return f"internal error in {Path(file).name}:{line}, {function}: {raised}; --debug shows the traceback"


def _shorten_path(file: str) -> str:
    """Return a file's path, relative to the current directory if it lies below."""
    path = Path(file)
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _is_installed(file: str) -> bool:
    """Return whether a file belongs to Python, to an installed package or to this library, and not to the task."""
    path = Path(file)
    return file.startswith("<") or any(path.resolve().is_relative_to(folder) for folder in (_LIBRARY, *_INSTALLED))
