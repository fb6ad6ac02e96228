"""Destination and format of a command's results: `--format`, `--output`, `--csv-raw` and `--html`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from tracin_ann.choices import FORMATS, Format
from tracin_ann.cli.messages import print_note
from tracin_ann.cli.streams import require_stdout
from tracin_ann.errors import UsageError, problem
from tracin_ann.text import format_size

if TYPE_CHECKING:
    from tracin_ann.index import InfluenceIndex
    from tracin_ann.results import Answers, Fields, RowList

Command = TypeVar("Command", bound=Callable[..., Any])
_CSV_RAW = "tracin_ann.csv_raw"
# Devices and FIFOs are allowed; the file need not be readable.
_OUTPUT = click.Path(dir_okay=False, readable=False)


def output_options(command: Command) -> Command:
    """Add `--format` (parameter `form`), `--output`, and `--csv-raw`, which `Sink` reads from the context."""
    form = click.option(
        "--format",
        "form",
        type=click.Choice(["table", *FORMATS]),
        help="Format of the results.  [default: by the suffix of --output, else table]",
    )
    output = click.option("--output", type=_OUTPUT, help="File for the results, such as hits.parquet.")
    raw = click.option(
        "--csv-raw",
        is_flag=True,
        expose_value=False,
        callback=_set_csv_raw,
        help="Write CSV cells unchanged, without the ' before cells that a spreadsheet would run.",
    )
    return form(output(raw(command)))


def _set_csv_raw(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    context.meta[_CSV_RAW] = value


def reject_csv_raw(got: str) -> None:
    """Reject `--csv-raw` where no CSV is written.

    Raises:
        UsageError: the option was given.
    """
    if _is_csv_raw():
        what, remedy = "--csv-raw applies to CSV only", "use --format csv, or remove --csv-raw"
        raise UsageError(problem(what, got=got, expected="--format csv", remedy=remedy))


def _is_csv_raw() -> bool:
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.meta.get(_CSV_RAW))


def html_option(command: Command) -> Command:
    """Add `--html`."""
    option = click.option(
        "--html",
        type=_OUTPUT,
        help="HTML report with images and figures; it replaces the table unless --format or --output is given.",
    )
    return option(command)


def check_report_path(path: str | None) -> None:
    """Reject a report that cannot be written, before the results are computed."""
    if path is not None:
        from tracin_ann.report import require_writable

        require_writable(path)


def write_html(
    results: Answers | RowList[Any], path: str | None, index: InfluenceIndex, checkpoints: Sequence[int] | None
) -> None:
    """Write the report if `--html` names one, and print its path."""
    if path is not None:
        from tracin_ann.report import write_report

        written = write_report(results, path, index, checkpoints=checkpoints)
        size = f", {format_size(written.stat().st_size)}" if written.is_file() else ""
        print_note(f"report: {written}{size}", err=True)


@dataclass(frozen=True)
class Sink:
    """The destination of results.

    Attributes:
        form: `table`, `jsonl`, `csv`, `parquet`, or `none` if results go to the report only.
        path: a file; None: stdout.
        csv_raw: write CSV cells unchanged, without guarding them against spreadsheets.
    """

    form: str
    path: Path | None
    csv_raw: bool = False

    @classmethod
    def from_options(cls, form: str | None, output: str | None, html: str | None = None) -> Sink:
        """Return the sink that `--format` and `--output` describe; the suffix of the file is the default format.

        With a report (`html`) and neither option, results go to the report only.

        Raises:
            UsageError: a table is to be written to a file, or Parquet to stdout; `--csv-raw` with another format.
            OSError: results are to be written to stdout, which is closed.
        """
        if html is not None and form is None and output is None:
            reject_csv_raw("--html alone")
            return cls("none", None)
        path = None if output is None else Path(output)
        suffix = "" if path is None else path.suffix.removeprefix(".")
        chosen = form or (suffix if suffix in FORMATS else "table")
        if path is not None and chosen == "table":
            raise UsageError(
                problem(
                    "a table cannot be written to a file",
                    got=f"--output {output}",
                    expected=f"a suffix of {', '.join(FORMATS)}",
                    remedy="rename the file, or use --format",
                )
            )
        if path is None and chosen == "parquet":
            what = "Parquet cannot be written to stdout"
            raise UsageError(problem(what, got="no file", expected="--output FILE", remedy="name a file"))
        if chosen != "csv":
            reject_csv_raw(f"--format {chosen}")
        if path is None:
            require_stdout()
        return cls(chosen, path, _is_csv_raw())

    @contextmanager
    def open(self, fields: Fields) -> Iterator[Callable[[Answers | RowList[Any]], None]]:
        """Yield a function that writes results; it may be called several times."""
        from tracin_ann.results import open_writer

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
