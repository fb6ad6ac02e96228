"""Matplotlib figures of results, for notebooks and reports.

Shapes: N training rows, M of them marked, C checkpoints.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from tracin_ann.errors import MissingPackageError, problem
from tracin_ann.results.answers import Answer, SelfInfluence
from tracin_ann.types import Float64, Int64

PROPONENT, OPPONENT = "#1a73b5", "#c4501b"
GREY = "#80868d"
_MOST_PANELS = 12
_MOST_TICKS = 12
_MOST_LAYERS = 40
# Sizes in inches.
_BAR = 0.25
_WIDTH, _HEIGHT = 6.0, 2.2
_REPORT_SIZE = 5.0, 2.7
# A placeholder for the text colour of the page: `render_svg` replaces it by `currentColor`.
_TEXT_COLOUR = "#010203"
_FILE_STYLE = (
    "svg{color:#17202b;font-family:system-ui,sans-serif}@media (prefers-color-scheme:dark){svg{color:#e6eaf0}}"
)


def scores_figure(answers: Sequence[Answer]) -> Any:
    """Return a Figure of the hits' scores by rank with known error bars, one panel for each of the first queries."""
    shown = answers[:_MOST_PANELS]
    figure = _make_figure(_WIDTH, _HEIGHT * max(1, len(shown)))
    for place, answer in enumerate(shown):
        axes = figure.add_subplot(len(shown), 1, place + 1)
        for hits, colour, name in (
            (answer.proponents, PROPONENT, "proponents"),
            (answer.opponents, OPPONENT, "opponents"),
        ):
            ranks = range(1, len(hits) + 1)
            errors = [0.0 if hit.is_exact else hit.error or 0.0 for hit in hits]
            axes.bar(ranks, [hit.score for hit in hits], color=colour, label=name, yerr=errors)
        axes.axhline(0, color="grey", linewidth=0.8)
        axes.set_title(f"{answer.side} {answer.query}", fontsize="medium", loc="left")
        axes.set_ylabel("score")
        if place == 0:
            axes.legend(frameon=False)
    if shown:
        figure.axes[-1].set_xlabel("rank")
    return figure


def ranked_figure(rows: Sequence[SelfInfluence]) -> Any:
    """Return a Figure of self-influence by rank."""
    figure = _make_figure(_WIDTH, _HEIGHT)
    axes = figure.add_subplot()
    axes.plot([row.rank for row in rows], [row.score for row in rows], color=PROPONENT)
    axes.set_xlabel("rank")
    axes.set_ylabel("self-influence")
    if any(row.score > 0 for row in rows):
        axes.set_yscale("log")
    return figure


def parts_figure(by_layer: Mapping[str, float], by_checkpoint: Mapping[int, float]) -> Any:
    """Return a Figure of the parts of a score by layer and by checkpoint; only the largest parts of many layers."""
    most = sorted(by_layer, key=lambda name: -abs(by_layer[name]))[:_MOST_LAYERS]
    layers = {name: value for name, value in by_layer.items() if name in most}
    if len(layers) < len(by_layer):
        layers[f"{len(by_layer) - len(layers)} others"] = sum(v for name, v in by_layer.items() if name not in most)
    checkpoints = {f"checkpoint {c}": value for c, value in by_checkpoint.items()}
    heights = [len(layers), len(checkpoints)]
    figure = _make_figure(_WIDTH, 1 + _BAR * sum(heights))
    for axes, parts in zip(figure.subplots(2, height_ratios=heights, sharex=True), (layers, checkpoints), strict=True):
        names = list(parts)
        axes.barh(
            range(len(names)), list(parts.values()), color=[PROPONENT if v > 0 else OPPONENT for v in parts.values()]
        )
        axes.set_yticks(range(len(names)), names, fontsize="small")
        axes.invert_yaxis()
        axes.axvline(0, color="grey", linewidth=0.8)
    figure.axes[-1].set_xlabel("part of the score")
    return figure


def counts_figure(proponents: Sequence[tuple[int, int]], opponents: Sequence[tuple[int, int]]) -> Any:
    """Return a Figure of the number of rows by the number of queries whose proponents or opponents they are.

    Args:
        proponents: pairs of a number of queries and the number of rows that are among the proponents of as many.
        opponents: the same for opponents.
    """
    figure = _make_figure(*_REPORT_SIZE)
    axes = figure.add_subplot()
    for pairs, colour, name in ((proponents, PROPONENT, "proponent"), (opponents, OPPONENT, "opponent")):
        times, rows = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        axes.plot(times, rows, marker=".", linestyle="none", color=colour, label=name)
    axes.set_xscale("symlog")
    axes.set_yscale("log")
    axes.set_xlabel("queries whose proponents or opponents contain the row")
    axes.set_ylabel("rows")
    axes.legend(frameon=False)
    return figure


