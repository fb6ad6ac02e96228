"""Table of the true scores that features as codes find."""

from __future__ import annotations

import itertools
import textwrap

from benchmarks.common.markdown import SIDES, WIDTH, Row, compose, format_environment, format_table
from benchmarks.common.results import read_results

_EQUAL_BYTES, _EQUAL_DIM = ((512, 520), (136,)), 1024
"""Codes have 8 bytes of factors."""
_NAMES = {"language": "GPT", "mnist": "MNIST CNN"}


def codes() -> str:
    """Return what features as codes find, at equal bytes and at equal D."""
    content = read_results("codes")
    head = ("model", "D", "features", "bytes", "proponents", "opponents", "error", "in bars")
    by_bytes: list[list[Row]] = [[] for _ in _EQUAL_BYTES]
    by_dim: list[Row] = [(*head, "curvature", "correlation")]
    for row in content["results"]:
        shares = ("/".join(f"{share:.3f}" for share in row[side]) for side in SIDES)
        first = (_NAMES[row["model"]], f"{row['dim']:,}", row["dtype"], f"{row['bytes']:,}", *shares)
        cells = (*first, f"{row['error']:.2f}", f"{row['error_in_bars']:.2f}")
        for rows, n_bytes in zip(by_bytes, _EQUAL_BYTES, strict=True):
            if row["bytes"] in n_bytes:
                rows.append(cells)
        if row["dim"] == _EQUAL_DIM:
            damped = (row["curvature_error_without_rounding"], row["damped_correlation"])
            by_dim.append((*cells, *(f"{figure:.3f}" for figure in damped)))
    settings = content["settings"]
    scope = (
        f"{settings['rows']:,} rows, {settings['queries']} queries, sketches of all parameters and checkpoints. Bytes: "
        "of a row at one checkpoint, factors included. Proponents, opponents: share of the true top ten in the first "
        "10/100/1,000 rows of the stored ranking. Error: root mean square of stored − true scores, as a share of that "
        "of true scores; in bars: in standard deviations that follow from the norms of the stored rows."
    )
    second = (
        "Features of the same D. Curvature: relative error of the second moment of the stored features, without what "
        "rounding adds to all eigenvalues (Frobenius norm). Correlation: of scores with its inverse (fisher) and those "
        "of the same sketch in float32, mean over queries; last checkpoint."
    )
    tables = [format_table(head, *itertools.chain(*by_bytes)), textwrap.fill(second, WIDTH), format_table(*by_dim)]
    return compose(scope, *tables, format_environment(content))


TABLES = (codes,)
