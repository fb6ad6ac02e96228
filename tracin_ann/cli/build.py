"""build_index.py, tracin-build: build an index of a task's training rows, or print the plan of the build."""

from __future__ import annotations

import os
from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import click

from tracin_ann.choices import DTYPES, INDEX_KINDS, MEMORY_FORMATS, ON_NONFINITE, PRECONDITIONERS, SKETCH_NAMES
from tracin_ann.cli.command import command, complete_devices, complete_directories, complete_files, find_given_options
from tracin_ann.cli.imports import pause_collector
from tracin_ann.cli.messages import format_count, is_quiet, print_fields, print_line, print_note, show_progress
from tracin_ann.cli.parameters import Dimension, MemorySize, parse_arguments
from tracin_ann.device import DEVICE_NAMES
from tracin_ann.errors import UsageError, problem
from tracin_ann.text import format_duration, format_size

if TYPE_CHECKING:
    from tracin_ann.build import BuildReport, ShardReport
    from tracin_ann.config import BuildConfig
    from tracin_ann.distributed import Launcher
    from tracin_ann.operations import BuildPlan
    from tracin_ann.scoring import DimChoice, DimPrediction
    from tracin_ann.store import Manifest

_MAX_SHOWN = 12
_RAY_OPTIONS = ("ray_address", "num_cpus_per_worker", "num_gpus_per_worker")
_SPREADING = ("shard", "finish", "launcher", *_RAY_OPTIONS)
"""Options that spread a build over processes or machines."""


