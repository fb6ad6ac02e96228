"""An index on disk: feature files, manifests, generations, locks, and lists of columns, removed and skipped rows.

Files are checked when they are read. A build writes each file once and publishes a new generation at the end; readers
continue to use the generation that they opened. The package does not depend on models.
"""

from __future__ import annotations

from tracin_ann.choices import Dtype
from tracin_ann.store.arrays import make_text_array, read_arrays, write_arrays
from tracin_ann.store.codec import is_coded, measure_row_bytes
from tracin_ann.store.codes import noise_ratio
from tracin_ann.store.columns import Columns, RowFilter, RowTable, collect_columns, read_columns
from tracin_ann.store.exclusions import (
    SkippedRows,
    read_removed_ids,
    read_skipped_rows,
    read_unlisted_ids,
    select_listed_rows,
    write_removed,
    write_unlisted,
)
from tracin_ann.store.feature_file import FeatureBlock, FeatureFile, FileRecord
from tracin_ann.store.feature_store import FeatureStore, FeatureView, PartitionRows
from tracin_ann.store.generations import (
    BuildStart,
    agree_on_record,
    check_generation,
    check_manifest_copy,
    claim_directory,
    clean_up,
    copy_files,
    find_next_folder,
    find_unnamed_files,
    generation_folder,
    generation_number,
    list_generations,
    make_next_folder,
    publish,
    read_current,
    read_last_build,
    read_shard_count,
    reject_foreign_files,
    reject_links,
    take_lease,
    write_shard_count,
)
from tracin_ann.store.layout import StoreLayout, choose_partition_rows
from tracin_ann.store.locks import Lease, hold_writer_lock
from tracin_ann.store.manifest import (
    BUILD_RECORD,
    FEATURES,
    MANIFEST,
    AuditRecord,
    BuildRecord,
    Estimate,
    Fidelity,
    IndexRecord,
    Manifest,
    ScoreFidelity,
    ScoreRecord,
    StepRecord,
    TrueRecall,
    check_file,
    read_build_record,
    record_file,
    write_build_record,
)
from tracin_ann.store.next_generation import NextGeneration
from tracin_ann.store.spec import CheckpointSpec, FeatureSpec, ParameterSpec, SketchSpec
from tracin_ann.store.write_behind import WriteBehind

__all__ = [
    "AuditRecord",
    "BUILD_RECORD",
    "BuildRecord",
    "BuildStart",
    "CheckpointSpec",
    "Columns",
    "Dtype",
    "Estimate",
    "FEATURES",
    "FeatureBlock",
    "FeatureFile",
    "FeatureSpec",
    "FeatureStore",
    "FeatureView",
    "Fidelity",
    "FileRecord",
    "IndexRecord",
    "Lease",
    "MANIFEST",
    "Manifest",
    "NextGeneration",
    "ParameterSpec",
    "PartitionRows",
    "RowFilter",
    "RowTable",
    "ScoreFidelity",
    "ScoreRecord",
    "SketchSpec",
    "SkippedRows",
    "StepRecord",
    "StoreLayout",
    "TrueRecall",
    "WriteBehind",
    "agree_on_record",
    "check_file",
    "check_generation",
    "check_manifest_copy",
    "choose_partition_rows",
    "claim_directory",
    "clean_up",
    "collect_columns",
    "copy_files",
    "find_next_folder",
    "find_unnamed_files",
    "generation_folder",
    "generation_number",
    "hold_writer_lock",
    "is_coded",
    "list_generations",
    "make_next_folder",
    "make_text_array",
    "measure_row_bytes",
    "noise_ratio",
    "publish",
    "read_arrays",
    "read_build_record",
    "read_columns",
    "read_current",
    "read_last_build",
    "read_removed_ids",
    "read_shard_count",
    "read_skipped_rows",
    "read_unlisted_ids",
    "record_file",
    "reject_foreign_files",
    "reject_links",
    "select_listed_rows",
    "take_lease",
    "write_arrays",
    "write_build_record",
    "write_removed",
    "write_shard_count",
    "write_unlisted",
]
