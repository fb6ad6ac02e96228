"""Figures of retrieval from the committed result files: recall against what is scored, and growth with the rows.

Needs matplotlib (`pip install -e '.[bench]'`); writes SVG files into docs/figures.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import RESULTS
from benchmarks.tables import read

FIGURES = Path(__file__).resolve().parent.parent / "docs" / "figures"
SIDES = ("proponents", "opponents")
# Okabe and Ito's colours, told apart by all.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")


def best(points: list[dict[str, Any]], side: str | None = None) -> tuple[list[float], list[float]]:
    """Return (scored, recall) of the points that no cheaper one reaches, rising."""
    chosen = [p if side is None else p[side] for p in points]
    scored: list[float] = []
    recall: list[float] = []
    for point in sorted(chosen, key=lambda p: p["scored"]):
        if not recall or point["recall"] > recall[-1]:
            scored.append(point["scored"])
            recall.append(point["recall"])
    return scored, recall


def recall_figure(pyplot: Any) -> Any:
    """Draw recall@10 against the share of the rows that is scored, ours and rivals, a panel a direction."""
    ours = read("retrieval_compact")["results"][0]
    rivals: dict[str, list[dict[str, Any]]] = {}
    for row in read("retrieval_rivals")["results"][0]["rivals"]:
        rivals.setdefault(row["rival"], []).append(row)
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for panel, side in zip(panels, SIDES, strict=True):
        series = [("lists, a byte a dimension", best(ours["sq8"]["points"][side]))]
        series.append(("lists, half a byte", best(ours["sq4"]["points"][side])))
        series += [(name, best(points, side)) for name, points in rivals.items()]
        for (name, (scored, recall)), colour in zip(series, COLOURS, strict=True):
            style = "-o" if name.startswith("lists") else "--s"
            panel.plot(100 * np.array(scored) / ours_rows(), recall, style, color=colour, label=name, markersize=3)
        panel.set_xscale("log")
        panel.set_title(side)
        panel.set_xlabel("scored, centroids counted, % of 1,000,000 rows")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("recall@10 of the exact scan")
    panels[1].legend(fontsize=8, loc="lower right")
    return figure


def ours_rows() -> int:
    """Return N of the recall figure."""
    return int(read("retrieval_compact")["results"][0]["rows"])


def growth_figure(pyplot: Any) -> Any:
    """Draw what recall .95 takes against the number of rows, with the fitted exponents."""
    results = read("retrieval")["results"] + read("retrieval_growth")["results"]
    rows = np.array([result["rows"] for result in results])
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.6))
    for panel, what in zip(panels, ("scored", "ms"), strict=True):
        for side, colour in zip(SIDES, COLOURS, strict=False):
            found = [result["sq8"] for result in results]
            values = [
                f["at_0.95"][side]["scored"] if what == "scored" else 1e3 * f["times"][f"{side} 0.95"]["batch"]
                for f in found
            ]
            slope, start = np.polyfit(np.log(rows), np.log(values), 1)
            panel.plot(rows, values, "o", color=colour)
            panel.plot(rows, np.exp(start) * rows**slope, "-", color=colour, label=f"{side}, $N^{{{slope:.2f}}}$")
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_xlabel("rows N")
        panel.grid(alpha=0.3, which="both")
        panel.legend()
    panels[0].set_ylabel("scored a query, centroids counted")
    panels[1].set_ylabel("ms a query, 1,000 at once, 2 threads")
    return figure


def main() -> None:
    import matplotlib as mpl  # noqa: PLC0415

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "tracin_ann"
    from matplotlib import pyplot  # noqa: PLC0415

    FIGURES.mkdir(exist_ok=True)
    for name, draw in (("retrieval-recall", recall_figure), ("retrieval-growth", growth_figure)):
        figure = draw(pyplot)
        figure.tight_layout()
        figure.savefig(FIGURES / f"{name}.svg", metadata={"Date": None})
        print(FIGURES / f"{name}.svg", f"from {RESULTS.name}")


if __name__ == "__main__":
    main()