@command(
    "tracin-build --task my_task.py:task --task-arg folder=checkpoints --out runs/mine",
    "tracin-build --task my_task.py:task --out runs/mine --dry-run",
    "tracin-build --from-transformers output_dir --data train.jsonl --out runs/mine",
    "tracin-build --config build.toml --dim 2048",
)
@click.option(
    "--task",
    metavar="FILE.py:NAME",
    shell_complete=complete_files,
    help="The Task, or a function that returns a Task.",
)
@click.option(
    "--from-transformers",
    "run",
    type=click.Path(),
    shell_complete=complete_directories,
    help="Run folder of the Hugging Face Trainer, instead of --task.",
)
@click.option(
    "--data",
    type=click.Path(),
    shell_complete=complete_files,
    help="Training data of the run: a JSONL, Parquet or CSV file, or a folder of save_to_disk.",
)
@click.option(
    "--query-data",
    type=click.Path(),
    shell_complete=complete_files,
    help="Query data of the run.  [default: the training data]",
)
@click.option(
    "--out", required=True, type=click.Path(), shell_complete=complete_directories, help="Directory of the index."
)
@click.option(
    "--task-arg",
    "task_args",
    multiple=True,
    metavar="KEY=VALUE",
    help="Argument of the task function, or option of the run such as rates=sum or text=sentence; repeatable.",
)
@click.option(
    "--dim",
    default=1024,
    show_default=True,
    type=Dimension(1),
    metavar="N|auto",
    help="Sketch dimension per checkpoint; auto chooses the smallest sufficient one by a pilot of some rows.",
)
@click.option(
    "--target-true-recall",
    default=0.95,
    show_default=True,
    type=float,
    help="With --dim auto: recall@10 of true TracIn scores, in both directions, among the --candidates.",
)
@click.option(
    "--candidates",
    default=1000,
    show_default=True,
    type=click.IntRange(1),
    help="With --dim auto: rows that queries will re-score exactly in each direction.",
)
@click.option(
    "--disk", "disk_bytes", type=MemorySize(), help="With --dim auto: limit for the index on disk, such as 20GB."
)
@click.option(
    "--sketch",
    default="factored",
    show_default=True,
    type=click.Choice(SKETCH_NAMES),
    help="Random projection of the gradients.",
)
@click.option("--seed", default=0, show_default=True, type=int, help="Seed of the sketch.")
@click.option(
    "--index",
    default="auto",
    show_default=True,
    type=click.Choice(INDEX_KINDS),
    help="Exact scan (flat) or a search index; auto chooses by the number of rows and a diagnosis of the features.",
)
@click.option(
    "--index-shards",
    default=1,
    show_default=True,
    type=click.IntRange(1),
    help="With --index ivf or codes: files over which its rows are split, to be searched by as many processes.",
)
@click.option(
    "--target-recall",
    default=0.95,
    show_default=True,
    type=float,
    help="recall@10 that the search index is calibrated to.",
)
@click.option(
    "--codes",
    default="sq8",
    show_default=True,
    type=click.Choice(["sq8", "sq4", "fp16"]),
    help="Encoding of the rows in inverted lists.",
)
@click.option(
    "--compact", "codes", flag_value="sq4", help="Same as --codes sq4: half the memory for the inverted lists."
)
@click.option(
    "--yardstick/--no-yardstick",
    default=True,
    help="Measure the quality of the stored features against exact scores of some rows.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    help="Examples per forward pass.  [default: depends on model, rows and device]",
)
@click.option(
    "--memory",
    "memory_bytes",
    type=MemorySize(),
    help="Memory for batches, and with --dim auto for rows, such as 8GB.  [default: 2GB, or what one row needs]",
)
@click.option(
    "--memory-format",
    default="auto",
    show_default=True,
    type=click.Choice(MEMORY_FORMATS),
    help="Memory format of images.",
)
@click.option(
    "--workers",
    default=0,
    show_default=True,
    type=click.IntRange(0),
    help="Processes that load data; 0 loads it in the main process.",
)
@click.option(
    "--precision",
    default="fp32",
    show_default=True,
    type=click.Choice(["fp32", "bf16"]),
    help="Precision of the forward and backward passes.",
)
@click.option(
    "--preconditioner",
    default="none",
    show_default=True,
    type=click.Choice(PRECONDITIONERS),
    help="Weights of gradients from Adam's second moments.",
)
@click.option(
    "--device",
    default="auto",
    show_default=True,
    metavar="NAME[,NAME...]|all",
    shell_complete=complete_devices,
    help=f"Compute device: {DEVICE_NAMES}; several, or all GPUs, compute the features in one process each.",
)
@click.option(
    "--shard",
    metavar="INDEX/COUNT|auto",
    help="Compute only a share of the features, such as 0/4; auto reads it from the scheduler's environment.",
)
@click.option("--finish", is_flag=True, help="Finish a build whose features were computed with --shard.")
@click.option("--launcher", type=click.Choice(["ray"]), help="Compute the features on the workers of a Ray cluster.")
@click.option(
    "--ray-address",
    default="auto",
    show_default=True,
    metavar="auto|HOST:PORT|local",
    help="Address of the cluster; local starts one on this machine.",
)
@click.option(
    "--num-cpus-per-worker",
    default=1,
    show_default=True,
    type=click.IntRange(1),
    help="With --launcher ray: CPUs and threads of a worker.",
)
@click.option(
    "--num-gpus-per-worker",
    default=0.0,
    show_default=True,
    type=click.FloatRange(0),
    help="With --launcher ray: GPUs of a worker.",
)
@click.option(
    "--dtype",
    default="float16",
    show_default=True,
    type=click.Choice(DTYPES),
    help="Type of the stored features: numbers, or codes of 8, 4, 2 or 1 bits.",
)
@click.option(
    "--norms",
    default="sketch",
    show_default=True,
    type=click.Choice(["sketch", "exact"]),
    help="Gradient norms: estimated from the sketch, or exact.",
)
@click.option(
    "--on-nonfinite",
    type=click.Choice(ON_NONFINITE),
    help="Rows with NaN or infinite values: stop or skip them.  [default: error; a resumed build keeps its choice]",
)
@click.option("--allow-random-data", is_flag=True, help="Accept rows that differ from one read to the next.")
@click.option("--append", is_flag=True, help="Add new rows at the end of train_data to a finished index.")
@click.option(
    "--add-checkpoint", is_flag=True, help="Add new checkpoints at the end of the task's list to a finished index."
)
@click.option("--rebuild-index", is_flag=True, help="Rebuild the search index, without removed rows.")
@click.option("--dry-run", is_flag=True, help="Print the plan of the build; write nothing.")
def main(out: str, task_args: tuple[str, ...], dry_run: bool, **options: Any) -> None:
    """Build an index of a task's training rows in a directory.

    To resume an interrupted build, run the same command again.
    """
    with pause_collector():
        from tracin_ann.build import build, build_shard, finish_build
        from tracin_ann.config import BuildConfig
        from tracin_ann.device import device_name, resolve_device
        from tracin_ann.distributed import Shard
        from tracin_ann.operations import plan

    spread = {name: options.pop(name) for name in _SPREADING}
    launcher, options["device"] = _choose_launcher(options["device"], **spread)
    sources = {name: options.pop(name) for name in ("task", "run", "data", "query_data")}
    task, arguments = _choose_task(**sources, arguments=parse_arguments(task_args))
    _reject_unused_options(options["dim"])
    config = BuildConfig(**options)
    if dry_run:
        _print_plan(plan(task, out, config, arguments=arguments), config)
        return
    shard = None if spread["shard"] is None else Shard.parse(spread["shard"])
    name = f"shard {shard} of {out}" if shard else out
    print_note(f"building {name} on {device_name(resolve_device(config.device))}", err=True)
    with show_progress("rows x checkpoints") as progress:
        if shard is not None:
            share = build_shard(task, out, shard, config, arguments=arguments, progress=progress)
        elif spread["finish"]:
            report = finish_build(task, out, config, arguments=arguments, progress=progress)
        else:
            report = build(task, out, config, arguments=arguments, progress=progress, launcher=launcher)
    if not is_quiet():
        _print_report(report, out) if shard is None else _print_share(share, out)


