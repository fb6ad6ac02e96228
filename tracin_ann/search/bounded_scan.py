"""Exact search by bounds: only rows whose bound reaches the k-th best score are scored.

Rows are reduced to R dimensions and sorted by norm. A search multiplies the queries with the reduced rows, block by
block, and adds the margins of `bounds`: the result is an upper bound of each score. It scores the rows of the best
reduced scores first, so that the k-th best score is soon known, and ends at the block whose largest norm cannot reach
it. Then it scores all rows whose bound reaches the k-th best score. If there are too many, it scans all rows.

The bounds hold in floating point, so results are those of float64 scores, rounded to float32, with ties by id. This
pass reads about R/F of the bytes of a scan, and less if it ends early; `rows_scored` does not include it.

Shapes: N rows, B rows of a block, Q queries, A signed queries (queries for each direction), P pairs of a signed query
and a row, K results, F feature dimension, R reduced dimension.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from tracin_ann.errors import DamagedIndexError, UsageError, attach_path, problem
from tracin_ann.files import (
    map_array,
    open_regular,
    read_json,
    read_npz,
    read_record,
    report_damage,
    save_array,
)
from tracin_ann.search.base import CalibratedIndex, check_queries, scale_to_unit
from tracin_ann.search.bounded_search import BatchSearch, SearchedRows
from tracin_ann.search.bounds import ReducedQueries, ReducedRows, find_wrong_bounds, reduce_rows
from tracin_ann.search.clustering import stratified_ids, survey
from tracin_ann.search.construction import scale_rows
from tracin_ann.search.faiss_file import REMEDY, WrittenFile
from tracin_ann.search.flat import FlatIndex, Sign, Subset
from tracin_ann.search.reduction import Reduction, fit_axes, fit_reduction, normalize, pack_reduction, unpack_reduction
from tracin_ann.search.settings import Setting
from tracin_ann.search.threads import use_one_thread
from tracin_ann.search.topk import concatenate, negate
from tracin_ann.types import Float32, Float64, Int64, RowSource, TopK

_CAPTION = "tracin_ann reduced rows with bounds"
_VERSION = 1
_ARRAY_FILES = 2
_WIDTHS = (64, 128, 192, 256)
_ENERGY = 0.95
"""The smallest width that preserves this share of the squared norms is chosen, or else the largest one."""
_SAMPLE_NUMBERS = 2**24
_BLOCK_NUMBERS = 2**22
_LEAST_QUERIES, _MOST_QUERIES = 64, 512
"""Queries of a batch."""
_ROWS_READ_AT_ONCE = 8192
_SCANNED_SHARE = 1 / 8
"""If more rows than this share remain, a scan of all rows takes less time."""
_LEAST_SCANNED = 256


@dataclass(frozen=True)
class BoundedScanParams:
    """Parameters of an exact search by bounds.

    Attributes:
        width: number of dimensions to which rows are reduced; None: 64 to 256, so that .95 of the squared norms are
            preserved.
        seed: seed of the sample and of the reduction.
    """

    width: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            UsageError: a field is out of range.
        """
        for name, value, least in (("width", self.width, 1), ("seed", self.seed, 0)):
            if value is not None and value < least:
                raise UsageError(
                    problem(f"invalid {name}", got=value, expected=f"{least} or more", remedy=f"change {name}")
                )

    def estimate_bytes(self, n_rows: int, dim: int) -> int:
        """Return the size in bytes of the files for N rows of F numbers, at most: reduced rows, margins and basis."""
        width = min(dim, self.width or _WIDTHS[-1])
        return n_rows * (2 * width + 22) + 4 * dim * width


@dataclass(frozen=True)
class _Caption:
    """The content of the JSON file: the parameters, and records of the other files."""

    rows: int
    energy: float
    params: BoundedScanParams
    files: tuple[WrittenFile, ...]
    caption: str = _CAPTION
    version: int = _VERSION

    def __post_init__(self) -> None:
        if (self.caption, self.version) != (_CAPTION, _VERSION):
            raise ValueError(f"{self.caption!r} version {self.version} instead of {_CAPTION!r} version {_VERSION}")
        if len(self.files) != _ARRAY_FILES:
            raise ValueError(f"records of {len(self.files)} files instead of {_ARRAY_FILES}")


