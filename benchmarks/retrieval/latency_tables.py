"""Tables of whole queries and their stages, of reading stored rows, and of commands as new processes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.common.markdown import Row, compose, format_environment, format_table
from benchmarks.common.results import Results, read_results

WHOLE = "whole auto stored"
"""The measured time of a whole query with the default options."""
_WAYS = ("lists", "scan")


def latency() -> str:
    """Return times of whole queries and of their stages on default indexes, estimates, and costs of a process."""
    content = read_results("latency")
    cases = content["results"]
    who: Row = ("model", "rows", "search")
    whole: Row = ("whole query", "90th percentile", "exact", "features")
    one = [(*who, *whole, "whole/features", "whole − 1.5 features")]
    many = [(*who, *whole, "search kernel", "whole/needed")]
    parts: list[Row] = [
        (*who, "features", "search kernel", "reading candidates", "scores", "all stages", "whole query")
    ]
    for case in cases:
        one += _format_whole(case, 1)
        many += _format_whole(case, 100)
        batch = find_batch(case, 1)
        for way in _list_ways(batch):
            names = ("features", *(f"{stage} {way}" for stage in ("kernel", "take", "scores")))
            stages = [batch["times"][name] for name in names]
            total = {"median": sum(stage["median"] for stage in stages)}
            shown = (*stages, total, batch["times"][f"whole {way} stored"])
            parts.append((case["model"], f"{case['rows']:,}", _name_way(case, way), *map(_format_ms, shown)))
    sizes = " or ".join(f"{size:,}" for size in sorted({case["partition_rows"] for case in cases}))
    scope = (
        "whole queries by `InfluenceIndex.query` with the default options, except `search` and `rerank` where a table "
        f"names them; default builds with D = {cases[0]['dim']} and {cases[0]['n_checkpoints']} checkpoints, and "
        f"partitions of {sizes} rows. Medians in ms, per query."
    )
    places = dict.fromkeys(format_environment(case) for case in cases)
    return compose(
        scope,
        f"One query; *exact* is the whole query with `--rerank exact`:\n\n{format_table(*one)}",
        f"100 queries in one call, times per query:\n\n{format_table(*many)}",
        f"Stages of one query:\n\n{format_table(*parts)}",
        *_compose_latency_details(cases),
        *places,
    )


def find_batch(case: dict[str, Any], queries: int) -> dict[str, Any]:
    """Return the figures of one number of queries in a call."""
    return next(batch for batch in case["batches"] if batch["queries"] == queries)


def _format_ms(figures: dict[str, float] | None, key: str = "median", share: int = 1) -> str:
    """Return a time in ms, divided by the number of queries; a dash if it was not measured."""
    if figures is None:
        return "–"
    milliseconds = 1e3 * figures[key] / share
    return f"{milliseconds:,.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"


def _list_ways(batch: dict[str, Any]) -> list[str]:
    return [way for way in _WAYS if f"whole {way} stored" in batch["times"]]


def _name_way(case: dict[str, Any], way: str) -> str:
    """Return the search that a result names `lists` or `scan`: the kind of the index, or the scan."""
    return "codes" if way == "lists" and case["kind"] == "codes" else way


def _format_whole(case: dict[str, Any], queries: int) -> Iterable[Row]:
    """Yield the rows of whole queries, by the index and by scan, with their ratios."""
    batch = find_batch(case, queries)
    times = batch["times"]
    for way in _list_ways(batch):
        whole, derived = times[f"whole {way} stored"], batch["derived"][way]
        cells = [_format_ms(whole, key, queries) for key in ("median", "p90")]
        cells += [_format_ms(times.get(f"whole {way} exact"), share=queries)]
        cells += [_format_ms(times["features"], share=queries)]
        if queries == 1:
            cells += [f"{derived['whole/features']:.2f}", f"{1e3 * derived['whole - 1.5 features']:,.1f}"]
        else:
            cells += [_format_ms(times[f"kernel {way}"], share=queries), f"{derived['whole/needed']:.2f}"]
        default = ", default" if batch["found_by"] == way and len(_list_ways(batch)) > 1 else ""
        yield (case["model"], f"{case['rows']:,}", f"{_name_way(case, way)}{default}", *cells)


def _compose_latency_details(cases: Results) -> list[str]:
    """Return the tables of estimates, of access to an index, and of a process."""
    estimates: list[Row] = [("model", "rows", "queries", "estimated", "search kernel", "whole query", "default")]
    access: list[Row] = [("model", "rows", *(f"`take` of {n} rows" for n in (40, 200)), "scan", "read of memory")]
    process: list[Row] = [
        ("model", "rows", "opening", "first query", "`query.py`, s", "`import torch`, s", "memory, MB", "growth, MB")
        + ("threads",)
    ]
    for case in cases:
        name = (case["model"], f"{case['rows']:,}")
        for batch in case["batches"]:
            if len(_list_ways(batch)) > 1 and batch["estimates"]:
                measured = (
                    [batch["times"].get(form.format(way)) for way in _WAYS] for form in ("kernel {}", "whole {} stored")
                )
                pairs = [[{"median": batch["estimates"][way]} for way in _WAYS], *measured]
                cells = (" / ".join(map(_format_ms, pair)) for pair in pairs)
                estimates.append((*name, f"{batch['queries']:,}", *cells, _name_way(case, batch["found_by"])))
        scan = find_batch(case, 1)["times"]["kernel scan"]
        takes = (_format_ms(case["takes"][n]) for n in ("40", "200"))
        access.append((*name, *takes, _format_ms(scan), _format_ms({"median": case["memory_read_s"]})))
        first, run, commands = case["first"], case["process"], case["commands"]
        starts = (_format_ms({"median": first[key]}) for key in ("open", "first query"))
        seconds = (f"{commands[key]['median']:.2f}" for key in ("query.py", "import torch"))
        private = [run[when]["private_mb"] for when in ("before", "after")]
        memory_cells = (f"{private[1]:,.0f}", f"{private[1] - private[0]:,.1f}", str(run["peak_threads"]))
        process.append((*name, *starts, *seconds, *memory_cells))
    many = " or ".join(map(str, sorted({case["process"]["queries"] for case in cases})))
    heads = {
        "Estimated and measured ms of one call, by the index / by scan; `auto` compares the estimates:": estimates,
        "Random rows, and one scan compared with a read of as many bytes of memory, in ms:": access,
        f"A process: private memory after {many} single queries, and its growth during them:": process,
    }
    return [f"{head}\n\n{format_table(*rows)}" for head, rows in heads.items() if len(rows) > 1]


def partitions() -> str:
    """Return the cost of a store by the number of rows of a partition."""
    content = read_results("partitions")
    settings = content["settings"]
    reading: list[Row] = [
        ("rows of a partition", "files", "opening all files", "`take` of 40", "of 200", "scan", "memory, MB")
    ]
    writing: list[Row] = [
        (
            "rows of a partition",
            "writing, µs/row",
            "fsyncs per 1,000 rows",
            "repeated at 50 µs/row, s",
            "at 5 ms/row, s",
        )
    ]
    for row in content["results"]:
        name = f"{row['partition_rows']:,}"
        times = (_format_ms(row[key]) for key in ("open", "take_40", "take_200", "scan"))
        reading.append((name, f"{row['files']:,}", *times, f"{row['open_store_mb']:.1f}"))
        repeated = (f"{seconds:,.1f}" for seconds in row["repeated_s"])
        writing.append((name, f"{row['write_us_a_row']:.1f}", f"{1000 * row['fsyncs_a_row']:.2f}", *repeated))
    shape = f"{settings['rows']:,} synthetic rows of {settings['checkpoints']} × {settings['dim']} dimensions"
    scope = (
        f"the feature store alone, {shape}. Times are medians in ms, a scan for one query. Repeated: the work of "
        "one partition at one checkpoint; a kill repeats at most two of them."
    )
    return compose(scope, format_table(*reading), format_table(*writing), format_environment(content))


def cold_start() -> str:
    """Return the time of commands as new processes, and of the stages of a query."""
    content = read_results("cold_start")
    results, settings = content["results"], content["settings"]
    medians = results["seconds"]
    base = next(iter(medians.values()))
    commands: list[Row] = [("command", "median, s", "fastest, s", "median/first row")]
    for name, seconds in medians.items():
        times = (f"{seconds:.2f}", f"{results['fastest'][name]:.2f}", f"{seconds / base:.2f}")
        commands.append((f"`{name}`", *times))
    stages: list[Row] = [("stage of `query.py DIR --ids 0`", "median, s")]
    stages += [(name, f"{seconds:.3f}") for name, seconds in results["stages"].items()]
    scope = (
        f"each command as a new process; {settings['rounds']} rounds, each with one run of every command. DIR and "
        "OTHER are indexes of 1,000 rows, 2 checkpoints and D = 64. The model of DIR has two linear layers; that of "
        "OTHER has one parameter that no layer rule covers, which needs vmap(grad)."
    )
    return compose(scope, format_table(*commands), format_table(*stages), format_environment(content))


TABLES = (latency, partitions, cold_start)