def _choose_launcher(device: str, **spread: Any) -> tuple[Launcher | None, str]:
    """Return the launcher that the options ask for, and the device of this process.

    Raises:
        click.UsageError: options exclude each other, or options of a launcher are given without it.
        UsageError: a device does not exist.
    """
    from tracin_ann.device import find_local_device, split_devices
    from tracin_ann.distributed import ProcessLauncher, RayLauncher

    several = device == "all" or "," in device
    ways = {"--shard": spread["shard"] is not None, "--finish": spread["finish"], "--launcher": spread["launcher"]}
    chosen = [name for name, is_given in {**ways, "several devices": several}.items() if is_given]
    if len(chosen) > 1:
        raise click.UsageError(f"{chosen[0]} and {chosen[1]} exclude each other.")
    unused = [name for name in _RAY_OPTIONS if name in find_given_options() and not spread["launcher"]]
    if unused:
        raise click.UsageError(f"'--{unused[0].replace('_', '-')}' needs '--launcher ray'.")
    if spread["launcher"]:
        cpus, gpus = spread["num_cpus_per_worker"], spread["num_gpus_per_worker"]
        return RayLauncher(spread["ray_address"], num_cpus_per_worker=cpus, num_gpus_per_worker=gpus), device
    if not several:
        return None, find_local_device() if device == spread["shard"] == "auto" else device
    devices = split_devices(device)
    return ProcessLauncher(devices), devices[0]


def _reject_unused_options(dim: object) -> None:
    """Reject options that were given but have an effect with `--dim auto` only."""
    unused = {"target_true_recall": "--target-true-recall", "candidates": "--candidates", "disk_bytes": "--disk"}
    for name in find_given_options() & unused.keys():
        if dim != "auto":
            what, expected = f"{unused[name]} is for the choice of the sketch dimension", "--dim auto"
            raise UsageError(problem(what, got=f"--dim {dim}", expected=expected, remedy="change one of the two"))


