"""Words of the commands: what their options take, and sizes and times as people read them. It imports nothing heavy.

Commands list these in `--help` and complete them in a shell; neither may wait for torch to be imported.
"""

from __future__ import annotations

from typing import Literal

Search = Literal["auto", "lists", "scan"]
OnNonfinite = Literal["error", "skip"]
Format = Literal["jsonl", "csv", "parquet"]
MemoryFormat = Literal["auto", "contiguous", "channels-last"]

SEARCHES: tuple[Search, ...] = ("auto", "lists", "scan")
ON_NONFINITE: tuple[OnNonfinite, ...] = ("error", "skip")
FORMATS: tuple[Format, ...] = ("jsonl", "csv", "parquet")
MEMORY_FORMATS: tuple[MemoryFormat, ...] = ("auto", "contiguous", "channels-last")
SKETCH_NAMES = ("factored", "kronecker", "dense", "dense-gaussian")


def duration(seconds: float) -> str:
    """Return seconds as people read them: 41 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:  # noqa: PLR2004
        return f"{whole} s"
    if whole < 3600:  # noqa: PLR2004
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def sized(n_bytes: float) -> str:
    """Return a number of bytes as people read it."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if n_bytes < 1000:  # noqa: PLR2004
            return f"{n_bytes:.0f} {unit}" if unit == "bytes" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.1f} TB"