def score_ranks_figure(answers: Sequence[Answer]) -> Any:
    """Return a Figure of scores by rank over all queries: the median and the range of the 10th to 90th percentile."""
    figure = _make_figure(*_REPORT_SIZE)
    axes = figure.add_subplot()
    for name, colour in (("proponents", PROPONENT), ("opponents", OPPONENT)):
        lists = [[hit.score for hit in getattr(answer, name)] for answer in answers]
        ranks = range(1, max(map(len, lists), default=0) + 1)
        by_rank = [[scores[rank - 1] for scores in lists if len(scores) >= rank] for rank in ranks]
        low, middle, high = np.array([np.percentile(scores, (10, 50, 90)) for scores in by_rank]).reshape(-1, 3).T
        axes.plot(ranks, middle, marker="o", markersize=4, color=colour, label=name)
        axes.fill_between(ranks, low, high, color=colour, alpha=0.25, linewidth=0)
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set_xlabel("rank")
    axes.set_ylabel("score")
    _add_legend_above(axes)
    return figure


def norms_figure(norm_N: Float64, marked_M: Int64, marked: str) -> Any:
    """Return a Figure with a histogram of the training rows' self-influence [N]; rows `marked_M` are highlighted."""
    figure = _make_figure(*_REPORT_SIZE)
    axes = figure.add_subplot()
    shown_N = np.isfinite(norm_N) & (norm_N > 0)
    marked_N = np.zeros(len(norm_N), bool)
    marked_N[marked_M] = True
    if shown_N.any():
        low, high = norm_N[shown_N].min(), norm_N[shown_N].max()
        edges = np.geomspace(low, max(high, low * 1.01), 41)
        axes.hist(norm_N[shown_N], edges, color=GREY, alpha=0.6, label="all training rows")
        if len(marked_M):
            axes.hist(norm_N[shown_N & marked_N], edges, color=OPPONENT, label=marked)
        _add_legend_above(axes)
    axes.set_xscale("log")
    axes.set_yscale("symlog")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("self-influence")
    axes.set_ylabel("rows")
    return figure


def checkpoints_figure(
    parts: Mapping[str, Float64], names: Sequence[str], colours: Sequence[str] = (PROPONENT, OPPONENT)
) -> Any:
    """Return a Figure of the parts of scores by checkpoint, learning rate included; `parts`: a series [C] by name."""
    figure = _make_figure(*_REPORT_SIZE)
    axes = figure.add_subplot()
    places, width = np.arange(len(names)), 0.8 / max(1, len(parts))
    for at, ((name, value_C), colour) in enumerate(zip(parts.items(), colours, strict=False)):
        axes.bar(places + (at - (len(parts) - 1) / 2) * width, value_C, width, color=colour, label=name)
    axes.axhline(0, color="grey", linewidth=0.8)
    every = -(-len(names) // _MOST_TICKS)
    axes.set_xticks(places[::every], names[::every], fontsize="small")
    axes.set_ylabel("mean part of the score")
    _add_legend_above(axes)
    return figure


def _add_legend_above(axes: Any) -> None:
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0)


def render_svg(figure: Any, prefix: str) -> str:
    """Return a figure as an `svg` element: its ids begin with `prefix`, its text has the colour of the page."""
    import matplotlib  # noqa: PLC0415 - optional package, imported only here

    for axes in figure.axes:
        axes.set_facecolor("none")
        axes.tick_params(colors=_TEXT_COLOUR, which="both")
        legend = axes.get_legend()
        texts = [axes.xaxis.label, axes.yaxis.label, axes.title, *(legend.get_texts() if legend else ())]
        for text in texts:
            text.set_color(_TEXT_COLOUR)
        for spine in axes.spines.values():
            spine.set_color(_TEXT_COLOUR)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix, "font.family": "sans-serif"}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{prefix}", svg)
    # The page sets the size; the view box preserves the aspect ratio.
    svg = re.sub(r'^<svg\b[^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', svg)
    # A style element would apply to the whole page, comments only take space, and the page sets the font.
    svg = re.sub(r"<!--.*?-->\n?|<style.*?</style>|font-family: [^;\"]*;?", "", svg, flags=re.DOTALL)
    return svg.replace(_TEXT_COLOUR, "currentColor").strip()


def render_svg_file(figure: Any, prefix: str) -> str:
    """Return a figure as the text of an SVG file, which follows the colour scheme of the reader."""
    namespaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    start, rest = render_svg(figure, prefix).split(">", 1)
    return f"{start.replace('<svg', f'<svg {namespaces}', 1)}><style>{_FILE_STYLE}</style>{rest}"


def _make_figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - optional package, imported only here
    except ImportError as error:
        raise MissingPackageError(
            problem(
                "matplotlib is not installed",
                got="no module matplotlib",
                expected="matplotlib, which figures and reports need",
                remedy="pip install 'tracin-ann[report]'",
            )
        ) from error
    figure: Any = Figure(figsize=(width, height), layout="constrained")
    # Notebooks show a Figure as an image only if pyplot was imported; with this method they always do.
    figure._repr_png_ = partial(render_png, figure)
    return figure


def render_png(figure: Any) -> bytes:
    """Return a figure as a PNG file."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()
