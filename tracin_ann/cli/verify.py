"""tracin-verify: check the files of an index, compare its rows with autograd, and repair damage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from tracin_ann.cli.command import command, device_option, directory_argument, task_options
from tracin_ann.cli.imports import pause_collector
from tracin_ann.cli.messages import format_count, print_line, print_note, show_progress
from tracin_ann.cli.parameters import parse_arguments
from tracin_ann.errors import DamagedIndexError
from tracin_ann.text import format_size

Options = Mapping[str, Any]


@command(
    "tracin-verify runs/mnist",
    "tracin-verify runs/mnist --repair --task moved/my_task.py:task",
    "tracin-verify runs/mnist --audit 100",
)
@directory_argument
@click.option("--repair", "with_repair", is_flag=True, help="Rebuild damaged files; needs the task.")
@click.option(
    "--audit",
    "n_audited",
    type=click.IntRange(1),
    metavar="N",
    help="Compare N random rows with plain autograd; needs the task.",
)
@click.option(
    "--seed", type=click.IntRange(0), help="Seed of the rows that --audit draws.  [default: derived from the index]"
)
@task_options
@device_option
def main(directory: str, with_repair: bool, n_audited: int | None, seed: int | None, **options: Any) -> None:
    """Check every byte of the index in DIR and print each damaged file.

    The exit status is 4 if a file is damaged, or if --audit finds a wrong row.
    """
    _verify(directory, with_repair, options)
    if n_audited is not None:
        _audit(directory, n_audited, seed, options)


def _task_arguments(options: Options) -> dict[str, Any]:
    """Return the task and device as arguments of `repair` and `audit`."""
    task, arguments = options["task"], parse_arguments(options["task_args"])
    return {"task": task, "arguments": arguments or ({} if task else None), "device": options["device"]}


def _verify(directory: str, with_repair: bool, options: Options) -> None:
    with pause_collector():
        from tracin_ann.operations import remove_leftovers, repair, verify

    with show_progress("files") as progress:
        result = verify(directory, progress)
    for damage in result.damage:
        print_line(damage.message)
    if not result.damage:
        if with_repair:
            remove_leftovers(directory)
        print_note(f"{directory}: {format_count(result.files, 'file')}, {format_size(result.size)}, all intact")
        return
    if not with_repair:
        count = format_count(len(result.damage), "damaged file")
        raise DamagedIndexError(f"{directory}: {count}; run tracin-verify --repair to rebuild them")
    with show_progress("rows x checkpoints") as progress:
        repair(directory, **_task_arguments(options), progress=progress)
        result = verify(directory, progress)
    for damage in result.damage:
        print_line(damage.message)
    if result.damage:
        count = format_count(len(result.damage), "file")
        raise DamagedIndexError(f"{directory}: {count} still damaged after the repair; build a new index")
    print_note(f"{directory}: repaired; {format_count(result.files, 'file')}, {format_size(result.size)}, all intact")


def _audit(directory: str, n_rows: int, seed: int | None, options: Options) -> None:
    from tracin_ann.operations import AuditSample, audit

    with show_progress("rows") as progress:
        result = audit(directory, AuditSample(n_rows, seed), **_task_arguments(options), progress=progress)
    for difference in result.differences:
        print_line(str(difference))
    if result.differences:
        raise DamagedIndexError(
            f"{directory}: {len(result.differences)} of {result.rows} rows differ from plain autograd; "
            "build a new index"
        )
    print_note(f"audit: {result.record.summary()}")
