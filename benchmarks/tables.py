"""Tables of the documents from the result files: printed, or written into the documents that are named."""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import numpy as np

from benchmarks.attribution.tables import lds, lds_peers, lds_published, lds_summary, removal
from benchmarks.common.markdown import Row, compose, format_environment, format_table
from benchmarks.common.results import read_results
from benchmarks.distributed.tables import exact_workers, scan_workers, sharded_search
from benchmarks.retrieval.tables import (
    families,
    families_candidates,
    families_choice,
    families_growth,
    families_methods,
)
from benchmarks.scale_plan import format_plans
from tracin_ann.store import choose_partition_rows

OUTPUT = "the documents that are named"
Results = list[dict[str, Any]]

SIDES = ("proponents", "opponents")
TARGETS = ("0.95", "0.98")
_LOADS = ("single", "batch")
# Of the retrieval result files that do not record it.
EARLIER_PARTITION_ROWS = 65_536


def format_sides(values: Iterable[float], form: str = ".3f") -> str:
    """Return the figures of proponents and opponents in one cell."""
    return " / ".join(format(value, form) for value in values)


def find_sides(figures: dict[str, Any]) -> Results:
    """Return the figures of proponents and opponents."""
    return [figures[side] for side in SIDES]


# Features


def features() -> str:
    content = read_results("features")
    rows: list[Row] = [
        ("model", "parameters", "plain step, µs/row", "build, µs/row", "plain/build", "plain channels-last/build")
    ]
    for row in content["results"]:
        costs = (f"{row['plain_us']:,.0f}", f"{row['row_us']:,.0f}", f"{row['ratio']:.2f}")
        has_images = row["plain_channels_last_us"] != row["plain_us"]
        channels_last = f"{row['ratio_to_channels_last']:.2f}" if has_images else "–"
        rows.append((row["model"], f"{row['parameters']:,}", *costs, channels_last))
    scope = (
        f"complete builds by `tracin_ann.build` with D = {content['settings']['dim']:,}; other settings are the "
        "defaults, except the batch size (equal to that of the plain step) and the estimate of fidelity (off). "
        "The plain step is batched forward and backward."
    )
    return compose(scope, format_table(*rows), format_environment(content))


def features_summary() -> str:
    """Return the cost of a feature row without the time of each side."""
    content = read_results("features")
    rows: list[Row] = [("model", "parameters", "plain step, µs/row", "build, µs/row", "plain/build")]
    for row in content["results"]:
        costs = (f"{row['plain_us']:,.0f}", f"{row['row_us']:,.0f}", f"{row['ratio']:.2f}")
        rows.append((row["model"], f"{row['parameters']:,}", *costs))
    return format_table(*rows)


def budget() -> str:
    content = read_results("budget")
    steps = ("reading", "forward", "input_gradients", "sketch", "storing")
    rows: list[Row] = [("model", "plain step", *(step.replace("_", " ") for step in steps), "operations, plain/build")]
    for row in content["results"]:
        name = row["model"] + (", channels last" if row["channels_last"] else "")
        costs = (f"{row[f'{step}_us']:,.0f}" for step in ("plain", *steps))
        rows.append((name, *costs, f"{row['arithmetic_ratio']:.2f}"))
    scope = "the steps of feature extraction alone, in µs per row; storing runs in its own thread during a build."
    return compose(scope, format_table(*rows), format_environment(content))


