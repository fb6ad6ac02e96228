"""Run a command of the library in this process."""

from __future__ import annotations

import click
from click.testing import CliRunner, Result


def run(command: click.Command, *words: object) -> Result:
    """Run a command with arguments of any type; an exception other than `SystemExit` is raised."""
    result = CliRunner().invoke(command, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result
