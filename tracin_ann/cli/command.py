"""The decorator of every command: shared options, help, logging and error handling."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

from tracin_ann import __version__
from tracin_ann.cli.config_file import read_config
from tracin_ann.cli.failures import DEBUG, handle_failures, print_error
from tracin_ann.cli.messages import QUIET
from tracin_ann.device import DEVICE_NAMES, DEVICES
from tracin_ann.errors import UsageError
from tracin_ann.text import escape_control

_STATUSES = (
    "Exit status: 0 success; 1 error; 2 invalid options; 3 the index does not match the task or the options; "
    "4 a file of the index is damaged or missing; 5 another process is writing the index; 130 or 143 interrupted."
)
Function = Callable[..., Any]


def command(*examples: str) -> Callable[[Function], click.Command]:
    """Turn a function with click options into a command.

    The command has `--config`, `--quiet`, `--verbose`, `--debug` and `--version`; its `--help` ends with examples and
    exit statuses; it reports an error in one line.

    Args:
        examples: command lines for the help.
    """
    shown = "\n".join(f"  {example}" for example in examples)
    epilog = f"\b\nExamples:\n{shown}\n\n{_STATUSES}"

    def decorate(function: Function) -> click.Command:
        wrapped = handle_failures(function)
        # `__click_params__` is in reverse order: parameters at its start are the last ones in the help.
        wrapped.__click_params__[:0] = reversed(_shared_options())  # type: ignore[attr-defined]
        return click.command(epilog=epilog, context_settings={"max_content_width": 100})(wrapped)

    return decorate


def _shared_options() -> list[click.Option]:
    return [
        click.Option(
            ["--config"],
            type=click.Path(dir_okay=False),
            is_eager=True,
            expose_value=False,
            callback=_apply_config,
            help="TOML file with options; the command line takes precedence.",
        ),
        click.Option(
            ["-q", "--quiet"],
            is_flag=True,
            expose_value=False,
            callback=_set_quiet,
            help="Print results and errors only.",
        ),
        click.Option(
            ["-v", "--verbose"],
            count=True,
            expose_value=False,
            callback=_start_logging,
            help="Log to stderr; -vv logs details.",
        ),
        click.Option(
            ["--debug"], is_flag=True, expose_value=False, callback=_set_debug, help="Show the traceback of an error."
        ),
        click.Option(
            ["--version"],
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=_print_version,
            help="Show the version.",
        ),
    ]


def _apply_config(context: click.Context, parameter: click.Parameter, value: str | None) -> None:
    if value is None or context.resilient_parsing:
        return
    try:
        context.default_map = read_config(Path(value), context.command, context)
    except UsageError as error:
        raise print_error(error, str(error), error.exit_code) from error


def _print_version(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value and not context.resilient_parsing:
        click.echo(f"{context.info_name} {__version__}")
        context.exit()


def _set_quiet(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    context.meta[QUIET] = value


def _set_debug(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    context.meta[DEBUG] = value


_NOISY_LOGGERS = ("torchao", "torch.utils._pytree")


class _StderrHandler(logging.Handler):
    """Writes records to the current `sys.stderr`, which a progress bar replaces while it is drawn."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        click.echo(escape_control(self.format(record), "\n"), err=True)


def _start_logging(context: click.Context, parameter: click.Parameter, value: int) -> None:
    if context.resilient_parsing:
        return
    if not value:
        # transformers imports torchao if it is installed, which logs warnings that do not concern a user of commands.
        for noisy in map(logging.getLogger, _NOISY_LOGGERS):
            context.call_on_close(partial(noisy.setLevel, noisy.level))
            noisy.setLevel(logging.ERROR)
        return
    logger, handler = logging.getLogger("tracin_ann"), _StderrHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s", "%H:%M:%S"))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if value == 1 else logging.DEBUG)

    def stop_logging() -> None:
        logger.removeHandler(handler)
        logger.setLevel(level)

    context.call_on_close(stop_logging)


def find_given_options() -> set[str]:
    """Return the names of the parameters that the command line or `--config` sets."""
    context = click.get_current_context()
    explicit = (ParameterSource.COMMANDLINE, ParameterSource.DEFAULT_MAP)
    return {
        str(parameter.name)
        for parameter in context.command.params
        if context.get_parameter_source(str(parameter.name)) in explicit
    }


def complete_directories(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete a value to directories."""
    return [CompletionItem(incomplete, type="dir")]


def complete_files(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete a value to files."""
    return [CompletionItem(incomplete, type="file")]


def complete_devices(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Complete a value to names of devices."""
    return [name for name in DEVICES if name.startswith(incomplete)]


def directory_argument(function: Function) -> Function:
    """Add the argument DIR, the directory of the index (parameter `directory`)."""
    return click.argument("directory", type=click.Path(), metavar="DIR", shell_complete=complete_directories)(function)


def device_option(function: Function) -> Function:
    """Add `--device`."""
    return click.option(
        "--device",
        default="auto",
        show_default=True,
        shell_complete=complete_devices,
        help=f"Compute device: {DEVICE_NAMES}.",
    )(function)


def task_options(function: Function) -> Function:
    """Add `--task` and `--task-arg` (parameter `task_args`) to a command that opens an index."""
    task = click.option(
        "--task",
        metavar="FILE.py:NAME",
        shell_complete=complete_files,
        help="Location of the task, if it moved or is not below the current directory.",
    )
    arguments = click.option(
        "--task-arg",
        "task_args",
        multiple=True,
        metavar="KEY=VALUE",
        help="Argument of the task function, instead of the build's arguments; repeatable.",
    )
    return task(arguments(function))