def memory() -> str:
    content = read_results("memory")
    rows: list[Row] = [("model", "rows", "plain training, MB", "build, MB")]
    for row in content["results"]:
        name = row["model"].replace("cheap", "small")  # the name in earlier result files
        plain = f"{row['plain_mb']:,.0f}" if "plain_mb" in row else "–"
        rows.append((name, f"{row['rows']:,}", plain, f"{row['build_mb']:,.0f}"))
    scope = (
        'peak memory of a process that runs a complete build by `tracin_ann.build` with `index="flat"`. Other settings '
        "are the defaults, except the batch size (equal to that of plain training) and, for the small MLP, D = 64."
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


def precision() -> str:
    content = read_results("precision")
    rows: list[Row] = [
        ("model", "score error of bf16", "of the sketch", "recall fp32", "recall bf16", "µs/row, fp32 / bf16")
    ]
    for row in content["results"]:
        recalls = (format_sides(row[f"{side}_{p}"] for side in SIDES) for p in ("fp32", "bf16"))
        times = format_sides((row[f"row_us_{p}"] for p in ("fp32", "bf16")), ",.0f")
        rows.append((row["model"], f"{row['score_error']:.2%}", f"{row['sketch_error']:.1%}", *recalls, times))
    scope = (
        f"feature extraction alone (D = {content['settings']['dim']:,}). Recall@10 of true TracInCP for "
        "proponents / opponents; errors are relative root mean squares."
    )
    return compose(scope, format_table(*rows), format_environment(content))


def attribution() -> str:
    content = read_results("attribution")
    rows: list[Row] = [("model", "plain step, µs", "build, µs", "plain/build", "loop, µs", "plain loop, µs")]
    for row in content["results"]:
        costs = (f"{row[key]:,.0f}" for key in ("plain_us", "row_us"))
        loops = (f"{row[key]:,.0f}" for key in ("loop_us", "plain_loop_us"))
        rows.append((row["model"], *costs, f"{row['ratio']:.2f}", *loops))
    settings = content["settings"]
    scope = (
        f"complete builds by `tracin_ann.build`, time per graph, D = {settings['dim']:,}, {settings['batch_size']} "
        "graphs per batch; other settings are the defaults. The loops process one graph at a time."
    )
    return compose(scope, format_table(*rows), format_environment(content))


def adapters() -> str:
    """Return the time per row of extraction for adapters, and that of a training step."""
    content = read_results("adapters")
    rows: list[Row] = [
        ("adapter", "trained parameters", "training step, µs/row", "extraction, µs/row", "step/extraction")
    ]
    for row in content["results"]:
        costs = (f"{row[key]:,.0f}" for key in ("parameters", "plain_us", "row_us"))
        rows.append((row["adapter"], *costs, f"{row['ratio']:.2f}"))
    settings, result = content["settings"], content["results"][0]
    scope = (
        f"feature extraction alone, with reading of rows, D = {settings['dim']:,}, {settings['batch_size']} rows per "
        "batch; CPU times on one thread. The base is a Llama with 12 layers and "
        f"{result['base_parameters'] / 1e6:.1f} M frozen parameters; 64 tokens per row, rank {result['rank']}. The "
        "training step is forward and backward of the adapter."
    )
    return compose(scope, format_table(*rows), format_environment(content))


def adapter_precision() -> str:
    """Return the error of exact scores over a base model in bfloat16 and int8."""
    content = read_results("adapter_precision")
    rows: list[Row] = [("base model", "score error", "largest error/largest score", "same first 10")]
    for row in content["results"]:
        shown = format_sides(row[side] for side in SIDES)
        rows.append((row["base"], f"{row['score_error']:.2%}", f"{row['largest_error']:.2%}", shown))
    scope = (
        f"exact scores alone, without a sketch, of {content['settings']['rows']:,} training rows; no index is built. "
        "The error is a relative root mean square. The last column is the share of the first ten proponents / "
        "opponents that are those of a base model in float32."
    )
    return compose(scope, format_table(*rows), format_environment(content))


def proofs() -> str:
    content = read_results("proofs")
    rows: list[Row] = [("rows × checkpoints", "build, CPU s", "proofs", "batch checks", "audit", "total")]
    for row in content["results"]:
        shares = (f"{row[f'{part}_cpu_s'] / row['build_cpu_s']:.1%}" for part in ("proofs", "checks", "audit"))
        size = f"{row['rows']:,} × {row['checkpoints']}"
        rows.append((size, f"{row['build_cpu_s']:.1f}", *shares, f"{row['share']:.1%}"))
    scope = (
        f"complete builds by `tracin_ann.build`, D = {content['settings']['dim']:,}; other settings are the defaults."
    )
    return compose(scope, format_table(*rows), format_environment(content))


# Fidelity


def recall() -> str:
    content = read_results("recall_mnist")
    by_sketch: dict[str, Results] = defaultdict(list)
    for row in content["results"]:
        by_sketch[row["sketch"]].append(row)
    settings = content["settings"]
    rows: list[Row] = [("sketch", *SIDES, f"re-scored exactly ({settings['candidates']} candidates)")]
    for name, seeds in by_sketch.items():
        stored, exact = ([mean(s[kind][side] for s in seeds) for side in SIDES] for kind in ("stored", "exact"))
        rows.append((name, *(f"{x:.3f}" for x in stored), format_sides(exact)))
    scope = (
        f"complete builds by `tracin_ann.build` and whole queries by `InfluenceIndex.query`, D = {settings['dim']:,}; "
        "other settings are the defaults. Recall@10 of true TracInCP, "
        f"{settings['rows']:,} rows, {settings['queries']} queries, mean of {settings['seeds']} seeds."
    )
    return compose(scope, format_table(*rows), format_environment(content))


def preconditioners() -> str:
    """Return the linear datamodeling score with each preconditioner."""
    content = read_results("preconditioners")
    kinds = ("none", "adam", "trackstar")
    rows: list[Row] = [("model", "none", *(f"{kind} (gain ± standard error)" for kind in kinds[1:]))]
    for row in content["results"]:
        gains = (f"{row[k]:.3f} ({row[k] - row['none']:+.3f} ± {row[f'{k}_gain_error']:.3f})" for k in kinds[1:])
        rows.append((row["model"], f"{row['none']:.3f}", *gains))
    settings = content["settings"]
    scope = (
        f"exact scores of complete indexes, {settings['seeds']} training runs; {settings['subsets']} random halves of "
        "800 training rows, 100 queries. The linear datamodeling score is the rank correlation of a query's true loss "
        "with the sum of its scores over the rows of a half, mean over queries."
    )
    return compose(scope, format_table(*rows), format_environment(content))


def curvature() -> str:
    """Return the agreement with retraining of scores with a curvature matrix, of sketches and over all parameters."""
    content = read_results("curvature")
    rows: list[Row] = [("model", "score", "method", "LDS", "rise", "more than sketch", "wrong")]
    for row in content["results"]:
        rise, more, wrong = "–", "–", "–"
        if "rise" in row:
            rise, wrong = f"{row['rise']:.2f}", f"{row['wrong']} of {row['queries']}"
            more = "–" if row["method"] == "sketch" else f"{row['gain']:+.2f} ± {row['gain_error']:.2f}"
        lds = f"{row['lds']:.3f} ± {row['lds_error']:.3f}"
        rows.append((row["model"], row["score"], row["method"], lds, rise, more, wrong))
    settings = content["settings"]
    scope = (
        "2,000 rows and 100 queries of MNIST, an MLP of 25,450 and a CNN of 14,538 parameters, SGD, 4 checkpoints, D = "
        f"1024; LDS against {settings['subsets']} random halves, {settings['seeds']} training runs each; mean over "
        "queries ± standard error. Rise: that of a query's loss after training without its best 50 of the 200 "
        "candidates by the sketch, mean over the first queries that are right before; how many are then wrong."
    )
    return compose(scope, format_table(*rows), format_environment(content))


def fidelity() -> str:
    """Return recall of each sketch, one table per direction."""
    content = read_results("fidelity")
    cells: dict[tuple[str, str], Results] = defaultdict(list)
    for row in content["results"]:
        cells[row["sketch"], row["model"]].append(row)
    sketches, models = (list(dict.fromkeys(pair[i] for pair in cells)) for i in (0, 1))
    tables = []
    for side in SIDES:
        rows: list[Row] = [(f"sketch, {side}", *models)]
        for sketch in sketches:
            rows.append((sketch, *(_format_spread([r[side] for r in cells[sketch, model]]) for model in models)))
        tables.append(format_table(*rows))
    settings = content["settings"]
    scope = (
        f"the sketches alone, D = {settings['dim']:,}. Recall@10 of true TracInCP, "
        f"mean ± standard deviation of {settings['seeds']} seeds."
    )
    return compose(scope, *tables, format_environment(content))


def _format_spread(values: Sequence[float]) -> str:
    if not values:
        return "–"
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


# Retrieval

_QUALITY: Row = ("index", "recall@10", "10th percentile of recall", "scored rows")
_COST: Row = ("index", "queries/s in a batch", "queries/s one by one", "bytes/row", "build, s")


def _describe_search(content: dict[str, Any], results: Results) -> str:
    partition_rows = content["settings"].get("partition_rows", EARLIER_PARTITION_ROWS)
    defaults = sorted({choose_partition_rows(result["rows"]) for result in results})
    shown = " to ".join(f"{size:,}" for size in sorted({defaults[0], defaults[-1]}))
    size = "the default size" if defaults == [partition_rows] else f"{shown} by default; single queries depend on this"
    return (
        "search kernel alone, on features that are already computed; query features and re-scoring of the results are "
        f"not included. The feature files have partitions of {partition_rows:,} rows, {size}. Lists use the settings "
        "that reach the target recall on these queries with the fewest scored rows; if no setting reaches it, the one "
        "with the highest recall. Cells with two figures are proponents / opponents."
    )


def _name_rival(rival: dict[str, Any]) -> str:
    return rival["rival"] + "".join(f", {key} {rival[key]}" for key in ("nprobe", "ef") if key in rival)


def _format_quality(name: str, sides: Results, n_rows: int) -> Row:
    return (
        name,
        format_sides(side["recall"] for side in sides),
        format_sides((side["p10"] for side in sides), ".2f"),
        format_sides((side["scored"] / n_rows for side in sides), ".2%"),
    )


def _format_lists(name: str, figures: dict[str, Any], n_rows: int, target: str) -> tuple[Row, Row]:
    """Return the rows of quality and cost of lists that are set to a recall."""
    sides = find_sides(figures[f"at_{target}"])
    times = [figures["times"][f"{side} {target}"] for side in SIDES]
    name = f"{name}, target {target}"
    cost = (
        name,
        format_sides((1 / time["batch"] for time in times), ",.0f"),
        format_sides((1 / time["single"] for time in times), ",.0f"),
        f"{figures['bytes_a_row']:.0f}",
        f"{figures['build_seconds']:.0f}",
    )
    return _format_quality(name, sides, n_rows), cost


def retrieval() -> str:
    """Return recall and cost of lists and exact scans with one million rows."""
    content = read_results("retrieval_compact")
    result = content["results"][0]
    n_rows = result["rows"]
    pairs = [_format_lists("lists", result["sq8"], n_rows, target) for target in TARGETS]
    pairs.append(_format_lists("lists, `--compact`", result["sq4"], n_rows, TARGETS[0]))
    for name, shown in (("scan", "exact scan, float32 in memory"), ("scan of the files", "exact scan of the files")):
        # A scan computes both directions at once, which count as two queries.
        rates = (f"{2 / result['sq8']['times'][name][kind]:,.1f}" for kind in ("batch", "single"))
        pairs.append(((shown, "1.000", "1.00", "100%"), (shown, *rates, "–", "–")))
    quality, cost = zip(*pairs, strict=True)
    scope = f"{_describe_search(content, [result])} {n_rows:,} rows; a scan of both directions counts as two queries."
    return compose(scope, format_table(_QUALITY, *quality), format_table(_COST, *cost), format_environment(content))


def retrieval_summary() -> str:
    """Return recall and speed of the search kernel with one million rows, and of whole queries of default indexes."""
    result = read_results("retrieval_compact")["results"][0]
    rows: list[Row] = [("measured", "recall@10", "scored rows", "one query, ms", "queries/s in a batch")]
    quality, cost = _format_lists("lists", result["sq8"], result["rows"], TARGETS[0])
    times = result["sq8"]["times"]
    singles = format_sides((1e3 * times[f"{side} {TARGETS[0]}"]["single"] for side in SIDES), ".1f")
    rows.append((f"search kernel alone: {quality[0]}", quality[1], quality[3], singles, cost[1]))
    scan = times["scan"]
    figures = (f"{1e3 * scan['single'] / 2:.0f}", f"{2 / scan['batch']:,.0f}")
    rows.append(("search kernel alone: exact scan, float32 in memory", "1.000", "100%", *figures))
    largest = {case["model"]: case for case in read_results("latency")["results"]}
    for case in (largest["MLP"], largest["GPT"]):
        one, many = (_find_batch(case, count) for count in (1, 100))
        name = f"whole query: {_MODELS[case['model']]}, {case['rows']:,} rows"
        recall_cell = format_sides([1.0, 1.0] if one["found_by"] == "scan" else case["recall"])
        rate = f"{100 / many['times'][_WHOLE]['median']:,.0f}"
        rows.append((name, recall_cell, f"{one['scored']:.2%}", f"{1e3 * one['times'][_WHOLE]['median']:.1f}", rate))
    return format_table(*rows)


# Latency of whole queries

_MODELS = {"MLP": "MLP 32-64-10", "CNN": "MNIST-like CNN", "GPT": "GPT 4x128"}
_WHOLE = "whole auto stored"
_WAYS = ("lists", "scan")


def _find_batch(case: dict[str, Any], queries: int) -> dict[str, Any]:
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


def _format_whole(case: dict[str, Any], queries: int) -> Iterable[Row]:
    """Yield the rows of whole queries, by lists and by scan, with their ratios."""
    batch = _find_batch(case, queries)
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
        yield (case["model"], f"{case['rows']:,}", f"{way}{default}", *cells)


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
        batch = _find_batch(case, 1)
        for way in _list_ways(batch):
            names = ("features", *(f"{stage} {way}" for stage in ("kernel", "take", "scores")))
            stages = [batch["times"][name] for name in names]
            total = {"median": sum(stage["median"] for stage in stages)}
            shown = (*stages, total, batch["times"][f"whole {way} stored"])
            parts.append((case["model"], f"{case['rows']:,}", way, *map(_format_ms, shown)))
    settings = content["settings"]
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
        *_compose_latency_details(cases, settings["many"]),
        *places,
    )


