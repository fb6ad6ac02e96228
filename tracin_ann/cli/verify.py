"""tracin-verify: whether an index is what was built, byte for byte, and making anew what is not."""

from __future__ import annotations

import click

from tracin_ann.cli.common import parsed_arguments, progress_shown
from tracin_ann.cli.manners import command, device_option, directory_argument, note, task_options
from tracin_ann.errors import DamagedIndexError
from tracin_ann.words import sized


@command("tracin-verify runs/mnist", "tracin-verify runs/mnist --repair --task moved/my_task.py:task")
@directory_argument
@click.option("--repair", "mend", is_flag=True, help="Make anew what is damaged; needs the task.")
@task_options
@device_option
def main(directory: str, mend: bool, task: str | None, task_args: tuple[str, ...], device: str) -> None:
    """Read every byte of the index in DIR and name each file that is damaged.

    The exit status is 4 if there is one.
    """
    from tracin_ann.verification import repair, sweep, verify

    with progress_shown("files") as progress:
        seen = verify(directory, progress)
    for damage in seen.damage:
        click.echo(damage.message)
    if not seen.damage:
        if mend:
            sweep(directory)
        note(f"{directory}: {seen.files:,} files, {sized(seen.size)}, all as they were written")
        return
    if not mend:
        raise DamagedIndexError(f"{directory}: {len(seen.damage)} damaged; tracin-verify --repair makes them anew")
    arguments = parsed_arguments(task_args)
    with progress_shown("rows x checkpoints") as progress:
        repair(directory, task, arguments=arguments or ({} if task else None), device=device, progress=progress)
        left = verify(directory, progress)
    for damage in left.damage:
        click.echo(damage.message)
    if left.damage:
        raise DamagedIndexError(f"{directory}: {len(left.damage)} still damaged; build a new index")
    note(f"{directory}: made anew, {left.files:,} files, {sized(left.size)}, all as they were written")
