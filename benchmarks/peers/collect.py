"""Merge the files of benchmarks.peers.run into results/peers.json; print the table of that file.

`python -m benchmarks.peers.collect FILE...` merges and prints; without files it only prints.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import RESULTS
from benchmarks.tables import table, where

FILE = RESULTS / "peers.json"


def merged(files: list[Path]) -> dict[str, Any]:
    """Return all files' results, and each peer's environment and settings; a later file replaces the same case."""
    runs: dict[str, Any] = {}
    results: dict[tuple[str, str], Any] = {}
    for path in files:
        content = json.loads(path.read_text())
        settings = content["settings"]
        runs.setdefault(settings["peer"], []).append({"environment": content["environment"], "settings": settings})
        for row in content["results"]:
            results[row["model"], row["side"]] = row
    kept = [row for row in results.values() if "skipped" not in row]
    return {"runs": runs, "results": sorted(kept, key=lambda row: row["peer"])}


def memory(megabytes: float | str) -> str:
    return f"{megabytes / 1000:.1f} GB" if isinstance(megabytes, int | float) else str(megabytes)


def common_cell(rows: list[dict[str, Any]], who: str) -> str:
    """Return plain's or ours's figures, the median over all peers' runs."""
    whole = [row for row in rows if "failed" not in row]
    if not whole:
        return "–"
    peak = memory(median(row["peak_mb"][who] for row in whole))
    return f"1, {peak}" if who == "plain" else f"{median(row['ours_to_plain'] for row in whole):.2f}, {peak}"


def peer_cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "–"
    if "failed" in row:
        return f"fails: {row['failed']}"
    cell = f"{row['peer_to_plain']:.3g} ({row['times_faster']:.3g}×), {memory(row['peak_mb']['peer'])}"
    share = row["covered"] / row["parameters"]
    return cell if share == 1 else f"{cell}; covers {share:.1%}"


def printed(content: dict[str, Any]) -> str:
    results = content["results"]
    of = {row["model"]: [other for other in results if other["model"] == row["model"]] for row in results}
    sizes = {model: max(row.get("parameters", 0) for row in rows) for model, rows in of.items()}
    models = sorted(of, key=lambda model: sizes[model])
    lines = [("ratio to plain (times ours is faster), peak", *(f"{m}, {sizes[m] / 1e6:.2f} M" for m in models))]
    lines += [(who, *(common_cell(of[model], who) for model in models)) for who in ("plain", "ours")]
    for side in dict.fromkeys(row["side"] for row in results):
        found = [next((row for row in of[model] if row["side"] == side), None) for model in models]
        lines.append((side, *map(peer_cell, found)))
    places = dict.fromkeys(f"{peer}: {where(run)}" for peer, runs in content["runs"].items() for run in runs)
    return "\n\n".join([table(*lines), *places])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path)
    options = parser.parse_args()
    if options.files:
        FILE.write_text(json.dumps(merged(options.files), indent=2) + "\n")
    print(printed(json.loads(FILE.read_text())))


if __name__ == "__main__":
    main()
