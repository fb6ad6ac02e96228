"""Maximum inner product search over feature rows: exact scan, and indexes with compact codes of the rows."""

from __future__ import annotations

from tracin_ann.device import import_faiss
from tracin_ann.search.backend import (
    NAMES,
    IndexNeeds,
    IndexRequest,
    build_index,
    choose_index,
    count_shards,
    estimate_bytes,
    expect_index,
    is_flat,
    list_codes,
    list_files,
    load_index,
)
from tracin_ann.search.base import CalibratedIndex, PlacedIndex, SearchIndex, scale_to_unit, search_both
from tracin_ann.search.calibration import Calibration, Cost, FirstUseCost, Point, calibrate
from tracin_ann.search.code_shards import CodeFile, CodeQuery
from tracin_ann.search.coded_scan import CodedScan
from tracin_ann.search.diagnosis import Diagnosis, diagnose
from tracin_ann.search.flat import FlatIndex, RowQuery, RowScanner, Subset
from tracin_ann.search.gpu_scan import GpuScan, open_scan
from tracin_ann.search.inverted_lists import CODES, Codes
from tracin_ann.search.ivf import IVFIndex
from tracin_ann.search.list_shards import ListQuery, ShardFile
from tracin_ann.search.rescored import RescoredIndex
from tracin_ann.search.settings import IVFParams

__all__ = [
    "CODES",
    "CalibratedIndex",
    "Calibration",
    "CodeFile",
    "CodeQuery",
    "CodedScan",
    "Codes",
    "Cost",
    "Diagnosis",
    "FirstUseCost",
    "FlatIndex",
    "GpuScan",
    "IVFIndex",
    "IVFParams",
    "IndexNeeds",
    "IndexRequest",
    "ListQuery",
    "NAMES",
    "PlacedIndex",
    "Point",
    "RescoredIndex",
    "RowQuery",
    "RowScanner",
    "SearchIndex",
    "ShardFile",
    "Subset",
    "build_index",
    "calibrate",
    "choose_index",
    "count_shards",
    "diagnose",
    "estimate_bytes",
    "expect_index",
    "is_flat",
    "list_codes",
    "list_files",
    "load_index",
    "open_scan",
    "scale_to_unit",
    "search_both",
]

# A build reaches its first search after hours: this raises an error at once if FAISS is missing or installed twice.
import_faiss()
