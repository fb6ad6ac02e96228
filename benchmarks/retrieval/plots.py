"""Figures of retrieval from the result files: recall against scored rows, and growth with the number of rows.

Needs matplotlib (`pip install -e '.[bench]'`). Writes SVG files into docs/figures.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.common.markdown import SIDES
from benchmarks.common.paths import FIGURES, RESULTS
from benchmarks.common.results import read_results
from benchmarks.retrieval.family_tables import group_families, list_kinds, list_scored

OUTPUT = "docs/figures/retrieval-*.svg"
# The palette of Okabe and Ito, which colour-blind readers can distinguish.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")


def find_frontier(points: list[dict[str, Any]], side: str | None = None) -> tuple[list[float], list[float]]:
    """Return scored rows and recall of the points with a higher recall than all points with fewer scored rows."""
    selected = [p if side is None else p[side] for p in points]
    scored: list[float] = []
    recall: list[float] = []
    for point in sorted(selected, key=lambda p: p["scored"]):
        if not recall or point["recall"] > recall[-1]:
            scored.append(point["scored"])
            recall.append(point["recall"])
    return scored, recall


def draw_recall(pyplot: Any) -> Any:
    """Draw recall@10 against the share of scored rows, one panel per direction."""
    ours = read_results("retrieval_compact")["results"][0]
    rivals: dict[str, list[dict[str, Any]]] = {}
    for row in read_results("retrieval_rivals")["results"][0]["rivals"]:
        rivals.setdefault(row["rival"], []).append(row)
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for panel, side in zip(panels, SIDES, strict=True):
        series = [("lists, one byte per dimension", find_frontier(ours["sq8"]["points"][side]))]
        series.append(("lists, half a byte per dimension", find_frontier(ours["sq4"]["points"][side])))
        series += [(name, find_frontier(points, side)) for name, points in rivals.items()]
        for (name, (scored, recall)), colour in zip(series, COLOURS, strict=True):
            style = "-o" if name.startswith("lists") else "--s"
            panel.plot(100 * np.array(scored) / count_rows(), recall, style, color=colour, label=name, markersize=3)
        panel.set_xscale("log")
        panel.set_title(side)
        panel.set_xlabel("scored rows and centroids, % of 1,000,000 rows")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("recall@10 of the exact scan")
    panels[1].legend(fontsize=8, loc="lower right")
    return figure


def count_rows() -> int:
    """Return the number of rows of the recall figure."""
    return int(read_results("retrieval_compact")["results"][0]["rows"])


def draw_growth(pyplot: Any) -> Any:
    """Draw scored rows and time at recall 0.95 against the number of rows, with fitted exponents."""
    results = read_results("retrieval")["results"]
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
    panels[0].set_ylabel("scored rows and centroids per query")
    panels[1].set_ylabel("ms/query, batch of 1,000, 2 threads")
    return figure


def draw_families(pyplot: Any) -> Any:
    """Draw the rows scored at recall 0.95 against the number of rows, one panel per model."""
    groups = group_families(read_results("retrieval_families")["results"])
    figure, panels = pyplot.subplots(1, len(groups), figsize=(2.8 * len(groups) + 2, 3.4), squeeze=False)
    for panel, (name, results) in zip(panels[0], groups.items(), strict=True):
        rows = [result["rows"] for result in results]
        for kind, colour in zip(list_kinds(results), COLOURS, strict=False):
            sizes, scored = zip(*list_scored(results, kind), strict=True)
            for side, style, values in zip(SIDES, ("-o", "--s"), zip(*scored, strict=True), strict=True):
                panel.plot(sizes, values, style, color=colour, label=f"{kind}, {side}", markersize=3)
        panel.plot(rows, rows, ":", color="grey", label="all rows")
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_xticks(rows, labels=[f"{n / 1000:g}k" for n in rows])
        panel.set_xticks([], minor=True)
        panel.set_title(name)
        panel.set_xlabel("rows N")
        panel.grid(alpha=0.3, which="both")
    panels[0][-1].legend(fontsize=8, bbox_to_anchor=(1.02, 1), loc="upper left")
    panels[0][0].set_ylabel("rows and centroids scored per query")
    return figure


FIGURE_MAKERS = {
    "retrieval-recall": draw_recall,
    "retrieval-growth": draw_growth,
    "retrieval-families": draw_families,
}


def main() -> None:
    import matplotlib as mpl  # noqa: PLC0415

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "tracin_ann"
    from matplotlib import pyplot  # noqa: PLC0415

    FIGURES.mkdir(exist_ok=True)
    for name, draw in FIGURE_MAKERS.items():
        figure = draw(pyplot)
        figure.tight_layout()
        figure.savefig(FIGURES / f"{name}.svg", metadata={"Date": None})
        print(FIGURES / f"{name}.svg", f"from {RESULTS.name}")


if __name__ == "__main__":
    main()
