"""Search by inverted lists: rows cut by L2, lists probed by inner product plus their radius, on a row budget.

A list is worth probing for q·c + α·‖q‖·radius(list), an estimate of the best score in it.

Shapes: N rows, Q queries, L lists, W keys a query, F feature dimension, K results.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tracin_ann.errors import DamagedIndexError, UsageError, problem
from tracin_ann.search.base import checked_queries
from tracin_ann.search.cluster import Assigner, centroids_of, stratified_ids, survey
from tracin_ann.search.flat import as_tensor
from tracin_ann.search.lists import InvertedLists
from tracin_ann.search.topk import from_padded, joined
from tracin_ann.types import Float32, Int64, RowSource, TopK

_CAPTION = "tracin_ann inverted lists"
_VERSION = 1
_RADIUS = 1.5
"""A list's radius, in root mean square distances of its rows to its centroid."""
_ROWS_A_LIST = 8
_TRAIN_ROWS_A_LIST = 64
_QUERIES_AT_ONCE = 1024
_BLOCK_ROWS = 8192
_PRODUCTS_AT_ONCE = 2**24
_TIE_SLACK = 1e-6


@dataclass(frozen=True)
class IVFParams:
    """How lists are built and probed.

    Attributes:
        nlist: number of lists; None: about 4·√N, with at least 8 rows a list.
        alpha: weight of the radius in the order of probing.
        scan_fraction: share of the rows that a query may score.
        seed: of the training sample and k-means.
        train_rows: rows k-means learns from; None: 64 a list.
    """

    nlist: int | None = None
    alpha: float = 0.1
    scan_fraction: float = 0.05
    seed: int = 0
    train_rows: int | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be built or probed.

        Raises:
            UsageError: a field out of its range.
        """
        for name, value, fine, expected in (
            ("nlist", self.nlist, self.nlist is None or self.nlist >= 1, "at least 1"),
            ("alpha", self.alpha, 0 <= self.alpha < math.inf, "0 or more"),
            ("scan_fraction", self.scan_fraction, 0 < self.scan_fraction <= 1, "over 0, at most 1"),
            ("seed", self.seed, self.seed >= 0, "0 or more"),
            ("train_rows", self.train_rows, self.train_rows is None or self.train_rows >= 1, "at least 1"),
        ):
            if not fine:
                raise UsageError(problem(f"bad {name}", got=value, expected=expected, remedy=f"change {name}"))

    def lists_for(self, n_rows: int) -> int:
        """Return the number of lists for N rows.

        Raises:
            UsageError: there are no rows, or fewer rows (or training rows) than lists.
        """
        nlist = self.nlist or max(1, min(round(4 * math.sqrt(n_rows)), n_rows // _ROWS_A_LIST))
        learnt_from = min(n_rows, self.train_rows or n_rows)
        if learnt_from < nlist:
            raise UsageError(
                problem(
                    "too few rows for the lists",
                    got=f"{learnt_from} rows to train on",
                    expected=f"at least nlist = {nlist}",
                    remedy="use a flat index, fewer lists or more train_rows",
                )
            )
        return nlist


@dataclass(frozen=True)
class _Caption:
    """What the side file says of the lists: enough to probe them and to tell a foreign file."""

    rows: int
    dim: int
    shift: int
    params: IVFParams
    radius_L: tuple[float, ...]
    caption: str = _CAPTION
    version: int = _VERSION

    def __post_init__(self) -> None:
        if (self.caption, self.version) != (_CAPTION, _VERSION):
            raise ValueError(f"{self.caption!r} version {self.version}, not {_CAPTION!r} version {_VERSION}")

    @classmethod
    def parse(cls, text: str) -> _Caption:
        fields = json.loads(text)
        return cls(**(fields | {"params": IVFParams(**fields["params"]), "radius_L": tuple(fields["radius_L"])}))


class IVFIndex:
    """Approximate maximum inner product over L2 lists of half-precision rows.

    Scores are inner products with rows rounded to half precision (relative error about 2^-11 an entry).
    """

    kind = "ivf"
    FILES = ("ivf.faiss", "ivf.json")

    def __init__(self, lists: InvertedLists, caption: _Caption, device: torch.device) -> None:
        """Hold filled lists; use `build` or `load` to get them."""
        self._lists = lists
        self._caption = caption
        self._device = device
        self._centroids_LF = as_tensor(lists.centroids_LF()).to(device)
        self._sizes_L = as_tensor(lists.sizes_L()).to(device)
        self._radius_L = torch.tensor(caption.radius_L, dtype=torch.float32, device=device)

    @classmethod
    def build(cls, source: RowSource, params: IVFParams, device: torch.device) -> IVFIndex:
        """Return an index of all rows of the source; reads it twice, and the training sample once.

        Raises:
            UsageError: no rows, or fewer than lists.
            NonFiniteError: a row holds NaN or infinity; names its id.
        """
        n_lists = params.lists_for(len(source))
        measured = survey(source, _BLOCK_ROWS)
        sample_ids = stratified_ids(measured, params.train_rows or _TRAIN_ROWS_A_LIST * n_lists, params.seed)
        sample = np.ldexp(source.take(sample_ids), measured.shift)
        centroids_LF = centroids_of(sample, n_lists, params.seed, device)
        del sample
        lists, assigner = InvertedLists.empty(centroids_LF, device), Assigner(centroids_LF, device)
        for ids_B, rows_BF in source.blocks(max(1, min(_BLOCK_ROWS, _PRODUCTS_AT_ONCE // n_lists))):
            scaled_BF = np.ldexp(rows_BF, measured.shift)
            lists.add(scaled_BF, assigner.assign(scaled_BF), ids_B)
        radius_L = tuple((_RADIUS * assigner.rms_distance_L()).tolist())
        return cls(lists, _Caption(len(source), source.dim, measured.shift, params, radius_L), device)

    @classmethod
    def load(cls, directory: Path, device: torch.device) -> IVFIndex:
        """Return the index that `save` wrote into the directory.

        Raises:
            DamagedIndexError: a file is missing, cut short, of another version, or not the other's.
        """
        lists_path, caption_path = (Path(directory) / name for name in cls.FILES)
        try:
            caption = _Caption.parse(caption_path.read_text(encoding="utf-8"))
        except (OSError, ValueError, TypeError, KeyError, UsageError) as error:
            raise DamagedIndexError(
                problem(f"cannot open {caption_path}", got=error, expected="a caption", remedy="rebuild the index")
            ) from error
        lists = InvertedLists.load(lists_path, device)
        got, expected = (len(lists), lists.dim, lists.filler), (caption.rows, caption.dim, len(caption.radius_L))
        if got != expected:
            raise DamagedIndexError(
                problem(
                    f"{lists_path} is not the file that {caption_path.name} speaks of",
                    got=f"(rows, dimension, lists) {got}",
                    expected=expected,
                    remedy="rebuild the index",
                )
            )
        return cls(lists, caption, device)

    def save(self, directory: Path) -> None:
        """Write `FILES` into an existing directory, to these very paths; the caller moves and fsyncs.

        Never into the directory it was loaded from: the file there is mapped.
        """
        lists_path, caption_path = (Path(directory) / name for name in self.FILES)
        self._lists.save(lists_path)
        caption_path.write_text(json.dumps(dataclasses.asdict(self._caption)) + "\n", encoding="utf-8")

    def probing(self, *, alpha: float | None = None, scan_fraction: float | None = None) -> IVFIndex:
        """Return an index over the same lists that probes them otherwise."""
        old = self.params
        params = dataclasses.replace(
            old,
            alpha=old.alpha if alpha is None else alpha,
            scan_fraction=old.scan_fraction if scan_fraction is None else scan_fraction,
        )
        return IVFIndex(self._lists, dataclasses.replace(self._caption, params=params), self._device)

    @property
    def params(self) -> IVFParams:
        """Return how the lists were built and are probed."""
        return self._caption.params

    @property
    def dim(self) -> int:
        """Return F, the length of a row."""
        return self._caption.dim

    def __len__(self) -> int:
        """Return N, the number of rows."""
        return self._caption.rows

    def search(self, queries_QF: Float32, k: int) -> TopK:
        """Return the k rows of largest inner product among the lists probed; min(k, N) of them always.

        `rows_scored` counts the rows of the probed lists and the centroids of all.
        """
        queries = checked_queries(self, queries_QF, k)
        k = min(k, len(self))
        batches = range(0, len(queries), _QUERIES_AT_ONCE)
        return joined([self._search_batch(queries[at : at + _QUERIES_AT_ONCE], k) for at in batches])

    def _search_batch(self, queries_QF: Float32, k: int) -> TopK:
        keys_QW, coarse_QW, rows_scored = self._plan(queries_QF, k)
        ids_QM, scores_QM = self._lists.scan(queries_QF, min(k + 1, len(self)), keys_QW, coarse_QW)
        top = from_padded(ids_QM, np.ldexp(scores_QM, -self._caption.shift), k, rows_scored)
        if k == len(self):
            return top
        ids, scores = list(top.ids), list(top.scores)
        for at in np.flatnonzero((ids_QM[:, k] >= 0) & (scores_QM[:, k] == scores_QM[:, k - 1])):
            edge = float(scores_QM[at, k])
            floor = float(np.nextafter(np.float32(edge - _TIE_SLACK * abs(edge)), np.float32(-np.inf)))
            tied_ids, tied = self._lists.scan_above(queries_QF[at], floor, keys_QW[at], coarse_QW[at])
            settled = from_padded(tied_ids[None], np.ldexp(tied, -self._caption.shift)[None], k, rows_scored[[at]])
            ids[at], scores[at] = settled.ids[0], settled.scores[0]
        return TopK(tuple(ids), tuple(scores), rows_scored)

    def _plan(self, queries_QF: Float32, k: int) -> tuple[Int64, Float32, Int64]:
        """Return (keys [Q, W], q·c beside them, rows scored [Q]): which lists each query probes.

        Lists are taken in falling order of q·c + α·‖q‖·radius while their rows fit the budget, the first
        always, and past the budget while fewer than k rows are reached. The rest of the keys name the filler.
        """
        queries = as_tensor(queries_QF).to(self._device)
        coarse_QL = queries @ self._centroids_LF.T
        worth_QL = coarse_QL + self.params.alpha * queries.norm(dim=1, keepdim=True) * self._radius_L
        order_QL = worth_QL.masked_fill(self._sizes_L == 0, -math.inf).argsort(dim=1, descending=True, stable=True)
        size_QL = self._sizes_L[order_QL]
        reached_QL = size_QL.cumsum(dim=1)
        budget = self.params.scan_fraction * len(self)
        probe_QL = (size_QL > 0) & ((reached_QL <= budget) | (reached_QL - size_QL < k))
        width = int(probe_QL.sum(dim=1).max())
        keys_QW = order_QL.masked_fill(~probe_QL, self._lists.filler)[:, :width].cpu().numpy()
        coarse_QW = coarse_QL.gather(1, order_QL[:, :width]).cpu().numpy()
        rows_scored = (size_QL * probe_QL).sum(dim=1) + len(self._sizes_L)
        return keys_QW, coarse_QW, rows_scored.cpu().numpy()
