"""tracin-verify: whether an index is what was built, byte for byte, and what autograd gives; making it anew."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from tracin_ann.cli.command import command, device_option, directory_argument, note, say, task_options
from tracin_ann.cli.parameters import parse_arguments, show_progress
from tracin_ann.errors import DamagedIndexError
from tracin_ann.text import format_size

Options = Mapping[str, Any]


@command(
    "tracin-verify runs/mnist",
    "tracin-verify runs/mnist --repair --task moved/my_task.py:task",
    "tracin-verify runs/mnist --audit 100",
)
@directory_argument
@click.option("--repair", "mend", is_flag=True, help="Make anew what is damaged; needs the task.")
@click.option(
    "--audit",
    "n_audited",
    type=click.IntRange(1),
    metavar="N",
    help="Compare N rows with plain autograd; needs the task.",
)
@click.option("--seed", type=click.IntRange(0), help="Which rows --audit draws.  [default: the index's own]")
@task_options
@device_option
def main(directory: str, mend: bool, n_audited: int | None, seed: int | None, **options: Any) -> None:
    """Read every byte of the index in DIR and name each file that is damaged.

    The exit status is 4 if there is one, or a row that --audit finds wrong.
    """
    _verify(directory, mend, options)
    if n_audited is not None:
        _audit(directory, n_audited, seed, options)


def _task(options: Options) -> dict[str, Any]:
    """Return the task and device as `repair` and `audit` take them."""
    task, arguments = options["task"], parse_arguments(options["task_args"])
    return {"task": task, "arguments": arguments or ({} if task else None), "device": options["device"]}


def _verify(directory: str, mend: bool, options: Options) -> None:
    from tracin_ann.operations import repair, sweep, verify

    with show_progress("files") as progress:
        seen = verify(directory, progress)
    for damage in seen.damage:
        say(damage.message)
    if not seen.damage:
        if mend:
            sweep(directory)
        note(f"{directory}: {seen.files:,} files, {format_size(seen.size)}, all as they were written")
        return
    if not mend:
        raise DamagedIndexError(f"{directory}: {len(seen.damage)} damaged; tracin-verify --repair makes them anew")
    with show_progress("rows x checkpoints") as progress:
        repair(directory, **_task(options), progress=progress)
        left = verify(directory, progress)
    for damage in left.damage:
        say(damage.message)
    if left.damage:
        raise DamagedIndexError(f"{directory}: {len(left.damage)} still damaged; build a new index")
    note(f"{directory}: made anew, {left.files:,} files, {format_size(left.size)}, all as they were written")


def _audit(directory: str, n_rows: int, seed: int | None, options: Options) -> None:
    from tracin_ann.operations import Draw, audit

    with show_progress("rows") as progress:
        seen = audit(directory, Draw(n_rows, seed), **_task(options), progress=progress)
    for difference in seen.differences:
        click.echo(str(difference))
    if seen.differences:
        raise DamagedIndexError(
            f"{directory}: {len(seen.differences)} of {seen.rows} rows differ from plain autograd; build a new index"
        )
    note(f"{directory}: audited {seen.record.summary()}")
