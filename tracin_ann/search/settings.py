"""How inverted lists are built, and how one direction of them is searched.

Shapes: N rows, F feature dimension.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tracin_ann.errors import UsageError, problem
from tracin_ann.search.inverted_lists import CODES, Codes

_LISTS_PER_ROOT = 24
"""Lists for N rows are this many times √N: docs/design.md."""
_ROWS_PER_LIST = 8
_DEFAULT_WIDTH = 256
_CODES_PER_RESULT = 4


@dataclass(frozen=True)
class IVFParams:
    """How lists are built.

    Attributes:
        nlist: number of lists, about; None: 24·√N, with at least 8 rows a list.
        width: dimensions that rows are reduced to.
        codes: `sq8`, `sq4` or `fp16`.
        seed: of the training sample, the reduction and k-means.
        train_rows: rows k-means learns from; None: 16 a list.
    """

    nlist: int | None = None
    width: int = _DEFAULT_WIDTH
    codes: Codes = "sq8"
    seed: int = 0
    train_rows: int | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be built.

        Raises:
            UsageError: a field out of its range.
        """
        for name, value, fine, expected in (
            ("nlist", self.nlist, self.nlist is None or self.nlist >= 1, "at least 1"),
            ("width", self.width, self.width >= 1, "at least 1"),
            ("codes", self.codes, self.codes in CODES, " or ".join(CODES)),
            ("seed", self.seed, self.seed >= 0, "0 or more"),
            ("train_rows", self.train_rows, self.train_rows is None or self.train_rows >= 1, "at least 1"),
        ):
            if not fine:
                raise UsageError(problem(f"bad {name}", got=value, expected=expected, remedy=f"change {name}"))

    def lists_for(self, n_rows: int) -> int:
        """Return the number of lists for N rows.

        Raises:
            UsageError: there are no rows, or fewer rows (or training rows) than lists.
        """
        nlist = self.nlist or max(1, min(round(_LISTS_PER_ROOT * math.sqrt(n_rows)), n_rows // _ROWS_PER_LIST))
        learnt_from = min(n_rows, self.train_rows or n_rows)
        if learnt_from < nlist:
            raise UsageError(
                problem(
                    "too few rows for the lists",
                    got=f"{learnt_from} rows to train on",
                    expected=f"at least nlist = {nlist}",
                    remedy="use a flat index, fewer lists or more train_rows",
                )
            )
        return nlist

    def bytes_for(self, n_rows: int, dim: int) -> int:
        """Return about how large the files of N rows of F numbers are: codes and ids, centroids."""
        width = min(dim, self.width)
        a_row = {"sq8": width, "sq4": width / 2, "fp16": 2 * width}[self.codes] + 8
        return round(n_rows * a_row + self.lists_for(n_rows) * 4 * width)


@dataclass(frozen=True)
class Setting:
    """How one direction is searched.

    Attributes:
        codes: coded rows that a query may score.
        centroids: list centroids that a query may score.
        alpha: weight of a list's radius in its worth.
    """

    codes: int
    centroids: int
    alpha: float

    def __post_init__(self) -> None:
        """Refuse what cannot be searched.

        Raises:
            UsageError: a field out of its range.
        """
        for name, value, fine in (
            ("codes", self.codes, self.codes >= 1),
            ("centroids", self.centroids, self.centroids >= 1),
            ("alpha", self.alpha, 0 <= self.alpha < math.inf),
        ):
            if not fine:
                raise UsageError(problem(f"bad {name}", got=value, expected="more", remedy=f"change {name}"))

    def holding(self, k: int) -> Setting:
        """Return the setting with room for k results: settings are measured for ten."""
        return Setting(max(self.codes, _CODES_PER_RESULT * k), max(self.centroids, _CODES_PER_RESULT * k), self.alpha)

    def widened(self, share: float) -> Setting:
        """Return the setting that reaches as many rows of a share as this does of all."""
        return Setting(math.ceil(self.codes / share), math.ceil(self.centroids / share), self.alpha)


def choose_default_setting(n_rows: int) -> Setting:
    """Return a setting for N rows before anything is calibrated: 4·√N rows, and as many centroids, 1,000 at least."""
    budget = max(1000, round(4 * math.sqrt(n_rows)))
    return Setting(budget, budget, 0.15)
