"""Tables of retrieval on the features of four models: true recall, index kinds and other libraries, growth."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from statistics import mean
from typing import Any

import numpy as np

from benchmarks.common.markdown import SIDES, Row, compose, format_environment, format_sides, format_table
from benchmarks.common.results import Results, read_results

_RECALL = 0.95
_TARGET = f"at_{_RECALL}"
_LOADS = ("single", "batch")
_EFFICIENT_SHARE = 0.1
"""A build tries its next choice of an index if one scores a larger share of the rows."""
_TRUE = ("true ten in 10", "in 100", "in 1,000")


def _format_true(sides: dict[str, Any]) -> Row:
    """Return the shares of the true ten at each depth, or dashes if true scores were not computed."""
    shares = [sides[side] for side in SIDES]
    if None in shares:
        return ("–",) * len(_TRUE)
    return tuple(format_sides(pair) for pair in zip(*shares, strict=True))


def group_families(results: Results) -> dict[str, Results]:
    """Return the results of each model by increasing number of rows."""
    groups: dict[str, Results] = defaultdict(list)
    for result in sorted(results, key=lambda result: result["rows"]):
        groups[result["family"]].append(result)
    return groups


def list_kinds(results: Results) -> list[str]:
    """Return the index kinds of the library that were measured."""
    return list(dict.fromkeys(f["method"] for result in results for f in result["methods"] if not f["is_rival"]))


def list_scored(results: Results, kind: str) -> list[tuple[int, tuple[float, float]]]:
    """Return the numbers of rows, and the rows scored at a recall of 0.95 for proponents and opponents."""
    return [
        (result["rows"], tuple(figures[_TARGET][side]["scored"] for side in SIDES))
        for result in results
        for figures in result["methods"]
        if figures["method"] == kind
    ]


def fit_growth(rows: Sequence[int], scored: Sequence[float]) -> float:
    """Return the exponent of N of the scored rows."""
    return float(np.polyfit(np.log(rows), np.log(scored), 1)[0])


def families() -> str:
    """Return the kind of features of each model, and the true recall of an exact scan of them."""
    content = read_results("retrieval_families")
    rows: list[Row] = [("model", "rows × dimensions", "directions", "energy", "bounds leave", "norms", *_TRUE)]
    for name, results in group_families(content["results"]).items():
        covered = [result for result in results if None not in result["exact"].values()]
        result = (covered or results)[-1]
        features = result["features"]
        norms = " / ".join(f"{features[f'norm_{q}']:.2g}" for q in ("p10", "p90", "max"))
        size = f"{result['rows']:,} × {result['dim']:,}"
        shape = (f"{features['directions']:.0f}", f"{features['energy']:.2f}", f"{features['bounded_share']:.1%}")
        rows.append((name, size, *shape, norms, *_format_true(result["exact"])))
    scope = (
        "exact scan of stored features, no re-scoring. The last columns are the share of the ten rows of largest / "
        "most negative TracIn score over all parameters among the best 10, 100 and 1,000 rows of the scan: the recall "
        "after exact re-ranking of as many candidates. Directions: (Σλ)² / Σλ² of the second moment. Energy: the share "
        "in the leading 128 directions. Bounds leave: the share of the rows that Cauchy-Schwarz bounds in these do not "
        "exclude. Norms: 10th percentile / 90th percentile / largest, over the median."
    )
    return compose(scope, format_table(*rows), *_format_environments(content["results"]))


def families_methods() -> str:
    """Return recall and cost of index kinds and other libraries, one table per model."""
    content = read_results("retrieval_families")
    parts = []
    for name, results in group_families(content["results"]).items():
        for result in _choose_sizes(results):
            head = f"{name}, {result['rows']:,} rows × {result['dim']:,} dimensions, {result['queries']:,} queries:"
            parts.append(f"{head}\n\n{format_table(*_format_methods(result))}")
    scope = (
        "search kernel alone, on features that are already computed, k = 10 in both directions. Each index has the "
        "setting with the fewest scored rows of a recall@10 of 0.95; if no setting reaches it, that of the highest "
        "recall. The times are those of the exact scan of float32 rows in memory, in ms per query, and the factors by "
        "which others are faster. Rows scored include centroids. Cells with two figures are proponents / opponents. "
        "*Automatic* is what a build chooses. Standard errors of recall are at most "
        f"{max(_list_errors(content['results'])):.3f}."
    )
    return compose(scope, *parts, *_format_environments(content["results"]))


def families_candidates() -> str:
    """Return the true recall of the candidates of index kinds and other libraries, one table per model."""
    content = read_results("retrieval_families")
    parts = []
    for name, results in group_families(content["results"]).items():
        for result in _choose_sizes([r for r in results if None not in r["exact"].values()]):
            head = f"{name}, {result['rows']:,} rows × {result['dim']:,} dimensions:"
            parts.append(f"{head}\n\n{format_table(*_format_candidates(result))}")
    scope = (
        "the same indexes and settings. The share of the true ten among the first 10, 100 and 1,000 candidates per "
        "direction, proponents / opponents, and the time of a search for 1,000 candidates in both directions."
    )
    return compose(scope, *parts, *_format_environments(content["results"]))


def families_growth() -> str:
    """Return the rows scored at a recall of 0.95 at the smallest and largest size, and exponents of N."""
    content = read_results("retrieval_families")
    rows: list[Row] = [("model", "index", "rows", "scored, smallest", "scored, largest", "growth")]
    for name, results in group_families(content["results"]).items():
        for kind in list_kinds(results):
            sizes, scored = zip(*list_scored(results, kind), strict=True)
            growth = "–"
            if len(sizes) > 1:
                growth = " / ".join(f"N^{fit_growth(sizes, side):.2f}" for side in zip(*scored, strict=True))
            ends = (format_sides(scored[end], ",.0f") for end in (0, -1))
            rows.append((name, kind, f"{sizes[0]:,} to {sizes[-1]:,}", *ends, growth))
    scope = (
        "rows and centroids that a query scores at a recall@10 of 0.95 of the stored ranking, proponents / opponents, "
        "and fitted exponents of the number of rows."
    )
    return compose(scope, format_table(*rows), *_format_environments(content["results"]))


def families_choice() -> str:
    """Return the kind that a build chooses at every size, and its time compared with that of the fastest kind."""
    content = read_results("retrieval_families")
    rows: list[Row] = [("model", "rows", "chosen", "one query", "fastest", "batch", "fastest")]
    for name, results in group_families(content["results"]).items():
        for result in results:
            chosen, kinds = _find_default(result), _list_sufficient(result)
            cells: list[str] = []
            for load in _LOADS:
                seconds = {kind: result["times"][f"{kind} 10"][load] for kind in {chosen, *kinds}}
                best = min(kinds, key=lambda kind, seconds=seconds: seconds[kind])
                cells += [f"× {seconds[chosen] / seconds[best]:.2f}", best]
            rows.append((name, f"{result['rows']:,}", chosen, *cells))
    scope = (
        "what `--index auto` builds, and its time divided by that of the fastest kind with a recall@10 of 0.95 in both "
        "directions, which is named beside it. `flat` is the exact scan of the files."
    )
    return compose(scope, format_table(*rows), *_format_environments(content["results"]))


def families_building() -> str:
    """Return time and memory of building each kind, and the share of the time of the features."""
    content = read_results("retrieval_building")
    rows: list[Row] = [("model", "rows × dimensions", "threads", "features", "index", "build", "share", "memory")]
    for result in content["results"]:
        size = f"{result['rows']:,} × {result['dim']:,}"
        features, build = (f"{result[name]:,.0f} s" for name in ("features_seconds", "seconds"))
        share = f"{result['seconds'] / result['features_seconds']:.1%}"
        memory = f"{result['peak_mb'] / 1e3:.1f} GB"
        rows.append((result["family"], size, str(result["threads"]), features, result["kind"], build, share, memory))
    scope = (
        "building each kind from stored features in a process of its own, with as many threads as the features were "
        "computed with. Share: of the time of the features. Memory: the largest private memory of the process."
    )
    return compose(scope, format_table(*rows), format_environment(content))


def _list_sufficient(result: dict[str, Any]) -> list[str]:
    """Return the kinds of the library that reach a recall of 0.95 in both directions."""
    kinds = ["flat"]
    for figures in result["methods"]:
        if not figures["is_rival"] and all(figures[_TARGET][side]["recall"] >= _RECALL for side in SIDES):
            kinds.append(figures["method"])
    return kinds


def _find_default(result: dict[str, Any]) -> str:
    """Return the kind that a build chooses: the first of its choices that scores at most a tenth of the rows."""
    largest = _EFFICIENT_SHARE * result["rows"]
    efficient = {
        figures["method"]
        for figures in result["methods"]
        if all(figures[_TARGET][side]["scored"] <= largest for side in SIDES)
    } & set(_list_sufficient(result))
    return str(next((kind for kind in result["auto"] if kind in efficient), result["auto"][-1]))


def _list_errors(results: Results) -> Iterator[float]:
    """Yield the standard errors of all recalls of the chosen settings."""
    for result in results:
        for figures in result["methods"]:
            yield from (figures[_TARGET][side]["error"] for side in SIDES)


def _choose_sizes(results: Results) -> Iterator[dict[str, Any]]:
    """Yield the largest sizes with other libraries, with true scores, and of all, each once."""
    with_rivals = [result for result in results if any(figures["is_rival"] for figures in result["methods"])]
    with_true = [result for result in results if None not in result["exact"].values()]
    chosen = {result["rows"] for part in (with_rivals, with_true, results) for result in part[-1:]}
    yield from (result for result in results if result["rows"] in chosen)


def _format_methods(result: dict[str, Any]) -> Iterator[Row]:
    """Yield the head of a table and the rows of all methods of a model."""
    times = result["times"]
    yield ("index", "recall@10", "scored", "one query", "batch", "bytes/row", "build, s")
    scan = [f"{1e3 * times['scan 10'][load]:.2f} ms" for load in _LOADS]
    yield ("exact scan, float32 in memory", "1.000", "100%", *scan, f"{4 * result['dim']:,}", "–")
    yield ("exact scan of the files", "1.000", "100%", *_format_factors(times, "flat", 10), "–", "–")
    default = _find_default(result)
    for figures in result["methods"]:
        name = figures["method"] + (", automatic" if figures["method"] == default else "")
        sides = [figures[_TARGET][side] for side in SIDES]
        scored = " / ".join(f"{side['scored'] / result['rows']:.2%}" for side in sides)
        factors = _format_factors(times, figures["method"], 10)
        size, seconds = f"{figures['bytes_a_row']:,.0f}", f"{figures['build_seconds']:,.0f}"
        yield (name, format_sides(side["recall"] for side in sides), scored, *factors, size, seconds)


def _format_candidates(result: dict[str, Any]) -> Iterator[Row]:
    """Yield the head of a table and the true recall of the candidates of all methods of a model, and their cost."""
    times = result["times"]
    yield ("index", *_TRUE, "one query, k = 1,000", "batch, k = 1,000")
    scan = (f"{1e3 * times['scan 1000'][load]:.2f} ms" for load in _LOADS)
    yield ("exact scan, float32 in memory", *_format_true(result["exact"]), *scan)
    for figures in result["methods"]:
        sides = {side: figures[_TARGET][side]["true"] for side in SIDES}
        yield (figures["method"], *_format_true(sides), *_format_factors(times, figures["method"], 1000))


def _format_factors(times: dict[str, Any], name: str, k: int) -> tuple[str, ...]:
    """Return how many times faster than the scan in memory a search is, for one query and for a batch."""
    factors = (times[f"scan {k}"][load] / times[f"{name} {k}"][load] for load in _LOADS)
    return tuple(f"× {factor:.2g}" if factor < 100 else f"× {factor:.0f}" for factor in factors)


def _format_environments(results: Results) -> tuple[str, ...]:
    """Return the lines of the machines that measured the results, each once."""
    return tuple(dict.fromkeys(format_environment(result) for result in results))


def true_recall() -> str:
    """Return how often the intervals of predicted true recall cover the measured one, by model."""
    content = read_results("true_recall")
    cells: dict[tuple[str, str], Results] = {}
    for name, kind in (("build", "the build"), ("pilot", "a pilot (`--dim auto`)")):
        for model in (*dict.fromkeys(cell["model"] for cell in content["results"]), "all"):
            chosen = [cell for cell in content["results"] if model in (cell["model"], "all")]
            cells[kind, model] = [{**cell, **cell[name]} for cell in chosen]
    head = ("predicted by", "model", "covered", "first 10", "mean predicted − measured", "largest", "measured")
    rows: list[Row] = [head]
    for (kind, model), found in cells.items():
        covered = {
            most: mean(cell["lower"] <= cell["measured"] <= cell["upper"] for cell in found if cell["depth"] <= most)
            for most in (1000, 10)
        }
        excess = [cell["mean"] - cell["measured"] for cell in found]
        measured = [cell["measured"] for cell in found]
        span = f"{min(measured):.2f} to {max(measured):.2f}"
        shares = (f"{share:.1%}" for share in covered.values())
        rows.append((kind, model, *shares, f"{mean(excess):+.3f}", f"{max(excess):+.3f}", span))
    settings = content["settings"]
    n_models = len({cell["model"] for cell in content["results"]})
    scope = (
        f"{n_models * settings['cases']} cases, {settings['cases']} of each model: a random half of the rows that have "
        f"true scores and {settings['queries']} random queries. Share of the true top ten in the first 10, 100 and "
        "1,000 rows of the stored ranking, in both directions; measured for all queries with true scores. Covered: the "
        "measured share is within the predicted 95% interval; first 10: of the share in the first 10 rows alone, which "
        "is the smallest."
    )
    return compose(scope, format_table(*rows), format_environment(content))


TABLES = (
    families,
    families_methods,
    families_candidates,
    families_growth,
    families_choice,
    families_building,
    true_recall,
)
