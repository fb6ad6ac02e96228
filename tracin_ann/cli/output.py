"""Where a command's results go, and in which form: `--format`, `--output` and `--html`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from tracin_ann.cli.manners import note
from tracin_ann.errors import UsageError, problem
from tracin_ann.words import FORMATS, Format, sized

if TYPE_CHECKING:
    from tracin_ann.formats import Fields
    from tracin_ann.index import InfluenceIndex
    from tracin_ann.results import Answers, Listed

Command = TypeVar("Command", bound=Callable[..., Any])


def output_options(command: Command) -> Command:
    """Give a command `--format` (its parameter `form`) and `--output`."""
    form = click.option(
        "--format", "form", type=click.Choice(["table", *FORMATS]), help="[default: table, or by --output's end]"
    )
    output = click.option(
        "--output", type=click.Path(dir_okay=False), help="A file for the results, such as hits.parquet."
    )
    return form(output(command))


def html_option(command: Command) -> Command:
    """Give a command `--html`."""
    option = click.option(
        "--html",
        type=click.Path(dir_okay=False),
        help="A page for the results, with pictures and figures; alone, it stands for the table.",
    )
    return option(command)


def expect_report(path: str | None) -> None:
    """Refuse a page that could not be written, before the results take their time."""
    if path is not None:
        from tracin_ann.report import refuse_unwritable

        refuse_unwritable(path)


def write_page(
    results: Answers | Listed[Any], path: str | None, index: InfluenceIndex, checkpoints: Sequence[int] | None
) -> None:
    """Write the page that `--html` asks for, if it does, and say where it is."""
    if path is not None:
        from tracin_ann.report import write_report

        written = write_report(results, path, index, checkpoints=checkpoints)
        note(f"report: {written}, {sized(written.stat().st_size)}", err=True)


@dataclass(frozen=True)
class Sink:
    """In which form results go where: to the screen, or to a file (`path`)."""

    form: str
    path: Path | None

    @classmethod
    def of(cls, form: str | None, output: str | None, html: str | None = None) -> Sink:
        """Return what `--format` and `--output` ask for; the end of the file's name says the format unless named.

        With a page (`html`) and neither of them, results go nowhere else.

        Raises:
            UsageError: a table is to go to a file, or Parquet to the screen.
        """
        if html is not None and form is None and output is None:
            return cls("none", None)
        path = None if output is None else Path(output)
        end = "" if path is None else path.suffix.removeprefix(".")
        chosen = form or (end if end in FORMATS else "table")
        if path is not None and chosen == "table":
            raise UsageError(
                problem(
                    "a table is for the screen",
                    got=f"--output {output}",
                    expected=f"a name that ends in {', '.join(FORMATS)}",
                    remedy="name it so, or give --format",
                )
            )
        if path is None and chosen == "parquet":
            what = "Parquet is no text"
            raise UsageError(problem(what, got="no file", expected="--output FILE", remedy="name a file"))
        return cls(chosen, path)

    @contextmanager
    def opened(self, fields: Fields) -> Iterator[Callable[[Answers | Listed[Any]], None]]:
        """Yield what writes results, one lot after another."""
        from tracin_ann.formats import writer

        if self.form == "none":
            yield lambda results: None
            return
        if self.form == "table":
            from tracin_ann.cli.table import print_results

            yield print_results
            return
        form = cast(Format, self.form)
        with writer(form, self.path or sys.stdout, fields) as write:
            yield lambda results: write(results.lines() if form == "jsonl" else results.records())