def _choose_task(
    task: str | None, run: str | None, data: str | None, query_data: str | None, arguments: dict[str, str]
) -> tuple[str, dict[str, str]]:
    """Return the reference of the task and its arguments: those of --task, or of the built-in task of a run.

    Raises:
        click.UsageError: neither or both are given, or the run is given without data.
    """
    from tracin_ann.task import TRANSFORMERS_TASK

    if run is None:
        if task is None:
            raise click.UsageError("Missing option '--task' or '--from-transformers'.")
        if data is not None or query_data is not None:
            raise click.UsageError("'--data' and '--query-data' need '--from-transformers'.")
        return task, arguments
    if task is not None:
        raise click.UsageError("'--task' and '--from-transformers' exclude each other.")
    if data is None:
        raise click.UsageError("'--from-transformers' needs '--data'.")
    # Absolute, so that the index can be queried from any directory.
    paths = {"run": run, "data": data} | ({"query_data": query_data} if query_data is not None else {})
    return TRANSFORMERS_TASK, {**{name: os.path.abspath(path) for name, path in paths.items()}, **arguments}


def _print_plan(plan: BuildPlan, config: BuildConfig) -> None:
    from tracin_ann.device import device_name, resolve_device

    tuned = plan.tuned
    layout = ", channels last" if tuned.channels_last else ""
    read_share = tuned.read_seconds / (tuned.read_seconds + plan.row_seconds)
    device = device_name(resolve_device(config.device))
    print_fields(
        [
            ("rows", f"{plan.rows:,} x {plan.feature_dim:,} dimensions ({config.sketch} sketch, seed {config.seed})"),
            ("disk", f"{format_size(plan.disk_bytes)}, features as {config.dtype}"),
            ("memory", f"{format_size(plan.memory_bytes)}, without the model's weights"),
            ("time", f"{format_duration(plan.seconds)} on {device}, without search index and measurements"),
            (
                "batches",
                f"{tuned.batch_size} rows{layout}, {config.precision}; {read_share:.0%} of the time for reading",
            ),
            *(("checkpoints", note) for note in plan.notes),
            ("index", f"{plan.index_kind}, {plan.index_reason}"),
            *_describe_gradients(plan),
            *_describe_excluded(plan),
            *([] if plan.dim_choice is None else [("dim", plan.dim_choice.summary)]),
        ]
    )
    if plan.dim_choice is not None:
        _print_dtypes(plan.dim_choice)
        _print_dims(plan.dim_choice, plan.dim_seconds)


def _print_dtypes(choice: DimChoice) -> None:
    """Print a table of the values of D that would be chosen for each dtype."""
    rows = [(dtype, str(row.dim), *_describe_dim(row)) for dtype, row in choice.others.items()]
    _print_right(("dtype", "dim", *_DIM_COLUMNS), rows)
    print_line("")


def _print_dims(choice: DimChoice, seconds: Sequence[float]) -> None:
    """Print a table of the recall and the cost of the values of D; * marks the chosen one, - those over the limits."""
    rows = []
    for row, duration in zip(choice.table, seconds, strict=True):
        mark = "*" if row is choice.chosen else " " if row.is_allowed else "-"
        rows.append((f"{row.dim} {mark}", *_describe_dim(row), format_duration(duration)))
    _print_right(("dim", *_DIM_COLUMNS, "time"), rows)


_DIM_COLUMNS = ("proponents", "opponents", "bytes a row", "disk")


def _describe_dim(row: DimPrediction) -> tuple[str, ...]:
    """Return the cells of `_DIM_COLUMNS`."""
    recalls = (f"{row.proponents.mean:.3f}", f"{row.opponents.mean:.3f}")
    return (*recalls, f"{row.size.row_bytes:,}", format_size(row.size.disk_bytes))


