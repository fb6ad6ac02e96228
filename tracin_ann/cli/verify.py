"""tracin-verify: whether an index is what was built, byte for byte, and making anew what is not."""

from __future__ import annotations

import click

from tracin_ann.cli.common import parsed_arguments, progress_shown, refusals, sized
from tracin_ann.device import DEVICE_NAMES
from tracin_ann.errors import DamagedIndexError
from tracin_ann.verification import repair, verify


@click.command(context_settings={"max_content_width": 100})
@click.argument("directory", type=click.Path(), metavar="DIR")
@click.option("--repair", "mend", is_flag=True, help="Make anew what is damaged; needs the task.")
@click.option("--task", metavar="FILE.py:NAME", help="Where the task is now, if it moved.")
@click.option("--task-arg", "task_args", multiple=True, metavar="KEY=VALUE", help="Instead of the build's; repeatable.")
@click.option("--device", default="auto", show_default=True, help=DEVICE_NAMES)
@refusals
def main(directory: str, mend: bool, task: str | None, task_args: tuple[str, ...], device: str) -> None:
    """Read every byte of the index in DIR and name each file that is damaged.

    The exit status is 4 if there is one.

    Example: tracin-verify runs/mnist --repair
    """
    with progress_shown("files") as progress:
        seen = verify(directory, progress)
    for damage in seen.damage:
        click.echo(damage.message)
    if not seen.damage:
        click.echo(f"{directory}: {seen.files:,} files, {sized(seen.size)}, all as they were written")
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
    click.echo(f"{directory}: made anew, {left.files:,} files, {sized(left.size)}, all as they were written")
