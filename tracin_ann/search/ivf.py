"""Approximate search with inverted lists (IVF): candidates from the codes of reduced rows, rescored with the rows.

A two-level coarse quantizer selects the lists to probe for a query. The candidates with the best coded scores are
scored again with the stored features. Outliers (rows of very large norm) are in no list; every query scores them.
Quiet rows (norm near zero) are in no list either; queries whose results they could enter are answered by an exact scan.

Shapes: N rows, Q queries, L lists, W lists per query, M candidates, K results, F feature dimension, R reduced.
"""

from __future__ import annotations

import dataclasses
import json
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from tracin_ann.errors import DamagedIndexError, attach_path, problem
from tracin_ann.files import map_array, open_regular, read_json, read_npz, read_record, report_damage, save_array
from tracin_ann.search.base import check_queries
from tracin_ann.search.coarse_quantizer import Assigner, ListTree
from tracin_ann.search.construction import UnfinishedLists, fill_lists, scale_rows
from tracin_ann.search.flat import FlatIndex, Sign, check_finite
from tracin_ann.search.inverted_lists import InvertedLists
from tracin_ann.search.reduction import Reduction, multiply_rows
from tracin_ann.search.settings import IVFParams, Setting, choose_default_setting
from tracin_ann.search.topk import concatenate, from_padded, merge, negate
from tracin_ann.types import Float32, Float64, Int64, RowSource, TopK

_CAPTION = "tracin_ann inverted lists"
_VERSION = 3
_QUERIES_AT_ONCE = 256
_QUERIES_RESCORED_AT_ONCE = 128
_LEAST_CANDIDATES = 40
_IDS_AT_ONCE = 65_536
_MOVED_SHARE = 0.01
"""Share of checked rows that may be in the list of a neighboring centroid, because of rounding."""
_LIST_MARGIN = 3
"""The tree returns this many times the lists that the budget would fill at the mean size: the best lists are short."""


@dataclass(frozen=True)
class _Caption:
    """The content of the JSON file beside the lists, by which files that do not belong together are found."""

    rows: int
    shift: int
    quiet_rows: int
    quiet_norm: float
    energy: float
    params: IVFParams
    lists_bytes: int = 0
    caption: str = _CAPTION
    version: int = _VERSION

    def __post_init__(self) -> None:
        if (self.caption, self.version) != (_CAPTION, _VERSION):
            raise ValueError(f"{self.caption!r} version {self.version} instead of {_CAPTION!r} version {_VERSION}")


@dataclass(frozen=True)
class _Parts:
    """The data of a search: lists, coarse quantizer, reduction, and the ids of outliers."""

    lists: InvertedLists
    tree: ListTree
    reduction: Reduction
    outliers: Int64
    _last: threading.local = field(default_factory=threading.local, compare=False, repr=False)

    def reduce(self, queries_QF: Float32) -> tuple[Float32, Float64]:
        """Return the queries, scaled to norm 1, in R dimensions, and their norms [Q].

        Those of the last call of a thread are stored: queries are compared with the calibration queries, then searched.
        """
        unit_QF, norm_Q = _normalize(queries_QF)
        last: tuple[Float32, Float32] | None = getattr(self._last, "queries", None)
        if last is not None and np.array_equal(last[0], unit_QF):
            return last[1], norm_Q
        reduced_QR = self.reduction.apply(unit_QF)
        if len(unit_QF) <= _QUERIES_AT_ONCE:
            self._last.queries = unit_QF, reduced_QR
        return reduced_QR, norm_Q

    @cached_property
    def unit_group_RG(self) -> Float32:
        """Return the centers of the groups, scaled to norm 1, as columns."""
        return np.ascontiguousarray(_normalize(self.tree.group_GR)[0].T)


@dataclass(frozen=True)
class _Direction:
    """A direction of a search: the sign of the inner products, and the setting."""

    sign: Sign
    setting: Setting


