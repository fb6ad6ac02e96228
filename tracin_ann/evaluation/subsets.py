"""Subsets of the training rows that a model is retrained on: random fractions, and all rows but one.

Shapes: N rows to draw from, K rows of a subset.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from tracin_ann.errors import UsageError, problem
from tracin_ann.types import Int64

FRACTION = 0.5
"""Share of the rows in a subset (Park et al. 2023)."""


def draw_subsets(row_N: Int64, n: int, fraction: float = FRACTION, seed: int = 0) -> list[Int64]:
    """Return n random subsets of the rows, each a share of them without replacement.

    A subset depends on its number and the seed only: the first subsets of a longer list are those of a shorter one.

    Args:
        row_N: positions in train_data, int64 [N].
        n: number of subsets.
        fraction: share of the rows in each, rounded to whole rows.
        seed: seed of the draw.

    Returns:
        n arrays of ascending positions, int64 [K].

    Raises:
        UsageError: n is below 1, or a subset would be empty or hold all rows.
    """
    _require_positive("--subsets", n)
    size = round(fraction * len(row_N))
    if not 0 < size < len(row_N):
        raise UsageError(
            problem(
                "bad --fraction",
                got=f"{fraction}, {size} of {len(row_N)} rows",
                expected="a share that leaves rows in and out",
                remedy="change --fraction",
            )
        )
    return [np.sort(_generator(seed, number).choice(row_N, size, replace=False)) for number in range(n)]


def draw_leave_one_out(row_N: Int64, n: int, seed: int = 0) -> list[Int64]:
    """Return n subsets that hold all rows but one; the rows left out are drawn without replacement.

    With such subsets, the linear datamodeling score is the rank correlation of leave-one-out retraining.

    Raises:
        UsageError: n is below 1, or there are not more rows than subsets.
    """
    _require_positive("--subsets", n)
    if n >= len(row_N):
        raise UsageError(
            problem("bad --subsets", got=n, expected=f"fewer than the {len(row_N)} rows", remedy="change --subsets")
        )
    return [np.setdiff1d(row_N, [row]) for row in _generator(seed, 0).choice(row_N, n, replace=False)]


def digest_rows(rows: Sequence[int] | Int64) -> str:
    """Return a digest of a set of rows, whatever their order."""
    content = np.sort(np.asarray(rows)).astype("<i8").tobytes()
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _generator(seed: int, number: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, number]))


def _require_positive(option: str, value: int) -> None:
    if value < 1:
        raise UsageError(problem(f"bad {option}", got=value, expected="1 or more", remedy=f"change {option}"))
