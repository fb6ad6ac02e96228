"""build_index.py, tracin-build: build an index of a task's training rows, or say what that would take."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING

import click

from tracin_ann.choices import MEMORY_FORMATS, ON_NONFINITE, SKETCH_NAMES
from tracin_ann.cli.command import command, device_option, files, folders, is_quiet, note, say
from tracin_ann.cli.info import quality_lines
from tracin_ann.cli.parameters import MemorySize, parse_arguments, show_progress
from tracin_ann.text import format_duration, format_size

if TYPE_CHECKING:
    from tracin_ann.build import BuildReport
    from tracin_ann.config import BuildConfig
    from tracin_ann.operations import BuildPlan

_SHOWN = 12


@command(
    "tracin-build --task my_task.py:task --task-arg folder=checkpoints --out runs/mine",
    "tracin-build --task my_task.py:task --out runs/mine --dry-run",
    "tracin-build --config build.toml --dim 2048",
)
@click.option(
    "--task",
    required=True,
    metavar="FILE.py:NAME",
    shell_complete=files,
    help="The Task, or a function that returns one.",
)
@click.option("--out", required=True, type=click.Path(), shell_complete=folders, help="Directory of the index.")
@click.option("--task-arg", "task_args", multiple=True, metavar="KEY=VALUE", help="For the function; repeatable.")
@click.option("--dim", default=1024, show_default=True, type=click.IntRange(1), help="Dimensions a checkpoint.")
@click.option("--sketch", default="factored", show_default=True, type=click.Choice(SKETCH_NAMES))
@click.option("--seed", default=0, show_default=True, type=int, help="Of the sketch's random numbers.")
@click.option("--index", default="auto", show_default=True, type=click.Choice(["auto", "flat", "ivf"]))
@click.option("--target-recall", default=0.95, show_default=True, type=float, help="Of an index of lists; measured.")
@click.option("--codes", default="sq8", show_default=True, type=click.Choice(["sq8", "sq4", "fp16"]))
@click.option("--compact", "codes", flag_value="sq4", help="The same as --codes sq4: half the index's memory.")
@click.option("--yardstick/--no-yardstick", default=True, help="Measure the sketch against true scores of a few rows.")
@click.option("--batch-size", type=click.IntRange(1), help="Examples a forward.  [default: by the rows' size]")
@click.option("--memory", "memory_bytes", type=MemorySize(), help="For batches, as 8GB.  [default: 2GB or one row]")
@click.option(
    "--memory-format",
    default="auto",
    show_default=True,
    type=click.Choice(MEMORY_FORMATS),
    help="Of pictures in memory.",
)
@click.option("--workers", default=0, show_default=True, type=click.IntRange(0), help="Processes that read data ahead.")
@click.option("--precision", default="fp32", show_default=True, type=click.Choice(["fp32", "bf16"]))
@device_option
@click.option("--dtype", default="float16", show_default=True, type=click.Choice(["float16", "float32"]))
@click.option("--norms", default="sketch", show_default=True, type=click.Choice(["sketch", "exact"]))
@click.option(
    "--on-nonfinite",
    type=click.Choice(ON_NONFINITE),
    help="Rows that are NaN or infinite.  [default: error, or as the index was begun]",
)
@click.option("--allow-random-data", is_flag=True, help="Accept rows that change when they are read twice.")
@click.option("--append", is_flag=True, help="Let a finished index grow by rows at the end of train_data.")
@click.option("--add-checkpoint", is_flag=True, help="Let it grow by checkpoints at the end of the task's.")
@click.option("--rebuild-index", is_flag=True, help="Make its lists anew, without removed rows.")
@click.option("--dry-run", is_flag=True, help="Say what the build would do and take; write nothing.")
def main(task: str, out: str, task_args: tuple[str, ...], dry_run: bool, **options: object) -> None:
    """Build an index of a task's training rows in a directory.

    Run the same command again after an interruption: it goes on where it was.
    """
    from tracin_ann.config import BuildConfig
    from tracin_ann.device import device_name, resolve_device
    from tracin_ann.operations import plan

    arguments = parse_arguments(task_args)
    config = BuildConfig(**options)  # type: ignore[arg-type]
    if dry_run:
        _show_plan(plan(task, out, config, arguments=arguments), config)
        return
    note(f"building {out} on {device_name(resolve_device(config.device))}", err=True)
    report = _built(task, out, config, arguments)
    if not is_quiet():
        _show_report(report, out)


def _built(task: str, out: str, config: BuildConfig, arguments: Mapping[str, str]) -> BuildReport:
    from tracin_ann.build import build

    with show_progress("rows x checkpoints") as progress:
        return build(task, out, config, arguments=arguments, progress=progress)


def _show_plan(made: BuildPlan, config: BuildConfig) -> None:
    from tracin_ann.device import device_name, resolve_device
    from tracin_ann.gradients import NONE, STEPS

    say(f"rows        {made.rows:,} x {made.feature_dim:,} dimensions ({config.sketch}, seed {config.seed})")
    say(f"disk        {format_size(made.disk_bytes)} as {config.dtype}")
    say(f"memory      {format_size(made.memory_bytes)} besides the model's weights")
    on = device_name(resolve_device(config.device))
    say(f"time        {format_duration(made.seconds)} on {on} for the features; index and measurements come on top")
    tuned = made.tuned
    layout = ", channels last" if tuned.channels_last else ""
    share = tuned.read_seconds / (tuned.read_seconds + made.row_seconds)
    say(f"batches     {tuned.batch_size} rows{layout}, {config.precision}; reading takes {share:.0%} of the time")
    for line in made.notes:
        say(f"checkpoints {line}")
    say(f"index       {made.index_kind}: {made.index_reason}")
    for name in (*STEPS, NONE):
        served = made.gradients.names(name)
        if served:
            say(f"gradients   {name}: {len(served)} parameters, {made.gradients.share(name):.1%} of their entries")
            said = ""
            for parameter in served[:_SHOWN]:
                reason = made.gradients.steps[parameter].reason
                why = f" ({'as above' if reason == said else reason})" if reason else ""
                say(f"  {parameter}: {made.sketches[parameter]}{why}")
                said = reason
            if len(served) > _SHOWN:
                say(f"  and {len(served) - _SHOWN} more")
    if made.frozen:
        say(f"left out    {len(made.frozen)} parameters that Task.parameters or requires_grad exclude")
        say("  " + ", ".join(made.frozen[:_SHOWN]) + (", ..." if len(made.frozen) > _SHOWN else ""))


def _show_report(report: BuildReport, out: str) -> None:
    from tracin_ann.gradients import NONE, STEPS

    manifest = report.manifest
    spec = manifest.build.spec
    if report.rows_extracted:
        rate = report.rows_extracted / max(report.seconds, 1e-9)
        took = (
            f"{report.rows_extracted:,} rows x checkpoints in {format_duration(report.seconds)}, {rate:,.0f} a second"
        )
    else:
        took = "all features were there already"
    size = sum(record.size for record in (*manifest.features, *manifest.index.files))
    made = f"{spec.train_rows:,} rows, {len(spec.checkpoints)} checkpoints x {spec.sketch.dim}, {format_size(size)}"
    say(f"{out}: {made}; {took}")
    if len(report.skipped):
        say(f"{report.skipped.counted} ({report.skipped.named})")
    for line in report.notes:
        say(line)
    say(f"index {manifest.index.kind}: {manifest.index.reason}")
    if manifest.fidelity is not None:
        say(f"believe {quality_lines(manifest)}")
    say(f"audited {manifest.audit_summary(report.uneven)}")
    steps = {step.step for step in manifest.steps}
    shares = [f"{name} {_share(report, name)}" for name in STEPS if name in steps]
    say(f"gradients of {len(spec.parameters)} parameters: " + ", ".join(shares))
    unreached = [step.parameter for step in manifest.steps if step.step == NONE]
    if unreached:
        say(f"no gradient reaches {', '.join(unreached)}")


def _share(report: BuildReport, step: str) -> str:
    manifest = report.manifest
    sizes = {p.name: prod(p.shape) for p in manifest.build.spec.parameters}
    served = sum(sizes[s.parameter] for s in manifest.steps if s.step == step)
    return f"{served / max(sum(sizes.values()), 1):.1%}"
