"""Tables of the plans of large builds, and of predictions beside measurements."""

from __future__ import annotations

from benchmarks.common.markdown import Row, compose, format_environment, format_table
from benchmarks.common.results import read_results
from benchmarks.scale_plan import format_plans


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


TABLES = (scale_check, scale_plan)
