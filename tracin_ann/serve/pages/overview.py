"""The overview of an index: content, expected recall, checkpoints, columns and warnings.

Shapes: N training rows, C checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tracin_ann.choices import ScoreName
from tracin_ann.errors import TracinAnnError
from tracin_ann.index import InfluenceIndex
from tracin_ann.report import Figure, ScoredCheckpoints, format_value, list_facts, make_norms_figure
from tracin_ann.serve.pages.context import Asked, Context, link_figures
from tracin_ann.serve.pages.site import Reply
from tracin_ann.serve.service import Reader
from tracin_ann.store import Fidelity, Manifest

_MOST_VALUES = 12
"""Values of a column that are listed with their counts."""
Cells = tuple[str, ...]


@dataclass(frozen=True)
class Overview:
    """The values of `overview.html`.

    Attributes:
        facts: names and values of the index.
        quality: its measured recall.
        starts: addresses, names and captions of pages to begin with.
        columns: name, type and values of each column.
        checkpoints: position, name, learning rate, mean loss, share of the self-influence.
        recalls: what is scored, recall of the proponents, recall of the opponents.
        recall_note: how the recall was measured.
        warnings: what a reader should know before trusting an answer.
    """

    facts: tuple[tuple[str, str], ...]
    quality: str
    starts: tuple[Cells, ...]
    columns: tuple[Cells, ...]
    checkpoints: tuple[Cells, ...]
    recalls: tuple[Cells, ...]
    recall_note: str
    warnings: tuple[str, ...]


async def show_overview(context: Context, asked: Asked, reader: Reader) -> Reply:
    """Return the overview."""
    view = await reader.run(summarise_index)
    figures = link_figures(await list_overview_figures(context, asked, reader), "overview", "/")
    return context.page(
        "overview.html", reader, title="Overview", here="/", view=view, notes=view.warnings, figures=figures
    )


async def list_overview_figures(context: Context, asked: Asked, reader: Reader) -> tuple[Figure, ...]:
    """Return the figures of the page."""
    return await reader.run(lambda index: (make_norms_figure(index, None, prefix="f1-"),))


def summarise_index(index: InfluenceIndex) -> Overview:
    """Return the overview of an index."""
    manifest = index.manifest
    recalls = tuple(_list_recalls(index))
    fidelity = manifest.fidelity
    return Overview(
        facts=(
            *list_facts(index),
            ("default score", index.default_score),
            ("audit", manifest.audit_summary()),
        ),
        quality=manifest.quality_summary,
        starts=tuple(_list_starts(index)),
        columns=tuple((name, _name_type(values), _count_values(values)) for name, values in index.columns.items()),
        checkpoints=tuple(_list_checkpoints(index)),
        recalls=recalls,
        recall_note="" if fidelity is None else _describe_measurement(manifest, fidelity),
        warnings=tuple(_list_warnings(index)),
    )


def _list_starts(index: InfluenceIndex) -> Iterator[Cells]:
    yield "/query", "Query", "Which training rows influenced a prediction?"
    yield "/suspects", "Suspects", "Which training rows have a wrong label?"
    yield "/hubs", "Hubs", "Which training rows influence many predictions?"
    yield "/duplicates", "Duplicates", "Which training rows are the same to the model?"


def _list_checkpoints(index: InfluenceIndex) -> Iterator[Cells]:
    specs, view = index.manifest.build.spec.checkpoints, index.view()
    rate_C = np.array([specs[c].learning_rate for c in view.checkpoints])
    row_N = index.present()
    loss_C = view.store.losses(view.checkpoints)[row_N].mean(axis=0, dtype=np.float64)
    part_C = (view.store.sqnorms(view.checkpoints)[row_N] * rate_C).sum(axis=0)
    share_C = part_C / (part_C.sum() or 1.0)
    for c, name in enumerate(ScoredCheckpoints.infer(index, 0, None).names):
        rates = "" if specs[c].rates is None else " (differs between parameters)"
        yield str(c), name, f"{rate_C[c]:g}{rates}", f"{loss_C[c]:.3g}", f"{share_C[c]:.0%}"


def _list_recalls(index: InfluenceIndex) -> Iterator[Cells]:
    for score, fidelity in _list_fidelities(index.manifest):
        by = f" by {score}" if index.default_score != "tracin" else ""
        for n, depth in enumerate(fidelity.depths):
            what = f"exact scores of {depth.candidates:,} candidates" if n else "stored features"
            yield f"{what}{by}", depth.proponents.summary, depth.opponents.summary
    calibration = index.manifest.index.calibration
    if calibration is not None:
        points = [calibration.usual_point(side) for side in ("proponents", "opponents")]
        yield "search index, of an exact scan", *(f"{point.recall:.3f}" for point in points)


def _list_fidelities(manifest: Manifest) -> Iterator[tuple[ScoreName, Fidelity]]:
    """Yield the scores whose fidelity was measured, the default score first."""
    if manifest.score_fidelity is not None:
        yield manifest.score_fidelity.score, manifest.score_fidelity.fidelity
    if manifest.fidelity is not None:
        yield "tracin", manifest.fidelity


def _describe_measurement(manifest: Manifest, fidelity: Fidelity) -> str:
    correlations = [(score, f"{each.correlation:.2f}") for score, each in _list_fidelities(manifest)]
    shown = " and ".join(f"{value} by {score}" if len(correlations) > 1 else value for score, value in correlations)
    return (
        "Share of the true ten best rows that an answer contains, with 95% intervals. Measured by the build with "
        f"{fidelity.queries:,} queries and {fidelity.rows:,} exact scores, whose correlation with the stored scores is "
        f"{shown}."
    )


def _list_warnings(index: InfluenceIndex) -> Iterator[str]:
    if len(index.skipped):
        yield f"{index.skipped.summary} ({index.skipped.first_rows}). No answer contains them."
    if len(index.removed):
        yield f"{len(index.removed):,} training rows were removed. No answer contains them."
    if index.manifest.build.random_data:
        yield "The training data is random: rows cannot be displayed, and scores mean nothing."
    try:
        _ = index.task
    except TracinAnnError as error:
        yield f"The task cannot be found, so rows have no content and new queries no gradients: {error}."
    calibration = index.manifest.index.calibration
    if calibration is not None:
        sides = ("proponents", "opponents")
        if any(calibration.fastest_point(side, calibration.target) is None for side in sides):  # type: ignore[arg-type]
            yield f"The search index does not reach recall {calibration.target:g}; choose the search scan."


def _name_type(values: npt.NDArray[np.generic]) -> str:
    return {"b": "yes or no", "i": "integer", "f": "number"}.get(values.dtype.kind, "text")


def _count_values(values: npt.NDArray[np.generic]) -> str:
    if values.dtype.kind == "f":
        return f"{format_value(values.min())} to {format_value(values.max())}"
    names, counts = np.unique(values, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:_MOST_VALUES]
    shown = ", ".join(f"{format_value(names[i])} ({counts[i]:,})" for i in order)
    return shown + (f", and {len(names) - len(order):,} more" if len(names) > len(order) else "")
