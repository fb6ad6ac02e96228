"""Feature rows on disk: immutable HDF5 files, checked and memory-mapped; knows no model."""

from tracin_ann.store.behind import WriteBehind
from tracin_ann.store.codec import Dtype
from tracin_ann.store.feature_file import (
    FeatureBlock,
    FeatureFile,
    FileHeader,
    FileRecord,
    write_feature_file,
)
from tracin_ann.store.feature_store import FeatureStore, FeatureView, StoreLayout, is_feature_file

__all__ = [
    "Dtype",
    "FeatureBlock",
    "FeatureFile",
    "FeatureStore",
    "FeatureView",
    "FileHeader",
    "FileRecord",
    "StoreLayout",
    "WriteBehind",
    "is_feature_file",
    "write_feature_file",
]
