"""The index that a command asks: how it is opened, and how the command line names its rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from tracin_ann.cli.command import device_option, task_options
from tracin_ann.cli.parameters import CheckpointRanges, IdRanges, Positions, parse_arguments
from tracin_ann.errors import UsageError, problem

if TYPE_CHECKING:
    from tracin_ann.choices import SideName
    from tracin_ann.index import InfluenceIndex
    from tracin_ann.scoring import Id
    from tracin_ann.store import RowFilter

Function = Callable[..., Any]
Options = Mapping[str, Any]


def index_options(function: Function) -> Function:
    """Give a command what `opened` reads: `--task`, `--task-arg`, `--batch-size`, `--device`."""
    size = click.option(
        "--batch-size", default=64, show_default=True, type=click.IntRange(1), help="Examples a forward."
    )
    return task_options(size(device_option(function)))


def own_ids_option(function: Function) -> Function:
    """Give a command `--own-ids`; its options of the type IdRanges then hold text."""
    return click.option(
        "--own-ids", is_flag=True, is_eager=True, help="Rows are named by the task's own ids, not positions."
    )(function)


def checkpoints_option(function: Function) -> Function:
    """Give a command `--checkpoints`."""
    return click.option(
        "--checkpoints", type=CheckpointRanges(), default=None, help="Positions to sum over, such as 0,2; default all."
    )(function)


def filter_options(function: Function) -> Function:
    """Give a command what `row_filter` reads: `--only`, `--without`, `--where`."""
    only = click.option("--only", type=IdRanges(), default=None, help="Training rows that take part; default all.")
    without = click.option("--without", type=IdRanges(), default=(), help="Training rows that do not.")
    where = click.option(
        "--where", multiple=True, metavar="COLUMN=VALUE", help="That they have; also != < <= > >=; repeatable."
    )
    return only(without(where(function)))


def open_index(directory: str, options: Options) -> InfluenceIndex:
    """Return the index in a directory, as `index_options` say."""
    from tracin_ann.index import InfluenceIndex

    task, arguments = options["task"], parse_arguments(options["task_args"])
    return InfluenceIndex.open(
        directory,
        task,
        arguments=arguments or ({} if task else None),
        device=options["device"],
        batch_size=options["batch_size"],
    )


def positions(
    index: InfluenceIndex, side: SideName, ids: Positions | Sequence[Id], options: Options
) -> tuple[int, ...]:
    """Return the positions of rows that the command line names, in `--own-ids` by the task's own ids.

    Raises:
        UsageError: there is no such row.
    """
    if isinstance(ids, Positions):
        n_rows = len(index) if side == "train" else index.passes.n_rows(side)
        return ids.within(n_rows, f"no such row in {side}_data")
    return index.positions(side, ids) if options["own_ids"] and ids else tuple(ids)  # type: ignore[arg-type]


def one_position(index: InfluenceIndex, side: SideName, name: str, options: Options) -> int:
    """Return the position of a row that the option `name` must name alone.

    Raises:
        UsageError: it names several, or there is no such id.
    """
    found = positions(index, side, options[name], options)
    if len(found) != 1:
        flag = f"--{name.replace('_', '-')}"
        raise UsageError(
            problem(f"{flag} is not one row", got=f"{len(found)} rows", expected="one", remedy=f"change {flag}")
        )
    return found[0]


def row_filter(index: InfluenceIndex, options: Options) -> RowFilter:
    """Return the filter that `filter_options` ask for.

    Raises:
        UsageError: there is no such id.
    """
    from tracin_ann.store import RowFilter

    only, without = options["only"], options["without"]
    chosen = None if only is None else positions(index, "train", only, options)
    return RowFilter(chosen, positions(index, "train", without, options), options["where"])
