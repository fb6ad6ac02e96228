"""Features: batches to feature rows, over partitions and checkpoints, tuned, and checked by canaries and audits."""

from __future__ import annotations

from tracin_ann.features.audit import Audited, Auditor, Built, audit_build, draw_places
from tracin_ann.features.autotune import USUAL_SIZE, Tuned, Wanted, measure_row_seconds, tune, warn_of_slower_bf16
from tracin_ann.features.canaries import CANARY_FILE, canaries_of, kept_canaries, refuse_changed, write_canaries
from tracin_ann.features.compatibility import Fitting, found_task
from tracin_ann.features.extractor import FeatureExtractor, FeatureOptions, squared_norms, unsound
from tracin_ann.features.fingerprint import checkpoint_specs, library_versions, model_digest, parameter_specs
from tracin_ann.features.passes import LoadedModel, Passes, PassOptions
from tracin_ann.features.pipeline import Extracted, Extraction, data_is_dearer

__all__ = [
    "Audited",
    "Auditor",
    "Built",
    "CANARY_FILE",
    "Extracted",
    "Extraction",
    "FeatureExtractor",
    "FeatureOptions",
    "Fitting",
    "LoadedModel",
    "PassOptions",
    "Passes",
    "Tuned",
    "USUAL_SIZE",
    "Wanted",
    "audit_build",
    "canaries_of",
    "checkpoint_specs",
    "data_is_dearer",
    "draw_places",
    "found_task",
    "kept_canaries",
    "library_versions",
    "measure_row_seconds",
    "model_digest",
    "parameter_specs",
    "refuse_changed",
    "squared_norms",
    "tune",
    "unsound",
    "warn_of_slower_bf16",
    "write_canaries",
]
