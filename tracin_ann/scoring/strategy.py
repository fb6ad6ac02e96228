"""The choice between the search index and an exact scan for a query, with the reason and the expected recall.

The choice uses the times and the recall that the build measured (`search.calibration`), and for a scan on GPUs the
rates that the open index measures. The times of the first searches of an open index include the files to open and, for
a scan, the rows to verify.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tracin_ann.choices import CURVATURES
from tracin_ann.errors import UsageError, problem
from tracin_ann.scoring.options import QueryOptions
from tracin_ann.search import NAMES, CalibratedIndex, Calibration, Cost, FlatIndex, GpuScan, Point, SearchIndex
from tracin_ann.store import IndexRecord
from tracin_ann.types import Float32

_SCAN = "exact scan of the stored rows"


@dataclass(frozen=True)
class Strategy:
    """The search strategy of some queries.

    Attributes:
        index: the index to search, with its settings.
        how: the strategy, the reason for it, and the expected recall, as text for users.
        unlike_Q: which queries are unlike the calibration queries [Q]; None: not applicable.
        recall: expected recall@10 of the stored ranking, of proponents and of opponents.
    """

    index: SearchIndex
    how: str
    unlike_Q: npt.NDArray[np.bool_] | None = None
    recall: tuple[float, float] = (1.0, 1.0)


def choose_strategy(
    record: IndexRecord,
    index: SearchIndex,
    scan: FlatIndex | GpuScan,
    queries_QF: Float32,
    options: QueryOptions,
    unsupported: str = "",
) -> Strategy:
    """Return the search strategy for these queries.

    With `--search auto`, the strategy with the shorter estimated time is chosen.

    Args:
        record: the manifest's record of the index.
        index: the search index.
        scan: the exact scan of the rows that are scored.
        queries_QF: the queries' features.
        options: `search` and `recall` are used.
        unsupported: the requested scoring that the index does not support; "" if it supports it.

    Raises:
        UsageError: the options require an index that cannot be used, or a recall that it does not reach.
    """
    calibration = record.calibration
    if calibration is None or not isinstance(index, CalibratedIndex) or unsupported:
        _check_index_not_required(record, index, options, unsupported)
        if not unsupported:
            return Strategy(index, _SCAN)
        if calibration is None:
            return Strategy(scan, _SCAN)
        return Strategy(scan, f"{_SCAN}, recall@10 1.000 ({NAMES[record.kind]}: not for {unsupported})")
    if options.search == "scan":
        return Strategy(scan, f"{_SCAN}, as requested")
    target = options.recall if options.recall is not None else calibration.target
    (proponents, opponents), is_reached = _choose_points(calibration, target, explicit=options.recall is not None)
    n_queries = len(queries_QF)
    pending, n_rows = scan.pending_reads(), index.most_rows_read(n_queries, options.n_candidates)
    index_cost = calibration.index_cost(proponents, opponents)
    measured_s = scan.estimate_seconds(n_queries, options.n_candidates) if isinstance(scan, GpuScan) else None
    scan_cost = calibration.scan if measured_s is None else Cost(measured_s, 0.0)
    index_first_s = calibration.first_use.take_seconds(pending, n_rows)
    scan_first_s = calibration.first_use.scan_seconds(pending)
    index_s = index_cost.seconds(n_queries) + index_first_s
    scan_s = scan_cost.seconds(n_queries) + scan_first_s
    # Not scan_s <= index_s: where the costs are nearly equal, rounding of the sums would decide, differently for each
    # number of queries.
    is_scan_faster = (scan_cost - index_cost).seconds(n_queries) + (scan_first_s - index_first_s) <= 0
    times = f"{index.name} {_format_time(index_s)}, exact scan {_format_time(scan_s)}"
    reason = f"estimated to be faster for {n_queries:,} {'query' if n_queries == 1 else 'queries'} ({times})"
    if options.search == "auto" and is_scan_faster:
        return Strategy(scan, f"{_SCAN}, {reason}")
    if options.search != "auto":
        reason = f"as requested (estimated times: {times})"
    how = f"{index.name}, {reason}"
    if not index.is_exact:
        how += (
            f"; expected recall@10 of the stored ranking: {proponents.recall:.3f} for proponents, "
            f"{opponents.recall:.3f} for opponents (lower bounds {proponents.lower:.3f}, {opponents.lower:.3f})"
        )
    if not is_reached:
        how += f"; below the target recall of {target:g}, --search scan finds all rows"
    comparison = calibration.looks.compare(index, queries_QF)
    unlike_Q = comparison.outlier_Q
    if comparison.is_shifted:
        unlike_Q = np.ones(n_queries, dtype=bool)
        how += "; the distribution of these queries differs from the calibration queries: recall may differ"
    settled = index.with_settings(proponents.setting, opponents.setting)
    return Strategy(settled, how, unlike_Q, (proponents.recall, opponents.recall))


def _check_index_not_required(record: IndexRecord, index: SearchIndex, options: QueryOptions, unsupported: str) -> None:
    """Check that the options do not require the index, which cannot be used.

    Raises:
        UsageError: they require it.
    """
    if options.search in ("index", "lists"):
        option = f"--search {options.search}"
    elif options.recall is not None and unsupported:
        option = f"--recall {options.recall:g}"
    else:
        return
    raise UsageError(
        problem(
            "the search index cannot be used for this query",
            got=f"{option} and {unsupported}" if unsupported else f"{option} for an index of kind {record.kind}",
            expected=_describe_served_scores(record, index),
            remedy="remove the option: an exact scan finds all rows",
        )
    )


def _describe_served_scores(record: IndexRecord, index: SearchIndex) -> str:
    """Return the scores that the index can be searched for, as text for users; if there are none, another index."""
    if not isinstance(index, CalibratedIndex) or record.calibration is None:
        return "an index with codes, such as ivf"
    if index.is_exact:
        return f"the score {' or '.join(('tracin', *CURVATURES))} over all checkpoints"
    damping = " with the default damping" if record.score in CURVATURES else ""
    return f"the score {record.score}{damping} over all checkpoints"


def _choose_points(calibration: Calibration, target: float, *, explicit: bool) -> tuple[tuple[Point, Point], bool]:
    """Return the settings of both directions for a recall, and whether both reach it.

    Raises:
        UsageError: one does not reach it, and the recall was requested explicitly.
    """
    best = calibration.best("proponents"), calibration.best("opponents")
    proponents, opponents = (
        calibration.fastest_point("proponents", target),
        calibration.fastest_point("opponents", target),
    )
    is_reached = proponents is not None and opponents is not None
    if explicit and not is_reached:
        raise UsageError(
            problem(
                "the search index does not reach this recall",
                got=f"--recall {target:g}",
                expected=f"at most {min(point.lower for point in best):.3f}, the lower bound that the build measured",
                remedy="lower --recall, or use --search scan, which finds all rows",
            )
        )
    return (proponents or best[0], opponents or best[1]), is_reached


def _format_time(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.1f} s"
