"""Subsets of training rows: sizes, rows, independence of how many are drawn."""

from __future__ import annotations

import numpy as np
import pytest

from tracin_ann.errors import UsageError
from tracin_ann.evaluation import draw_leave_one_out, draw_subsets
from tracin_ann.evaluation.subsets import digest_rows

ROWS = np.array([1, 3, 4, 8, 9, 20, 31], dtype=np.int64)


def test_subsets_are_shares_of_the_rows_without_replacement() -> None:
    for rows in draw_subsets(ROWS, 40, 0.4):
        assert len(rows) == 3
        assert rows.tolist() == sorted(set(rows.tolist()) & set(ROWS.tolist()))


def test_a_longer_list_begins_with_the_shorter_one_and_seeds_differ() -> None:
    few, many, other = draw_subsets(ROWS, 3), draw_subsets(ROWS, 9), draw_subsets(ROWS, 9, seed=1)
    assert [rows.tolist() for rows in few] == [rows.tolist() for rows in many[:3]]
    assert [rows.tolist() for rows in other] != [rows.tolist() for rows in many]
    assert len({digest_rows(rows) for rows in many}) > 5


def test_every_row_is_in_its_share_of_the_subsets() -> None:
    n, rows = 4000, np.arange(10)
    count = np.bincount(np.concatenate(draw_subsets(rows, n, 0.3)), minlength=10)
    assert np.abs(count - 0.3 * n).max() < 4 * np.sqrt(n * 0.3 * 0.7)


def test_leave_one_out_leaves_out_distinct_rows() -> None:
    subsets = draw_leave_one_out(ROWS, 6)
    missing = [set(ROWS.tolist()) - set(rows.tolist()) for rows in subsets]
    assert [len(rows) for rows in missing] == [1] * 6
    assert len(set.union(*missing)) == 6


def test_the_digest_is_that_of_the_set() -> None:
    assert digest_rows([3, 1]) == digest_rows(np.array([1, 3])) != digest_rows([1, 4])


@pytest.mark.parametrize(("n", "fraction"), [(0, 0.5), (2, 0.0), (2, 1.0), (2, 0.01), (2, 1.5)])
def test_empty_and_full_subsets_are_rejected(n: int, fraction: float) -> None:
    with pytest.raises(UsageError, match="bad --"):
        draw_subsets(ROWS, n, fraction)


@pytest.mark.parametrize("n", [0, 7])
def test_more_rows_than_there_are_cannot_be_left_out(n: int) -> None:
    with pytest.raises(UsageError, match="bad --subsets"):
        draw_leave_one_out(ROWS, n)
