"""Tables of linear datamodeling scores and of removal, beside published figures."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from statistics import mean
from typing import Any

from benchmarks.attribution.settings import SETTINGS
from benchmarks.common.markdown import Row, compose, format_environment, format_table
from benchmarks.common.results import read_results

_SCORES = ("tracin", "cosine", "trackstar", "fisher", "gauss-newton", "trak")
_PROTOCOL = ("dattri LR", "dattri MLP")
_SUMMARY = {
    "LR": "logistic regression",
    "MLP": "MLP",
    "CNN": "CNN",
    "CIFAR-2": "narrow ResNet-9",
    "GPT": "character GPT",
}
_DIM = 1024
"""Dimensions of the sketch in every table except the one of dimensions."""
_WITH_CURVATURE = ("fisher", "gauss-newton")
_DAMPINGS = ("default", "1/(ηT)", "5e-4 tr K")

# Deng et al. 2024, "dattri: A Library for Efficient Data Attribution", arXiv 2410.04555: method -> MNIST-LR, MNIST-MLP;
# TRAK with the best damping: Hu et al. 2025, "GraSS: Scalable Data Attribution with Gradient Sparsification and Sparse
# Projection", arXiv 2505.18976.
_PUBLISHED = {
    "published: TracIn": (0.33, 0.146),
    "published: IF, conjugate gradients": (0.80, 0.258),
    "published: TRAK, 1 model": (0.415, 0.114),
    "published: TRAK, 10 models": (0.645, 0.333),
    "published: TRAK, 50 models": (0.68, 0.448),
    "published: TRAK, 10 models, tuned damping": (None, 0.436),
}


def _format_interval(found: Sequence[float] | None) -> str:
    """Return a mean with half the width of its interval."""
    if found is None:
        return "–"
    mean, low, high = found
    return f"{mean:.3f} ± {(high - low) / 2:.3f}"


def _describe_index(row: dict[str, Any]) -> str:
    """Return which checkpoints an index contains, and how gradients are weighted."""
    runs = "1 run" if row["runs"] == 1 else f"{row['runs']} runs"
    parts = [runs, *(["last checkpoint"] if row["last"] else [])]
    if row["preconditioner"] != "none":
        parts.append(row["preconditioner"])
    return ", ".join(parts)


def _read_own() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the content of our results, and those with the usual dimensions of the sketch in the order of a table."""
    content = read_results("lds")
    return content, sorted((row for row in content["results"] if row["dim"] == _DIM), key=_order)


def _order(row: dict[str, Any]) -> tuple[Any, ...]:
    """Return the place of a row in a table."""
    index = row["runs"], row["last"], row["preconditioner"] != "none"
    return list(SETTINGS).index(row["setting"]), *index, _DAMPINGS.index(row["damping"]), row["dim"]


def lds() -> str:
    content, own = _read_own()
    rows: list[Row] = [("setting", "index", "λ", "ceiling", *_SCORES)]
    for row in own:
        ceiling = "–" if row["ceiling"] is None else f"{row['ceiling']:.3f}"
        figures = (f"{row[score][0]:.3f}" if score in row else "–" for score in _SCORES)
        rows.append((row["setting"], _describe_index(row), row["damping"], ceiling, *figures))
    widest = max((row[s][2] - row[s][1]) / 2 for row in own for s in _SCORES if s in row)
    scope = (
        "linear datamodeling score over 50 random halves of the training rows, mean over the queries, by "
        f"`InfluenceIndex.score_matrix` with D = {_DIM:,} per checkpoint. 95% bootstrap "
        f"intervals over subsets and queries are at most ± {widest:.3f}. The ceiling is the score of exact predictions "
        "of the expected losses; it needs two training runs of each subset. The default λ is the larger one of the two "
        "others after SGD, and 5e-4 tr K after AdamW; that of `trak` is always 5e-4 tr K."
    )
    return compose(scope, format_table(*rows), format_environment(content))


