"""tracin-info: what an index holds, how far its answers may be believed, and what more would cost."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from tracin_ann.cli.command import command, directory_argument, say
from tracin_ann.cli.streams import expect_stdout
from tracin_ann.text import format_duration, format_size

if TYPE_CHECKING:
    from tracin_ann.search import Calibration
    from tracin_ann.store import Fidelity, Manifest

_SHOWN = 12


@command("tracin-info runs/mnist")
@directory_argument
def main(directory: str) -> None:
    """Say what the index in DIR holds and how far its answers may be believed."""
    from tracin_ann.store import read_removed_ids, read_skipped_rows, take_lease

    expect_stdout()
    manifest, lease = take_lease(Path(directory))
    with closing(lease):
        removed = len(read_removed_ids(Path(directory), manifest))
    spec, index = manifest.build.spec, manifest.index
    size = sum(record.size for record in manifest.features)
    say(
        f"rows        {spec.train_rows:,}, {len(spec.checkpoints)} checkpoints x {spec.sketch.dim}, {format_size(size)}"
    )
    say(f"sketch      {spec.sketch.name}, seed {spec.sketch.seed}, {spec.dtype}, norms by {spec.norms}")
    held = sum(record.size for record in index.files)
    say(f"index       {index.kind}{f', {format_size(held)}' if held else ''}: {index.reason}")
    say(f"generation  {manifest.generation}{f', {removed:,} rows removed' if removed else ''}")
    skipped = read_skipped_rows(Path(directory), manifest)
    if len(skipped):
        say(f"skipped     {skipped.counted} ({skipped.named})")
    if manifest.fidelity is not None:
        say(f"fidelity    {fidelity_line(manifest.fidelity)}")
    say(f"believe     {quality_lines(manifest)}")
    say(f"audited     {manifest.audit_summary()}")
    if index.calibration is not None:
        _print_curve(index.calibration)


def fidelity_line(found: Fidelity) -> str:
    """Return what was measured of the sketch, one line."""
    return (
        f"the sketch finds {found.proponents:.0%} of the true ten proponents, {found.opponents:.0%} of the opponents; "
        f"its first 100 hold {found.deep_proponents:.0%} and {found.deep_opponents:.0%} "
        f"({found.queries} queries, {found.rows:,} rows scored exactly); correlation {found.correlation:.2f}"
    )


def quality_lines(manifest: Manifest) -> str:
    """Return in one line what may be believed from end to end, and what exact re-scoring would lift it to."""
    return manifest.quality_summary


def _print_curve(calibration: Calibration) -> None:
    from rich.console import Console
    from rich.table import Table

    training = f", {calibration.train_queries} of them training rows" if calibration.train_queries else ""
    say(
        f"recall      of the stored rows' own top ten, on {calibration.queries} queries{training}; "
        f"target {calibration.target:g}; an exact scan takes {_seconds(calibration.scan.of(1))} for one query, "
        f"{_seconds(calibration.scan.each)} for each of many"
    )
    table = Table(show_edge=False, pad_edge=False)
    for name in ("hits", "recall", "at least", "10th percentile", "scored", "time"):
        table.add_column(name, justify="right")
    for side in ("proponents", "opponents"):
        points = getattr(calibration, side)
        at_target = calibration.reaching(side, calibration.target)
        for point in points[-_SHOWN:]:
            mark = f"{side} {'*' if point is at_target else ' '}"
            table.add_row(
                *(mark, f"{point.recall:.3f}", f"{point.lower:.3f}", f"{point.tenth:.2f}"),
                *(f"{point.scored:,.0f}", _seconds(point.seconds)),
            )
    Console(highlight=False).print(table)
    if any(calibration.reaching(side, calibration.target) is None for side in ("proponents", "opponents")):
        say(f"the target {calibration.target:g} is out of the lists' reach: query with --search scan to find all")


def _seconds(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1e3:.2f} ms"
    return format_duration(seconds)