class BoundedScan(CalibratedIndex):
    """Exact maximum inner product search by bounds; see the module."""

    kind, name, is_exact = "bounds", "exact search by bounds", True
    FILES = ("bounds.npy", "bounds.npz", "bounds.json")

    def __init__(
        self,
        source: RowSource,
        reduction: Reduction,
        rows: ReducedRows,
        params: BoundedScanParams,
        device: torch.device,
    ) -> None:
        """Wrap reduced rows, sorted by decreasing norm; use `build` or `load` to create an index.

        `device` is that of scans of all rows; bounds are computed on the CPU.
        """
        self._source, self._reduction, self._rows, self._params, self._device = source, reduction, rows, params, device
        self.settings = (Setting(max(_LEAST_SCANNED, math.ceil(_SCANNED_SHARE * len(source)))),) * 2
        """The number of rows left for a query from which on all rows are scanned, for proponents and opponents."""

    @classmethod
    def build(
        cls,
        source: RowSource,
        params: BoundedScanParams,
        device: torch.device,
        progress: Callable[[int, int], None] | None = None,
    ) -> BoundedScan:
        """Build an index of all rows of the source, in two passes over them.

        Args:
            source: the rows.
            params: parameters of the index.
            device: device of scans of all rows.
            progress: called with (rows done, rows).

        Raises:
            UsageError: there are no rows.
            NonFiniteError: a row contains NaN or infinity; the message has its id.
        """
        if not len(source):
            raise UsageError(
                problem("too few rows for an exact search by bounds", got=0, expected="1 or more", remedy="add rows")
            )
        block_rows = max(1, _BLOCK_NUMBERS // source.dim)
        measured = survey(source, block_rows)
        sample_ids = stratified_ids(measured, max(1, _SAMPLE_NUMBERS // source.dim), params.seed)
        reduction = _fit(scale_rows(source.take(sample_ids), measured.shift), params)
        place_N = np.empty(len(source), np.int64)
        place_N[np.argsort(-measured.norm_N, kind="stable")] = np.arange(len(source))
        rows, basis_FR = ReducedRows.make_empty(len(source), reduction.width), _widen_basis(reduction)
        done = 0
        for ids_B, rows_BF in source.blocks(block_rows):
            norm_B = measured.norm_N[done : done + len(ids_B)]
            rows.write(place_N[done : done + len(ids_B)], reduce_rows(ids_B, rows_BF, norm_B, basis_FR))
            done += len(ids_B)
            if progress is not None:
                progress(done, len(source))
        return cls(source, reduction, rows, params, device)

    @classmethod
    def load(cls, directory: Path, source: RowSource, device: torch.device) -> BoundedScan:
        """Return the index that `save` wrote to the directory, for the same rows.

        Raises:
            DamagedIndexError: a file is missing, damaged or of another version, or the files do not belong together.
            OSError: the system has no memory or file descriptors left.
        """
        *paths, caption_path = (Path(directory) / name for name in cls.FILES)
        expected = "a file written by a build"
        content = read_json(caption_path, REMEDY)
        with report_damage(caption_path, expected, REMEDY):
            caption = read_record(_Caption, content)
        for path, written in zip(paths, caption.files, strict=True):
            written.check(path)
        stored_path, arrays_path = paths
        with report_damage(stored_path, expected, REMEDY):
            stored_NR = map_array(stored_path)
        with report_damage(arrays_path, expected, REMEDY), open_regular(arrays_path) as file:
            arrays = read_npz(file)
            reduction, _ = unpack_reduction({**arrays, "outliers": np.zeros(0, np.int64)}, source.dim, caption.energy)
            arrays.pop("basis_FR")
            rows = ReducedRows(stored_NR=stored_NR, **arrays)
        got = len(rows), caption.rows, rows.stored_NR.shape[1]
        consistent = len(source), len(source), reduction.width
        if got != consistent:
            raise DamagedIndexError(
                problem(
                    f"{caption_path} does not belong to {stored_path.name}, {arrays_path.name} and the features",
                    got=f"rows, rows, dimensions {got}",
                    expected=f"{consistent}",
                    remedy=REMEDY,
                )
            )
        return cls(source, reduction, rows, caption.params, device)

    def save(self, directory: Path) -> None:
        """Write the files `FILES` to a directory; the caller renames and fsyncs."""
        *paths, caption_path = (Path(directory) / name for name in self.FILES)
        stored_path, arrays_path = paths
        arrays = {name: getattr(self._rows, name) for name in ReducedRows.__dataclass_fields__}
        with attach_path(stored_path), stored_path.open("wb") as file:
            save_array(file, arrays.pop("stored_NR"))
        basis = pack_reduction(self._reduction, np.zeros(0, np.int64))["basis_FR"]
        with attach_path(arrays_path):
            np.savez(arrays_path, allow_pickle=False, basis_FR=basis, **arrays)
        files = tuple(WrittenFile.measure(path) for path in paths)
        caption = _Caption(len(self), self._reduction.energy, self._params, files)
        with attach_path(caption_path):
            caption_path.write_text(json.dumps(asdict(caption)) + "\n", encoding="utf-8")

    def find_faults(self, sample: int, seed: int) -> list[str]:
        """Compare the reduced rows with the source and return descriptions of the differences.

        All ids are compared; the bounds are computed again for `sample` random rows.
        """
        known = np.concatenate([ids_B for ids_B, _ in self._source.blocks(_ROWS_READ_AT_ONCE)])
        if not np.array_equal(self._by_id[0], known):
            return [f"the ids of {len(self):,} reduced rows do not match {len(known):,} stored rows"]
        found = []
        if (np.diff(self._rows.norm_N) > 0).any():
            found.append("the reduced rows are not sorted by decreasing norm")
        places = np.sort(np.random.default_rng(seed).permutation(len(self))[:sample])
        wrong = 0
        for at in range(0, len(places), _ROWS_READ_AT_ONCE):
            rows = self._rows.select(places[at : at + _ROWS_READ_AT_ONCE])
            wrong += int(find_wrong_bounds(rows, self._source.take(rows.ids_N), self._basis_FR).sum())
        if wrong:
            found.append(f"of {len(places):,} rows checked, {wrong:,} have wrong bounds")
        return found

    def with_settings(self, proponents: Setting, opponents: Setting | None = None) -> BoundedScan:
        """Return an index with the same reduced rows and these settings, of which only `codes` is used.

        Without `opponents`, one setting for both directions. Results are the same with all settings.
        """
        other = BoundedScan(self._source, self._reduction, self._rows, self._params, self._device)
        other.settings = proponents, opponents or proponents
        return other

    def propose_settings(self, recall_of: Callable[[Setting], float]) -> Iterator[Sequence[Setting]]:
        """Yield the only setting to measure: all settings find all results."""
        yield [self.settings[0]]

    @property
    def params(self) -> BoundedScanParams:
        """Return the parameters."""
        return self._params

    @property
    def source(self) -> RowSource:
        """Return the rows."""
        return self._source

    @property
    def width(self) -> int:
        """Return R, the length of a reduced row."""
        return self._reduction.width

    @property
    def resident_bytes(self) -> int:
        """Return the bytes that the index uses in memory or mapped, without the features."""
        return self._rows.nbytes + self._basis_FR.nbytes

    def __len__(self) -> int:
        """Return N, the number of rows."""
        return len(self._rows)

    def describe_exactness(self, proponents: TopK, opponents: TopK) -> str:
        """Return the certificate of results, with the mean share of the rows that were scored for each direction."""
        shares = [
            float(top.rows_scored.mean() if len(top.rows_scored) else 0) / len(self) for top in (proponents, opponents)
        ]
        return f"exact: {shares[0]:.2%} and {shares[1]:.2%} of the rows scored for proponents and opponents"

    def measure(self, queries_QF: Float32) -> tuple[Float64, Float64]:
        """Return the norm of each query [Q], and the norm of the reduced query of norm 1 [Q]; 0 for a zero query."""
        unit_QF, norm_Q = normalize(queries_QF)
        reduced_QR = self._reduction.apply(unit_QF).astype(np.float64)
        return norm_Q, np.linalg.norm(reduced_QR, axis=1)

    def will_scan(self, k: int, allowed: Int64 | None = None) -> bool:
        """Return whether a search scans all (allowed) rows for every query, because there are not more than results."""
        return k >= (len(self) if allowed is None else len(allowed))

    def most_rows_read(self, n_queries: int, k: int) -> int:
        """Return the largest number of rows that a search in both directions reads by id before it scans all rows."""
        return min(len(self), n_queries * sum(setting.codes for setting in self.settings))

    def search(self, queries_QF: Float32, k: int, allowed: Int64 | None = None) -> TopK:
        """Return the k rows of largest inner product; always min(k, N) rows.

        `rows_scored` counts the rows whose inner products with the query are computed from all features.

        Raises:
            NonFiniteError: a query, or the score of a result, is not finite.
        """
        return self._search_signs(queries_QF, k, (1,), allowed)[0]

    def search_both(self, queries_QF: Float32, k: int, allowed: Int64 | None = None) -> tuple[TopK, TopK]:
        """Return (proponents, opponents) from one pass over the reduced rows."""
        proponents, opponents = self._search_signs(queries_QF, k, (1, -1), allowed)
        return proponents, negate(opponents)

    def _search_signs(self, queries_QF: Float32, k: int, signs: Sequence[Sign], allowed: Int64 | None) -> list[TopK]:
        """Return the k rows of largest sign × inner product for each sign."""
        queries_QF = check_queries(self, queries_QF, k)
        searched = self._choose_rows(allowed)
        k = max(1, min(k, len(searched)))
        most = min(len(searched), max(_LEAST_SCANNED, 4 * k, self.settings[0].codes * len(searched) // len(self)))
        n_threads = torch.get_num_threads()
        at_once = min(_MOST_QUERIES, max(_LEAST_QUERIES, math.ceil(len(queries_QF) / n_threads)))
        batches = [queries_QF[at : at + at_once] for at in range(0, len(queries_QF), at_once)]

        def search_bounded(batch_QF: Float32) -> BatchSearch:
            scaled_QF, exponent_Q = scale_to_unit(batch_QF)
            search = BatchSearch(searched, ReducedQueries.reduce(scaled_QF, self._basis_FR), exponent_Q, k, signs)
            search.score_bounded(most, max(1, n_threads // len(batches)))
            return search

        # Several batches at the same time, each by one thread: threads of one operation wait for each other.
        with ThreadPoolExecutor(n_threads, "tracin-bounds", use_one_thread) as threads:
            searches = list(threads.map(search_bounded, batches))
        # Threads of a scan are in PyTorch's default mode, in which tensors of the inference mode cannot be written.
        with torch.inference_mode(False):
            found = [search.finish() for search in searches]
        return [concatenate([tops[side] for tops in found]) for side in range(len(signs))]

    def _choose_rows(self, allowed: Int64 | None) -> SearchedRows:
        """Return the (allowed) rows of a search."""
        ids_N, place_N = self._by_id
        if allowed is None or len(allowed) == len(self):
            return SearchedRows(FlatIndex(self._source, self._device), self._rows, place_N, None)
        place_M = place_N[np.searchsorted(ids_N, allowed)]
        scan = FlatIndex(Subset(self._source, allowed), self._device)
        return SearchedRows(scan, self._rows, place_M, np.sort(place_M))

    @cached_property
    def _basis_FR(self) -> Float64:
        """Return the basis in float64."""
        return _widen_basis(self._reduction)

    @cached_property
    def _by_id(self) -> tuple[Int64, Int64]:
        """Return the ids in increasing order, and the positions of their rows among the reduced rows."""
        place_N = np.argsort(self._rows.ids_N)
        return self._rows.ids_N[place_N], place_N


def _fit(sample_BF: Float32, params: BoundedScanParams) -> Reduction:
    """Return the reduction of `params.width` dimensions, or of the smallest width that preserves `_ENERGY`."""
    if params.width is not None or sample_BF.shape[1] <= _WIDTHS[-1]:
        return fit_reduction(sample_BF, params.width or _WIDTHS[-1], params.seed)
    axes = fit_axes(sample_BF, _WIDTHS[-1], params.seed)
    square_R = axes.square_R.cumsum()
    return axes.reduce(next((width for width in _WIDTHS if square_R[width - 1] >= _ENERGY * axes.total), _WIDTHS[-1]))


def _widen_basis(reduction: Reduction) -> Float64:
    """Return the basis of a reduction in float64."""
    if reduction.basis_FR is None:
        return np.eye(reduction.dim)
    return reduction.basis_FR.astype(np.float64)
