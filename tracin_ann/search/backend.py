"""The choice of the search backend (exact scan or inverted lists) for an index of a given size."""

from __future__ import annotations

from dataclasses import dataclass

from tracin_ann.errors import UsageError, problem

KINDS = ("flat", "ivf")
_NAMES = {"flat": "exact scan", "ivf": "inverted lists (IVF)"}
FLAT_BELOW_ROWS = 100_000
"""With fewer rows, a batched exact scan takes about as long as a search of inverted lists."""


@dataclass(frozen=True)
class IndexChoice:
    """A backend and the reason for it: a phrase with the size of the index."""

    kind: str
    reason: str

    def __post_init__(self) -> None:
        """Check that the kind is one of `KINDS`."""
        if self.kind not in KINDS:
            raise ValueError(f"IndexChoice of kind {self.kind!r}")


def choose_index(requested: str, n_rows: int, dim: int) -> IndexChoice:
    """Return the backend for `requested`: `flat`, `ivf`, or `auto` to choose by the number of rows.

    Raises:
        UsageError: `requested` is another name.
    """
    if requested not in (*KINDS, "auto"):
        raise UsageError(
            problem("unknown index", got=repr(requested), expected="auto, flat or ivf", remedy="change --index")
        )
    chosen = "flat" if n_rows < FLAT_BELOW_ROWS else "ivf"
    kind = chosen if requested == "auto" else requested
    rule = {
        "flat": f"inverted lists are used from {FLAT_BELOW_ROWS:,} rows on",
        "ivf": f"an exact scan is used below {FLAT_BELOW_ROWS:,} rows",
    }[kind]
    why = rule if requested == "auto" else f"requested by --index {kind}"
    size = f"{n_rows:,} rows of {dim:,} numbers ({n_rows * dim * 4 / 1e6:,.0f} MB)"
    return IndexChoice(kind, f"{_NAMES[kind]}: {size}; {why}")
