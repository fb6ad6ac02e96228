"""Tables of recall and cost of searches, and of true recall after exact re-scoring."""

from __future__ import annotations

from collections import defaultdict
from statistics import mean
from typing import Any

from benchmarks.common.markdown import SIDES, Row, compose, find_sides, format_environment, format_sides, format_table
from benchmarks.common.results import Results, read_results
from benchmarks.retrieval import code_tables, family_tables, latency_tables
from benchmarks.retrieval.family_tables import fit_growth
from benchmarks.retrieval.latency_tables import WHOLE, find_batch
from tracin_ann.store import choose_partition_rows

_TARGETS = ("0.95", "0.98")
_LOADS = ("single", "batch")
_MODELS = {"MLP": "MLP 32-64-10", "CNN": "MNIST-like CNN", "GPT": "GPT 4x128"}
_QUALITY: Row = ("index", "recall@10", "10th percentile of recall", "scored rows")
_COST: Row = ("index", "queries/s in a batch", "queries/s one by one", "bytes/row", "build, s")


def retrieval() -> str:
    """Return recall and cost of lists and exact scans with one million rows."""
    content = read_results("retrieval_compact")
    result = content["results"][0]
    n_rows = result["rows"]
    pairs = [_format_lists("lists", result["sq8"], n_rows, target) for target in _TARGETS]
    pairs.append(_format_lists("lists, `--compact`", result["sq4"], n_rows, _TARGETS[0]))
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
    quality, cost = _format_lists("lists", result["sq8"], result["rows"], _TARGETS[0])
    times = result["sq8"]["times"]
    singles = format_sides((1e3 * times[f"{side} {_TARGETS[0]}"]["single"] for side in SIDES), ".1f")
    rows.append((f"search kernel alone: {quality[0]}", quality[1], quality[3], singles, cost[1]))
    scan = times["scan"]
    figures = (f"{1e3 * scan['single'] / 2:.0f}", f"{2 / scan['batch']:,.0f}")
    rows.append(("search kernel alone: exact scan, float32 in memory", "1.000", "100%", *figures))
    largest = {case["model"]: case for case in read_results("latency")["results"]}
    for case in (largest["MLP"], largest["GPT"]):
        one, many = (find_batch(case, count) for count in (1, 100))
        name = f"whole query: {_MODELS[case['model']]}, {case['rows']:,} rows"
        recall_cell = format_sides([1.0, 1.0] if one["found_by"] == "scan" else case["recall"])
        rate = f"{100 / many['times'][WHOLE]['median']:,.0f}"
        rows.append((name, recall_cell, f"{one['scored']:.2%}", f"{1e3 * one['times'][WHOLE]['median']:.1f}", rate))
    return format_table(*rows)


def rivals() -> str:
    """Return recall and cost of lists and other indexes of the same rows, in one run."""
    content = read_results("retrieval_rivals")
    result = content["results"][0]
    n_rows = result["rows"]
    pairs = [_format_lists("lists", result["sq8"], n_rows, target) for target in _TARGETS]
    for rival in result["rivals"]:
        name, sides = _name_rival(rival), find_sides(rival)
        rate = format_sides((1 / side["batch"] for side in sides), ",.0f")
        cost = (name, rate, "–", f"{rival['bytes_a_row']:,}", f"{rival['build_seconds']:.0f}")
        pairs.append((_format_quality(name, sides, n_rows), cost))
    quality, cost_rows = zip(*pairs, strict=True)
    scope = f"{_describe_search(content, [result])} {n_rows:,} rows."
    tables = (format_table(_QUALITY, *quality), format_table(_COST, *cost_rows))
    return compose(scope, *tables, format_environment(content))


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
            for target in _TARGETS:
                if kind == "scored":
                    values = [side["scored"] for side in find_sides(found[f"at_{target}"])]
                else:
                    values = [1e3 * found["times"][f"{side} {target}"]["batch"] for side in SIDES]
                series[kind, target].append(sum(values))
                cells.append(format_sides(values, ",.0f" if kind == "scored" else ".2f"))
        build = f"{found['build_seconds']:,.0f}"
        rows.append((f"{result['rows']:,}", f"{found['lists']:,}", *cells, build, f"{found['bytes_a_row']:.0f}"))
    sizes = [result["rows"] for result in results]
    slopes = (f"N^{fit_growth(sizes, values):.2f}" for values in series.values())
    rows.append(("fitted growth", "", *slopes, "", ""))
    scope = f"{_describe_search(content, results)} Times are ms per query in a batch, at a recall@10 of 0.95 and 0.98."
    return compose(scope, format_table(*rows), format_environment(content))


def _describe_search(content: dict[str, Any], results: Results) -> str:
    partition_rows = content["settings"]["partition_rows"]
    defaults = sorted({choose_partition_rows(result["rows"]) for result in results})
    shown = " to ".join(f"{size:,}" for size in sorted({defaults[0], defaults[-1]}))
    size = "the default size" if defaults == [partition_rows] else f"{shown} by default; single queries depend on this"
    return (
        "search kernel alone, on features that are already computed; query features and re-scoring of the results are "
        f"not included. The feature files have partitions of {partition_rows:,} rows, {size}. Lists use the settings "
        "that reach the target recall on these queries with the fewest scored rows; if no setting reaches it, the one "
        "with the highest recall. Cells with two figures are proponents / opponents."
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


def _format_quality(name: str, sides: Results, n_rows: int) -> Row:
    return (
        name,
        format_sides(side["recall"] for side in sides),
        format_sides((side["p10"] for side in sides), ".2f"),
        format_sides((side["scored"] / n_rows for side in sides), ".2%"),
    )


def _name_rival(rival: dict[str, Any]) -> str:
    return rival["rival"] + "".join(f", {key} {rival[key]}" for key in ("nprobe", "ef") if key in rival)


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
        f"both directions; k = 10, {content['settings']['queries']} queries, batches of 100, λ = 1/(ηT). Cells "
        "with two figures are proponents / opponents."
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


TABLES = (
    *latency_tables.TABLES,
    *(retrieval, retrieval_summary, growth, rivals, scan, retrieval_preconditioned, score_cost, calibration),
    *family_tables.TABLES,
    *code_tables.TABLES,
    *(recall, end_to_end, end_to_end_summary),
)
