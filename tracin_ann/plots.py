"""Figures of answers, by matplotlib: for notebooks and reports."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from tracin_ann.answers import Answer, SelfInfluence
from tracin_ann.errors import MissingPackageError, problem
from tracin_ann.types import Int64

PROPONENT, OPPONENT = "#1a73b5", "#c4501b"
_MOST = 12
_MOST_LAYERS = 40
_BAR = 0.25
_WIDTH, _HEIGHT = 6.0, 2.2


def scores_figure(answers: Sequence[Answer]) -> Any:
    """Return a Figure of the hits' scores by rank, one panel for each of the first queries, error bars where known."""
    shown = answers[:_MOST]
    figure = _figure(_WIDTH, _HEIGHT * max(1, len(shown)))
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
    figure = _figure(_WIDTH, _HEIGHT)
    axes = figure.add_subplot()
    axes.plot([row.rank for row in rows], [row.score for row in rows], color=PROPONENT)
    axes.set_xlabel("rank")
    axes.set_ylabel("self-influence")
    if any(row.score > 0 for row in rows):
        axes.set_yscale("log")
    return figure


def parts_figure(by_layer: Mapping[str, float], by_checkpoint: Mapping[int, float]) -> Any:
    """Return a Figure of what layers and checkpoints add to a score; of many layers, those that add or take most."""
    most = sorted(by_layer, key=lambda name: -abs(by_layer[name]))[:_MOST_LAYERS]
    layers = {name: value for name, value in by_layer.items() if name in most}
    if len(layers) < len(by_layer):
        layers[f"{len(by_layer) - len(layers)} others"] = sum(v for name, v in by_layer.items() if name not in most)
    checkpoints = {f"checkpoint {c}": value for c, value in by_checkpoint.items()}
    heights = [len(layers), len(checkpoints)]
    figure = _figure(_WIDTH, 1 + _BAR * sum(heights))
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


def counts_figure(proponent_of: Int64, opponent_of: Int64) -> Any:
    """Return a Figure of how many rows are proponents, and opponents, of how many queries."""
    figure = _figure(_WIDTH, _HEIGHT)
    axes = figure.add_subplot()
    for counts, colour, name in ((proponent_of, PROPONENT, "proponent"), (opponent_of, OPPONENT, "opponent")):
        times, rows = np.unique(counts, return_counts=True)
        axes.plot(times, rows, marker=".", linestyle="none", color=colour, label=name)
    axes.set_xscale("symlog")
    axes.set_yscale("log")
    axes.set_xlabel("queries that a row is among the first of")
    axes.set_ylabel("rows")
    axes.legend(frameon=False)
    return figure


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - optional package, imported only here
    except ImportError as error:
        raise MissingPackageError(
            problem(
                "matplotlib is not installed",
                got="no module matplotlib",
                expected="it, for figures and reports",
                remedy="pip install 'tracin-ann[report]'",
            )
        ) from error
    figure: Any = Figure(figsize=(width, height), layout="constrained")
    # Notebooks show a bare Figure as a picture only after pyplot was imported; this they show always.
    figure._repr_png_ = partial(_png, figure)
    return figure


def _png(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()
