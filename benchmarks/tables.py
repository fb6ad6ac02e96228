"""README's and the design notes' tables from the committed result files: printed, or put into the documents named."""

from __future__ import annotations

import argparse
import importlib
import json
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

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


def _lists(name: str, found: dict[str, Any], n_rows: int) -> list[tuple[str, ...]]:
    """Return a row for each of the two recalls that lists were set to."""
    rows = []
    for target in ("0.95", "0.98"):
        chosen, times = found[f"at_{target}"], found["times"]
        sides = [(chosen[side], times[f"{side} {target}"]) for side in ("proponents", "opponents")]
        rows.append(
            (
                f"{name}, for {target}",
                _both(point["recall"] for point, _ in sides),
                _both((point["p10"] for point, _ in sides), ".2f"),
                _both((point["scored"] / n_rows for point, _ in sides), ".2%"),
                _both((1 / time["batch"] for _, time in sides), ",.0f"),
                _both((1 / time["single"] for _, time in sides), ",.0f"),
                f"{found['bytes_a_row']:.0f}",
                f"{found['build_seconds']:.0f}",
            )
        )
    return rows


_RETRIEVAL = ("index", "recall@10", "10th percentile", "scored", "queries/s, many at once", "one by one", "bytes a row")


def retrieval() -> str:
    """Return what one million rows take: ours at two recalls, exact scans."""
    content = read("retrieval_compact")
    big = content["results"][0]
    rows = [(*_RETRIEVAL, "built in, s")]
    rows += _lists("lists", big["sq8"], big["rows"]) + _lists("lists, `--compact`", big["sq4"], big["rows"])[:1]
    for name, shown in (("scan", "exact scan, float32 in memory"), ("scan of the files", "exact scan of the files")):
        time = big["sq8"]["times"][name]
        rates = (f"{2 / time[kind]:,.1f}" for kind in ("batch", "single"))
        rows.append((f"{shown}, both directions (counted as two)", "1.000", "1.00", "100%", *rates, "–", "–"))
    return f"{table(*rows)}\n\n{where(content)}"


def rivals() -> str:
    """Return other indexes of the same million rows beside ours, in one run on one thread."""
    content = read("retrieval_rivals")
    big = content["results"][0]
    rows = [(*_RETRIEVAL, "built in, s"), *_lists("lists", big["sq8"], big["rows"])]
    for rival in big["rivals"]:
        name = rival["rival"] + "".join(f", {key} {rival[key]}" for key in ("nprobe", "ef") if key in rival)
        sides = [rival["proponents"], rival["opponents"]]
        rows.append(
            (
                name,
                _both(side["recall"] for side in sides),
                _both((side["p10"] for side in sides), ".2f"),
                _both((side["scored"] / big["rows"] for side in sides), ".2%"),
                _both((1 / side["batch"] for side in sides), ",.0f"),
                "–",
                f"{rival['bytes_a_row']:,}",
                f"{rival['build_seconds']:.0f}",
            )
        )
    return f"{table(*rows)}\n\n{where(content)}"


def language() -> str:
    """Return recall and what is scored over windows of text, and rivals at the largest size."""
    content = read("retrieval_language")
    rows = [("rows", "index", "recall@10", "scored", "queries/s, many at once")]
    for result in content["results"]:
        n_rows = result["rows"]
        for target in ("0.95", "0.98"):
            found = result["sq8"][f"at_{target}"]
            times = result["sq8"]["times"]
            sides = [found[side] for side in ("proponents", "opponents")]
            rates = [1 / times[f"{side} {target}"]["batch"] for side in ("proponents", "opponents")]
            shares = _both((side["scored"] / n_rows for side in sides), ".2%")
            recall = _both(side["recall"] for side in sides)
            rows.append((f"{n_rows:,}", f"lists, for {target}", recall, shares, _both(rates, ",.0f")))
        for rival in result.get("rivals", []):
            name = rival["rival"] + "".join(f", {key} {rival[key]}" for key in ("nprobe", "ef") if key in rival)
            sides = [rival[side] for side in ("proponents", "opponents")]
            shares = _both((side["scored"] / n_rows for side in sides), ".2%")
            recall = _both(side["recall"] for side in sides)
            rates = [1 / side["batch"] for side in sides]
            rows.append((f"{n_rows:,}", name, recall, shares, _both(rates, ",.0f")))
    return f"{table(*rows)}\n\n{where(content)}"


