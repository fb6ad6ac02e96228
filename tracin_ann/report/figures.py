"""Figures of a report with titles, captions and what they say in words: scores, norms, what checkpoints add."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tracin_ann.index import InfluenceIndex
from tracin_ann.report.views import Asked
from tracin_ann.scoring import (
    GREY,
    OPPONENT,
    Answer,
    Hit,
    checkpoints_figure,
    norms_figure,
    render_svg,
    score_ranks_figure,
)
from tracin_ann.store import FEATURES, FeatureStore
from tracin_ann.types import Float64


@dataclass(frozen=True)
class Figure:
    """A figure as an `svg` element, its title, its caption, and what it shows in words."""

    svg: str
    title: str
    caption: str
    alt: str


def answer_figures(index: InfluenceIndex, answers: Sequence[Answer], asked: Asked) -> tuple[Figure, ...]:
    """Return the figures of answers; none where there is no hit."""
    hits = {name: [hit for answer in answers for hit in getattr(answer, name)] for name in ("proponents", "opponents")}
    rows = sorted({hit.row for of_side in hits.values() for hit in of_side})
    if not rows:
        return ()
    best = {name: max((abs(hit.score) for hit in of_side), default=0.0) for name, of_side in hits.items()}
    of = "this query" if len(answers) == 1 else f"{len(answers):,} queries"
    figures = [
        _figure(
            score_ranks_figure(answers),
            "Scores by rank",
            f"Proponents and opponents of {of}"
            + (": the median, shaded from the 10th to the 90th percentile." if len(answers) > 1 else "."),
            f"the largest score of a proponent is {best['proponents']:.3g}, of an opponent -{best['opponents']:.3g}",
            "f1-",
        ),
        _norms(index, asked.checkpoints, rows, "rows among the hits", "f2-"),
    ]
    parts = {name: _mean_parts(of_side) for name, of_side in hits.items()}
    parts = {name: part_C for name, part_C in parts.items() if len(part_C)}
    if parts:
        drawn = checkpoints_figure(parts, asked.names)
        figures.append(
            _checkpoints(drawn, "What a hit's score is made of, mean over the hits.", parts, asked.names, "f3-")
        )
    return tuple(figures)


def row_figures(index: InfluenceIndex, rows: Sequence[int], checkpoints: Sequence[int] | None) -> tuple[Figure, ...]:
    """Return the figures of training rows that stand in a list; none where it is empty."""
    if not rows:
        return ()
    asked = Asked.of(index, 0, checkpoints)
    part_NC = _parts(index, asked.checkpoints)
    present = np.setdiff1d(np.arange(len(index)), np.union1d(index.removed, index.skipped.row_S))
    parts = {"rows of this list": part_NC[list(rows)].mean(0), "all training rows": part_NC[present].mean(0)}
    return (
        _norms(index, asked.checkpoints, rows, "rows of this list", "f1-"),
        _checkpoints(
            checkpoints_figure(parts, asked.names, (OPPONENT, GREY)),
            "Self-influence by checkpoint, mean.",
            parts,
            asked.names,
            "f2-",
        ),
    )


def _norms(
    index: InfluenceIndex, checkpoints: Sequence[int] | None, rows: Sequence[int], marked: str, prefix: str
) -> Figure:
    norm_N = _parts(index, checkpoints).sum(axis=1)
    known = np.isfinite(norm_N)
    above = float(np.mean(np.median(norm_N[list(rows)]) >= norm_N[known]))
    return _figure(
        norms_figure(norm_N, np.array(rows, dtype=np.int64), marked),
        "Gradient norms",
        "Training rows by their self-influence (learning rate × squared gradient norm, summed); coloured, the "
        f"{len(rows):,} {marked}.",
        f"the median of the {marked} is at or above {above:.0%} of all training rows",
        prefix,
    )


def _checkpoints(drawn: Any, caption: str, parts: dict[str, Float64], names: Sequence[str], prefix: str) -> Figure:
    said = "; ".join(
        f"{name}: " + ", ".join(f"{at} {value:+.3g}" for at, value in zip(names, part_C, strict=False))
        for name, part_C in parts.items()
    )
    return _figure(drawn, "By checkpoint, learning rate included", caption, said, prefix)


def _figure(drawn: Any, title: str, caption: str, said: str, prefix: str) -> Figure:
    return Figure(render_svg(drawn, prefix), title, caption, f"{title}: {said}")


def _parts(index: InfluenceIndex, checkpoints: Sequence[int] | None) -> Float64:
    """Return what each checkpoint adds to each training row's self-influence, [N, C]."""
    store = FeatureStore(index.directory / FEATURES, index.manifest.build.layout)
    specs = index.manifest.build.spec.checkpoints
    chosen = range(len(specs)) if checkpoints is None else checkpoints
    part_NC: Float64 = store.sqnorms(checkpoints) * np.array([specs[c].learning_rate for c in chosen])
    return part_NC


def _mean_parts(hits: Sequence[Hit]) -> Float64:
    parts = [hit.by_checkpoint for hit in hits if hit.by_checkpoint]
    return np.mean(parts, axis=0) if parts else np.zeros(0)
