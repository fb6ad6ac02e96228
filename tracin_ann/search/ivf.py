"""Search by inverted lists: reduced and coded rows in two levels of L2 lists, probed in order of what they may hold.

What the codes find is scored again from the rows themselves. Rows out of all proportion are kept aside and always
scored; rows too small to matter are in no list, and a query whose answer they could enter is scanned.

Shapes: N rows, Q queries, L lists, W lists a query, M candidates, F feature dimension, R reduced dimension, K results.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tracin_ann.errors import DamagedIndexError, attach_path, problem
from tracin_ann.files import map_array, open_plain, read_json, read_npz, read_record, report_damage, save_array
from tracin_ann.search.base import check_queries
from tracin_ann.search.coarse_quantizer import Assigner, ListTree
from tracin_ann.search.construction import UnfinishedLists, fill_lists, scale_rows
from tracin_ann.search.flat import FlatIndex, check_finite
from tracin_ann.search.inverted_lists import InvertedLists
from tracin_ann.search.reduction import Reduction
from tracin_ann.search.settings import IVFParams, Setting, choose_default_setting
from tracin_ann.search.topk import concatenate, from_padded, merge, negate
from tracin_ann.types import Float32, Float64, Int64, RowSource, TopK

_CAPTION = "tracin_ann inverted lists"
_VERSION = 3
_QUERIES_AT_ONCE = 256
_RESCORED_AT_ONCE = 128
_LEAST_CANDIDATES = 40
_IDS_AT_ONCE = 65_536
_MOVED_SHARE = 0.01
_LIST_MARGIN = 3
"""Lists asked of the tree, in those that the budget would fill at their mean size: the best lists are short."""


@dataclass(frozen=True)
class _Caption:
    """What the side file says of the lists: enough to tell a foreign file."""

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
            raise ValueError(f"{self.caption!r} version {self.version}, not {_CAPTION!r} version {_VERSION}")


@dataclass(frozen=True)
class _Parts:
    """What lists are searched with."""

    lists: InvertedLists
    tree: ListTree
    reduction: Reduction
    outliers: Int64


class IVFIndex:
    """Approximate maximum inner product; scores are those of the source's rows.

    Settings are those of `choose_default_setting` unless given: `at` returns the same index with others.
    """

    kind = "ivf"
    FILES = ("ivf.faiss", "ivf.npz", "ivf-centroids.npy", "ivf.json")

    def __init__(self, source: RowSource, parts: _Parts, caption: _Caption, device: torch.device) -> None:
        """Hold filled lists; use `build` or `load` to get them."""
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
        """Return an index of all rows of the source, made as `fill.filled` says.

        Raises:
            UsageError: no rows, or fewer than lists.
            NonFiniteError: a row holds NaN or infinity; names its id.
        """
        made = fill_lists(source, params, scratch, progress)
        measured, reduction = made.measured, made.reduction
        quiet_norm = float(measured.norm_N[measured.quiet_N].max(initial=0.0))
        caption = _Caption(
            len(source), measured.shift, int(measured.quiet_N.sum()), quiet_norm, reduction.energy, params
        )
        parts = _Parts(made.lists, made.tree, reduction, measured.ids_N[measured.outlier_N])
        return cls(source, parts, caption, device)

    @classmethod
    def load(cls, directory: Path, source: RowSource, device: torch.device) -> IVFIndex:
        """Return the index that `save` wrote into the directory, over the same rows.

        Raises:
            DamagedIndexError: a file is missing, cut short, of another version, or not the others'.
            OSError: the system has no memory or files left for it.
        """
        lists_path, arrays_path, centroids_path, caption_path = (Path(directory) / name for name in cls.FILES)
        expected, remedy = "what a build writes", "rebuild the index"
        content = read_json(caption_path, remedy)
        with report_damage(caption_path, expected, remedy):
            caption = read_record(_Caption, content)
        with report_damage(centroids_path, expected, remedy):
            # Mapped: they are read once, when FAISS is given its own copy.
            centroids = map_array(centroids_path)
        with report_damage(arrays_path, expected, remedy), open_plain(arrays_path) as file:
            arrays = read_npz(file)
            tree = ListTree.of({**arrays, "centroid_LR": centroids})
            basis, outliers = arrays["basis_FR"], arrays["outliers"]
            if basis.dtype != np.float32 or outliers.ndim != 1 or outliers.dtype != np.int64:
                raise ValueError(f"a basis of {basis.dtype}, outliers of {outliers.dtype} {outliers.shape}")
            if (np.diff(outliers, prepend=-1) <= 0).any():
                raise ValueError("outliers that do not rise")
            reduction = Reduction(source.dim, basis if basis.size else None, caption.energy)
        lists = InvertedLists.load(lists_path, (tree.n_lists, reduction.width), caption.params.codes)
        n_bytes, n_centroids, width = lists_path.stat().st_size, *tree.centroid_LR.shape
        got = n_bytes, len(lists), lists.dim, lists.n_lists, int(tree.size_L.sum()), width, caption.rows
        n_listed = len(source) - caption.quiet_rows - len(outliers)
        fitting = caption.lists_bytes, n_listed, reduction.width, n_centroids, n_listed, reduction.width, len(source)
        if got != fitting or not np.array_equal(lists.sizes(), tree.size_L):
            raise DamagedIndexError(
                problem(
                    f"{caption_path} does not belong to {lists_path.name}, {arrays_path.name} and the features",
                    got=f"bytes, rows, dimensions, lists, rows in lists, dimensions, rows {got}",
                    expected=f"{fitting} and the lists' sizes",
                    remedy=remedy,
                )
            )
        return cls(source, _Parts(lists, tree, reduction, outliers), caption, device)

    def save(self, directory: Path) -> None:
        """Write the files of `FILES` into a directory; the caller moves and fsyncs."""
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
        # FAISS reads a file that lacks its last few bytes without a word.
        caption = dataclasses.replace(self._caption, lists_bytes=lists_path.stat().st_size)
        with attach_path(caption_path):
            caption_path.write_text(json.dumps(dataclasses.asdict(caption)) + "\n", encoding="utf-8")

    def faults(self, sample: int, seed: int) -> list[str]:
        """Return what of the lists does not fit the source: ids, and the codes and places of some lists' rows."""
        parts, found = self._parts, []
        ids, lists = parts.lists.ids()
        everything = np.concatenate([ids, parts.outliers])
        known = np.concatenate([block for block, _ in self._source.blocks(_IDS_AT_ONCE)])
        twice = len(everything) - len(np.unique(everything))
        if twice or not np.isin(everything, known).all() or len(known) - len(everything) != self._caption.quiet_rows:
            found.append(f"{len(everything):,} rows in lists ({twice:,} twice), {self._caption.quiet_rows:,} in none")
            return found
        random = np.random.default_rng(seed)
        assigner = Assigner(parts.tree.group_GR, parts.tree.centroid_LR, parts.tree.parent_L)
        off = moved = seen = 0
        for number in random.permutation(np.unique(lists)):
            if seen >= sample:
                break
            rows = self._source.take(ids[lists == number])
            reduced_BR = parts.reduction.apply(scale_rows(rows, self._caption.shift))
            given_BR, step_BR = parts.lists.coded(reduced_BR)
            # Rounding may take a number to the next code, and a row between two centroids to the other.
            off += int((np.abs(parts.lists.decoded(int(number)) - given_BR) > 1.01 * step_BR).any(axis=1).sum())
            moved += int((assigner.assign(reduced_BR) != number).sum())
            seen += len(rows)
        if off or moved > _MOVED_SHARE * seen:
            found.append(f"of {seen:,} rows looked at, {off:,} with others' codes and {moved:,} in others' lists")
        return found

    def at(self, proponents: Setting, opponents: Setting | None = None) -> IVFIndex:
        """Return an index over the same lists that is searched otherwise."""
        other = IVFIndex(self._source, self._parts, self._caption, self._device)
        other.settings = proponents, opponents or proponents
        return other

    @property
    def source(self) -> RowSource:
        """Return the rows."""
        return self._source

    @property
    def params(self) -> IVFParams:
        """Return how the lists were built."""
        return self._caption.params

    @property
    def tree(self) -> ListTree:
        """Return the centroids."""
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
        """Return what the index keeps in memory or mapped, features not counted."""
        basis = self._parts.reduction.basis_FR
        rows = len(self._parts.lists) * self._parts.lists.bytes_a_row
        return rows + self.tree.resident_bytes + (0 if basis is None else basis.nbytes) + self._parts.outliers.nbytes

    def nearness(self, queries_QF: Float32) -> Float64:
        """Return each query's largest |cosine| with the centre of a group, [Q]; 0 for a zero query."""
        reduced_QR = self._parts.reduction.apply(_normalize(queries_QF))
        group_GR = _normalize(self.tree.group_GR)
        nearness_Q: Float64 = np.abs(reduced_QR @ group_GR.T).max(axis=1, initial=0.0).astype(np.float64)
        return nearness_Q

    def search(self, queries_QF: Float32, k: int, allowed: Int64 | None = None) -> TopK:
        """Return the k rows of largest inner product among those reached; min(k, N) of them always.

        `rows_scored` counts rows, and the centroids of groups and lists.
        """
        return self._searched(check_queries(self, queries_QF, k), k, self.settings[0], allowed)

    def search_both(self, queries_QF: Float32, k: int, allowed: Int64 | None = None) -> tuple[TopK, TopK]:
        """Return (proponents, opponents), each by its own setting."""
        queries = check_queries(self, queries_QF, k)
        opponents = self._searched(-queries, k, self.settings[1], allowed)
        return self._searched(queries, k, self.settings[0], allowed), negate(opponents)

    def scans(self, k: int, allowed: Int64 | None = None) -> bool:
        """Return whether all rows that may be found are as few as those that the lists would score."""
        n_rows = len(self) if allowed is None else len(allowed)
        return all(self._scans(k, self._for(setting, k, n_rows), n_rows) for setting in self.settings)

    def _for(self, setting: Setting, k: int, n_rows: int) -> Setting:
        setting = setting.holding(k)
        return setting if n_rows == len(self) else setting.widened(max(n_rows, 1) / len(self))

    def _scans(self, k: int, setting: Setting, n_rows: int) -> bool:
        return max(setting.codes, _count_candidates(k)) >= n_rows

    def _searched(self, queries_QF: Float32, k: int, setting: Setting, allowed: Int64 | None) -> TopK:
        allowed = None if allowed is not None and len(allowed) == len(self) else allowed
        n_rows = len(self) if allowed is None else len(allowed)
        setting = self._for(setting, k, n_rows)
        if self._scans(k, setting, n_rows):
            return self._scanned(queries_QF, k, allowed)
        batches = range(0, len(queries_QF), _QUERIES_AT_ONCE)
        found = concatenate(
            [self._batch(queries_QF[at : at + _QUERIES_AT_ONCE], k, setting, allowed) for at in batches]
        )
        outliers = self._parts.outliers if allowed is None else np.intersect1d(self._parts.outliers, allowed)
        if len(outliers):
            with _report_unknown_rows():
                found = merge([found, self._scanned(queries_QF, k, outliers)], k)
        return self._completed(found, queries_QF, k, allowed)

    def _scanned(self, queries_QF: Float32, k: int, allowed: Int64 | None) -> TopK:
        return FlatIndex(self._source, self._device).search(queries_QF, k, allowed)

    def _batch(self, queries_QF: Float32, k: int, setting: Setting, allowed: Int64 | None) -> TopK:
        """Return the best k of what the lists hand on, by the scores of the rows themselves."""
        parts = self._parts
        reduced_QR = parts.reduction.apply(_normalize(queries_QF))
        n_groups = math.ceil(setting.centroids / parts.tree.centroids_a_group)
        mean_size = len(parts.lists) / max(1, int((parts.tree.size_L > 0).sum()))
        n_lists = math.ceil(_LIST_MARGIN * setting.codes / max(mean_size, 1.0))
        probes = parts.tree.probe(reduced_QR, setting.alpha, n_groups, n_lists)
        size_QW = np.where(probes.list_QW >= 0, parts.tree.size_L[probes.list_QW], 0)
        before_QW = size_QW.cumsum(axis=1) - size_QW
        within_QW = (before_QW < setting.codes) & (probes.list_QW >= 0)
        width = max(1, int(within_QW.sum(axis=1).max(initial=1)))
        key_QW = np.where(within_QW, probes.list_QW, -1)[:, :width]
        ids_QM, _ = parts.lists.scan(reduced_QR, _count_candidates(k), key_QW, allowed)
        scored_Q = (size_QW * within_QW).sum(axis=1) + probes.scored_Q
        scores_QM = self._scores(queries_QF, ids_QM)
        check_finite(ids_QM, scores_QM)
        return from_padded(ids_QM, scores_QM, k, scored_Q)

    def _scores(self, queries_QF: Float32, ids_QM: Int64) -> Float32:
        """Return the inner products [Q, M] with the rows of these ids; of padding, 0."""
        scores_QM = np.zeros(ids_QM.shape, np.float32)
        for at in range(0, len(queries_QF), _RESCORED_AT_ONCE):
            part = slice(at, at + _RESCORED_AT_ONCE)
            unique, place = np.unique(ids_QM[part], return_inverse=True)
            n_padding = int(np.searchsorted(unique, 0))
            with _report_unknown_rows():
                rows = torch.from_numpy(self._source.take(unique[n_padding:]))
            if not len(rows):
                continue
            chosen_QMF = rows[torch.from_numpy((place.reshape(ids_QM[part].shape) - n_padding).clip(0))]
            query_QF1 = torch.from_numpy(np.ascontiguousarray(queries_QF[part]))[:, :, None]
            scores_QM[part] = torch.bmm(chosen_QMF, query_QF1)[:, :, 0].numpy()
        scores_QM[ids_QM < 0] = 0
        return scores_QM

    def _completed(self, top: TopK, queries_QF: Float32, k: int, allowed: Int64 | None) -> TopK:
        """Return the answers, scanned anew where lists cannot give them: too few rows, scores like the quiet rows'."""
        wanted = min(k, len(self) if allowed is None else len(allowed))
        norm_Q = np.linalg.norm(queries_QF.astype(np.float64), axis=1)
        quiet_Q = norm_Q * self._caption.quiet_norm
        has_quiet = self._caption.quiet_rows > 0
        short = [
            at
            for at, scores in enumerate(top.scores)
            if len(scores) < wanted or norm_Q[at] == 0 or (has_quiet and scores[-1] <= quiet_Q[at])
        ]
        if not short:
            return top
        exact = self._scanned(queries_QF[short], k, allowed)
        ids, scores, counts = list(top.ids), list(top.scores), top.rows_scored.copy()
        for place, at in enumerate(short):
            ids[at], scores[at] = exact.ids[place], exact.scores[place]
            counts[at] += exact.rows_scored[place]
        return TopK(tuple(ids), tuple(scores), counts)


def _count_candidates(k: int) -> int:
    """Return how many rows the codes hand on for k results."""
    return max(_LEAST_CANDIDATES, 2 * k)


@contextmanager
def _report_unknown_rows() -> Iterator[None]:
    """Take a row that the source does not hold for damage of the lists: they are not read whole when they are opened.

    Raises:
        DamagedIndexError: names the row.
    """
    try:
        yield
    except KeyError as error:
        expected = "rows of the index alone"
        raise DamagedIndexError(
            problem(
                f"{IVFIndex.FILES[0]}: lists of other rows", got=error, expected=expected, remedy="rebuild the index"
            )
        ) from error


def _normalize(vectors: Float32) -> Float32:
    """Return vectors at norm 1, zeros as they are."""
    norms = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    unit: Float32 = np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0, casting="same_kind")
    return unit
