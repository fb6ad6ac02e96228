"""By which way candidates are found, lists or an exact scan, and the sentence that says why and what to believe."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tracin_ann.errors import UsageError, problem
from tracin_ann.scoring.answers import QueryOptions
from tracin_ann.search import Calibration, FlatIndex, IVFIndex, Point, SearchIndex
from tracin_ann.store import IndexRecord
from tracin_ann.types import Float32


@dataclass(frozen=True)
class Strategy:
    """An index set to search, why it, and which queries look like none that its recall was measured on."""

    index: SearchIndex
    how: str
    strange_Q: npt.NDArray[np.bool_] | None = None


def choose_strategy(
    record: IndexRecord,
    index: SearchIndex,
    scan: FlatIndex,
    queries_QF: Float32,
    options: QueryOptions,
    why_scan: str = "",
) -> Strategy:
    """Return the way for these queries.

    Args:
        record: what the manifest says of the index.
        index: the search index.
        scan: the exact scan of the same rows.
        queries_QF: the queries' features.
        options: `search` and `recall` are read.
        why_scan: why lists cannot serve; "" where they can.

    Raises:
        UsageError: a recall that the lists were not seen to reach, or lists of an index that has none.
    """
    calibration = record.calibration
    if calibration is None or not isinstance(index, IVFIndex) or why_scan:
        if options.search == "lists" or (options.recall is not None and why_scan):
            raise UsageError(
                problem(
                    "lists cannot serve this query",
                    got="--search lists" if options.search == "lists" else "--recall",
                    expected=why_scan or f"an index of lists (this one is {record.kind})",
                    remedy="drop the option: an exact scan finds all",
                )
            )
        return Strategy(
            scan if why_scan else index, f"exact scan of the stored rows{f' ({why_scan})' if why_scan else ''}"
        )
    if options.search == "scan":
        return Strategy(scan, "exact scan of the stored rows, as asked")
    asked = options.recall if options.recall is not None else calibration.target
    points, reached = _points(calibration, asked, explicit=options.recall is not None)
    n_queries = len(queries_QF)
    by_lists, by_scan = calibration.index_cost(*points).of(n_queries), calibration.scan.of(n_queries)
    costs = f"about {_short(by_lists)} by lists, {_short(by_scan)} by scan"
    if options.search == "auto" and by_scan <= by_lists:
        return Strategy(scan, f"exact scan of the stored rows: {n_queries} queries cost {costs}")
    proponents, opponents = points
    how = (
        f"lists, recall@10 of the stored ranking measured at {proponents.recall:.3f} for proponents, "
        f"{opponents.recall:.3f} for opponents (at least {proponents.lower:.3f}, {opponents.lower:.3f}); {costs}"
    )
    if not reached:
        how += f"; {asked:g} is out of the lists' reach: --search scan finds all"
    strange_Q = calibration.looks.find_outliers(index, queries_QF)
    if calibration.looks.is_shifted(index, queries_QF):
        strange_Q = np.ones(n_queries, dtype=bool)
        how += "; these queries are not distributed like those measured: recall may differ"
    return Strategy(index.at(proponents.setting, opponents.setting), how, strange_Q)


def _points(calibration: Calibration, asked: float, *, explicit: bool) -> tuple[tuple[Point, Point], bool]:
    """Return the points of both directions for a recall, and whether both reach it.

    Raises:
        UsageError: one does not, and the recall was asked for explicitly.
    """
    found = calibration.reaching("proponents", asked), calibration.reaching("opponents", asked)
    best = calibration.best("proponents"), calibration.best("opponents")
    if None not in found:
        return (found[0] or best[0], found[1] or best[1]), True
    if explicit:
        raise UsageError(
            problem(
                "a recall out of the lists' reach",
                got=f"--recall {asked:g}",
                expected=f"at most {min(point.lower for point in best):.3f}, the bound that was measured",
                remedy="lower --recall, or use --search scan, which finds all",
            )
        )
    return (found[0] or best[0], found[1] or best[1]), False


def _short(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.1f} s"
