"""The choice between inverted lists and an exact scan, by costs of synthetic calibrations."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from tracin_ann import QueryOptions
from tracin_ann.errors import UsageError
from tracin_ann.files.json_records import read_record
from tracin_ann.scoring.strategy import Strategy, choose_strategy
from tracin_ann.search import Calibration, FirstUseCost, FlatIndex, IVFIndex, IVFParams, Point, SearchIndex
from tracin_ann.search.bounded_scan import BoundedScan, BoundedScanParams
from tracin_ann.search.calibration import Cost
from tracin_ann.search.query_distribution import QueryDistribution
from tracin_ann.store import IndexRecord
from tracin_ann.types import Float32, Int64, PendingReads

CPU = torch.device("cpu")
N, DIM = 400, 6
LOOKS = QueryDistribution((-9.0, 9.0), (-9.0, 9.0), (100,))
COSTS = st.floats(1e-6, 1.0)


@dataclass
class PartlyReadRows:
    """Rows of which some files are not open yet."""

    rows: Float32
    pending: PendingReads = PendingReads()

    @property
    def dim(self) -> int:
        return self.rows.shape[1]

    def __len__(self) -> int:
        return len(self.rows)

    def blocks(self, block_rows: int, start: int = 0) -> Iterator[tuple[Int64, Float32]]:
        for at in range(start, len(self), block_rows):
            yield np.arange(at, min(at + block_rows, len(self))), self.rows[at : at + block_rows]

    def take(self, ids: Sequence[int] | Int64) -> Float32:
        return self.rows[np.asarray(ids)]

    def pending_reads(self) -> PendingReads:
        return self.pending


ROWS = PartlyReadRows(np.random.default_rng(0).standard_normal((N, DIM)).astype(np.float32))
LISTS = IVFIndex.build(ROWS, IVFParams(), CPU)
BOUNDS = BoundedScan.build(ROWS, BoundedScanParams(), CPU)


def point(seconds: float, lower: float = 0.96) -> Point:
    return Point(100, 100, 0.1, lower + 0.01, lower, 0.9, 200.0, seconds)


def calibrated(scan: Cost, lists: Cost, first_use: FirstUseCost | None = None) -> Calibration:
    """Return a calibration with these costs of both directions together."""
    points = (point(lists.each / 2),)
    return Calibration(0.95, 100, 0, points, points, scan, lists.fixed, LOOKS, 1.0, first_use or FirstUseCost())


def choose(
    calibration: Calibration,
    n_queries: int = 1,
    pending: PendingReads | None = None,
    options: QueryOptions | None = None,
) -> Strategy:
    record = IndexRecord("ivf", "", (), calibration, "sq8")
    scan = FlatIndex(replace(ROWS, pending=pending or PendingReads()), CPU)
    return choose_strategy(record, LISTS, scan, np.ones((n_queries, DIM), np.float32), options or QueryOptions())


def test_the_search_with_the_lower_cost_is_chosen() -> None:
    slow, fast = Cost(0.5, 0.1), Cost(0.0, 0.001)
    assert choose(calibrated(fast, slow)).index.kind == "flat"
    assert choose(calibrated(slow, fast)).index.kind == "ivf"
    assert choose(calibrated(fast, fast)).index.kind == "flat"


def test_many_queries_are_searched_in_lists_with_a_high_fixed_cost() -> None:
    calibration = calibrated(Cost(0.001, 0.010), Cost(0.100, 0.001))
    assert [choose(calibration, n).index.kind for n in (1, 11, 12, 1000)] == ["flat", "flat", "ivf", "ivf"]


@given(COSTS, COSTS, COSTS, COSTS)
@example(1e-6 * (1 + 2**-52), 1e-6 * (1 + 2**-52), 1e-6, 1e-6 * (1 + 2**-52))
def test_the_choice_changes_at_most_once_as_queries_are_added(a: float, b: float, c: float, d: float) -> None:
    calibration = calibrated(Cost(a, b), Cost(c, d))
    chosen = [choose(calibration, n).index.kind for n in (1, 2, 5, 10, 30, 100, 300)]
    assert sum(one != other for one, other in zip(chosen, chosen[1:], strict=False)) <= 1


def test_a_scan_that_has_to_verify_rows_is_not_chosen() -> None:
    calibration = calibrated(Cost(0.001, 0.001), Cost(0.002, 0.002), FirstUseCost(0.001, 1e-9))
    assert choose(calibration).index.kind == "flat"
    assert choose(calibration, pending=PendingReads(0, 10**7)).index.kind == "ivf"
    # From ten queries on, verification costs less than the lists.
    assert choose(calibration, 10, PendingReads(0, 10**7)).index.kind == "flat"


def test_files_are_opened_for_all_rows_of_a_scan_and_for_the_candidates_of_lists() -> None:
    calibration = calibrated(Cost(0.001, 0.001), Cost(0.002, 0.002), FirstUseCost(0.001, 0.0))
    # Two directions with 40 candidates: one query reads at most 80 rows, each from two files.
    all_rows = 2 * 40 * 2
    assert LISTS.most_rows_read(1, 10) == 80
    assert choose(calibration, pending=PendingReads(all_rows, 0, 2)).index.kind == "flat"
    assert choose(calibration, pending=PendingReads(all_rows + 3, 0, 2)).index.kind == "ivf"
    assert choose(calibration, 2, PendingReads(all_rows + 3, 0, 2)).index.kind == "flat"
    exact = QueryOptions(rerank="exact", candidates=200)
    assert choose(calibration, pending=PendingReads(all_rows + 3, 0, 2), options=exact).index.kind == "flat"


@pytest.mark.parametrize(
    ("kind", "score", "expected"),
    [
        ("ivf", "tracin", "the score tracin over all checkpoints"),
        ("codes", "gauss-newton", "the score gauss-newton with the default damping over all checkpoints"),
        ("bounds", "gauss-newton", "the score tracin or fisher or gauss-newton or trak over all checkpoints"),
        ("flat", "tracin", "an index with codes, such as ivf"),
    ],
)
def test_the_error_of_a_score_that_the_index_does_not_serve_names_those_that_it_does(
    kind: str, score: str, expected: str
) -> None:
    scan = FlatIndex(ROWS, CPU)
    index: SearchIndex = {"bounds": BOUNDS, "flat": scan}.get(kind, LISTS)
    calibration = None if kind == "flat" else calibrated(Cost(0.5, 0.1), Cost(0.0, 0.001))
    record = IndexRecord(kind, "", (), calibration, score=score)
    query_1F, options = np.ones((1, DIM), np.float32), QueryOptions(search="index")
    with pytest.raises(UsageError, match=f"got --search index and the score cosine, expected {expected}; remove"):
        choose_strategy(record, index, scan, query_1F, options, "the score cosine")


def test_the_estimates_of_an_answer_include_the_first_use() -> None:
    calibration = calibrated(Cost(0.001, 0.001), Cost(0.002, 0.001), FirstUseCost(0.001, 1e-9))
    lists = QueryOptions(search="lists")
    assert "(estimated times: inverted lists 3.0 ms, exact scan 2.0 ms)" in choose(calibration, options=lists).how
    pending = PendingReads(10, 10**7, 2)
    how = choose(calibration, pending=pending, options=lists).how
    assert "(estimated times: inverted lists 13.0 ms, exact scan 22.0 ms)" in how


def test_costs_of_other_recalls_are_scaled_by_the_measured_ratio() -> None:
    points = point(0.001, 0.90), point(0.003, 0.96), point(0.010, 0.99)
    calibration = Calibration(0.95, 100, 0, points, points, Cost(0.0, 0.007), 0.0, LOOKS, 0.5)
    seconds = [
        calibration.index_cost(*(calibration.fastest_point(side, recall) for side in ("proponents", "opponents"))).each  # type: ignore[arg-type]
        for recall in (0.9, 0.95, 0.98)
    ]
    assert seconds == pytest.approx([0.001, 0.003, 0.010])
    assert [choose(calibration, options=QueryOptions(recall=r)).index.kind for r in (0.9, 0.98)] == ["ivf", "flat"]
    assert calibration.usual_point("proponents") is points[1]
    assert replace(calibration, target=0.999).usual_point("opponents") is points[2]


def test_calibrations_are_read_back_and_those_of_earlier_versions_have_no_first_use() -> None:
    calibration = replace(calibrated(Cost(1, 2), Cost(3, 4), FirstUseCost(0.25, 0.5)), both_ratio=0.75)
    content = json.loads(json.dumps(asdict(calibration)))
    assert read_record(Calibration, content) == calibration
    del content["both_ratio"], content["first_use"]
    earlier = read_record(Calibration, content)
    assert earlier == replace(calibration, both_ratio=1.0, first_use=FirstUseCost())
    unread = PendingReads(1000, 10**12)
    assert earlier.index_cost(*earlier.proponents, *earlier.opponents) == Cost(3, 4)
    assert choose(earlier, pending=unread).how == choose(earlier).how