def _print_right(names: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table whose columns are aligned to the right."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_edge=False, pad_edge=False)
    for name in names:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row)
    Console(highlight=False).print(table)


def _describe_gradients(plan: BuildPlan) -> list[tuple[str, str]]:
    """Return fields that name the gradient method of every parameter, with the share of entries of each method."""
    from tracin_ann.gradients import METHODS, NONE

    fields = []
    for method in (*METHODS, NONE):
        names = plan.gradients.names(method)
        if not names:
            continue
        count = format_count(len(names), "parameter")
        fields.append(("gradients", f"{method}, {count}, {plan.gradients.share(method):.1%} of the entries"))
        previous = ""
        for name in names[:_MAX_SHOWN]:
            reason = plan.gradients.steps[name].reason
            suffix = f" ({'as above' if reason == previous else reason})" if reason else ""
            fields.append(("", f"{name}: {plan.sketches[name]}{suffix}"))
            previous = reason
        if len(names) > _MAX_SHOWN:
            fields.append(("", f"and {len(names) - _MAX_SHOWN} more"))
    return fields


def _describe_excluded(plan: BuildPlan) -> list[tuple[str, str]]:
    if not plan.frozen:
        return []
    count = format_count(len(plan.frozen), "parameter")
    names = ", ".join(plan.frozen[:_MAX_SHOWN]) + (", ..." if len(plan.frozen) > _MAX_SHOWN else "")
    return [("excluded", f"{count} by Task.parameters or requires_grad"), ("", names)]


def _print_report(report: BuildReport, out: str) -> None:
    manifest = report.manifest
    spec = manifest.build.spec
    size = sum(record.size for record in (*manifest.features, *manifest.index.files))
    content = f"{spec.train_rows:,} rows, {len(spec.checkpoints)} checkpoints x {spec.sketch.dim}, {format_size(size)}"
    print_line(f"{out}: {content}; {_describe_extraction(report)}")
    if len(report.skipped):
        print_line(f"skipped: {format_count(len(report.skipped), 'row')}, not finite ({report.skipped.first_rows})")
    if report.dim_choice is not None:
        print_line(f"dim: {report.dim_choice.summary}")
    for note in report.notes:
        print_line(f"checkpoints: {note}")
    print_line(f"index: {manifest.index.kind}, {manifest.index.reason}")
    if manifest.fidelity is not None:
        print_line(f"quality: {manifest.quality_summary}")
    print_line(f"audit: {manifest.audit_summary(report.uneven)}")
    _print_gradients(manifest)


def _print_share(report: ShardReport, out: str) -> None:
    files = format_count(report.files, "file")
    print_line(f"{out}: shard {report.shard}, {files}; {_describe_extraction(report)}")


def _describe_extraction(report: BuildReport | ShardReport) -> str:
    if not report.rows_extracted:
        return "all features were already stored"
    rate = report.rows_extracted / max(report.seconds, 1e-9)
    duration = format_duration(report.seconds)
    return f"{report.rows_extracted:,} rows x checkpoints in {duration}, {rate:,.0f} per second"


def _print_gradients(manifest: Manifest) -> None:
    """Print the share of parameter entries of each gradient method, and the parameters that no gradient reaches."""
    from tracin_ann.gradients import METHODS, NONE

    sizes = {parameter.name: prod(parameter.shape) for parameter in manifest.build.spec.parameters}
    total = max(sum(sizes.values()), 1)
    entries = {method: 0 for method in METHODS}
    for step in manifest.steps:
        if step.step in entries:
            entries[step.step] += sizes[step.parameter]
    used = {step.step for step in manifest.steps}
    shares = [f"{method} {n / total:.1%}" for method, n in entries.items() if method in used]
    print_line(f"gradients: {', '.join([format_count(len(sizes), 'parameter'), *shares])}")
    unreached = [step.parameter for step in manifest.steps if step.step == NONE]
    if unreached:
        print_line(f"no gradient: {', '.join(unreached)}")
