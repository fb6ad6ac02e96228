"""tracin-info: print the content of an index, its measured quality and the cost of higher recall."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from tracin_ann.cli.command import command, directory_argument
from tracin_ann.cli.imports import pause_collector
from tracin_ann.cli.messages import format_count, print_fields, print_line
from tracin_ann.cli.streams import require_stdout
from tracin_ann.text import format_duration, format_size

if TYPE_CHECKING:
    from tracin_ann.search import Calibration
    from tracin_ann.store import CheckpointSpec, Fidelity, Manifest

_MAX_POINTS = 12
_MAX_RATES = 6


@command("tracin-info runs/mnist")
@directory_argument
def main(directory: str) -> None:
    """Print the content and the measured quality of the index in DIR."""
    with pause_collector():
        from tracin_ann.store import read_removed_ids, read_skipped_rows, take_lease

    require_stdout()
    manifest, lease = take_lease(Path(directory))
    with closing(lease):
        n_removed = len(read_removed_ids(Path(directory), manifest))
        scores = _describe_scores(Path(directory), manifest)
    removed = f", {format_count(n_removed, 'row')} removed" if n_removed else ""
    skipped = read_skipped_rows(Path(directory), manifest)
    calibration, scored = manifest.index.calibration, manifest.score_fidelity
    print_fields(
        [
            *_describe_content(manifest),
            ("generation", f"{manifest.generation}{removed}"),
            *(
                [("skipped", f"{format_count(len(skipped), 'row')}, not finite ({skipped.first_rows})")]
                if len(skipped)
                else []
            ),
            *([] if manifest.fidelity is None else _describe_fidelity(manifest.fidelity)),
            *([] if scored is None else _describe_fidelity(scored.fidelity, scored.score)),
            ("quality", manifest.quality_summary),
            ("audit", manifest.audit_summary()),
            *scores,
            *([] if calibration is None else [("recall@10", _describe_calibration(calibration))]),
        ]
    )
    if calibration is not None:
        _print_curve(calibration)


def _describe_content(manifest: Manifest) -> list[tuple[str, str]]:
    spec, index = manifest.build.spec, manifest.index
    feature_bytes = sum(record.size for record in manifest.features)
    index_bytes = sum(record.size for record in index.files)
    size = f", {format_size(index_bytes)}" if index_bytes else ""
    shards = f" in {index.shards} shards" if index.shards > 1 else ""
    checkpoints = f"{len(spec.checkpoints)} checkpoints x {spec.sketch.dim}"
    return [
        ("rows", f"{spec.train_rows:,}, {checkpoints}, {format_size(feature_bytes)}"),
        ("sketch", f"{spec.sketch.name}, seed {spec.sketch.seed}, {spec.dtype}, {_NORMS[spec.norms]} norms"),
        *_describe_rates(spec.checkpoints),
        *([] if spec.preconditioner == "none" else [("weights", f"preconditioner {spec.preconditioner}")]),
        ("index", f"{index.kind}{size}{shards}, {index.reason}"),
    ]


def _describe_scores(directory: Path, manifest: Manifest) -> list[tuple[str, str]]:
    """Return the default score and, if it has a curvature matrix, whether the sketch has enough dimensions for it."""
    from tracin_ann.scoring import find_curvature, open_score_maker, suggest_dim
    from tracin_ann.store import FEATURES, FeatureStore

    name = manifest.default_score
    curvature, spec = find_curvature(name), manifest.build.spec
    if curvature is None:
        return [("score", f"{name} by default; --score names another one")]
    maker = open_score_maker(directory, manifest, FeatureStore(directory / FEATURES, manifest.build.layout))
    damped = maker.damp(curvature)
    used = [c for c, checkpoint in enumerate(spec.checkpoints) if checkpoint.learning_rate > 0]
    dims = [damped.curvatures[c].effective_dimension(damped.damping_C[c]) for c in used]
    sample = damped.curvatures[used[0]]
    error = max(damped.curvatures[c].error for c in used)
    shown = " to ".join(dict.fromkeys(f"{dim:.0f}" for dim in (min(dims), max(dims))))
    dim, suggested = spec.sketch.dim, suggest_dim(spec.sketch.dim, max(dims))
    advice = "is enough" if suggested is None else f"is small: build with --dim {suggested} or more"
    return [
        ("score", f"{name} by default, damping {damped.rule}"),
        (
            "curvature",
            f"effective dimension {shown}, of which D should be 3 times; D = {dim} {advice}; computed from "
            f"{sample.n_rows:,} rows, relative error at most {error:.2g}",
        ),
    ]


def _describe_rates(checkpoints: Sequence[CheckpointSpec]) -> list[tuple[str, str]]:
    """Return a field for each checkpoint whose parameters have different learning rates."""
    fields: list[tuple[str, str]] = []
    for i, checkpoint in enumerate(checkpoints):
        if checkpoint.rates is not None:
            counts = sorted(Counter(checkpoint.rates.values()).items(), reverse=True)
            parts = [f"{rate:g} for {format_count(count, 'parameter')}" for rate, count in counts[:_MAX_RATES]]
            more = f", and {len(counts) - _MAX_RATES} more rates" if len(counts) > _MAX_RATES else ""
            fields.append(("" if fields else "rates", f"checkpoint {i}: {', '.join(parts)}{more}"))
    return fields


_NORMS = {"sketch": "estimated", "exact": "exact"}


def _describe_fidelity(fidelity: Fidelity, score: str = "") -> list[tuple[str, str]]:
    """Return the expected recall of the true top ten at several depths of the sketch's ranking, one field each.

    Args:
        fidelity: that of a score.
        score: its name; "" for TracIn.
    """
    fields: list[tuple[str, str]] = []
    top = f"true top 10 by {score}" if score else "true top 10"
    for depth in fidelity.depths:
        what = f"among {depth.candidates:,}" if fields else f"{top} among the first {depth.candidates} rows"
        recalls = f"{depth.proponents.summary} of the proponents, {depth.opponents.summary} of the opponents"
        fields.append(("" if fields or score else "fidelity", f"{what}: {recalls}"))
    measured = f"{format_count(fidelity.queries, 'query', 'queries')}, {fidelity.rows:,} rows scored exactly"
    return [*fields, ("", f"95% intervals, {measured}; correlation {fidelity.correlation:.2f}")]


def _describe_calibration(calibration: Calibration) -> str:
    """Return in one line what the recall of the search index was measured on, and the cost of an exact scan."""
    training = f", {calibration.train_queries} of them training rows" if calibration.train_queries else ""
    return (
        f"of the search index against an exact scan, on {calibration.queries} queries{training}; target "
        f"{calibration.target:g}, marked *; an exact scan takes {_format_seconds(calibration.scan.seconds(1))} for one "
        f"query, {_format_seconds(calibration.scan.each)} per query for many"
    )


def _print_curve(calibration: Calibration) -> None:
    """Print a table of recall and cost for the calibrated settings of the search index."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_edge=False, pad_edge=False)
    for name in ("hits", "recall", "lower bound", "10th percentile", "rows scored", "time"):
        table.add_column(name, justify="right")
    for side in ("proponents", "opponents"):
        points = getattr(calibration, side)
        at_target = calibration.fastest_point(side, calibration.target)
        for point in points[-_MAX_POINTS:]:
            table.add_row(
                *(f"{side} {'*' if point is at_target else ' '}", f"{point.recall:.3f}", f"{point.lower:.3f}"),
                *(f"{point.tenth:.2f}", f"{point.scored:,.0f}", _format_seconds(point.seconds)),
            )
    Console(highlight=False).print(table)
    if any(calibration.fastest_point(side, calibration.target) is None for side in ("proponents", "opponents")):
        print_line(f"warning: the search index does not reach recall {calibration.target:g}; use --search scan")


def _format_seconds(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1e3:.2f} ms"
    return format_duration(seconds)
