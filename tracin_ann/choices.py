"""Values that options accept: names of sketches, search strategies, precisions, formats and policies.

Commands list them in `--help` and in shell completion, so this module does not import torch.
"""

from __future__ import annotations

from typing import Literal

SideName = Literal["train", "query", "input"]
"""Where an example is from: train_data, query_data, or the examples that a caller gives, which are not in the index."""
Precision = Literal["fp32", "bf16"]
Norms = Literal["sketch", "exact"]
Dtype = Literal["float16", "float32", "int8", "int4", "int2", "int1"]
"""How features are stored: as numbers, or as codes of 8 to 1 bits."""
Preconditioner = Literal["none", "adam", "trackstar"]
IndexKind = Literal["auto", "flat", "ivf", "codes", "bounds", "graph"]
Search = Literal["auto", "index", "lists", "scan"]
CurvatureName = Literal["fisher", "gauss-newton", "trak"]
ScoreName = Literal["tracin", "cosine", "fisher", "gauss-newton", "trak", "trackstar"]
EvaluationProtocol = Literal["lds", "leave-one-out", "removal", "tail-patch"]
OnNonfinite = Literal["error", "skip"]
Format = Literal["jsonl", "csv", "parquet"]
MemoryFormat = Literal["auto", "contiguous", "channels-last"]

SIDE_NAMES: dict[SideName, str] = {"train": "train_data", "query": "query_data", "input": "the given examples"}
"""Names of the sides for messages."""
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")
DTYPES: tuple[Dtype, ...] = ("float16", "float32", "int8", "int4", "int2", "int1")
NORMS: tuple[Norms, ...] = ("sketch", "exact")
PRECONDITIONERS: tuple[Preconditioner, ...] = ("none", "adam", "trackstar")
INDEX_KINDS: tuple[IndexKind, ...] = ("auto", "flat", "ivf", "codes", "bounds", "graph")
SEARCHES: tuple[Search, ...] = ("auto", "index", "lists", "scan")
"""`lists` is the earlier name of `index`."""
CURVATURES: tuple[CurvatureName, ...] = ("fisher", "gauss-newton", "trak")
SCORES: tuple[ScoreName, ...] = ("tracin", "cosine", *CURVATURES, "trackstar")
DAMPED_SCORES: tuple[ScoreName, ...] = (*CURVATURES, "trackstar")
"""The scores that use the inverse of a curvature matrix."""
RETRAINING_PROTOCOLS: tuple[EvaluationProtocol, ...] = ("lds", "leave-one-out", "removal")
EVALUATION_PROTOCOLS: tuple[EvaluationProtocol, ...] = (*RETRAINING_PROTOCOLS, "tail-patch")
ON_NONFINITE: tuple[OnNonfinite, ...] = ("error", "skip")
FORMATS: tuple[Format, ...] = ("jsonl", "csv", "parquet")
MEMORY_FORMATS: tuple[MemoryFormat, ...] = ("auto", "contiguous", "channels-last")
SKETCH_NAMES = ("factored", "kronecker", "dense", "dense-gaussian")
