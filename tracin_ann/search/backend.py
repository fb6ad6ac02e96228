"""The kinds of search index, and the choice among them by a diagnosis of the rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from tracin_ann.choices import INDEX_KINDS
from tracin_ann.errors import UsageError, problem
from tracin_ann.search.base import CalibratedIndex
from tracin_ann.search.bounded_scan import BoundedScan, BoundedScanParams
from tracin_ann.search.coded_scan import CodedScan, CodedScanParams, list_coded_files
from tracin_ann.search.construction import UnfinishedLists, digest_inputs
from tracin_ann.search.diagnosis import Diagnosis
from tracin_ann.search.flat import FlatIndex
from tracin_ann.search.gpu_scan import GpuScan, open_scan
from tracin_ann.search.graph import GraphIndex, GraphParams
from tracin_ann.search.inverted_lists import CODES, Codes
from tracin_ann.search.ivf import IVFIndex, list_ivf_files
from tracin_ann.search.settings import IVFParams
from tracin_ann.types import RowSource

FLAT_BELOW_ROWS = 20_000
"""With fewer rows, an exact scan takes no longer than the features of a query."""
_CLASSES: dict[str, type[CalibratedIndex]] = {
    index.kind: index for index in (IVFIndex, CodedScan, BoundedScan, GraphIndex)
}
_LIST_SHARDED = {"ivf": list_ivf_files, "codes": list_coded_files}
"""By kind of index that can have shards: the function that returns the names of the files of so many shards."""
_MANY_DIRECTIONS = 150
"""From about this participation ratio on, inverted lists score a tenth of the rows for a recall of .95."""
_APPROXIMATE = 0.99
"""The largest target recall that approximate indexes usually reach."""
_SMALL_SHARE = 0.05
"""Share of the rows left by bounds up to which a search by bounds is faster than a scan."""
NAMES = {"flat": "exact scan", **{kind: index.name for kind, index in _CLASSES.items()}}
"""The kinds, with their names for users."""


@dataclass(frozen=True)
class IndexChoice:
    """A kind of index and the reason for it: a phrase with the size of the index."""

    kind: str
    reason: str


@dataclass(frozen=True)
class IndexNeeds:
    """What an index is for.

    Attributes:
        is_damped: whether the default score has a curvature matrix: small directions of the rows have a large weight.
        target_recall: recall@10 that the index is calibrated to.
        shards: number of files; with more than one, `auto` chooses a kind that can have them, or a scan of few rows.
    """

    is_damped: bool = False
    target_recall: float = 0.95
    shards: int = 1


def is_flat(requested: str, n_rows: int) -> bool:
    """Return whether an index of this many rows is an exact scan.

    Raises:
        UsageError: `requested` is none of `INDEX_KINDS`.
    """
    if requested not in INDEX_KINDS:
        expected = f"{', '.join(INDEX_KINDS[:-1])} or {INDEX_KINDS[-1]}"
        raise UsageError(problem("unknown index", got=repr(requested), expected=expected, remedy="change --index"))
    return requested == "flat" or (requested == "auto" and n_rows < FLAT_BELOW_ROWS)


def choose_index(
    requested: str,
    n_rows: int,
    dim: int,
    diagnose: Callable[[], Diagnosis],
    needs: IndexNeeds | None = None,
) -> tuple[IndexChoice, ...]:
    """Return the kinds to build, best first: each of the others only if those before it do not reach the target recall.

    Args:
        requested: one of `INDEX_KINDS`.
        n_rows: number of rows.
        dim: length of a row.
        diagnose: returns the diagnosis of the rows; called if the choice depends on it.
        needs: what `auto` takes into account; None: the defaults.

    Raises:
        UsageError: `requested` is none of `INDEX_KINDS`.
    """
    needs = needs or IndexNeeds()
    if is_flat(requested, n_rows) or requested != "auto":
        return (_explain(requested, n_rows, dim),)
    if needs.is_damped:
        return (_choose("codes", n_rows, dim, "the default score gives small directions a large weight"),)
    found = diagnose()
    directions = f"the rows vary in about {found.directions:,.0f} directions"
    codes = _choose("codes", n_rows, dim, directions)
    if needs.shards == 1 and needs.target_recall > _APPROXIMATE and found.bounded_share <= _SMALL_SHARE:
        return (_choose("bounds", n_rows, dim, f"{directions}, and a recall of {needs.target_recall:g} is requested"),)
    if found.directions > _MANY_DIRECTIONS:
        return (codes,)
    return _choose("ivf", n_rows, dim, directions), codes


def expect_index(requested: str, n_rows: int, dim: int) -> IndexChoice:
    """Return what is known of the choice before there are rows: `auto` if it depends on their diagnosis."""
    if requested == "auto" and not is_flat(requested, n_rows):
        return IndexChoice("auto", f"{_describe_size(n_rows, dim)}; the build chooses the index by the features")
    return _explain(requested, n_rows, dim)


def _explain(requested: str, n_rows: int, dim: int) -> IndexChoice:
    """Return a choice that does not depend on the rows."""
    if requested == "auto":
        return _choose("flat", n_rows, dim, f"search indexes are used from {FLAT_BELOW_ROWS:,} rows on")
    return _choose(requested, n_rows, dim, f"requested by --index {requested}")


def _choose(kind: str, n_rows: int, dim: int, why: str) -> IndexChoice:
    return IndexChoice(kind, f"{NAMES[kind]}: {_describe_size(n_rows, dim)}; {why}")


def _describe_size(n_rows: int, dim: int) -> str:
    return f"{n_rows:,} rows of {dim:,} numbers ({n_rows * dim * 4 / 1e6:,.0f} MB)"


@dataclass(frozen=True)
class IndexRequest:
    """What an index of a given kind is built with.

    Attributes:
        seed: of the samples that it is trained on.
        codes: how inverted lists store their rows.
        device: where it is built and searched.
        folder: for intermediate results.
        inputs: identify the rows, as JSON values; results of other inputs are not resumed.
        shards: number of files over which inverted lists, or the codes of a coded scan, are split.
    """

    seed: int
    codes: Codes
    device: torch.device
    folder: Path
    inputs: tuple[object, ...]
    shards: int = 1


def build_index(
    kind: str, source: RowSource, request: IndexRequest, progress: Callable[[int, int], None]
) -> CalibratedIndex:
    """Build an index of a kind other than `flat`; `progress` is called with (rows done, rows)."""
    lists = IVFParams(seed=request.seed, codes=request.codes, shards=request.shards)
    if kind == "codes":
        params = CodedScanParams(seed=request.seed, shards=request.shards)
        return CodedScan.build(source, params, request.device, progress)
    if kind == "bounds":
        return BoundedScan.build(source, BoundedScanParams(seed=request.seed), request.device, progress)
    if kind == "graph":
        return GraphIndex.build(source, GraphParams(seed=request.seed), request.device, progress)
    scratch = UnfinishedLists(request.folder, digest_inputs(lists, *request.inputs))
    return IVFIndex.build(source, lists, request.device, scratch, progress)


def estimate_bytes(kind: str, n_rows: int, dim: int, codes: Codes) -> int:
    """Return the approximate size of the files of an index in bytes; for `auto`, that of the largest kind."""
    if is_flat(kind, n_rows):
        return 0
    sizes = {
        "ivf": IVFParams(codes=codes).estimate_bytes(n_rows, dim),
        "codes": CodedScanParams().estimate_bytes(n_rows, dim),
        "bounds": BoundedScanParams().estimate_bytes(n_rows, dim),
        "graph": GraphParams().estimate_bytes(n_rows, dim),
    }
    return max(sizes.values()) if kind == "auto" else sizes[kind]


def load_index(
    kind: str, directory: Path, source: RowSource, device: torch.device
) -> FlatIndex | GpuScan | CalibratedIndex:
    """Return the index of a kind whose files are in a directory, for the same rows.

    Raises:
        DamagedIndexError: a file is missing or damaged.
    """
    return open_scan(source, device) if kind == "flat" else _CLASSES[kind].load(directory, source, device)


def list_files(kind: str, shards: int = 1) -> tuple[str, ...]:
    """Return the names of the files of a kind of index with this many shards.

    Raises:
        ValueError: there is no such kind, or it has no shards.
    """
    if kind not in NAMES:
        raise ValueError(f"an index {kind!r}")
    if kind in _LIST_SHARDED and shards >= 1:
        return _LIST_SHARDED[kind](shards)
    if shards != 1:
        raise ValueError(f"an index {kind!r} in {shards} shards")
    return () if kind == "flat" else _CLASSES[kind].FILES


def count_shards(kind: str, shards: int) -> int:
    """Return the number of shards of an index of a kind, if this many are requested: 1 if the kind has none."""
    return shards if kind in _LIST_SHARDED else 1


def list_codes(kind: str) -> tuple[str, ...]:
    """Return the values that the manifest may have for the codes of a kind of index."""
    return CODES if kind == "ivf" else ("",)
