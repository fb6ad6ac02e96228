"""Where a command's results go, and in which form: `--format`, `--output` and `--html`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from tracin_ann.choices import FORMATS, Format
from tracin_ann.cli.command import note
from tracin_ann.cli.streams import expect_stdout
from tracin_ann.errors import UsageError, problem
from tracin_ann.text import format_size

if TYPE_CHECKING:
    from tracin_ann.index import InfluenceIndex
    from tracin_ann.scoring import Answers, Fields, RowList

Command = TypeVar("Command", bound=Callable[..., Any])
_CSV_RAW = "tracin_ann.csv_raw"
# A device or a FIFO is as good, and need not be one that can be read.
_OUTPUT = click.Path(dir_okay=False, readable=False)


def output_options(command: Command) -> Command:
    """Give a command `--format` (its parameter `form`), `--output` and `--csv-raw`, which `Sink` asks for itself."""
    form = click.option(
        "--format", "form", type=click.Choice(["table", *FORMATS]), help="[default: table, or by --output's end]"
    )
    output = click.option("--output", type=_OUTPUT, help="A file for the results, such as hits.parquet.")
    raw = click.option(
        "--csv-raw",
        is_flag=True,
        expose_value=False,
        callback=_keep_raw,
        help="CSV cells as they are; else a ' stands before what a spreadsheet would run.",
    )
    return form(output(raw(command)))


def _keep_raw(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    context.meta[_CSV_RAW] = value


def refuse_raw(got: str) -> None:
    """Refuse `--csv-raw` where no CSV is written.

    Raises:
        UsageError: it was given.
    """
    if _is_raw():
        what, remedy = "--csv-raw changes CSV", "give --format csv, or drop --csv-raw"
        raise UsageError(problem(what, got=got, expected="--format csv", remedy=remedy))


def _is_raw() -> bool:
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.meta.get(_CSV_RAW))


def html_option(command: Command) -> Command:
    """Give a command `--html`."""
    option = click.option(
        "--html",
        type=_OUTPUT,
        help="A page for the results, with pictures and figures; alone, it stands for the table.",
    )
    return option(command)


def expect_report(path: str | None) -> None:
    """Refuse a page that could not be written, before the results take their time."""
    if path is not None:
        from tracin_ann.report import refuse_unwritable

        refuse_unwritable(path)


def write_page(
    results: Answers | RowList[Any], path: str | None, index: InfluenceIndex, checkpoints: Sequence[int] | None
) -> None:
    """Write the page that `--html` asks for, if it does, and say where it is."""
    if path is not None:
        from tracin_ann.report import write_report

        written = write_report(results, path, index, checkpoints=checkpoints)
        size = f", {format_size(written.stat().st_size)}" if written.is_file() else ""
        note(f"report: {written}{size}", err=True)


@dataclass(frozen=True)
class Sink:
    """In which form results go where: to the screen, or to a file (`path`); CSV for spreadsheets, or `csv_raw`."""

    form: str
    path: Path | None
    csv_raw: bool = False

    @classmethod
    def of(cls, form: str | None, output: str | None, html: str | None = None) -> Sink:
        """Return what `--format` and `--output` ask for; the end of the file's name says the format unless named.

        With a page (`html`) and neither of them, results go nowhere else.

        Raises:
            UsageError: a table is to go to a file, or Parquet to the screen; `--csv-raw` with another format.
            OSError: results are to go to stdout, and it is closed.
        """
        if html is not None and form is None and output is None:
            refuse_raw("--html alone")
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
        if chosen != "csv":
            refuse_raw(f"--format {chosen}")
        if path is None:
            expect_stdout()
        return cls(chosen, path, _is_raw())

    @contextmanager
    def opened(self, fields: Fields) -> Iterator[Callable[[Answers | RowList[Any]], None]]:
        """Yield what writes results, one lot after another."""
        from tracin_ann.scoring import open_writer

        if self.form == "none":
            yield lambda results: None
            return
        if self.form == "table":
            from tracin_ann.cli.table import print_results

            yield print_results
            return
        form = cast(Format, self.form)
        with open_writer(form, self.path or sys.stdout, fields, csv_raw=self.csv_raw) as write:
            yield lambda results: write(results.lines() if form == "jsonl" else results.records())
