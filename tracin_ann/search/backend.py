"""Which backend serves an index of a given size, and the sentence that says why."""

from __future__ import annotations

from dataclasses import dataclass

from tracin_ann.errors import UsageError, problem

KINDS = ("flat", "ivf")
FLAT_BELOW_ROWS = 100_000
"""Under this many rows a batched exact scan takes about as long as searching lists would."""


@dataclass(frozen=True)
class IndexChoice:
    """The backend and the reason for it, one sentence with the numbers."""

    kind: str
    reason: str

    def __post_init__(self) -> None:
        """Check that the kind is one of `KINDS`."""
        if self.kind not in KINDS:
            raise ValueError(f"IndexChoice of kind {self.kind!r}")


def choose_index(requested: str, n_rows: int, dim: int) -> IndexChoice:
    """Return the backend for `requested`: `flat`, `ivf`, or `auto` to choose by size.

    Raises:
        UsageError: another name.
    """
    size = f"{n_rows:,} rows of {dim:,} numbers ({n_rows * dim * 4 / 1e6:,.0f} MB)"
    if requested in KINDS:
        return IndexChoice(requested, f"{requested} was asked for, over {size}.")
    if requested != "auto":
        raise UsageError(
            problem("unknown index", got=repr(requested), expected="auto, flat or ivf", remedy="change --index")
        )
    if n_rows < FLAT_BELOW_ROWS:
        return IndexChoice("flat", f"{size}, under {FLAT_BELOW_ROWS:,}: an exact scan is fast enough.")
    return IndexChoice("ivf", f"{size}, {FLAT_BELOW_ROWS:,} or more: inverted lists score a small part of the rows.")
