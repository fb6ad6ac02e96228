"""Parameters of inverted lists (`IVFParams`) and settings of a search in them (`Setting`).

Shapes: N rows, F feature dimension, K results.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tracin_ann.errors import UsageError, problem
from tracin_ann.search.inverted_lists import CODES, Codes

_LISTS_PER_ROOT = 24
"""N rows have this many times √N lists (see docs/design.md)."""
_ROWS_PER_LIST = 8
_DEFAULT_WIDTH = 256
_CODES_PER_RESULT = 4


def check_fields(*fields: tuple[str, object, bool, str]) -> None:
    """Check fields, given as name, value, whether the value is valid, and the expected values.

    Raises:
        UsageError: a field is not valid.
    """
    for name, value, valid, expected in fields:
        if not valid:
            raise UsageError(problem(f"invalid {name}", got=value, expected=expected, remedy=f"change {name}"))


@dataclass(frozen=True)
class IVFParams:
    """Parameters of inverted lists.

    Attributes:
        nlist: approximate number of lists; None: 24·√N, with at least 8 rows per list.
        width: number of dimensions to which rows are reduced.
        codes: `sq8`, `sq4` or `fp16`.
        seed: seed of the training sample, the reduction and k-means.
        train_rows: number of training rows for k-means; None: 16 per list.
        shards: number of files over which the rows are split by their ids.
    """

    nlist: int | None = None
    width: int = _DEFAULT_WIDTH
    codes: Codes = "sq8"
    seed: int = 0
    train_rows: int | None = None
    shards: int = 1

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            UsageError: a field is out of range.
        """
        check_fields(
            ("nlist", self.nlist, self.nlist is None or self.nlist >= 1, "at least 1"),
            ("width", self.width, self.width >= 1, "at least 1"),
            ("codes", self.codes, self.codes in CODES, " or ".join(CODES)),
            ("seed", self.seed, self.seed >= 0, "0 or more"),
            ("train_rows", self.train_rows, self.train_rows is None or self.train_rows >= 1, "at least 1"),
            ("shards", self.shards, self.shards >= 1, "at least 1"),
        )

    def count_lists(self, n_rows: int) -> int:
        """Return the number of lists for N rows.

        Raises:
            UsageError: there are no rows, or fewer (training) rows than lists.
        """
        nlist = self.nlist or max(1, min(round(_LISTS_PER_ROOT * math.sqrt(n_rows)), n_rows // _ROWS_PER_LIST))
        n_training = min(n_rows, self.train_rows or n_rows)
        if n_training < nlist:
            raise UsageError(
                problem(
                    "too few rows for inverted lists",
                    got=f"{n_training} training rows",
                    expected=f"at least nlist = {nlist}",
                    remedy="use a flat index, fewer lists or more train_rows",
                )
            )
        return nlist

    def estimate_bytes(self, n_rows: int, dim: int) -> int:
        """Return the approximate size in bytes of the files for N rows of F numbers: codes, ids and centroids."""
        width = min(dim, self.width)
        per_row = {"sq8": width, "sq4": width / 2, "fp16": 2 * width}[self.codes] + 8
        return round(n_rows * per_row + self.count_lists(n_rows) * 4 * width)


@dataclass(frozen=True)
class Setting:
    """The setting of a search in one direction.

    Attributes:
        codes: budget of codes. Inverted lists: the coded rows that a query scores. Coded scan: the candidates that are
            scored again. Graph: `efSearch`, the best rows that a search keeps while it visits others.
        centroids: inverted lists: budget of list centroids that a query scores.
        alpha: inverted lists: weight of a list's radius in the estimate of its best score.
    """

    codes: int
    centroids: int = 1
    alpha: float = 0.0

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            UsageError: a field is out of range.
        """
        check_fields(
            ("codes", self.codes, self.codes >= 1, "at least 1"),
            ("centroids", self.centroids, self.centroids >= 1, "at least 1"),
            ("alpha", self.alpha, 0 <= self.alpha < math.inf, "a finite number, 0 or more"),
        )

    def scale_for_results(self, k: int) -> Setting:
        """Return the setting with budgets that suffice for k results; settings are calibrated for 10."""
        return Setting(max(self.codes, _CODES_PER_RESULT * k), max(self.centroids, _CODES_PER_RESULT * k), self.alpha)

    def scale_for_share(self, share: float) -> Setting:
        """Return the setting that scores as many allowed rows as this one, if only a share of the rows is allowed."""
        return Setting(math.ceil(self.codes / share), math.ceil(self.centroids / share), self.alpha)


def choose_default_setting(n_rows: int) -> Setting:
    """Return the setting for N rows before calibration: 4·√N rows and as many centroids, at least 1,000."""
    budget = max(1000, round(4 * math.sqrt(n_rows)))
    return Setting(budget, budget, 0.15)
