"""Options of the commands that open an index: the task, row ids, row filters, checkpoints and scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import click

from tracin_ann.choices import SCORES
from tracin_ann.cli.command import device_option, find_given_options, task_options
from tracin_ann.cli.imports import pause_collector
from tracin_ann.cli.parameters import CheckpointRanges, IdRanges, MemorySize, Positions, parse_arguments
from tracin_ann.errors import UsageError, problem

if TYPE_CHECKING:
    from tracin_ann.choices import ScoreName, SideName
    from tracin_ann.distributed import ServiceLauncher, ShardOptions
    from tracin_ann.index import InfluenceIndex
    from tracin_ann.results import Id
    from tracin_ann.store import RowFilter

Function = Callable[..., Any]
Options = Mapping[str, Any]
Workers: TypeAlias = "tuple[ServiceLauncher | None, ShardOptions | None]"
"""What starts the workers of an index, and how they search; None: there are none."""


def index_options(function: Function) -> Function:
    """Add the options that `open_index` reads: `--task`, `--task-arg`, `--batch-size`, `--memory`, `--device`."""
    size = click.option(
        "--batch-size", default=64, show_default=True, type=click.IntRange(1), help="Examples per forward pass."
    )
    memory = click.option(
        "--memory",
        "memory_bytes",
        type=MemorySize(),
        help="Memory for the weights of several checkpoints, such as 8GB.  [default: a quarter of the free memory]",
    )
    return task_options(size(memory(device_option(function))))


def own_ids_option(function: Function) -> Function:
    """Add `--own-ids`; with it, options of the type IdRanges hold strings."""
    return click.option(
        "--own-ids", is_flag=True, is_eager=True, help="Row options take the task's own ids instead of positions."
    )(function)


def checkpoints_option(function: Function) -> Function:
    """Add `--checkpoints`."""
    return click.option(
        "--checkpoints",
        type=CheckpointRanges(),
        default=None,
        help="Positions of the checkpoints to use, such as 0,2.  [default: all]",
    )(function)


def score_options(function: Function) -> Function:
    """Add `--score`, `--cosine` and `--damping`."""
    score = click.option(
        "--score",
        type=click.Choice(SCORES),
        default=None,
        help="TracInCP, cosine, or a score with the inverse curvature of the loss.  [default: that of the index]",
    )
    cosine = click.option("--cosine", is_flag=True, help="The same as --score cosine.")
    return score(cosine(damping_option(function)))


def damping_option(function: Function) -> Function:
    """Add `--damping`."""
    return click.option(
        "--damping",
        type=float,
        help="Damping of the curvature.  [default: the larger of 1 / (learning rate × steps) and 5e-4 of its trace]",
    )(function)


def choose_score(options: Options) -> ScoreName | None:
    """Return the score that `--score` or `--cosine` names; None: that of the index.

    Raises:
        UsageError: they name two scores.
    """
    score, cosine = options["score"], bool(options["cosine"])
    if cosine and score not in (None, "cosine"):
        # As `QueryOptions` says it, which imports torch.
        got = f"--cosine and --score {score}"
        raise UsageError(problem("two scores", got=got, expected="one", remedy="remove one"))
    return "cosine" if cosine else score


def filter_options(function: Function) -> Function:
    """Add the options that `make_row_filter` reads: `--only`, `--without`, `--where`."""
    only = click.option("--only", type=IdRanges(), default=None, help="Training rows to consider.  [default: all]")
    without = click.option("--without", type=IdRanges(), default=(), help="Training rows to exclude.")
    where = click.option(
        "--where",
        multiple=True,
        metavar="COLUMN=VALUE",
        help="Condition on a column of the training rows; also != < <= > >=; repeatable.",
    )
    return only(without(where(function)))


def worker_options(function: Function) -> Function:
    """Add the options that `choose_workers` reads: `--shard-workers` and those of workers."""
    workers = click.option(
        "--shard-workers",
        is_flag=True,
        help="Search, scan and score exactly by processes: one for each shard of the index, or for each CPU thread.",
    )
    address = click.option(
        "--ray-address",
        metavar="auto|HOST:PORT|local",
        help="With --shard-workers: address of a Ray cluster on which they run, instead of on this machine.",
    )
    deadline = click.option(
        "--deadline", type=float, help="With --shard-workers: seconds until all shards have to answer a search."
    )
    partial = click.option(
        "--allow-partial",
        is_flag=True,
        help="With --shard-workers: without a shard that does not answer, return the results of the others, marked.",
    )
    return workers(address(deadline(partial(function))))


def choose_workers(options: Options) -> Workers:
    """Return the workers that the options of `worker_options` describe.

    Raises:
        UsageError: there are options of workers without `--shard-workers`.
    """
    if not options["shard_workers"]:
        for name in sorted(find_given_options() & {"ray_address", "deadline", "allow_partial"}):
            flag, remedy = f"--{name.replace('_', '-')}", "add it, or remove the option"
            raise UsageError(problem(f"{flag} is for workers", got=flag, expected="--shard-workers", remedy=remedy))
        return None, None
    with pause_collector():
        import torch

        from tracin_ann.device import resolve_device
        from tracin_ann.distributed import ProcessLauncher, RayLauncher, ShardOptions

    chosen = ShardOptions(options["deadline"], options["allow_partial"])
    if options["ray_address"] is not None:
        return RayLauncher(options["ray_address"]), chosen
    device = resolve_device(options["device"])
    return ProcessLauncher([str(device)] * (torch.get_num_threads() if device.type == "cpu" else 1)), chosen


def open_index(directory: str, options: Options, workers: Workers = (None, None)) -> InfluenceIndex:
    """Open the index in a directory with the options of `index_options`."""
    launcher, shard_options = workers
    with pause_collector():
        from tracin_ann.index import InfluenceIndex

    task, arguments = options["task"], parse_arguments(options["task_args"])
    return InfluenceIndex.open(
        directory,
        task,
        arguments=arguments or ({} if task else None),
        device=options["device"],
        batch_size=options["batch_size"],
        memory_bytes=options["memory_bytes"],
        launcher=launcher,
        shard_options=shard_options,
    )


def resolve_positions(
    index: InfluenceIndex, side: SideName, ids: Positions | Sequence[Id], options: Options
) -> tuple[int, ...]:
    """Return the positions of rows that an option names, with `--own-ids` by the task's own ids.

    Raises:
        UsageError: a row does not exist.
    """
    if isinstance(ids, Positions):
        n_rows = len(index) if side == "train" else index.runner.n_rows(side)
        return ids.expand(n_rows, f"no such row in {side}_data")
    return index.positions(side, ids) if options["own_ids"] and ids else tuple(ids)  # type: ignore[arg-type]


def resolve_one_position(index: InfluenceIndex, side: SideName, name: str, options: Options) -> int:
    """Return the position of the single row that the option `name` names.

    Raises:
        UsageError: the option names several rows, or the row does not exist.
    """
    rows = resolve_positions(index, side, options[name], options)
    if len(rows) != 1:
        flag = f"--{name.replace('_', '-')}"
        raise UsageError(
            problem(f"{flag} takes one row", got=f"{len(rows)} rows", expected="one row", remedy=f"change {flag}")
        )
    return rows[0]


def make_row_filter(index: InfluenceIndex, options: Options) -> RowFilter:
    """Return the filter that the options of `filter_options` describe.

    Raises:
        UsageError: a row does not exist.
    """
    from tracin_ann.store import RowFilter

    only, without = options["only"], options["without"]
    chosen = None if only is None else resolve_positions(index, "train", only, options)
    return RowFilter(chosen, resolve_positions(index, "train", without, options), options["where"])
