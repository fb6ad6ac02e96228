"""README's and the design notes' tables from the committed result files: printed, or put into the documents named."""

from __future__ import annotations

import argparse
import importlib
import json
import re
from collections import defaultdict
from pathlib import Path
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
    rows = [("sketch", "proponents", "opponents", "re-scored exactly (200 candidates)")]
    for name, seeds in by_sketch.items():
        figures = [
            mean(s[kind][side] for s in seeds) for kind in ("stored", "exact") for side in ("proponents", "opponents")
        ]
        up, down, exact_up, exact_down = (f"{x:.3f}" for x in figures)
        rows.append((name, up, down, f"{exact_up} / {exact_down}"))
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
    rows = [
        ("model", "parameters", "plain step, µs a row", "whole build, µs a row", "ratio", "to plain, channels last")
    ]
    for row in content["results"]:
        costs = (f"{row['plain_us']:,.0f}", f"{row['row_us']:,.0f}", f"{row['ratio']:.2f}")
        pictures = row["plain_channels_last_us"] != row["plain_us"]
        last = f"{row['ratio_to_channels_last']:.2f}" if pictures else "–"
        rows.append((row["model"], f"{row['parameters']:,}", *costs, last))
    return f"{table(*rows)}\n\n{where(content)}"


def budget() -> str:
    content = read("budget")
    parts = ("reading", "forward", "input_gradients", "sketch", "storing")
    names = ("model", "plain", *(p.replace("_", " ") for p in parts), "arithmetic's limit")
    rows = [names]
    for row in content["results"]:
        name = row["model"] + (", channels last" if row["channels_last"] else "")
        costs = (f"{row[f'{part}_us']:,.0f}" for part in ("plain", *parts))
        rows.append((name, *costs, f"{row['arithmetic_ratio']:.2f}"))
    return f"{table(*rows)}\n\n{where(content)}"


def memory() -> str:
    content = read("memory")
    rows = [("model", "rows", "plain training, MB", "build, MB")]
    for row in content["results"]:
        plain = f"{row['plain_mb']:,.0f}" if "plain_mb" in row else "–"
        rows.append((row["model"], f"{row['rows']:,}", plain, f"{row['build_mb']:,.0f}"))
    return f"{table(*rows)}\n\n{where(content)}"


def precision() -> str:
    content = read("precision")
    rows = [("model", "error of scores", "of the sketch itself", "recall fp32", "recall bf16", "µs a row fp32 / bf16")]
    for row in content["results"]:
        recalls = (f"{row[f'proponents_{p}']:.3f} / {row[f'opponents_{p}']:.3f}" for p in ("fp32", "bf16"))
        times = f"{row['row_us_fp32']:,.0f} / {row['row_us_bf16']:,.0f}"
        rows.append((row["model"], f"{row['score_error']:.2%}", f"{row['sketch_error']:.1%}", *recalls, times))
    return f"{table(*rows)}\n\n{where(content)}"


def fidelity() -> str:
    return importlib.import_module("benchmarks.fidelity").fidelity()  # type: ignore[no-any-return]


def peers() -> str:
    return importlib.import_module("benchmarks.peers.collect").printed(read("peers"))  # type: ignore[no-any-return]


TABLES = {make.__name__: make for make in (recall, ivf, digits, features, budget, memory, precision, fidelity, peers)}


def filled(text: str) -> str:
    """Return a document with what stands between `<!-- table: name -->` and `<!-- end -->` made anew."""

    def fill(found: re.Match[str]) -> str:
        return f"{found[1]}\n{TABLES[found[2]]()}\n{found[3]}"

    return re.sub(r"(<!-- table: (\w+) -->)\n.*?(<!-- end -->)", fill, text, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("documents", nargs="*", type=Path, help="fill the tables that they name, in place")
    options = parser.parse_args()
    for path in options.documents:
        path.write_text(filled(path.read_text()))
    if not options.documents:
        for name, make in TABLES.items():
            print(f"## {name}\n\n{make()}\n")


if __name__ == "__main__":
    main()
