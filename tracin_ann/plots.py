"""Figures of answers, by matplotlib: for notebooks and reports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tracin_ann.answers import Answer, SelfInfluence
from tracin_ann.errors import MissingPackageError, problem

PROPONENT, OPPONENT = "#1a73b5", "#c4501b"
_MOST = 12
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
    return Figure(figsize=(width, height), layout="constrained")
