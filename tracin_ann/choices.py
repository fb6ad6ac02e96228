"""Values that options accept: names of sketches, search strategies, precisions, formats and policies.

Commands list them in `--help` and in shell completion, so this module does not import torch.
"""

from __future__ import annotations

from typing import Literal

SideName = Literal["train", "query"]
Precision = Literal["fp32", "bf16"]
Norms = Literal["sketch", "exact"]
Preconditioner = Literal["none", "adam", "trackstar"]
Search = Literal["auto", "lists", "scan"]
OnNonfinite = Literal["error", "skip"]
Format = Literal["jsonl", "csv", "parquet"]
MemoryFormat = Literal["auto", "contiguous", "channels-last"]

PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")
NORMS: tuple[Norms, ...] = ("sketch", "exact")
PRECONDITIONERS: tuple[Preconditioner, ...] = ("none", "adam", "trackstar")
SEARCHES: tuple[Search, ...] = ("auto", "lists", "scan")
ON_NONFINITE: tuple[OnNonfinite, ...] = ("error", "skip")
FORMATS: tuple[Format, ...] = ("jsonl", "csv", "parquet")
MEMORY_FORMATS: tuple[MemoryFormat, ...] = ("auto", "contiguous", "channels-last")
SKETCH_NAMES = ("factored", "kronecker", "dense", "dense-gaussian")
