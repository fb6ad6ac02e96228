"""Maximum inner product search over feature rows: exact scan (`flat`) and inverted lists (`ivf`)."""

from __future__ import annotations

from tracin_ann.device import import_faiss
from tracin_ann.search.backend import choose_index
from tracin_ann.search.base import SearchIndex, scale_to_unit, search_both
from tracin_ann.search.calibration import Calibration, FirstUseCost, Point, calibrate
from tracin_ann.search.construction import UnfinishedLists, digest_inputs
from tracin_ann.search.flat import FlatIndex, Subset
from tracin_ann.search.inverted_lists import CODES, Codes
from tracin_ann.search.ivf import IVFIndex
from tracin_ann.search.settings import IVFParams

__all__ = [
    "CODES",
    "Calibration",
    "Codes",
    "FirstUseCost",
    "FlatIndex",
    "IVFIndex",
    "IVFParams",
    "Point",
    "SearchIndex",
    "Subset",
    "UnfinishedLists",
    "calibrate",
    "choose_index",
    "digest_inputs",
    "scale_to_unit",
    "search_both",
]

# A build reaches its first search after hours: this raises an error at once if FAISS is missing or installed twice.
import_faiss()