def lds_dims() -> str:
    content = read_results("lds")
    measured = [
        row
        for row in content["results"]
        if row.get("effective_dimension") and row["runs"] == 1 and not row["last"] and row["preconditioner"] == "none"
    ]
    counts = Counter((row["setting"], row["damping"]) for row in measured)
    measured = [row for row in measured if counts[row["setting"], row["damping"]] > 1]
    columns = [column for score in _WITH_CURVATURE for column in (score, "D / d_λ")]
    rows: list[Row] = [("setting", "λ", "D", "tracin", *columns)]
    for row in sorted(measured, key=_order):
        cells = [cell for score in _WITH_CURVATURE for cell in _format_dim(row, score)]
        tracin = f"{row['tracin'][0]:.3f}" if "tracin" in row else "–"
        rows.append((row["setting"], row["damping"], f"{row['dim']:,}", tracin, *cells))
    widest = max((row[s][2] - row[s][1]) / 2 for row in measured for s in _WITH_CURVATURE if s in row)
    scope = (
        "linear datamodeling scores of indexes of one run by the dimensions D of the sketch per checkpoint, with the "
        "same runs, subsets, queries and seed of the sketch. Beside each score, D / d_λ for the largest effective "
        "dimension d_λ of a checkpoint, from the same index. 95% bootstrap intervals over subsets and queries are at "
        f"most ± {widest:.3f}."
    )
    return compose(scope, format_table(*rows), format_environment(content))


def _format_dim(row: dict[str, Any], score: str) -> tuple[str, str]:
    """Return a score, and the dimensions as a multiple of its effective dimension with the latter in parentheses."""
    if score not in row:
        return "–", "–"
    effective = max(row["effective_dimension"][score])
    return f"{row[score][0]:.3f}", f"{row['dim'] / effective:.1f} (d_λ {effective:.0f})"


def lds_summary() -> str:
    """Return the figures of indexes with the default damping, for five models."""
    _, own = _read_own()
    usual = [row for row in own if row["runs"] == 1 and not row["last"] and row["damping"] == "default"]
    columns = [
        next(row for row in usual if row["setting"] == name and row["preconditioner"] == "none") for name in _SUMMARY
    ]
    rows: list[Row] = [("", *_SUMMARY.values())]
    for score in ("tracin", "fisher", "gauss-newton"):
        rows.append((f"`{score}`", *(f"{row[score][0]:.2f}" if score in row else "–" for row in columns)))
    ceilings = ("–" if row["ceiling"] is None else f"{row['ceiling']:.2f}" for row in columns)
    return format_table(*rows, ("ceiling", *ceilings))


def lds_published() -> str:
    content, own = _read_own()
    indexes = {(row["runs"], row["last"]) for row in own if row["setting"] in _PROTOCOL}
    rows: list[Row] = [("method", "MNIST-LR", "MNIST-MLP")]
    for name, published in _PUBLISHED.items():
        rows.append((name, *("–" if figure is None else f"{figure:.3f}" for figure in published)))
    for runs, last in sorted(indexes, key=lambda index: (index[0], not index[1])):
        found = [next(_find_indexes(own, (setting, runs, last)), ("", {})) for setting in _PROTOCOL]
        index = _describe_index({"runs": runs, "last": last, "preconditioner": "none"})
        for score in ("tracin", "fisher", "gauss-newton", "trak"):
            cells = (_format_interval(row.get(score)) + _mark_damping(score, row) for _, row in found)
            rows.append((f"{score}, {index}", *cells))
    scope = (
        "the protocol of dattri's benchmark: its models and training on the first 5,000 MNIST rows of our file, 500 "
        "queries, 50 halves with one training run each. The published figures come from the authors' own retrained "
        "models, ours from models that were trained again, with the default damping and D = 1,024, except for * with "
        "λ = 1/(ηT)."
    )
    return compose(scope, format_table(*rows), format_environment(content))


def _mark_damping(score: str, row: dict[str, Any]) -> str:
    """Return the mark of a figure with another damping than the default."""
    return "*" if row and score in ("fisher", "gauss-newton") and row["damping"] != "default" else ""


