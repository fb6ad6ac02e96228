"""Maximum inner product search over feature rows: exact (`flat`) and by inverted lists (`ivf`)."""

from tracin_ann.device import import_faiss
from tracin_ann.search.base import SearchIndex, TwoSidedIndex, at_unit_scale, search_both
from tracin_ann.search.choose import IndexChoice, choose_index
from tracin_ann.search.flat import FlatIndex
from tracin_ann.search.ivf import IVFIndex
from tracin_ann.search.setting import IVFParams, Setting
from tracin_ann.search.topk import from_padded, merge

__all__ = [
    "FlatIndex",
    "IVFIndex",
    "IVFParams",
    "IndexChoice",
    "SearchIndex",
    "Setting",
    "TwoSidedIndex",
    "at_unit_scale",
    "choose_index",
    "from_padded",
    "merge",
    "search_both",
]

# Here and not at the first search, which may come hours into a build: that FAISS is missing, or there twice.
import_faiss()
