"""Figures of a page with titles, captions and text alternatives: scores, gradient norms, parts by checkpoint.

Shapes: N training rows, C checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np

from tracin_ann.index import InfluenceIndex
from tracin_ann.report.views import ScoredCheckpoints
from tracin_ann.results import (
    GREY,
    OPPONENT,
    PROPONENT,
    Answer,
    Hit,
    checkpoints_figure,
    counts_figure,
    norms_figure,
    render_png,
    render_svg,
    render_svg_file,
    score_ranks_figure,
)
from tracin_ann.types import Float64


@dataclass(frozen=True)
class Figure:
    """A figure that `draw` returns as a matplotlib Figure, and its title, caption and text alternative.

    `prefix` is that of its ids in a page.
    """

    draw: Callable[[], Any]
    prefix: str
    title: str
    caption: str
    alt: str

    @property
    def svg(self) -> str:
        """Return the figure as an `svg` element of a page."""
        return render_svg(self.draw(), self.prefix)

    def encode(self, form: Literal["svg", "png"]) -> bytes:
        """Return the figure as a file."""
        return render_png(self.draw()) if form == "png" else render_svg_file(self.draw(), self.prefix).encode()


def answer_figures(
    index: InfluenceIndex, answers: Sequence[Answer], checkpoints: ScoredCheckpoints
) -> tuple[Figure, ...]:
    """Return the figures of answers; none if there is no hit."""
    hits = {name: [hit for answer in answers for hit in getattr(answer, name)] for name in ("proponents", "opponents")}
    rows = sorted({hit.row for of_side in hits.values() for hit in of_side})
    if not rows:
        return ()
    best = {name: max((abs(hit.score) for hit in of_side), default=0.0) for name, of_side in hits.items()}
    queries = "this query" if len(answers) == 1 else f"{len(answers):,} queries"
    figures = [
        _make_figure(
            partial(score_ranks_figure, answers),
            "Scores by rank",
            f"Proponents and opponents of {queries}"
            + (": median, with the range of the 10th to 90th percentile." if len(answers) > 1 else "."),
            f"the largest score of a proponent is {best['proponents']:.3g}, of an opponent -{best['opponents']:.3g}",
            "f1-",
        ),
        make_norms_figure(index, checkpoints.positions, rows, "hits", "f2-"),
    ]
    parts = {name: _average_parts(of_side) for name, of_side in hits.items()}
    parts = {name: part_C for name, part_C in parts.items() if len(part_C)}
    if parts:
        caption = "Parts of a score by checkpoint, learning rate included; mean over the hits."
        names = checkpoints.names
        figures.append(_make_checkpoints_figure(caption, parts, names, "f3-"))
    return tuple(figures)


def row_figures(index: InfluenceIndex, rows: Sequence[int], checkpoints: Sequence[int] | None) -> tuple[Figure, ...]:
    """Return the figures of listed training rows; none if there is no row."""
    if not rows:
        return ()
    scored = ScoredCheckpoints.infer(index, 0, checkpoints)
    part_NC = read_parts(index, scored.positions)
    present = np.setdiff1d(np.arange(len(index)), np.union1d(index.removed, index.skipped.row_S))
    parts = {"listed rows": part_NC[list(rows)].mean(0), "all training rows": part_NC[present].mean(0)}
    return (
        make_norms_figure(index, scored.positions, rows, "listed rows", "f1-"),
        _make_checkpoints_figure(
            "Mean parts of the self-influence by checkpoint, learning rate included.",
            parts,
            scored.names,
            "f2-",
            (OPPONENT, GREY),
        ),
    )


def make_counts_figure(
    proponents: Sequence[tuple[int, int]], opponents: Sequence[tuple[int, int]], n_queries: int, prefix: str = ""
) -> Figure:
    """Return the figure of how many training rows are hits of how many queries.

    Args:
        proponents: pairs of a number of queries and the number of rows that are among the proponents of as many.
        opponents: the same for opponents.
        n_queries: the number of queries.
        prefix: that of the figure's ids in a page.
    """
    counts = {"proponents": proponents, "opponents": opponents}
    text = "; ".join(
        f"{dict(pairs).get(0, 0):,} rows are among the {name} of no query, one is among those of "
        f"{max((count for count, _ in pairs), default=0):,}"
        for name, pairs in counts.items()
    )
    return _make_figure(
        partial(counts_figure, proponents, opponents),
        "Rows by count",
        f"All training rows that answers may contain, by the number of the {n_queries:,} queries whose hits they are.",
        text,
        prefix,
    )


def make_norms_figure(
    index: InfluenceIndex,
    checkpoints: Sequence[int] | None,
    rows: Sequence[int] = (),
    marked: str = "",
    prefix: str = "",
) -> Figure:
    """Return the figure of the self-influence of all training rows, with `rows` highlighted under the name `marked`."""
    norm_N = read_parts(index, checkpoints).sum(axis=1)
    known_N = norm_N[np.isfinite(norm_N)]
    middle = float(np.median(norm_N[list(rows)] if rows else known_N)) if len(known_N) else 0.0
    share = float(np.mean(middle >= known_N)) if len(known_N) else 0.0
    return _make_figure(
        partial(norms_figure, norm_N, np.array(rows, dtype=np.int64), marked),
        "Gradient norms",
        "Training rows by self-influence (learning rate × squared gradient norm, summed over checkpoints)"
        + (f", with the {len(rows):,} {marked} highlighted." if rows else "."),
        f"the median of the {marked} is greater than or equal to {share:.0%} of all training rows"
        if rows
        else f"the median is {middle:.3g}",
        prefix,
    )


def _make_checkpoints_figure(
    caption: str,
    parts: dict[str, Float64],
    names: Sequence[str],
    prefix: str,
    colours: Sequence[str] = (PROPONENT, OPPONENT),
) -> Figure:
    text = "; ".join(
        f"{name}: " + ", ".join(f"{checkpoint} {value:+.3g}" for checkpoint, value in zip(names, part_C, strict=False))
        for name, part_C in parts.items()
    )
    draw = partial(checkpoints_figure, parts, names, colours)
    return _make_figure(draw, "Parts by checkpoint", caption, text, prefix)


def _make_figure(draw: Callable[[], Any], title: str, caption: str, text: str, prefix: str) -> Figure:
    return Figure(draw, prefix, title, caption, f"{title}: {text}")


def read_parts(index: InfluenceIndex, checkpoints: Sequence[int] | None) -> Float64:
    """Return the part of each training row's self-influence by checkpoint, [N, C]."""
    specs = index.manifest.build.spec.checkpoints
    chosen = range(len(specs)) if checkpoints is None else checkpoints
    part_NC: Float64 = index.view().store.sqnorms(checkpoints) * np.array([specs[c].learning_rate for c in chosen])
    return part_NC


def _average_parts(hits: Sequence[Hit]) -> Float64:
    parts = [hit.by_checkpoint for hit in hits if hit.by_checkpoint]
    return np.mean(parts, axis=0) if parts else np.zeros(0)
