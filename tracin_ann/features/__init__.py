"""Computation of feature rows from the examples of a task, with automatic batch sizes, canaries and audits.

A feature row stores, for one example, the sketches of its gradients at every checkpoint.
"""

from __future__ import annotations

from tracin_ann.features.audit import (
    Auditor,
    AuditResult,
    BuildAudits,
    UnpublishedRows,
    audit_build,
    audit_files,
    draw_places,
)
from tracin_ann.features.autotune import (
    DEFAULT_BATCH_SIZE,
    BatchSettings,
    TuningOptions,
    measure_row_seconds,
    tune,
    warn_of_slower_bf16,
)
from tracin_ann.features.canaries import (
    CANARY_FILE,
    check_canaries,
    read_generation_canaries,
    read_intact_canaries,
    write_canaries,
)
from tracin_ann.features.compatibility import IndexTask, check_spec, load_index_task
from tracin_ann.features.extractor import FeatureExtractor, FeatureOptions, find_nonfinite, group_by_rows, squared_norms
from tracin_ann.features.fingerprint import (
    checkpoint_specs,
    data_digest,
    library_versions,
    model_digest,
    parameter_specs,
)
from tracin_ann.features.loaded_model import LoadedModel
from tracin_ann.features.pipeline import Extraction, ExtractionResult, reading_costs_more
from tracin_ann.features.runner import TaskRunner
from tracin_ann.features.task_data import RunOptions

__all__ = [
    "AuditResult",
    "Auditor",
    "BatchSettings",
    "BuildAudits",
    "CANARY_FILE",
    "DEFAULT_BATCH_SIZE",
    "Extraction",
    "ExtractionResult",
    "FeatureExtractor",
    "FeatureOptions",
    "IndexTask",
    "LoadedModel",
    "RunOptions",
    "TaskRunner",
    "TuningOptions",
    "UnpublishedRows",
    "audit_build",
    "audit_files",
    "check_canaries",
    "check_spec",
    "checkpoint_specs",
    "data_digest",
    "draw_places",
    "find_nonfinite",
    "group_by_rows",
    "library_versions",
    "load_index_task",
    "measure_row_seconds",
    "model_digest",
    "parameter_specs",
    "read_generation_canaries",
    "read_intact_canaries",
    "reading_costs_more",
    "squared_norms",
    "tune",
    "warn_of_slower_bf16",
    "write_canaries",
]
