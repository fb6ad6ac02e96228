"""The manners of every command: its shared options, its help, what it logs, and how quiet it is."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

from tracin_ann import __version__
from tracin_ann.cli.config_file import read_config
from tracin_ann.cli.failures import DEBUG, refusals, refused
from tracin_ann.device import DEVICE_NAMES, DEVICES
from tracin_ann.errors import UsageError
from tracin_ann.text import escape_control

_QUIET = "tracin_ann.quiet"
_STATUSES = (
    "Exit status: 0 done; 1 refused or failed, in one line; 2 the options cannot be used; 3 the index does not fit; "
    "4 a file of the index is damaged or missing; 5 another process writes it; 130 and 143 stopped."
)
Function = Callable[..., Any]


def command(*examples: str) -> Callable[[Function], click.Command]:
    """Make a function with click's options a command with the manners of all.

    That is: `--config`, `--quiet`, `--verbose`, `--debug`, `--version`; examples and exit statuses below `--help`;
    errors in one line.

    Args:
        examples: command lines, shown as they are.
    """
    shown = "\n".join(f"  {example}" for example in examples)
    epilog = f"\b\nExamples:\n{shown}\n\n{_STATUSES}"

    def made(function: Function) -> click.Command:
        wrapped = refusals(function)
        # In front of the function's own, since click lists last what comes first here.
        wrapped.__click_params__[:0] = reversed(_shared())  # type: ignore[attr-defined]
        return click.command(epilog=epilog, context_settings={"max_content_width": 100})(wrapped)

    return made


def _shared() -> list[click.Option]:
    return [
        click.Option(
            ["--config"],
            type=click.Path(dir_okay=False),
            is_eager=True,
            expose_value=False,
            callback=_configure,
            help="Options in a TOML file, named as here; the command line wins.",
        ),
        click.Option(
            ["-q", "--quiet"], is_flag=True, expose_value=False, callback=_hush, help="Results and errors only."
        ),
        click.Option(
            ["-v", "--verbose"],
            count=True,
            expose_value=False,
            callback=_log,
            help="Log what is done to stderr; -vv in detail.",
        ),
        click.Option(
            ["--debug"], is_flag=True, expose_value=False, callback=_debug, help="Show the traceback of an error."
        ),
        click.Option(
            ["--version"], is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version."
        ),
    ]


def _configure(context: click.Context, parameter: click.Parameter, value: str | None) -> None:
    if value is None or context.resilient_parsing:
        return
    try:
        context.default_map = read_config(Path(value), context.command, context)
    except UsageError as error:
        raise refused(error, str(error), error.exit_code) from error


def _version(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value and not context.resilient_parsing:
        click.echo(f"{context.info_name} {__version__}")
        context.exit()


def _hush(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    context.meta[_QUIET] = value


def _debug(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    context.meta[DEBUG] = value


class _ToStderr(logging.Handler):
    """Lines on stderr as it is at the moment: a progress bar takes its place while it is drawn."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        click.echo(escape_control(self.format(record), "\n"), err=True)


def _log(context: click.Context, parameter: click.Parameter, value: int) -> None:
    if not value or context.resilient_parsing:
        return
    logger, handler = logging.getLogger("tracin_ann"), _ToStderr()
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s", "%H:%M:%S"))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if value == 1 else logging.DEBUG)

    def undo() -> None:
        logger.removeHandler(handler)
        logger.setLevel(level)

    context.call_on_close(undo)


def is_quiet() -> bool:
    """Return whether the command was told to give results and errors only."""
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.meta.get(_QUIET))


def note(message: str, *, err: bool = False) -> None:
    """Print what is neither a result nor an error: nothing with `--quiet`."""
    if not is_quiet():
        say(message, err=err)


def say(message: str, *, err: bool = False) -> None:
    """Print a line, whatever stands in it: a manifest, a task or a data set of somebody else may have a part in it."""
    click.echo(escape_control(message), err=err)


def given() -> set[str]:
    """Return the names of the command's parameters that were given, by the command line or by `--config`."""
    context = click.get_current_context()
    asked = (ParameterSource.COMMANDLINE, ParameterSource.DEFAULT_MAP)
    return {
        str(parameter.name)
        for parameter in context.command.params
        if context.get_parameter_source(str(parameter.name)) in asked
    }


def folders(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete to directories."""
    return [CompletionItem(incomplete, type="dir")]


def files(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete to files."""
    return [CompletionItem(incomplete, type="file")]


def _devices(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    return [name for name in DEVICES if name.startswith(incomplete)]


def directory_argument(function: Function) -> Function:
    """Give a command the index's directory, `directory`."""
    return click.argument("directory", type=click.Path(), metavar="DIR", shell_complete=folders)(function)


def device_option(function: Function) -> Function:
    """Give a command `--device`."""
    return click.option("--device", default="auto", show_default=True, shell_complete=_devices, help=DEVICE_NAMES)(
        function
    )


def task_options(function: Function) -> Function:
    """Give a command on an index `--task` and `--task-arg` (its parameter `task_args`)."""
    task = click.option(
        "--task", metavar="FILE.py:NAME", shell_complete=files, help="The task, if it moved, or is not below here."
    )
    arguments = click.option(
        "--task-arg", "task_args", multiple=True, metavar="KEY=VALUE", help="Instead of the build's; repeatable."
    )
    return task(arguments(function))