def _find_indexes(own: Sequence[dict[str, Any]], place: tuple[Any, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield a name and the results of each index of a setting, with the default damping if it was measured."""
    for preconditioner, suffix in (("none", ""), ("adam", ", adam")):
        found = {
            row["damping"]: row
            for row in own
            if (row["setting"], row["runs"], row["last"], row["preconditioner"]) == (*place, preconditioner)
        }
        damping = next((each for each in _DAMPINGS if each in found), None)
        if damping is not None:
            other = "" if damping == "default" else f", λ = {damping}"
            yield f"tracin-ann{suffix}{other}", found[damping]


def lds_peers() -> str:
    content, (_, own) = read_results("lds_peers"), _read_own()
    rows: list[Row] = [("setting", "checkpoints", "method", "default damping", "best damping")]
    shown = set()
    for row in content["results"]:
        place = row["setting"], row["runs"], row["last"]
        checkpoints = _describe_index({**row, "preconditioner": "none"})
        if place not in shown:
            shown.add(place)
            for name, ours in _find_indexes(own, place):
                scores = [score for score in ("tracin", "fisher", "gauss-newton") if score in ours]
                figures = ((f"{name}, {score}", _format_interval(ours[score])) for score in scores)
                rows += ((row["setting"], checkpoints, *cells, "–") for cells in figures)
        if "failed" in row:
            rows.append((row["setting"], checkpoints, row["method"], "fails", "–"))
            continue
        default = "not finite" if row["default"] is None else _format_interval(row["default"])
        best = _format_interval(row["best"]) if row["best_fraction"] else "–"
        rows.append((row["setting"], checkpoints, row["method"], default, best))
    scope = (
        "linear datamodeling scores on the same checkpoints, subsets and queries. The best damping of a library is "
        "the best of several, chosen by the score itself; – where the default is best or no other was tried. EK-FAC "
        "and LoGra cover the Linear layers."
    )
    return compose(scope, format_table(*rows), format_environment(content))


def removal() -> str:
    content = read_results("removal")
    rows: list[Row] = [("setting", "runs", "removed rows", "score", "rise of the loss", "turned wrong", "same label")]
    for row in content["results"]:
        figures = (f"{row['overturned']} of {row['queries']}", f"{row['same_label']:.0%}")
        place = row["setting"], str(row["seeds"]), str(row["k"]), row["score"]
        rows.append((*place, _format_interval(row["rise"]), *figures))
    scope = (
        "retraining without the top rows of each query, with the mean loss of one or more training runs: the mean rise "
        "of the loss, the queries whose label falls below a probability of 1/2, and the share of the removed rows with "
        "the label of the query. The queries are the first with a probability above 1/2. Intervals are over the "
        "queries. Index of one run, D = 1,024, λ = 1/(ηT)."
    )
    return compose(scope, format_table(*rows), format_environment(content))


def true_recall_curvature() -> str:
    """Return how often the intervals of the true recall that a build predicts cover the measured one."""
    content = read_results("true_recall_curvature")
    groups: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    for cell in content["results"]["cases"]:
        groups[cell["rows"], cell["dim"]].append({**cell, **cell["build"]})
    rows: list[Row] = [("rows", "D", "measured in 10, 100, 1,000", "covered", "mean error", "largest")]
    for (n_rows, dim), found in groups.items():
        shares = {(cell["depth"], cell["side"]): cell["measured"] for cell in found}
        measured = ", ".join(
            " / ".join(f"{shares[depth, side]:.2f}" for side in ("proponents", "opponents"))
            for depth in sorted({depth for depth, _ in shares})
        )
        covered = mean(cell["lower"] <= cell["measured"] <= cell["upper"] for cell in found)
        errors = [cell["mean"] - cell["measured"] for cell in found]
        size = f"{mean(map(abs, errors)):.3f} ({mean(errors):+.3f})"
        rows.append((f"{n_rows:,}", f"{dim:,}", measured, f"{covered:.1%}", size, f"{max(map(abs, errors)):.3f}"))
    settings = content["settings"]
    scope = (
        f"MLP of MNIST, {settings['checkpoints']} checkpoints, `gauss-newton`; {settings['cases']} cases of each size "
        f"and D: random draws of {settings['queries']} of {settings['measured_queries']} queries and of the rows that "
        "are scored exactly. Measured: the share of the true top ten of all these queries (proponents / opponents) in "
        "the first rows of the stored ranking. Covered: it is within the predicted 95% interval. Error: predicted − "
        "measured, mean of the absolute values, and mean."
    )
    return compose(scope, format_table(*rows), format_environment(content))


def yardstick_cost() -> str:
    """Return the CPU time of builds with and without the measurement of true recall."""
    content = read_results("true_recall_curvature")
    names = [f"{score}{measured}" for score in ("tracin", "gauss-newton") for measured in ("", ", measured")]
    rows: list[Row] = [("rows", *names)]
    for result in content["results"]["builds"]:
        rows.append((f"{result['rows']:,}", *(f"{result['seconds'][name]:.1f} s" for name in names)))
    scope = (
        f"CPU time of a build of the same MLP with D = {content['results']['builds'][0]['dim']:,} by its default "
        "score, without (`--no-yardstick`) and with the measurement: of TracIn, or of TracIn and `gauss-newton`."
    )
    return compose(scope, format_table(*rows), format_environment(content))


TABLES = (lds, lds_dims, lds_summary, lds_peers, lds_published, removal, true_recall_curvature, yardstick_cost)
