"""Curves of known wrong labels: the share that a ranking finds by depth.

Shapes: N ranked rows.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from tracin_ann.analysis import ASKED, RANKINGS, By, find_mislabelled
from tracin_ann.errors import UsageError, problem
from tracin_ann.index import InfluenceIndex
from tracin_ann.types import Float64


@dataclass(frozen=True, eq=False)
class DetectionCurve:
    """Wrong rows found by a ranking.

    Attributes:
        found_N: the share of the wrong rows among the first 1, 2, ..., N rows, float64 [N].
        auc: the probability that a wrong row ranks before a right one: the area under the ROC curve.
    """

    found_N: Float64
    auc: float

    def found(self, share: float) -> float:
        """Return the share of the wrong rows that the first `share` of the ranked rows contains."""
        n_rows = round(share * len(self.found_N))
        return float(self.found_N[n_rows - 1]) if n_rows else 0.0


def compute_detection(rows: Sequence[int], wrong: Collection[int]) -> DetectionCurve:
    """Return the curve of a ranking.

    Args:
        rows: all ranked rows, the most suspicious first.
        wrong: the rows that are known to be wrong; those that are not ranked do not count.

    Raises:
        UsageError: no ranked row is wrong, or every one is.
    """
    is_wrong_N = np.isin(np.asarray(rows), list(wrong))
    n_wrong, n_right = int(is_wrong_N.sum()), int((~is_wrong_N).sum())
    if not n_wrong or not n_right:
        raise UsageError(
            problem(
                "no curve",
                got=f"{n_wrong} wrong and {n_right} right rows",
                expected="some of both",
                remedy="change the known wrong rows",
            )
        )
    found_N = is_wrong_N.cumsum() / n_wrong
    return DetectionCurve(found_N, float(found_N[~is_wrong_N].mean()))


def compare_rankings(
    index: InfluenceIndex, wrong: Collection[int], labels: str = "label", asked: int = ASKED
) -> dict[By, DetectionCurve]:
    """Return the curve of every ranking of `find_mislabelled`.

    Args:
        index: an open index.
        wrong: positions of the rows whose label is known to be wrong.
        labels: the column with the labels.
        asked: number of rows whose neighbours vote; rows beyond it rank after all others.

    Raises:
        UsageError: there is no such column, or no row of the index is known to be wrong.
    """
    return {
        by: compute_detection([suspect.row for suspect in find_mislabelled(index, labels, by=by, asked=asked)], wrong)
        for by in RANKINGS
    }
