"""Tables of the wrong labels that each ranking finds."""

from __future__ import annotations

from collections import defaultdict
from statistics import mean

from benchmarks.common.markdown import Row, compose, format_environment, format_table
from benchmarks.common.results import Results, read_results


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


TABLES = (digits, mislabelled, leverage)