def _compose_latency_details(cases: Results, many: int) -> list[str]:
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
                estimates.append((*name, f"{batch['queries']:,}", *cells, batch["found_by"]))
        scan = _find_batch(case, 1)["times"]["kernel scan"]
        takes = (_format_ms(case["takes"][n]) for n in ("40", "200"))
        access.append((*name, *takes, _format_ms(scan), _format_ms({"median": case["memory_read_s"]})))
        first, run, commands = case["first"], case["process"], case["commands"]
        starts = (_format_ms({"median": first[key]}) for key in ("open", "first query"))
        seconds = (f"{commands[key]['median']:.2f}" for key in ("query.py", "import torch"))
        private = [run[when]["private_mb"] for when in ("before", "after")]
        memory_cells = (f"{private[1]:,.0f}", f"{private[1] - private[0]:,.1f}", str(run["peak_threads"]))
        process.append((*name, *starts, *seconds, *memory_cells))
    heads = {
        "Estimated and measured times of one call in ms, by lists / by scan. `auto` compares the estimates:": estimates,
        "Random rows, and one scan compared with a read of as many bytes of memory, in ms:": access,
        f"A process: private memory after {many:,} single queries, and its growth during them:": process,
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


def rivals() -> str:
    """Return recall and cost of lists and other indexes of the same rows, in one run."""
    content = read_results("retrieval_rivals")
    result = content["results"][0]
    n_rows = result["rows"]
    pairs = [_format_lists("lists", result["sq8"], n_rows, target) for target in TARGETS]
    for rival in result["rivals"]:
        name, sides = _name_rival(rival), find_sides(rival)
        rate = format_sides((1 / side["batch"] for side in sides), ",.0f")
        cost = (name, rate, "–", f"{rival['bytes_a_row']:,}", f"{rival['build_seconds']:.0f}")
        pairs.append((_format_quality(name, sides, n_rows), cost))
    quality, cost_rows = zip(*pairs, strict=True)
    scope = f"{_describe_search(content, [result])} {n_rows:,} rows."
    tables = (format_table(_QUALITY, *quality), format_table(_COST, *cost_rows))
    return compose(scope, *tables, format_environment(content))


def scan() -> str:
    """Return the time of a scan of stored rows, of decoded rows, and of reading the rows."""
    content = read_results("scan")
    settings = content["settings"]
    n_bytes = settings["rows"] * settings["checkpoints"] * settings["dim"] * 2
    head = ("queries", "read", "scan of stored rows", "scan of decoded blocks", "scan/read")
    rows = []
    for row in content["results"]:
        seconds = [row[f"{name}_seconds"] for name in ("read", "stored", "decoded")]
        rows.append((str(row["queries"]), *(f"{1000 * s:,.0f} ms" for s in seconds), f"{seconds[1] / seconds[0]:.1f}"))
    scope = (
        f"kernel alone: {settings['rows']:,} rows of {settings['checkpoints']} × {settings['dim']} float16 numbers "
        f"({n_bytes / 1e6:,.0f} MB) in the page cache, verified before. Both directions, k = 10; medians of "
        "interleaved rounds."
    )
    return compose(scope, format_table(head, *rows), format_environment(content))


def retrieval_preconditioned() -> str:
    """Return the lists beside the exact scan, and the candidates of other scores, under scores with a curvature."""
    content = read_results("retrieval_preconditioned")
    lists: list[Row] = [
        ("rows × D, score", "lists over", "recall@10", "scored rows", "one query, ms", "in a batch, ms")
    ]
    names = {"tracin": "TracIn", "svd": "256 dimensions", "bilinear": "256 dimensions, bilinear"}
    depths = [100, 1000]
    shares: list[Row] = [("rows × D, score", "candidates by", *(f"best {depth:,}" for depth in depths))]
    for row in content["results"]:
        name = f"{row['rows']:,} × 3 × {row['dim']:,}, {row['score']}"
        lists.append((name, "exact scan", "1.000", "100%", *(f"{1e3 * row['scan'][n]:.1f}" for n in _LOADS)))
        for kind, figures in row["lists"].items():
            sides = find_sides(figures)
            seconds = ("–",) * 2
            if "single" in sides[0]:
                seconds = tuple(f"{1e3 * sum(side[load] for side in sides):.1f}" for load in _LOADS)
            recall = format_sides(side["recall"] for side in sides)
            scored = " / ".join(f"{side['scored']:.1%}" for side in sides)
            label = {"rows": "256 dimensions", "full": "all dimensions", "whitened": "whitened rows"}.get(kind)
            lists.append((name, label or names[kind], recall, scored, *seconds))
        for kind, found in row["candidates"].items():
            cells = [format_sides(found[side][row["depths"].index(depth)] for side in SIDES) for depth in depths]
            shares.append((name, names.get(kind, kind), *cells))
    scope = (
        "search kernel alone, on features that are already computed. Lists have the settings with the fewest scored "
        "rows of a recall of 0.95; if no setting reaches it, those of the highest recall. CPU time of one thread for "
        f"both directions; k = 10, {content['settings']['queries']} queries, batches of 100. Cells with two figures "
        "are proponents / opponents."
    )
    caption = "The share of the ten largest scores among the best 100 and 1,000 by another score:"
    return compose(scope, format_table(*lists), caption, format_table(*shares), format_environment(content))


def score_cost() -> str:
    """Return the cost of queries by score and of the curvature matrices."""
    content = read_results("score_cost")
    queries: list[Row] = [("rows × D", "queries", "TracIn, ms", "fisher", "gauss-newton")]
    matrices: list[Row] = [("rows of the sample × D", "CPU time", "peak memory", "before")]
    for row in content["results"]:
        if "curvature_seconds" in row:
            memory = (f"{row['peak_mb']:,.0f} MB", f"{row['before_mb']:,.0f} MB")
            n_sampled = min(row["rows"], 65_536)
            matrices.append((f"{n_sampled:,} × 3 × {row['dim']:,}", f"{row['curvature_seconds']:.1f} s", *memory))
            continue
        for count in (1, 100):
            plain, ratio = row[f"{count} queries"]["tracin"], row[f"ratio, {count} queries"]
            cells = (f"{1e3 * plain:.0f}", f"× {ratio['fisher']:.2f}", f"× {ratio['gauss-newton']:.2f}")
            queries.append((f"{row['rows']:,} × 3 × {row['dim']:,}", str(count), *cells))
    scope = (
        "CPU time of one thread for a whole call of an open index by an exact scan, features of the queries included; "
        f"medians of {content['settings']['rounds']} interleaved rounds. The memory of the matrices includes the "
        "mapped feature files."
    )
    return compose(scope, format_table(*queries), format_table(*matrices), format_environment(content))


def growth() -> str:
    """Return scored rows and time at two recalls as the rows grow, and exponents of N."""
    content = read_results("retrieval")
    results = content["results"]
    rows: list[Row] = [
        ("rows", "lists", "scored at 0.95", "scored at 0.98", "ms at 0.95", "ms at 0.98", "build, s", "bytes/row")
    ]
    series: dict[tuple[str, str], list[float]] = defaultdict(list)
    for result in results:
        found, cells = result["sq8"], []
        for kind in ("scored", "batch"):
            for target in TARGETS:
                if kind == "scored":
                    values = [side["scored"] for side in find_sides(found[f"at_{target}"])]
                else:
                    values = [1e3 * found["times"][f"{side} {target}"]["batch"] for side in SIDES]
                series[kind, target].append(sum(values))
                cells.append(format_sides(values, ",.0f" if kind == "scored" else ".2f"))
        build = f"{found['build_seconds']:,.0f}"
        rows.append((f"{result['rows']:,}", f"{found['lists']:,}", *cells, build, f"{found['bytes_a_row']:.0f}"))
    sizes = np.log([result["rows"] for result in results])
    slopes = (f"N^{np.polyfit(sizes, np.log(values), 1)[0]:.2f}" for values in series.values())
    rows.append(("fitted growth", "", *slopes, "", ""))
    scope = f"{_describe_search(content, results)} Times are ms per query in a batch, at a recall@10 of 0.95 and 0.98."
    return compose(scope, format_table(*rows), format_environment(content))


def calibration() -> str:
    content = read_results("calibration")
    summary, *cases = content["results"]
    rows: list[Row] = [
        ("direction", "mean lower bound", "mean recall of new queries", "least recall minus bound", "bound violated")
    ]
    for side in SIDES:
        found = [case[side] for case in cases]
        least = min(f["fresh"] - f["lower"] for f in found)
        figures = (mean(f["lower"] for f in found), mean(f["fresh"] for f in found))
        violated = f"{sum(f['broken'] for f in found)} of {len(found)}"
        rows.append((side, *(f"{x:.3f}" for x in figures), f"{least:+.3f}", violated))
    flagged = ", ".join(f"{name}: {n} of {len(cases)}" for name, n in summary["flagged"].items())
    note = f"Shifted sets that were flagged: {flagged}. Unshifted sets that were flagged: {summary['falsely_flagged']}."
    scope = f"search kernel alone, {content['settings']['rows']:,} rows per case, calibrated on 400 queries."
    return compose(scope, format_table(*rows), note, format_environment(content))


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


def end_to_end() -> str:
    """Return recall of true TracInCP after exact re-scoring over all MNIST rows, and its cost."""
    content = read_results("end_to_end")
    _, *found = content["results"]
    settings = content["settings"]
    quality: list[Row] = [("candidates per direction", "recall@10", "10th percentile of recall")]
    n_queries = settings["queries"]
    cost: list[Row] = [
        ("candidates per direction", "rows run, 1 query", f"rows run, {n_queries} queries", "time/exact scan")
        + ("plain steps/row", "in round 2")
    ]
    for row in found:
        name = str(row["candidates"])
        ends = ([row[f"{side}{end}"] for side in SIDES] for end in ("", "_p10"))
        quality.append((name, *map(format_sides, ends)))
        shares = (f"{row[key]:.2%}" for key in ("share_alone", "share_of_scan", "time_of_scan"))
        steps = (f"{row[key]:.2f}" for key in ("steps_a_row", "more_steps_a_row"))
        cost.append((name, *shares, *steps))
    scope = (
        "a build by `tracin_ann.build` and whole queries by `InfluenceIndex.query` with exact re-scoring, "
        f"{settings['rows']:,} rows, {n_queries} queries. Not the defaults: D = {settings['dim']:,}, "
        '`index="ivf"` and queries of the lists with a recall of 0.98. '
        "Rows and time are shares of an exact scan; the time is that of all queries in a batch."
    )
    return compose(scope, format_table(*quality), format_table(*cost), format_environment(content))


def end_to_end_summary() -> str:
    """Return recall of true TracInCP after exact re-scoring, and the rows that one query runs."""
    _, *found = read_results("end_to_end")["results"]
    rows: list[Row] = [("candidates per direction", "recall@10 of true TracIn", "rows run for one query")]
    for row in found[:2]:
        recall = format_sides(row[side] for side in SIDES)
        rows.append((str(row["candidates"]), recall, f"{row['share_alone']:.2%}"))
    return format_table(*rows)


# Reliability


def reliability() -> str:
    """Return the results of flips, fuzzing, readers and the soak, and the cost of checksums."""
    flips, fuzz, readers, soak, checksums = map(read_results, ("flips", "fuzz", "readers", "soak", "checksums"))
    flipped, queried = flips["results"], readers["results"]
    found, missed = sum(r["found"] for r in flipped), sum(len(r["missed"]) for r in flipped)
    wrong, errors = sum(r["wrong"] for r in queried), sum(len(r["errors"]) for r in queried)
    soaked, altered = soak["results"][0], fuzz["results"][0]
    files = f"{soaked['warm']['open_files']}, then {soaked['end']['open_files']}"
    rows: list[Row] = [
        ("trial", "result"),
        ("flipped bytes", f"{found} of {sum(r['flips'] for r in flipped)} found, {missed} missed"),
        ("altered files", f"{altered['all']:,}, {len(altered['failures'])} failures"),
        (
            "answers during writes",
            f"{sum(r['answers'] for r in queried):,} over {sum(r['generations_seen'] for r in queried)} generations, "
            f"{wrong} wrong, {errors} errors",
        ),
        (
            f"{soaked['queries']:,} queries in one process",
            f"memory grows by {soaked['growth']:.1%} after the first thousand; open files: {files}",
        ),
    ]
    for row in checksums["results"]:
        rows.append((f"checksums, {row['what'].replace('ask', 'query')}", f"{row['checksums']:.2%} of the CPU time"))
    scope = (
        "complete builds, queries, removals and verification through the public functions; for altered files, each "
        "reader alone."
    )
    return compose(scope, format_table(*rows), format_environment(readers))


def kills() -> str:
    """Return the number of kills, the files that they left, what readers found, and how the commands ended."""
    content = read_results("kills")
    rows: list[Row] = [
        ("command", "without kills, s", "kills", "temporary left", "reader found none / old / new", "ends, all equal")
    ]
    for row in content["results"]:
        found = " / ".join(f"{number}" for number in row["readers_found"].values())
        counts = (str(row["kills"]), str(row["left"]["a temporary"]), found, str(row["ended_as_undisturbed"]))
        rows.append((row["command"], f"{row['seconds']:.2f}", *counts))
    scope = f"complete builds and removals through the public functions, {content['settings']['rows']:,} rows."
    return compose(scope, format_table(*rows), format_environment(content))


# Serving


def serving() -> str:
    """Return the latency and throughput of tracin-serve, and of its pages."""
    content = read_results("serving")
    settings = content["settings"]
    rows: list[Row] = [("queries", "median, ms", "95th percentile, ms", "per second", "wrong", "growth of memory")]
    pages: list[Row] = [("page", "kB", "median, ms", "95th percentile, ms")]
    for row in content["results"]:
        times = (f"{row['p50_ms']:.1f}", f"{row['p95_ms']:.1f}")
        if "bytes" in row:
            pages.append((row["way"].removeprefix("page of "), f"{row['bytes'] / 1e3:.0f}", *times))
        else:
            checked = (str(row["wrong"]), f"{row['memory_growth']:.1%}") if "wrong" in row else ("–", "–")
            rows.append((row["way"], *times, f"{row['per_second']:.0f}", *checked))
    scope = (
        f"a default index of the CNN of examples/mnist.py on {settings['rows']:,} digits, 3 checkpoints; "
        f"{settings['clients']} clients at the same time with {settings['each']} queries each, all different, over "
        f"loopback; pages by one client, {settings['pages']} loads each."
    )
    return compose(scope, format_table(*rows), format_table(*pages), format_environment(content))


# Labels


def digits() -> str:
    content = read_results("mislabelled_digits")
    rows: list[Row] = [("self-influence", "AUC", "found in the first 10%", "in the first 20%", "worst seed, 20%")]
    results = content["results"]
    for kind in ("sketch", "exact"):
        figures = [mean(r[f"{kind}_{name}"] for r in results) for name in ("auc", "found_at_10", "found_at_20")]
        worst = min(r[f"{kind}_found_at_20"] for r in results)
        rows.append((kind, f"{figures[0]:.3f}", *(f"{x:.1%}" for x in (*figures[1:], worst))))
    settings = content["settings"]
    scope = (
        "complete builds by `tracin_ann.build` and `InfluenceIndex.self_influence`, "
        f"D = {settings['dim']:,}; other settings are the defaults. Mean of {settings['seeds']} seeds."
    )
    return compose(scope, format_table(*rows), format_environment(content))


def mislabelled() -> str:
    """Return the wrong labels found in the first 10% and 20% of each ranking, and the estimate of their number."""
    content = read_results("mislabelled")
    rows: list[Row] = [
        (
            "data",
            "wrong labels",
            "ranking",
            "found in first 10%",
            "first 20%",
            "estimated number",
            "found in these",
            "correct label",
        )
    ]
    cases: dict[tuple[str, float], Results] = defaultdict(list)
    for result in content["results"]:
        cases[result["data"], result["rate"]].append(result)
    rankings = {"self-influence": "self-influence", "loss": "loss", "votes": "votes against"}
    rankings["loss-and-votes"] = "loss × votes against"
    for (name, _), seeds in cases.items():
        first = seeds[0]
        estimate = f"{mean(s['look_at'] for s in seeds):,.0f}"
        wrong = f"{first['flipped']:,} of {first['rows']:,}"
        if not first["flipped"]:
            rows.append((name, wrong, "–", "–", "–", estimate, "–", "–"))
            continue
        found = f"{mean(s['found_there'] for s in seeds):.0%}"
        shares = [s["suggested_correct"] for s in seeds if s.get("suggested_correct") is not None]
        correct = f"{mean(shares):.1%}" if shares else "–"
        for by, shown in rankings.items():
            figures = [f"{mean(s[by][f'found_at_{share}%'] for s in seeds):.1%}" for share in (10, 20)]
            last = (estimate, found, correct) if by == "loss-and-votes" else ("–", "–", "–")
            rows.append((name, wrong, shown, *figures, *last))
    scope = (
        "complete builds by `tracin_ann.build` and `tracin_ann.analysis.find_mislabelled`, with "
        f'`index="flat"` and D = {content["settings"]["dim"]:,}; other settings are the defaults. '
        "Correct label: the share of the changed labels in the first 10% for which the suggested label is the true one."
    )
    return compose(scope, format_table(*rows), format_environment(content))


def leverage() -> str:
    """Return the areas under the curve of rankings by scores with a curvature matrix, beside the default."""
    content = read_results("leverage")
    rankings = ("loss-and-votes", "loss", "self-influence", "leverage", "loss without the row")
    cases: dict[tuple[str, float], Results] = defaultdict(list)
    for result in content["results"]:
        cases[result["data"], result["rate"]].append(result)
    rows: list[Row] = [("data", "wrong labels", *rankings)]
    for (name, rate), seeds in cases.items():
        rows.append((name, f"{rate:.0%}", *(f"{mean(seed[by] for seed in seeds):.4f}" for by in rankings)))
    scope = (
        f"area under the ROC curve of each ranking, D = {content['settings']['dim']:,}; digits: mean of "
        f"{content['settings']['seeds']} seeds. Leverage: self-influence by `--score fisher`. Loss without the row: "
        "the loss plus its estimated rise if the row is left out (`amount`, by `gauss-newton`)."
    )
    return compose(scope, format_table(*rows), format_environment(content))


# Peers


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


# Plans of large builds


def scale_check() -> str:
    """Return predicted costs beside measured ones."""
    content = read_results("scale_plan")
    rows: list[Row] = [("quantity", "factors from", "predicted", "measured", "predicted/measured")]
    for check in content["results"]["checks"]:
        figures = (_format_quantity(check[name], check["unit"]) for name in ("predicted", "measured"))
        ratio = f"{check['predicted'] / check['measured']:.2f}"
        rows.append((check["what"], check["fitted"], *figures, ratio))
    scope = (
        "predictions of the simulation in `benchmarks/scale_plan.py` for sizes that are larger than those that its "
        "factors are fitted to, and measurements of the same quantity, on one machine."
    )
    return compose(scope, format_table(*rows), format_environment(content))


def _format_quantity(value: float, unit: str) -> str:
    return f"{1e3 * value:.2f} ms" if unit == "s" and value < 1 else f"{value:.1f} {unit}"


def scale_plan() -> str:
    """Return the plans of builds of 10 million to a billion rows."""
    content = read_results("scale_plan")
    settings, assumed = content["settings"], content["settings"]["machines"]
    scope = (
        f"simulated, not measured: the fewest machines of {settings['threads']} CPU threads that compute the features "
        f"in {settings['days']:g} day, D = {settings['dim']}; then one of them finishes the build. Assumptions: a "
        f"shared file system of {assumed['disk'] / 1e9:g} GB/s, {assumed['failures']:g} failures of a machine an hour, "
        f"{assumed['restart']:g} s to replace it, {assumed['price']:.2f} $ for a machine hour. Memory is that of the "
        "inverted lists, which the finishing machine holds; query is the search in both directions on one machine."
    )
    table = format_plans(content["results"]["plans"])
    return compose(scope, table, format_environment(content))


_TABLES = (
    *(scale_check, scale_plan),
    *(features, budget, memory, launchers, precision, attribution, proofs, adapters, adapter_precision),
    *(recall, fidelity, preconditioners, curvature),
    *(lds, lds_peers, lds_published, removal),
    *(latency, partitions),
    *(
        retrieval,
        scan,
        retrieval_preconditioned,
        score_cost,
        rivals,
        families,
        families_methods,
        families_candidates,
        families_growth,
        families_choice,
        growth,
        calibration,
        cold_start,
        end_to_end,
        sharded_search,
        exact_workers,
        scan_workers,
    ),
    *(reliability, kills, serving),
    *(digits, mislabelled, leverage),
    peers,
    *(features_summary, retrieval_summary, end_to_end_summary, lds_summary),
)
TABLES: dict[str, Callable[[], str]] = {make.__name__: make for make in _TABLES}
"""The functions that make the tables, by the name that documents use: `<!-- table: NAME -->` ... `<!-- end -->`."""

_MARK = re.compile(r"^<!-- (?:table: (?P<name>\S+)|(?P<end>end)) -->$", re.MULTILINE)


def fill_tables(text: str) -> str:
    """Return a document with the current table between each pair of marks.

    Raises:
        ValueError: a mark that names no table, or marks that do not form pairs.
    """
    parts, position, opened = [], 0, None
    for mark in _MARK.finditer(text):
        if mark["name"] is not None and opened is None:
            if mark["name"] not in TABLES:
                raise ValueError(f"unknown table: got {mark['name']!r}, expected one of {', '.join(TABLES)}")
            parts.append(f"{text[position : mark.end()]}\n{TABLES[mark['name']]()}\n")
            opened, position = mark, mark.end()
        elif mark["end"] is not None and opened is not None:
            opened, position = None, mark.start()
        else:
            raise ValueError(f"marks of tables do not form pairs: {mark[0]!r} at character {mark.start()}")
    if opened is not None:
        raise ValueError(f"marks of tables do not form pairs: {opened[0]!r} has no end mark")
    return "".join([*parts, text[position:]])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("documents", nargs="*", type=Path, help="documents whose tables are filled in place")
    parser.add_argument("--table", choices=list(TABLES), help="print this table only")
    options = parser.parse_args()
    if options.table and options.documents:
        parser.error("--table prints a table; name documents or a table, not both")
    # All documents are read first, so that an error leaves every file unchanged.
    try:
        filled = {path: fill_tables(path.read_text(encoding="utf-8")) for path in options.documents}
    except (OSError, ValueError) as error:
        parser.error(str(error))
    for path, text in filled.items():
        path.write_text(text, encoding="utf-8")
    if options.table:
        print(TABLES[options.table]())
    elif not options.documents:
        for name, make in TABLES.items():
            print(f"## {name}\n\n{make()}\n")


if __name__ == "__main__":
    main()