def growth() -> str:
    """Return what recall .95 and .98 take as rows grow, and the exponents of N."""
    content = read("retrieval")
    results = content["results"] + read("retrieval_growth")["results"]
    rows = [
        ("rows", "lists", "scored for .95", "scored for .98", "ms for .95", "ms for .98", "built in, s", "bytes a row")
    ]
    series: dict[tuple[str, str], list[float]] = defaultdict(list)
    for result in results:
        found, cells = result["sq8"], []
        for kind in ("scored", "batch"):
            for target in ("0.95", "0.98"):
                values = [
                    found[f"at_{target}"][side]["scored"]
                    if kind == "scored"
                    else 1e3 * found["times"][f"{side} {target}"]["batch"]
                    for side in ("proponents", "opponents")
                ]
                series[kind, target].append(sum(values))
                cells.append(_both(values, ",.0f" if kind == "scored" else ".2f"))
        build = f"{found['build_seconds']:,.0f}"
        rows.append((f"{result['rows']:,}", f"{found['lists']:,}", *cells, build, f"{found['bytes_a_row']:.0f}"))
    sizes = np.log([result["rows"] for result in results])
    slopes = (f"N^{np.polyfit(sizes, np.log(values), 1)[0]:.2f}" for values in series.values())
    rows.append(("grows like", "", *slopes, "", ""))
    return f"{table(*rows)}\n\n{where(content)}"


def calibration() -> str:
    content = read("calibration")
    summary, *cases = content["results"]
    rows = [
        ("direction", "lower bound, mean", "recall on fresh queries, mean", "least recall over bound", "bound broken")
    ]
    for side in ("proponents", "opponents"):
        found = [case[side] for case in cases]
        least = min(f["fresh"] - f["lower"] for f in found)
        figures = (mean(f["lower"] for f in found), mean(f["fresh"] for f in found))
        broken = f"{sum(f['broken'] for f in found)} of {len(found)}"
        rows.append((side, *(f"{x:.3f}" for x in figures), f"{least:+.3f}", broken))
    flagged = ", ".join(f"{name} {n} of {len(cases)}" for name, n in summary["flagged"].items())
    note = f"Shifted sets flagged: {flagged}; unshifted sets flagged: {summary['falsely_flagged']}."
    return f"{table(*rows)}\n\n{note}\n\n{where(content)}"


def reliability() -> str:
    """Return what flips, fuzzing, readers, the soak and the checksums' cost came to."""
    flips, fuzz, readers, soak, checksums = map(read, ("flips", "fuzz", "readers", "soak", "checksums"))
    flipped = flips["results"]
    found, missed = sum(r["found"] for r in flipped), sum(len(r["missed"]) for r in flipped)
    asked = readers["results"]
    wrong, errors = sum(r["wrong"] for r in asked), sum(len(r["errors"]) for r in asked)
    soaked, altered = soak["results"][0], fuzz["results"][0]
    files = f"{soaked['warm']['open_files']} then {soaked['end']['open_files']}"
    rows = [
        ("trial", "result"),
        ("bytes flipped", f"{found} of {sum(r['flips'] for r in flipped)} found, {missed} missed"),
        ("altered files", f"{altered['all']:,}, {len(altered['failures'])} failures"),
        (
            "answers beside a writer",
            f"{sum(r['answers'] for r in asked):,} over {sum(r['generations_seen'] for r in asked)} generations, "
            f"{wrong} wrong, {errors} errors",
        ),
        (
            f"{soaked['queries']:,} queries",
            f"memory grows by {soaked['growth']:.1%} after the first thousand; open files {files}",
        ),
        *((f"checksums, {r['what']}", f"{r['checksums']:.2%} of its CPU time") for r in checksums["results"]),
    ]
    return f"{table(*rows)}\n\n{where(readers)}"


def end_to_end() -> str:
    """Return recall of true TracInCP after exact re-scoring, over all MNIST rows, and its cost."""
    content = read("end_to_end")
    brute, *found = content["results"]
    rows = [
        ("candidates a side", "recall@10", "10th percentile", "rows run for one query", "for all 50 at once")
        + ("time of the 50, of an exact scan's", "steps a row", "in the second round")
    ]
    for row in found:
        recall, low = (_both(row[f"{side}{end}"] for side in ("proponents", "opponents")) for end in ("", "_p10"))
        shares = (f"{row[name]:.2%}" for name in ("share_alone", "share_of_scan", "time_of_scan"))
        steps = (f"{row[name]:.2f}" for name in ("steps_a_row", "more_steps_a_row"))
        rows.append((str(row["candidates"]), recall, low, *shares, *steps))
    return f"{table(*rows)}\n\n{where(content)}"


