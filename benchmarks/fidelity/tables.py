"""Tables of sketched scores, preconditioners and curvature matrices beside true scores and retraining."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from statistics import mean, stdev

from benchmarks.common.markdown import SIDES, Row, compose, format_environment, format_table
from benchmarks.common.results import Results, read_results


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
        f"1024, λ = 1/(ηT); LDS against {settings['subsets']} random halves, {settings['seeds']} training runs each; "
        "mean over queries ± standard error. Rise: that of a query's loss after training without its best 50 of the "
        "200 candidates by the sketch, mean over the first queries that are right before; how many are then wrong."
    )
    return compose(scope, format_table(*rows), format_environment(content))


TABLES = (fidelity, preconditioners, curvature)
