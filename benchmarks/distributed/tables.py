"""Tables of builds and queries by several processes."""

from __future__ import annotations

import textwrap
from typing import Any

from benchmarks.common.markdown import (
    SIDES,
    WIDTH,
    Row,
    compose,
    find_sides,
    format_environment,
    format_sides,
    format_table,
)
from benchmarks.common.results import read_results

NAMES = {"single": "one file, one process", "shards": "{shards} files, one process", "workers": "{shards} workers"}
TARGETS = (0.95, 0.98)


def _format_interval(figures: dict[str, Any]) -> str:
    return " / ".join("{:.3f}–{:.3f}".format(*figures[side]["interval"]) for side in SIDES)


def sharded_search() -> str:
    content = read_results("sharded_search")
    (result,) = content["results"]
    rows: list[Row] = [("lists in", "recall@10", "95% interval", "rows scored", "other results", "ms a query", "one")]
    for target in TARGETS:
        for name, title in NAMES.items():
            figures = result[f"at_{target}"][name]
            sides = find_sides(figures)
            rows.append(
                (
                    title.format(shards=result["shards"]),
                    format_sides(side["recall"] for side in sides),
                    _format_interval(figures),
                    format_sides((side["scored"] for side in sides), ",.0f"),
                    str(figures["different"] + figures["different_one_by_one"]),
                    f"{figures['batch_ms']:.2f}",
                    f"{figures['one_ms']:.2f}",
                )
            )
    kills = result["kills"]
    killed = (
        f"While a random worker was killed {kills['kills']} times during {kills['queries']:,} queries, one after the "
        f"other, {kills['wrong']} answers were wrong and {kills['lost']} lost; the longest query took "
        f"{kills['longest_s']:.1f} s, in which a worker started again."
    )
    scope = (
        f"MNIST CNN, {result['rows']:,} rows of 3 × 256, {result['queries']:,} queries, settings for a recall of .95 "
        "and .98; proponents / opponents. Other results: searches of all queries at once and one by one whose ids or "
        "scores differ by a bit from those of one file. Times are for both directions, all at once and one by one."
    )
    return compose(scope, format_table(*rows), textwrap.fill(killed, WIDTH), format_environment(content))


def exact_workers() -> str:
    content = read_results("exact_workers")
    settings = content["settings"]
    rows: list[Row] = [("exact scores of", "one process, CPU s", "2 workers, CPU s", "ratio")]
    for result in content["results"]:
        times = (f"{result[name]:.2f}" for name in ("one_s", "workers_s"))
        rows.append((result["scored"], *times, f"{result['ratio']:.2f}"))
    scope = (
        f"MNIST CNN, {settings['rows']:,} rows, one checkpoint, {settings['queries']} queries, "
        f"{settings['candidates']} candidates in each direction; one thread in each process. CPU time of the "
        "command and of the worker that takes longest, as on a machine with a free core for each; medians of "
        f"{settings['rounds']} rounds."
    )
    return compose(scope, format_table(*rows), format_environment(content))


def scan_workers() -> str:
    content = read_results("scan_workers")
    settings = content["settings"]
    rows: list[Row] = [("queries", "one process, CPU ms", "2 workers, CPU ms", "ratio", "other results")]
    for result in content["results"]:
        times = (f"{1e3 * result[name]:.0f}" for name in ("one_s", "workers_s"))
        rows.append((str(result["queries"]), *times, f"{result['ratio']:.2f}", str(result["different"])))
    scope = (
        f"{settings['rows']:,} normal rows of {settings['dim']} float16 numbers, 200 results in each direction; one "
        "thread in each process. CPU time of a scan in the calling process and in the worker that takes longest, as on "
        f"a machine with a free core for each; medians of {settings['rounds']} rounds. Other results: those that "
        "differ by a bit from the results of one process."
    )
    return compose(scope, format_table(*rows), format_environment(content))


def launchers() -> str:
    content = read_results("launchers")
    runs = [row for row in content["results"] if "ratio" in row]
    speeds: list[Row] = [("features by", "rows/s", "relative to one process", "start, s", "whole build, s")]
    for row in runs:
        seconds = (f"{row['first_report_s']:.1f}", f"{row['total_s']:.1f}")
        speeds.append((row["way"], f"{row['rows_per_s']:,.0f}", f"{row['ratio']:.2f}", *seconds))
    memory: list[Row] = [("features by", "rows", "memory of the driver, features", "whole build")]
    for row in content["results"]:
        if row not in runs:
            peaks = (f"{row[name]:,.0f} MB" for name in ("features_mb", "build_mb"))
            memory.append((row["way"], f"{row['rows']:,}", *peaks))
    scope = (
        f"{runs[0]['rows']:,} rows of the MNIST CNN at one checkpoint, in partitions of "
        f"{content['settings']['partition_rows']:,}, with one thread for each worker; medians of "
        f"{content['settings']['rounds']} rounds. Below, peak memory of the process that runs the command, for a small "
        "MLP with D = 64."
    )
    return compose(scope, format_table(*speeds), format_table(*memory), format_environment(content))


TABLES = (launchers, sharded_search, exact_workers, scan_workers)
