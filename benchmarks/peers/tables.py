"""Tables of feature extraction by this library and by others."""

from __future__ import annotations

from collections import defaultdict
from statistics import median
from typing import Any

from benchmarks.common.markdown import Row, compose, format_environment, format_table
from benchmarks.common.results import Results, read_results


def peers() -> str:
    """Return speed and memory of each method of the peers, one table per model."""
    content = read_results("peers")
    by_model: dict[str, Results] = defaultdict(list)
    for row in content["results"]:
        by_model[row["model"]].append(row)
    sizes = {model: max(row.get("parameters", 0) for row in rows) for model, rows in by_model.items()}
    methods = list(dict.fromkeys(row["side"] for row in content["results"]))
    parts = []
    for model in sorted(by_model, key=lambda model: sizes[model]):
        found = sorted(by_model[model], key=lambda row: methods.index(row["side"]))
        head = ("method", "speed/plain step", "time/tracin_ann", "peak memory", "parameters covered")
        rows = [head, *_format_baselines(found), *map(_format_peer, found)]
        parts.append(f"{model}, {sizes[model] / 1e6:.2f} M parameters:\n\n{format_table(*rows)}")
    places = (f"{peer}: {format_environment(run)}" for peer, runs in content["runs"].items() for run in runs)
    scope = (
        "feature extraction alone: gradients and projection, nothing is written. Speed is relative to batched forward "
        "and backward. The figures of the plain step and of tracin_ann are medians over the runs of all peers."
    )
    return compose(scope, *parts, *dict.fromkeys(places))


def _format_baselines(rows: Results) -> list[Row]:
    """Return the plain step and the library, the median over the runs of all peers."""
    complete = [row for row in rows if "failed" not in row]
    if not complete:
        return []
    peaks = {who: _format_memory(median(row["peak_mb"][who] for row in complete)) for who in ("plain", "ours")}
    speed = f"{median(row['ours_to_plain'] for row in complete):.2f}"
    return [("plain step", "1", "–", peaks["plain"], "–"), ("tracin_ann", speed, "1×", peaks["ours"], "100%")]


def _format_peer(row: dict[str, Any]) -> Row:
    if "failed" in row:
        return (row["side"], f"fails: {row['failed']}", "–", "–", "–")
    speed, faster = f"{row['peer_to_plain']:.3g}", f"{row['times_faster']:.3g}×"
    covered = row["covered"] / row["parameters"]
    return (
        row["side"],
        speed,
        faster,
        _format_memory(row["peak_mb"]["peer"]),
        "100%" if covered == 1 else f"{covered:.1%}",
    )


def _format_memory(megabytes: float | str) -> str:
    return f"{megabytes / 1000:.1f} GB" if isinstance(megabytes, int | float) else str(megabytes)


TABLES = (peers,)