def _both(values: Iterable[float], form: str = ".3f") -> str:
    return " / ".join(format(value, form) for value in values)


def digits() -> str:
    content = read("mislabelled_digits")
    rows = [("self-influence", "AUC", "found in the first 10%", "in the first 20%", "worst seed, 20%")]
    for kind in ("sketch", "exact"):
        results = content["results"]
        figures = [mean(r[f"{kind}_{name}"] for r in results) for name in ("auc", "found_at_10", "found_at_20")]
        worst = min(r[f"{kind}_found_at_20"] for r in results)
        rows.append((kind, f"{figures[0]:.3f}", *(f"{x:.1%}" for x in (*figures[1:], worst))))
    return f"{table(*rows)}\n\n{where(content)}"


def mislabelled() -> str:
    """Return wrong labels found in the first tenth and fifth checked, and how many the estimate says to look at."""
    content = read("mislabelled")
    rows = [
        (
            "data",
            "wrong labels",
            "ranked by",
            "found in the first 10%",
            "in the first 20%",
            "told to look at",
            "found there",
        )
    ]
    cases: dict[tuple[str, float], list[dict[str, Any]]] = defaultdict(list)
    for result in content["results"]:
        cases[result["data"], result["rate"]].append(result)
    for (name, _), seeds in cases.items():
        first = seeds[0]
        told = f"{mean(s['look_at'] for s in seeds):,.0f}"
        wrong = f"{first['flipped']:,} of {first['rows']:,}"
        if not first["flipped"]:
            rows.append((name, wrong, "–", "–", "–", told, "–"))
            continue
        there = f"{mean(s['found_there'] for s in seeds):.0%}"
        shown_by = {"self-influence": "self-influence", "loss": "loss", "votes": "votes against"}
        shown_by["loss-and-votes"] = "loss × votes against"
        for by, shown in shown_by.items():
            figures = [f"{mean(s[by][f'found_at_{share}%'] for s in seeds):.1%}" for share in (10, 20)]
            rows.append((name, wrong, shown, *figures, *((told, there) if by == "loss-and-votes" else ("–", "–"))))
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


def kills() -> str:
    """Return how often commands were killed, what that left, what readers found, and how the commands ended."""
    content = read("kills")
    rows = [
        (
            "command",
            "undisturbed, s",
            "kills",
            "left a temporary",
            "found: no index, the old, the new",
            "ends, all equal",
        )
    ]
    for row in content["results"]:
        found = " / ".join(f"{number}" for number in row["readers_found"].values())
        counts = (str(row["kills"]), str(row["left"]["a temporary"]), found, str(row["ended_as_undisturbed"]))
        rows.append((row["command"], f"{row['seconds']:.2f}", *counts))
    return f"{table(*rows)}\n\n{where(content)}"


def fidelity() -> str:
    return importlib.import_module("benchmarks.fidelity").fidelity()  # type: ignore[no-any-return]


def peers() -> str:
    return importlib.import_module("benchmarks.peers.collect").printed(read("peers"))  # type: ignore[no-any-return]


def attribution() -> str:
    content = read("attribution")
    head = ("model", "plain step, µs", "build, µs", "ratio", "loop, µs", "plain loop, µs")
    rows = [
        (
            row["model"],
            *(f"{row[key]:,.0f}" for key in ("plain_us", "row_us")),
            f"{row['ratio']:.2f}",
            f"{row['loop_us']:,.0f}",
            f"{row['plain_loop_us']:,.0f}",
        )
        for row in content["results"]
    ]
    return f"{table(head, *rows)}\n\n{where(content)}"


def proofs() -> str:
    content = read("proofs")
    head = ("rows x checkpoints", "build, CPU s", "proofs", "checks", "audit", "together")
    rows = [
        (
            f"{row['rows']:,} x {row['checkpoints']}",
            f"{row['build_cpu_s']:.1f}",
            *(f"{row[f'{part}_cpu_s'] / row['build_cpu_s']:.1%}" for part in ("proofs", "checks", "audit")),
            f"{row['share']:.1%}",
        )
        for row in content["results"]
    ]
    return f"{table(head, *rows)}\n\n{where(content)}"


_MAKERS = (
    attribution,
    proofs,
    recall,
    retrieval,
    growth,
    calibration,
    rivals,
    language,
    reliability,
    end_to_end,
    digits,
    mislabelled,
    features,
    budget,
    memory,
    precision,
    fidelity,
    peers,
    kills,
)
TABLES = {make.__name__: make for make in _MAKERS}


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
