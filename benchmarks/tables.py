"""Print README's and the design notes' tables from the committed result files."""

from __future__ import annotations

import json
from collections import defaultdict
from statistics import mean
from typing import Any

from benchmarks.common import RESULTS


def read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def table(*rows: tuple[str, ...]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def where(content: dict[str, Any]) -> str:
    machine = content["environment"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    return f"{machine['machine']}; {machine['device']}; {versions}; {machine['date']}"


def recall() -> str:
    content = read("recall_mnist")
    by_sketch: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in content["results"]:
        by_sketch[row["sketch"]].append(row)
    rows = [("sketch", "proponents", "opponents", "re-scored exactly (200 candidates)", "rows × checkpoints a second")]
    for name, seeds in by_sketch.items():
        figures = [
            mean(s[kind][side] for s in seeds) for kind in ("stored", "exact") for side in ("proponents", "opponents")
        ]
        up, down, exact_up, exact_down = (f"{x:.3f}" for x in figures)
        rows.append((name, up, down, f"{exact_up} / {exact_down}", f"{mean(s['rows_a_second'] for s in seeds):,.0f}"))
    return f"{table(*rows)}\n\n{where(content)}"


def ivf(alphas: tuple[float, ...] = (0.0, 0.1, 0.2)) -> str:
    content = read("ivf_mnist")
    rows = [("index", "proponents", "opponents", "rows scored a side")]
    for row in (r for r in content["results"] if r.get("alpha", alphas[0]) in alphas):
        name = row["index"]
        name += (
            f", nprobe {row['nprobe']}" if "nprobe" in row else f", α {row['alpha']}, budget {row['scan_fraction']:.0%}"
        )
        scored = f"{row['proponents_scored']:.1%} / {row['opponents_scored']:.1%}"
        rows.append((name, f"{row['proponents']:.3f}", f"{row['opponents']:.3f}", scored))
    return f"{table(*rows)}\n\n{where(content)}"


def digits() -> str:
    content = read("mislabelled_digits")
    rows = [("self-influence", "AUC", "found in the first 10%", "in the first 20%", "worst seed, 20%")]
    for kind in ("sketch", "exact"):
        results = content["results"]
        figures = [mean(r[f"{kind}_{name}"] for r in results) for name in ("auc", "found_at_10", "found_at_20")]
        worst = min(r[f"{kind}_found_at_20"] for r in results)
        rows.append((kind, f"{figures[0]:.3f}", *(f"{x:.1%}" for x in (*figures[1:], worst))))
    return f"{table(*rows)}\n\n{where(content)}"


def features() -> str:
    content = read("features")
    rows = [("model", "parameters", "plain step, µs a row", "whole build, µs a row", "ratio")]
    for row in content["results"]:
        costs = (f"{row['plain_us']:,.0f}", f"{row['row_us']:,.0f}", f"{row['ratio']:.2f}")
        rows.append((row["model"], f"{row['parameters']:,}", *costs))
    return f"{table(*rows)}\n\n{where(content)}"


def main() -> None:
    for make in (recall, ivf, digits, features):
        print(f"## {make.__name__}\n\n{make()}\n")


if __name__ == "__main__":
    main()