class IVFIndex:
    """Approximate maximum inner product search; the scores of results are exact.

    The settings are those of `choose_default_setting`; `with_settings` returns the same index with other settings.
    """

    kind = "ivf"
    FILES = ("ivf.faiss", "ivf.npz", "ivf-centroids.npy", "ivf.json")

    def __init__(self, source: RowSource, parts: _Parts, caption: _Caption, device: torch.device) -> None:
        """Wrap filled lists; use `build` or `load` to create an index."""
        self._source, self._parts, self._caption, self._device = source, parts, caption, device
        self.settings = (choose_default_setting(caption.rows),) * 2

    @classmethod
    def build(
        cls,
        source: RowSource,
        params: IVFParams,
        device: torch.device,
        scratch: UnfinishedLists | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> IVFIndex:
        """Build an index of all rows of the source; see `construction.fill_lists` for the arguments.

        Raises:
            UsageError: there are no rows, or fewer rows than lists.
            NonFiniteError: a row contains NaN or infinity; the message has its id.
        """
        filled = fill_lists(source, params, scratch, progress)
        measured, reduction = filled.measured, filled.reduction
        quiet_norm = float(measured.norm_N[measured.quiet_N].max(initial=0.0))
        caption = _Caption(
            len(source), measured.shift, int(measured.quiet_N.sum()), quiet_norm, reduction.energy, params
        )
        parts = _Parts(filled.lists, filled.tree, reduction, measured.ids_N[measured.outlier_N])
        return cls(source, parts, caption, device)

    @classmethod
    def load(cls, directory: Path, source: RowSource, device: torch.device) -> IVFIndex:
        """Return the index that `save` wrote to the directory, for the same rows.

        Raises:
            DamagedIndexError: a file is missing, truncated or of another version, or the files do not belong together.
            OSError: the system has no memory or file descriptors left.
        """
        lists_path, arrays_path, centroids_path, caption_path = (Path(directory) / name for name in cls.FILES)
        expected, remedy = "a file written by a build", "rebuild the index"
        content = read_json(caption_path, remedy)
        with report_damage(caption_path, expected, remedy):
            caption = read_record(_Caption, content)
        with report_damage(centroids_path, expected, remedy):
            # Mapped, because they are read only once, when FAISS copies them.
            centroids = map_array(centroids_path)
        with report_damage(arrays_path, expected, remedy), open_regular(arrays_path) as file:
            arrays = read_npz(file)
            tree = ListTree.from_arrays({**arrays, "centroid_LR": centroids})
            basis, outliers = arrays["basis_FR"], arrays["outliers"]
            if basis.dtype != np.float32 or outliers.ndim != 1 or outliers.dtype != np.int64:
                raise ValueError(f"a basis of {basis.dtype}, outliers of {outliers.dtype} {outliers.shape}")
            if (np.diff(outliers, prepend=-1) <= 0).any():
                raise ValueError("the ids of outliers do not increase")
            reduction = Reduction(source.dim, basis if basis.size else None, caption.energy)
        lists = InvertedLists.load(lists_path, (tree.n_lists, reduction.width), caption.params.codes)
        n_bytes, n_centroids, width = lists_path.stat().st_size, *tree.centroid_LR.shape
        got = n_bytes, len(lists), lists.dim, lists.n_lists, int(tree.size_L.sum()), width, caption.rows
        n_listed = len(source) - caption.quiet_rows - len(outliers)
        consistent = caption.lists_bytes, n_listed, reduction.width, n_centroids, n_listed, reduction.width, len(source)
        if got != consistent or not np.array_equal(lists.sizes(), tree.size_L):
            raise DamagedIndexError(
                problem(
                    f"{caption_path} does not belong to {lists_path.name}, {arrays_path.name} and the features",
                    got=f"bytes, rows, dimensions, lists, rows in lists, dimensions, rows {got}",
                    expected=f"{consistent} and equal list sizes",
                    remedy=remedy,
                )
            )
        return cls(source, _Parts(lists, tree, reduction, outliers), caption, device)

    def save(self, directory: Path) -> None:
        """Write the files `FILES` to a directory; the caller renames and fsyncs."""
        lists_path, arrays_path, centroids_path, caption_path = (Path(directory) / name for name in self.FILES)
        parts = self._parts
        parts.lists.save(lists_path)
        basis = parts.reduction.basis_FR
        basis = np.zeros((0, 0), np.float32) if basis is None else basis
        tree = {name: getattr(parts.tree, name) for name in ListTree.__dataclass_fields__}
        with attach_path(centroids_path), centroids_path.open("wb") as file:
            save_array(file, tree.pop("centroid_LR"))
        with attach_path(arrays_path):
            np.savez(arrays_path, basis_FR=basis, outliers=parts.outliers, **tree)
        # The size is stored because FAISS reads a file without its last few bytes and reports no error.
        caption = dataclasses.replace(self._caption, lists_bytes=lists_path.stat().st_size)
        with attach_path(caption_path):
            caption_path.write_text(json.dumps(dataclasses.asdict(caption)) + "\n", encoding="utf-8")

    def find_faults(self, sample: int, seed: int) -> list[str]:
        """Compare the lists with the source and return descriptions of the differences.

        All ids are compared; codes and list numbers are recomputed for at least `sample` rows of random lists.
        """
        parts, found = self._parts, []
        ids, lists = parts.lists.ids()
        everything = np.concatenate([ids, parts.outliers])
        known = np.concatenate([block for block, _ in self._source.blocks(_IDS_AT_ONCE)])
        twice = len(everything) - len(np.unique(everything))
        if twice or not np.isin(everything, known).all() or len(known) - len(everything) != self._caption.quiet_rows:
            found.append(
                f"{len(everything):,} ids ({twice:,} duplicates) and {self._caption.quiet_rows:,} quiet rows do not "
                f"match {len(known):,} stored rows"
            )
            return found
        random = np.random.default_rng(seed)
        assigner = Assigner(parts.tree.group_GR, parts.tree.centroid_LR, parts.tree.parent_L)
        off = moved = seen = 0
        for number in random.permutation(np.unique(lists)):
            if seen >= sample:
                break
            rows = self._source.take(ids[lists == number])
            reduced_BR = parts.reduction.apply(scale_rows(rows, self._caption.shift))
            rounded_BR, step_BR = parts.lists.quantize(reduced_BR)
            # Rounding can move a number to the next code, and a row between two centroids to the other list.
            off += int((np.abs(parts.lists.decode_list(int(number)) - rounded_BR) > 1.01 * step_BR).any(axis=1).sum())
            moved += int((assigner.assign(reduced_BR) != number).sum())
            seen += len(rows)
        if off or moved > _MOVED_SHARE * seen:
            found.append(f"of {seen:,} rows checked, {off:,} have wrong codes and {moved:,} are in wrong lists")
        return found

    def with_settings(self, proponents: Setting, opponents: Setting | None = None) -> IVFIndex:
        """Return an index with the same lists and these settings; without `opponents`, one setting for both."""
        other = IVFIndex(self._source, self._parts, self._caption, self._device)
        other.settings = proponents, opponents or proponents
        return other

    @property
    def source(self) -> RowSource:
        """Return the rows."""
        return self._source

    @property
    def params(self) -> IVFParams:
        """Return the parameters of the lists."""
        return self._caption.params

    @property
    def tree(self) -> ListTree:
        """Return the coarse quantizer."""
        return self._parts.tree

    @property
    def dim(self) -> int:
        """Return F, the length of a row."""
        return self._source.dim

    def __len__(self) -> int:
        """Return N, the number of rows."""
        return self._caption.rows

    @property
    def resident_bytes(self) -> int:
        """Return the bytes that the index uses in memory or mapped, without the features."""
        basis = self._parts.reduction.basis_FR
        rows = len(self._parts.lists) * self._parts.lists.bytes_per_row
        return rows + self.tree.resident_bytes + (0 if basis is None else basis.nbytes) + self._parts.outliers.nbytes

    def measure(self, queries_QF: Float32) -> tuple[Float64, Float64]:
        """Return the norm of each query [Q], and its largest |cosine| with the center of a group [Q].

        The cosines of a zero query are 0.
        """
        reduced_QR, norm_Q = self._parts.reduce(queries_QF)
        cosine_QG = multiply_rows(reduced_QR, self._parts.unit_group_RG)
        return norm_Q, np.abs(cosine_QG).max(axis=1).astype(np.float64)

    def search(self, queries_QF: Float32, k: int, allowed: Int64 | None = None) -> TopK:
        """Return the k rows of largest inner product among the rows that the setting reaches; always min(k, N) rows.

        `rows_scored` counts rows and the centroids of groups and lists.
        """
        directions = [_Direction(1, self.settings[0])]
        return self._search_directions(check_queries(self, queries_QF, k), k, directions, allowed)[0]

    def search_both(self, queries_QF: Float32, k: int, allowed: Int64 | None = None) -> tuple[TopK, TopK]:
        """Return (proponents, opponents), each with its own setting, as two separate searches do.

        Both directions share the reduction of the queries, the scan of outliers, and one reading of the candidates.
        """
        directions = [_Direction(1, self.settings[0]), _Direction(-1, self.settings[1])]
        queries = check_queries(self, queries_QF, k)
        proponents, opponents = self._search_directions(queries, k, directions, allowed)
        return proponents, negate(opponents)

    def will_scan(self, k: int, allowed: Int64 | None = None) -> bool:
        """Return whether a search scans all (allowed) rows, because lists would score as many."""
        n_rows = len(self) if allowed is None else len(allowed)
        return all(self._is_scanned(k, self._adapt(setting, k, n_rows), n_rows) for setting in self.settings)

    def most_rows_read(self, n_queries: int, k: int) -> int:
        """Return the largest number of stored rows that a search in both directions reads: candidates and outliers."""
        return 2 * _count_candidates(k) * n_queries + len(self._parts.outliers)

    def _adapt(self, setting: Setting, k: int, n_rows: int) -> Setting:
        """Return the setting for k results among n_rows allowed rows."""
        setting = setting.scale_for_results(k)
        return setting if n_rows == len(self) else setting.scale_for_share(max(n_rows, 1) / len(self))

    def _is_scanned(self, k: int, setting: Setting, n_rows: int) -> bool:
        """Return whether the lists would score as many rows as a scan of n_rows rows."""
        return max(setting.codes, _count_candidates(k)) >= n_rows

    def _search_directions(
        self, queries_QF: Float32, k: int, directions: Sequence[_Direction], allowed: Int64 | None
    ) -> list[TopK]:
        """Return the k rows of largest sign × inner product for each direction: of lists and outliers, or of a scan."""
        allowed = None if allowed is not None and len(allowed) == len(self) else allowed
        n_rows = len(self) if allowed is None else len(allowed)
        directions = [dataclasses.replace(d, setting=self._adapt(d.setting, k, n_rows)) for d in directions]
        scanned = [d for d in directions if self._is_scanned(k, d.setting, n_rows)]
        listed = [d for d in directions if d not in scanned]
        found = self._scan(queries_QF, k, scanned, allowed) if scanned else {}
        if listed:
            found |= self._search_lists(queries_QF, k, listed, allowed)
        return [found[d.sign] for d in directions]

    def _scan(
        self, queries_QF: Float32, k: int, directions: Sequence[_Direction], allowed: Int64 | None
    ) -> dict[Sign, TopK]:
        """Return the results of an exact scan, by sign of the direction."""
        signs = [d.sign for d in directions]
        scan = FlatIndex(self._source, self._device)
        return dict(zip(signs, scan.search_signs(queries_QF, k, signs, allowed), strict=True))

    def _search_lists(
        self, queries_QF: Float32, k: int, directions: Sequence[_Direction], allowed: Int64 | None
    ) -> dict[Sign, TopK]:
        """Return the results of lists and outliers, by sign of the direction."""
        batches = [
            self._search_batch(queries_QF[at : at + _QUERIES_AT_ONCE], k, directions, allowed)
            for at in range(0, len(queries_QF), _QUERIES_AT_ONCE)
        ]
        found = {d.sign: concatenate([batch[d.sign] for batch in batches]) for d in directions}
        outliers = self._parts.outliers
        if allowed is not None:
            outliers = np.intersect1d(outliers, allowed)
        if len(outliers):
            with _report_unknown_rows():
                scanned = self._scan(queries_QF, k, directions, outliers)
            found = {sign: merge([top, scanned[sign]], k) for sign, top in found.items()}
        return self._complete(found, queries_QF, k, directions, allowed)

    def _search_batch(
        self, queries_QF: Float32, k: int, directions: Sequence[_Direction], allowed: Int64 | None
    ) -> dict[Sign, TopK]:
        """Return the best k of the lists' candidates by their exact scores, by sign of the direction."""
        reduced_QR, _ = self._parts.reduce(queries_QF)
        candidates = [self._find_candidates(d.sign * reduced_QR, k, d.setting, allowed) for d in directions]
        scores = self._rescore(queries_QF, [ids_QM for ids_QM, _ in candidates])
        found: dict[Sign, TopK] = {}
        for direction, (ids_QM, scored_Q), scores_QM in zip(directions, candidates, scores, strict=True):
            check_finite(ids_QM, scores_QM)
            found[direction.sign] = from_padded(ids_QM, direction.sign * scores_QM, k, scored_Q)
        return found

    def _find_candidates(
        self, reduced_QR: Float32, k: int, setting: Setting, allowed: Int64 | None
    ) -> tuple[Int64, Int64]:
        """Return the padded ids [Q, M] with the best coded scores, and the numbers of scored rows and centroids [Q]."""
        parts = self._parts
        n_groups = math.ceil(setting.centroids / parts.tree.centroids_per_group)
        n_lists = math.ceil(_LIST_MARGIN * setting.codes / max(self._mean_size, 1.0))
        probes = parts.tree.probe(reduced_QR, setting.alpha, n_groups, n_lists)
        size_QW = np.where(probes.list_QW >= 0, parts.tree.size_L[probes.list_QW], 0)
        before_QW = size_QW.cumsum(axis=1) - size_QW
        within_QW = (before_QW < setting.codes) & (probes.list_QW >= 0)
        width = max(1, int(within_QW.sum(axis=1).max(initial=1)))
        key_QW = np.where(within_QW, probes.list_QW, -1)[:, :width]
        ids_QM, _ = parts.lists.scan(reduced_QR, _count_candidates(k), key_QW, allowed)
        return ids_QM, (size_QW * within_QW).sum(axis=1) + probes.scored_Q

    @cached_property
    def _mean_size(self) -> float:
        """Return the mean number of rows of the lists with rows."""
        return len(self._parts.lists) / max(1, int((self.tree.size_L > 0).sum()))

    def _rescore(self, queries_QF: Float32, candidates: Sequence[Int64]) -> list[Float32]:
        """Return the inner products [Q, M] of each array of ids [Q, M]; 0 for padding. Each row is read once."""
        ids_QM = np.concatenate(candidates, axis=1)
        scores_QM = np.zeros(ids_QM.shape, np.float32)
        for at in range(0, len(queries_QF), _QUERIES_RESCORED_AT_ONCE):
            part = slice(at, at + _QUERIES_RESCORED_AT_ONCE)
            unique, place = np.unique(ids_QM[part], return_inverse=True)
            n_padding = int(np.searchsorted(unique, 0))
            with _report_unknown_rows():
                row_UF = self._source.take(unique[n_padding:])
            if not len(row_UF):
                continue
            place_QM = (place.reshape(ids_QM[part].shape) - n_padding).clip(0)
            for query_F, place_M, scores_M in zip(queries_QF[part], place_QM, scores_QM[part], strict=True):
                # Not a matrix product: threads cost more than they save, and sums depend on the number of rows.
                np.einsum("mf,f->m", row_UF[place_M], query_F, out=scores_M)
        scores_QM[ids_QM < 0] = 0
        return np.split(scores_QM, np.cumsum([ids.shape[1] for ids in candidates])[:-1], axis=1)

    def _complete(
        self,
        found: dict[Sign, TopK],
        queries_QF: Float32,
        k: int,
        directions: Sequence[_Direction],
        allowed: Int64 | None,
    ) -> dict[Sign, TopK]:
        """Return the results, from an exact scan for queries with too few results or where quiet rows could enter."""
        n_results = min(k, len(self) if allowed is None else len(allowed))
        norm_Q = np.linalg.norm(queries_QF.astype(np.float64), axis=1)
        quiet_Q = norm_Q * self._caption.quiet_norm
        has_quiet = self._caption.quiet_rows > 0
        together: dict[tuple[int, ...], list[_Direction]] = {}
        for direction in directions:
            incomplete = [
                at
                for at, scores in enumerate(found[direction.sign].scores)
                if len(scores) < n_results or norm_Q[at] == 0 or (has_quiet and scores[-1] <= quiet_Q[at])
            ]
            if incomplete:
                together.setdefault(tuple(incomplete), []).append(direction)
        for places, some in together.items():
            exact = self._scan(queries_QF[list(places)], k, some, allowed)
            found = found | {sign: _replace(found[sign], places, top) for sign, top in exact.items()}
        return found


def _replace(top: TopK, places: Sequence[int], exact: TopK) -> TopK:
    """Return the results with those at some places from a scan of these queries; rows_scored are added."""
    ids, scores, counts = list(top.ids), list(top.scores), top.rows_scored.copy()
    for own, at in enumerate(places):
        ids[at], scores[at] = exact.ids[own], exact.scores[own]
        counts[at] += exact.rows_scored[own]
    return TopK(tuple(ids), tuple(scores), counts)


def _count_candidates(k: int) -> int:
    """Return how many candidates are rescored for k results."""
    return max(_LEAST_CANDIDATES, 2 * k)


@contextmanager
def _report_unknown_rows() -> Iterator[None]:
    """Report a row that the source does not have as damage of the lists, which `load` does not check row by row.

    Raises:
        DamagedIndexError: the lists contain such a row; the message has its id.
    """
    try:
        yield
    except KeyError as error:
        raise DamagedIndexError(
            problem(
                f"{IVFIndex.FILES[0]} contains an unknown row",
                got=f"id {error}",
                expected="ids of the stored features",
                remedy="rebuild the index",
            )
        ) from error


def _normalize(vectors: Float32) -> tuple[Float32, Float64]:
    """Return the vectors scaled to norm 1, and their norms; zero vectors stay zero."""
    wide = vectors.astype(np.float64)
    norms = np.linalg.norm(wide, axis=1)
    # A plain quotient takes a third of the time of one with a mask.
    wide /= np.where(norms > 0, norms, 1)[:, None]
    return wide.astype(np.float32), norms
