"""Computation of feature rows from the examples of a task, with automatic batch sizes, canaries and audits.

A feature row stores, for one example, the sketches of its gradients at every checkpoint.
"""

from __future__ import annotations

from tracin_ann.features.audit import Auditor, AuditResult, BuildAudits, BuiltRows, audit_build, draw_places
from tracin_ann.features.autotune import (
    USUAL_SIZE,
    RunSettings,
    TuningRequest,
    measure_row_seconds,
    tune,
    warn_of_slower_bf16,
)
from tracin_ann.features.canaries import (
    CANARY_FILE,
    read_generation_canaries,
    read_kept_canaries,
    refuse_changed,
    write_canaries,
)
from tracin_ann.features.compatibility import IndexTask, load_index_task
from tracin_ann.features.extractor import FeatureExtractor, FeatureOptions, find_nonfinite, squared_norms
from tracin_ann.features.fingerprint import checkpoint_specs, library_versions, model_digest, parameter_specs
from tracin_ann.features.passes import LoadedModel, Passes, PassOptions
from tracin_ann.features.pipeline import Extraction, ExtractionResult, reading_costs_more

__all__ = [
    "AuditResult",
    "Auditor",
    "BuildAudits",
    "BuiltRows",
    "CANARY_FILE",
    "Extraction",
    "ExtractionResult",
    "FeatureExtractor",
    "FeatureOptions",
    "IndexTask",
    "LoadedModel",
    "PassOptions",
    "Passes",
    "RunSettings",
    "TuningRequest",
    "USUAL_SIZE",
    "audit_build",
    "checkpoint_specs",
    "draw_places",
    "find_nonfinite",
    "library_versions",
    "load_index_task",
    "measure_row_seconds",
    "model_digest",
    "parameter_specs",
    "read_generation_canaries",
    "read_kept_canaries",
    "reading_costs_more",
    "refuse_changed",
    "squared_norms",
    "tune",
    "warn_of_slower_bf16",
    "write_canaries",
]
